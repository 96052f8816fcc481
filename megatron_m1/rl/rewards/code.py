"""Code reward: hidden tests in the sandbox. The expected results never enter it."""

import json
import time
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from megatron_m1.rl.rewards.extract import after_thinking
from megatron_m1.rl.rewards.protocol import RewardRequest, Score
from megatron_m1.rl.rewards.sandbox import Sandbox, SandboxError, SandboxLimits

__all__ = ["CodeReward", "last_code_block"]

BUDGET_SHARE = 0.8
"""Of the pool's time for a sample, what all its tests together may take; the rest is for ending the sandbox."""
FENCE, LANGUAGES = "```", ("", "python", "py", "python3")


class CodeReward:
    """1 if the last code block after the thinking part passes all of task["tests"], else 0.

    A test is {"stdin": text, "stdout": text} (compared line by line, without trailing white space) or {"function": name,
    "arguments": [...], "expected": value} (compared as JSON values, so tuples are lists). Each runs in a sandbox of its
    own that holds the program and this one input; results are compared out here, where the program cannot read or change
    them. The first test that fails ends the run, and so does BUDGET_SHARE of the pool's time: a program that is too slow for
    its tests fails them. limits: see SandboxLimits, per test; a wall_s among them must be below that share.
    Raises SandboxUnavailable when made on a machine without a sandbox. A run that the sandbox fails is a reward_error.
    """

    def __init__(self, *, limits: Mapping[str, float] | None = None, python: str | None = None) -> None:
        known = {field.name: field.type for field in fields(SandboxLimits)}
        unknown = set(limits or {}) - set(known)
        if unknown:
            raise ValueError(f"limits={sorted(unknown)} must be among {sorted(known)}.")
        self.least_timeout_s = (limits or {}).get("wall_s", 0.0) / BUDGET_SHARE
        self.sandbox = Sandbox(SandboxLimits(**(limits or {})), python=python)  # type: ignore[arg-type]

    def __call__(self, request: RewardRequest) -> Score:
        """The verdict; parts: whether there was code, the share of tests passed before the first that failed, whether time ran out."""
        until = time.monotonic() + BUDGET_SHARE * request.timeout_s
        tests = request.task["tests"]
        if not tests:
            raise ValueError("a code task needs at least one test")
        text = after_thinking(request.response)
        source = None if text is None else last_code_block(text)
        if source is None:
            return Score(0.0, {"code": 0.0, "passed_share": 0.0, "out_of_time": 0.0})
        passed = 0
        for test in tests:
            try:
                if not self._passes(source, test, wall_s=max(until - time.monotonic(), 0.0)):
                    break
            except SandboxError:
                # The sandbox works, but was given too little time to start.
                if passed == 0 or time.monotonic() < until:
                    raise
                break
            passed += 1
        parts = {"passed_share": passed / len(tests), "out_of_time": float(time.monotonic() >= until)}
        return Score(float(passed == len(tests)), {"code": 1.0, **parts})

    def _passes(self, source: str, test: Mapping[str, Any], *, wall_s: float) -> bool:
        function = test.get("function")
        stdin = test["stdin"] if function is None else json.dumps(test["arguments"])
        outcome = self.sandbox.run(source, stdin=stdin.encode(), function=function, wall_s=wall_s)
        if outcome.ended != "exit" or outcome.exit_code != 0:
            return False
        if function is None:
            return _lines(outcome.stdout.decode(errors="replace")) == _lines(test["stdout"])
        try:
            return _same(json.loads(outcome.stdout), json.loads(json.dumps(test["expected"])))
        except (ValueError, RecursionError):
            return False


def last_code_block(text: str) -> str | None:
    """Content of the last whole ``` block that is Python or names no language; None without one. Linear in the text."""
    found: str | None = None
    language: str | None = None
    lines: list[str] = []
    for line in text.split("\n"):
        if language is None and line.startswith(FENCE):
            language, lines = line[len(FENCE) :].strip().lower(), []
        elif language is not None and line.rstrip() == FENCE:
            found = "\n".join([*lines, ""]) if language in LANGUAGES else found
            language = None
        else:
            lines.append(line)
    return found


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().splitlines()]


def _same(a: Any, b: Any) -> bool:
    """Equal JSON values; unlike Python's ==, true is not 1."""
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    return isinstance(a, bool) == isinstance(b, bool) and a == b
