"""A reward worker process: `python -m megatron_m1.rl.rewards.worker`, one JSON line in, one JSON line out.

First line in: {"rewards": {name: {"target", "options"}}, "memory_bytes", "timeout_s"}; out: {"ready": true} or {"failed": why}.
Then per request {"reward", "prompt", "response", "task", "timeout_s"}; out: {"value", "parts"} or {"error": why}.
Nothing else reaches the pool: standard output of the rewards goes to standard error.
"""

import json
import math
import os
import resource
import sys
from typing import IO, Any

from megatron_m1.rl.rewards.load import load_reward
from megatron_m1.rl.rewards.protocol import Reward, RewardRequest, Score

__all__ = ["main"]


def main() -> int:
    """Serve until standard input ends. Returns 0."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    setup = json.loads(sys.stdin.readline())
    try:
        rewards = {
            name: load_reward(name, **spec, timeout_s=setup["timeout_s"]) for name, spec in setup["rewards"].items()
        }
    except Exception as error:
        _answer(answers, {"failed": str(error)[:2000]})
        return 0
    # Only the soft limit: a sandbox started from here sets its own.
    resource.setrlimit(resource.RLIMIT_AS, (setup["memory_bytes"], resource.getrlimit(resource.RLIMIT_AS)[1]))
    _answer(answers, {"ready": True})
    for line in sys.stdin:
        _answer(answers, _judge(rewards, json.loads(line)))
    return 0


def _judge(rewards: dict[str, Reward], message: dict[str, Any]) -> dict[str, Any]:
    # If the trainer is killed, nobody is left to kill a worker that never ends: the kernel does, by CPU time.
    usage = resource.getrusage(resource.RUSAGE_SELF)
    limit = math.ceil(usage.ru_utime + usage.ru_stime + 2 * message["timeout_s"]) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.getrlimit(resource.RLIMIT_CPU)[1]))
    try:
        request = RewardRequest(**message)
        score = rewards[request.reward](request)
        if not isinstance(score, Score):
            raise TypeError(f"the reward returned {type(score).__name__}, not a Score")
        if not math.isfinite(score.value):
            raise ValueError(f"the reward is {score.value}")
        return {"value": float(score.value), "parts": {name: float(part) for name, part in score.parts.items()}}
    except Exception as error:
        return {"error": _said(error)}


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:2000]


def _answer(answers: IO[str], message: dict[str, Any]) -> None:
    answers.write(json.dumps(message) + "\n")
    answers.flush()


if __name__ == "__main__":
    sys.exit(main())
