"""Rewards that misbehave, for the tests of the pool."""

import math
import os
import subprocess
import sys
import time
from dataclasses import replace

from megatron_m1.rl.rewards.code import CodeReward
from megatron_m1.rl.rewards.protocol import RewardRequest, Score


class Misbehaving:
    """Does what the response says. slow: a file; while it exists, making one takes two seconds."""

    def __init__(self, *, base: float = 0.0, slow: str | None = None) -> None:
        self.base = base
        if slow is not None and os.path.exists(slow):
            time.sleep(2.0)

    def __call__(self, request: RewardRequest) -> Score:
        match request.response:
            case "hang":
                while True:
                    pass
            case "bignum":  # holds the interpreter: no signal handler or thread would run
                return Score(float(len(str((10**10) ** 10**10))))
            case "sleep":
                time.sleep(100)
            case "nap":
                time.sleep(0.2)
            case "time":
                return Score(request.timeout_s)
            case "number":
                return 1.0  # type: ignore[return-value]
            case "raise":
                raise RuntimeError("verifier bug")
            case "die":
                os._exit(7)
            case "memory":
                return Score(float(len(bytearray(8 << 30))))
            case "print":
                print("noise on standard output")
                os.write(1, b"{}\n")
            case "child":
                child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
                with open(request.task["pid_file"], "w") as file:
                    file.write(str(child.pid))
                time.sleep(100)
            case "nan":
                return Score(float("nan"))
            case "pid":
                return Score(float(os.getpid()))
        return Score(self.base + request.task.get("value", 0), {"length": len(request.response)})


class Unmakeable:
    def __init__(self) -> None:
        raise ValueError("no data")


class NoReward:
    """Nothing to call."""


class Patient(Misbehaving):
    """May need two seconds."""

    least_timeout_s = 2.0


class PatientWithCode(CodeReward):
    """Knows no budget: the pool has to end it."""

    def __call__(self, request: RewardRequest) -> Score:
        return super().__call__(replace(request, timeout_s=math.inf))
