"""What a reward is, what it is given, what comes back."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

__all__ = ["Reward", "RewardRequest", "RewardResult", "RewardSpec", "Score"]


@dataclass(frozen=True)
class RewardRequest:
    """One sample to be judged. task: JSON values that the reward named `reward` understands (answer, tests, ...).

    timeout_s: what the pool gives for it, after which the worker is killed; the pool fills it in.
    """

    reward: str
    prompt: str
    response: str
    task: Mapping[str, Any] = field(default_factory=dict)
    timeout_s: float = math.inf


@dataclass(frozen=True)
class Score:
    """A verdict: the reward and what it is made of, for the log."""

    value: float
    parts: Mapping[str, float] = field(default_factory=dict)


class Reward(Protocol):
    """A plug-in. It is made once per worker process, from JSON options, and called in that process only.

    It returns a Score for whatever the response holds: a wrong, malformed or hostile response is a verdict. What it cannot
    judge (bad task data, no sandbox) it raises; the sample then gets a `reward_error`, never a 0.
    A killed worker is a reward_error too, so a reward whose work the response can draw out ends that work itself, within
    request.timeout_s. One that has a `least_timeout_s` attribute is refused by a pool whose timeout is not above it.
    """

    def __call__(self, request: RewardRequest) -> Score:
        """The verdict."""
        ...


@dataclass(frozen=True)
class RewardSpec:
    """Where a reward is found: `target` is `module:Class`, called with the JSON `options` as keywords."""

    target: str
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class RewardResult:
    """score is None exactly when reward_error says why there is none. wall_s: time in the worker or until it was killed."""

    score: Score | None
    reward_error: str | None
    wall_s: float

    @property
    def value(self) -> float:
        """The reward. Raises ValueError where there is a reward_error: there is no number to train on."""
        if self.score is None:
            raise ValueError(f"reward_error: {self.reward_error}")
        return self.score.value
