"""Math reward: the last box after the thinking part against a reference, compared by math-verify."""

import logging

from math_verify import LatexExtractionConfig, parse, verify

from megatron_m1.rl.rewards.extract import after_thinking, last_boxed
from megatron_m1.rl.rewards.protocol import RewardRequest, Score

__all__ = ["MathReward"]


class MathReward:
    """1 if the response's final box equals task["answer"] (LaTeX or plain, without a box), else 0.

    math-verify (0.9.0) is given our box alone, as LaTeX without a fallback: left to search, it merges boxes into a set and
    takes the last number of a sentence.
    Its own time limits are alarms, off here: the worker is killed instead. A box longer than max_chars is wrong.
    A box that cannot be parsed is wrong; a reference that cannot be, or a comparison that fails, is an error.
    """

    def __init__(self, *, max_chars: int = 1000) -> None:
        self.max_chars = max_chars
        # It warns at every call that its own time limits are off.
        logging.getLogger("math_verify").setLevel(logging.ERROR)

    def __call__(self, request: RewardRequest) -> Score:
        """The verdict; parts: whether there was a box, whether it parsed."""
        gold = _parse(str(request.task["answer"]), strict=True)
        if not gold:
            raise ValueError(f"the reference answer {request.task['answer']!r} cannot be parsed")
        answer = after_thinking(request.response)
        box = None if answer is None else last_boxed(answer)
        if not box or len(box) > self.max_chars:
            return Score(0.0, {"boxed": float(bool(box)), "parsed": 0.0})
        parsed = _parse(box, strict=False)
        right = bool(parsed) and verify(gold, parsed, timeout_seconds=None, raise_on_error=True)
        return Score(float(right), {"boxed": 1.0, "parsed": float(bool(parsed))})


def _parse(answer: str, *, strict: bool) -> list:
    return parse(
        rf"\boxed{{{answer}}}",
        [LatexExtractionConfig()],
        fallback_mode="no_fallback",
        parsing_timeout=None,
        raise_on_error=strict,
    )
