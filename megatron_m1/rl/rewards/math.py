"""Math reward: the last box after the thinking part against a reference, compared by math-verify."""

import logging
import re
from collections.abc import Iterator

from math_verify import LatexExtractionConfig, parse, verify
from sympy import Basic, Eq, FiniteSet, Float
from sympy.core.function import AppliedUndef
from sympy.core.relational import Relational

from megatron_m1.rl.rewards.extract import after_thinking, last_boxed
from megatron_m1.rl.rewards.limited import limited
from megatron_m1.rl.rewards.protocol import RewardRequest, Score

__all__ = ["MathReward"]

COMPARE_S = 4.0
SAID_SHARE = 0.02
"""How far a decimal in a chain of equations may be from what it stands for: people round."""
CLOSED_BY = {"(": ")", "[": "]", "{": "}"}
EQUALS = re.compile(r"(?<![<>!:\\])=")


class MathReward:
    """1 if the response's final box equals task["answer"] (LaTeX or plain, without a box), else 0.

    math-verify (0.9.0) is given our box alone, as LaTeX without a fallback: left to search, it merges boxes into a set and
    takes the last number of a sentence. It takes (1, 2) for {1, 2}, {1, 2} for 1 < x < 2 and `5 = 4` for 4: brackets of
    another kind, lists for inequalities and equations between numbers that differ are refused here.
    A box can ask for any amount of work (towers of powers), and math-verify's own time limits are alarms, which big integers
    ignore: it is parsed and compared in a forked process. A box longer than max_chars, that cannot be parsed, or that takes
    longer than compare_s (by default 4 s, or half of the pool's time if that is less) is wrong; a reference that
    cannot be parsed, or a comparison that fails, is an error.
    """

    def __init__(self, *, max_chars: int = 1000, compare_s: float | None = None) -> None:
        self.max_chars = max_chars
        self.compare_s = compare_s
        self.least_timeout_s = compare_s or 0.0
        # It warns at every call that its own time limits are off.
        logging.getLogger("math_verify").setLevel(logging.ERROR)
        # What sympy imports at the first comparison of each kind would be imported in every forked process.
        for kinds in (("f(x)=1", "f(x)=2"), (r"\{1,x\}", r"\{2,x\}"), ("(1,2)", "[1,3]"), (r"\sqrt{2}x", "x^2+1")):
            gold, said = (_parse(kind, strict=False) for kind in kinds)
            verify(gold, said, timeout_seconds=None)

    def __call__(self, request: RewardRequest) -> Score:
        """The verdict; parts: whether there was a box, whether it parsed, whether that and the comparison ended in time."""
        reference = str(request.task["answer"])
        gold = _parse(reference, strict=True)
        if not gold:
            raise ValueError(f"the reference answer {reference!r} cannot be parsed")
        answer = after_thinking(request.response)
        box = None if answer is None else last_boxed(answer)
        if not box or len(box) > self.max_chars:
            return Score(0.0, {"boxed": float(bool(box)), "parsed": 0.0, "compared": 0.0})
        seconds = self.compare_s or min(COMPARE_S, request.timeout_s / 2)
        found = limited(lambda: _compared(reference, gold, box), seconds=seconds)
        parsed, right = found or (False, False)
        return Score(float(right), {"boxed": 1.0, "parsed": float(parsed), "compared": float(found is not None)})


def _compared(reference: str, gold: list, box: str) -> tuple[bool, bool]:
    """(the box can be parsed, it is right)"""
    said = _parse(box, strict=False)
    brackets = {_bracket(reference), _bracket(box)} - {None}
    if not said or len(brackets) == 2 or (_inequality(gold[0]) and isinstance(said[0], FiniteSet)):
        return bool(said), False
    right = verify(gold, said, timeout_seconds=None, raise_on_error=True)
    return True, right and all(_agree(a, b) for a, b in _equations(box, said))


def _bracket(answer: str) -> str | None:
    """The kind of bracket that all of an answer, or what follows its last `=` or \\in, stands in; None without one."""
    text = re.sub(r"\\left|\\right|\\[,;! ]|\s|\$", "", EQUALS.split(re.sub(r"\\in(?![a-z])", "=", answer))[-1])
    text = (
        text.replace(r"\lbrace", r"\{").replace(r"\rbrace", r"\}").replace(r"\{", "{").replace(r"\}", "}").rstrip(".")
    )
    if not text or "," not in text or text[0] not in CLOSED_BY or text[-1] != CLOSED_BY[text[0]]:
        return None
    depth = 0
    for at, letter in enumerate(text):
        depth += (letter in "([{") - (letter in ")]}")
        if depth == 0:
            return text[0] if at == len(text) - 1 else None
    return None


def _inequality(expression: object) -> bool:
    return isinstance(expression, Basic) and any(not isinstance(r, Eq) for r in expression.atoms(Relational))


def _equations(box: str, said: list) -> Iterator[tuple[Basic, Basic]]:
    """Both sides of every equation in the box."""
    for expression in said:
        if isinstance(expression, Basic):
            yield from (equation.args for equation in expression.atoms(Eq))
    # Of a chain that it cannot parse, math-verify takes the last part.
    parts = EQUALS.split(box)
    if len(parts) > 2 and not re.search("[,;]", box):
        sides = [side[0] if (side := _parse(part, strict=False)) else None for part in parts]
        yield from ((a, sides[-1]) for a in sides[:-1] if isinstance(a, Basic) and isinstance(sides[-1], Basic))


def _agree(a: Basic, b: Basic) -> bool:
    """False for two numbers that differ; decimals stand for what is near."""
    if any(side.free_symbols or side.atoms(AppliedUndef) for side in (a, b)):
        return True
    if verify(a, b, timeout_seconds=None) or verify(b, a, timeout_seconds=None):
        return True
    try:
        return bool(a.atoms(Float) | b.atoms(Float)) and abs(complex(a) - complex(b)) <= SAID_SHARE * abs(complex(b))
    except TypeError:
        return False


def _parse(answer: str, *, strict: bool) -> list:
    return parse(
        rf"\boxed{{{answer}}}",
        [LatexExtractionConfig()],
        fallback_mode="no_fallback",
        parsing_timeout=None,
        raise_on_error=strict,
    )
