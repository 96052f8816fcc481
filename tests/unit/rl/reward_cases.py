"""Rewards that misbehave, for the tests of the pool."""

import os
import subprocess
import sys
import time

from megatron_m1.rl.rewards.protocol import RewardRequest, Score


class Misbehaving:
    """Does what the response says."""

    def __init__(self, *, base: float = 0.0) -> None:
        self.base = base

    def __call__(self, request: RewardRequest) -> Score:
        match request.response:
            case "hang":
                while True:
                    pass
            case "bignum":  # holds the interpreter: no signal handler or thread would run
                return Score(float(len(str((10**10) ** 10**10))))
            case "sleep":
                time.sleep(100)
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
