"""A reward made of others: their product, or their sum with weights."""

import math
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from megatron_m1.rl.rewards.load import load_reward
from megatron_m1.rl.rewards.protocol import RewardRequest, Score

__all__ = ["CombinedReward"]


class CombinedReward:
    """The product of its parts, so that an answer counts only in the right form (M1 rewards both); with weights, their sum.

    parts: name -> {"target", "options"}.  weights: of every part by name. An error in one part is an error of the whole.
    """

    def __init__(self, *, parts: Mapping[str, Mapping[str, Any]], weights: Mapping[str, float] | None = None) -> None:
        self.parts = {name: load_reward(name, **spec) for name, spec in parts.items()}
        self.weights = weights
        self.least_timeout_s = math.fsum(getattr(part, "least_timeout_s", 0.0) for part in self.parts.values())

    def __call__(self, request: RewardRequest) -> Score:
        """The verdict; parts: what each part gave, and under name/... what that was made of. What one leaves of the time the next has."""
        until = time.monotonic() + request.timeout_s
        values, parts = {}, {}
        for name, reward in self.parts.items():
            score = reward(replace(request, reward=name, timeout_s=max(until - time.monotonic(), 0.0)))
            values[name] = parts[name] = score.value
            parts |= {f"{name}/{part}": value for part, value in score.parts.items()}
        if self.weights is None:
            return Score(math.prod(values.values()), parts)
        return Score(math.fsum(self.weights[name] * value for name, value in values.items()), parts)
