"""Format reward: thinking in one pair of tags, then an answer."""

from typing import Literal

from megatron_m1.rl.rewards.extract import CLOSE, OPEN, last_boxed, last_tagged
from megatron_m1.rl.rewards.protocol import RewardRequest, Score

__all__ = ["FormatReward"]


class FormatReward:
    """1 for a response that is `<think>...</think>` and then a non-empty answer, else 0.

    prefilled: the prompt ended with <think>, so the response starts inside it.
    answer: what the answer must hold: anything, a whole box, or a whole <answer> tag.
    """

    def __init__(self, *, prefilled: bool = False, answer: Literal["text", "boxed", "tag"] = "text") -> None:
        if answer not in ("text", "boxed", "tag"):
            raise ValueError(f"answer={answer} must be text, boxed or tag.")
        self.prefilled = prefilled
        self.answer = answer

    def __call__(self, request: RewardRequest) -> Score:
        """The verdict; the task is not read."""
        response = OPEN + request.response if self.prefilled else request.response.lstrip()
        thought, _, answer = response.partition(CLOSE)
        tags = response.startswith(OPEN) and response.count(OPEN) == 1 and response.count(CLOSE) == 1
        held = {"text": answer.strip(), "boxed": last_boxed(answer), "tag": last_tagged(answer, "answer")}[self.answer]
        thinking = tags and bool(thought.removeprefix(OPEN).strip())
        return Score(float(thinking and bool(held)), {"thinking": float(thinking), "answer": float(bool(held))})
