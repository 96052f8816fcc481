"""What the RL stage changes while it runs: the output window, the mix of tasks, which prompts are worth sampling."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_m1.config.errors import ConfigError
from megatron_m1.config.schema import CurriculumPoint, WindowStage

__all__ = ["PassRates", "WindowController", "curriculum_weights", "length_quantile"]


def length_quantile(lengths: Iterable[int], q: float) -> int:
    """The smallest length that at least a share q of the lengths do not exceed (nearest rank; no interpolation)."""
    ordered = sorted(lengths)
    if not ordered:
        raise ValueError("No lengths.")
    return ordered[max(math.ceil(q * len(ordered)) - 1, 0)]


@dataclass
class WindowController:
    """Moves the output window on when M1's two signals agree (report, section 5): 40K, 48K, 56K, 64K, 72K, 80K.

    stages: rising windows, at least one.
    1. The perplexity of generations has converged: the means of the older and the newer half of the last `patience` steps
       in this window differ by at most `tolerance` of the older one.
    2. The 99th percentile of generation lengths is near the window: at least `near_share` of it, in each of these steps.
    The report gives the signals without numbers; the numbers are ours. The history starts anew in every window.
    """

    stages: Sequence[WindowStage]
    patience: int = 20
    tolerance: float = 0.01
    near_share: float = 0.95
    index: int = 0
    perplexities: list[float] = field(default_factory=list)
    near: list[bool] = field(default_factory=list)

    @property
    def stage(self) -> WindowStage:
        """The stage in force."""
        return self.stages[self.index]

    def update(self, *, perplexity: float, p99_length: int) -> bool:
        """Take one step's signals (exp of minus the mean log-probability of generated tokens; `length_quantile` at 0.99).

        True if the window moved; `stage` is then the new one. Raises ValueError for a perplexity that is not finite.
        """
        if not math.isfinite(perplexity):
            raise ValueError(f"perplexity={perplexity} is not finite.")
        self.perplexities = [*self.perplexities, perplexity][-self.patience :]
        self.near = [*self.near, p99_length >= self.near_share * self.stage.max_new_tokens][-self.patience :]
        if self.index + 1 == len(self.stages) or not (self.converged() and all(self.near)):
            return False
        self.index += 1
        self.perplexities, self.near = [], []
        return True

    def converged(self) -> bool:
        """Signal 1 alone."""
        if len(self.perplexities) < self.patience:
            return False
        half = self.patience // 2
        older = math.fsum(self.perplexities[:half]) / half
        newer = math.fsum(self.perplexities[-half:]) / half
        return abs(newer - older) <= self.tolerance * older

    def state(self) -> dict[str, Any]:
        """JSON values that `load` takes; with them a resumed run moves its windows at the same steps."""
        return {
            "window": self.stage.max_new_tokens,
            "perplexities": list(self.perplexities),
            "near": list(self.near),
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Continue from `state`. Raises ConfigError if its window is not among the stages."""
        windows = [stage.max_new_tokens for stage in self.stages]
        if state["window"] not in windows:
            raise ConfigError(f"The saved window of {state['window']} tokens is not in windows={windows}; add it.")
        self.index = windows.index(state["window"])
        self.perplexities, self.near = list(state["perplexities"]), list(state["near"])


def curriculum_weights(step: int, points: Sequence[CurriculumPoint]) -> list[float]:
    """Share of each source in step `step`, summing to 1: linear between the points' normalised weights, constant outside.

    points: rising steps, at least one. The report goes from rule-checked reasoning to a mix with general tasks (section 4.3)
    without figures.
    """
    after = next((i for i, point in enumerate(points) if point.step > step), len(points))
    left, right = points[max(after - 1, 0)], points[min(after, len(points) - 1)]
    done = 0.0 if left.step == right.step else (step - left.step) / (right.step - left.step)
    shares = [[weight / sum(point.weights) for weight in point.weights] for point in (left, right)]
    return [(1 - done) * a + done * b for a, b in zip(*shares, strict=True)]


@dataclass
class PassRates:
    """Right answers and attempts per prompt, and which prompts they say are neither too easy nor too hard.

    A prompt is skipped once it has `min_attempts` attempts and its pass rate is above `easy_above` or below `hard_below`
    (the report filters easy samples, section 4.1; 0 keeps every hard one). Old attempts are forgotten by
    halving both counts when the attempts reach `window`, so a prompt's rate follows the policy.
    """

    easy_above: float = 0.9
    hard_below: float = 0.0
    min_attempts: int = 16
    window: int = 64
    counts: dict[str, tuple[float, float]] = field(default_factory=dict)

    def record(self, prompt_id: str, *, right: int, attempts: int) -> None:
        """Add a group's outcome; samples with a reward_error are no attempts."""
        if not 0 <= right <= attempts:
            raise ValueError(f"right={right} must lie in [0, attempts={attempts}].")
        passed, tried = self.counts.get(prompt_id, (0.0, 0.0))
        passed, tried = passed + right, tried + attempts
        while tried >= max(self.window, 2 * self.min_attempts):
            passed, tried = passed / 2, tried / 2
        self.counts[prompt_id] = (passed, tried)

    def rate(self, prompt_id: str) -> float | None:
        """Pass rate in [0, 1]; None before the first attempt."""
        passed, tried = self.counts.get(prompt_id, (0.0, 0.0))
        return passed / tried if tried else None

    def wanted(self, prompt_id: str) -> bool:
        """False if the prompt is known to be too easy or too hard."""
        passed, tried = self.counts.get(prompt_id, (0.0, 0.0))
        return tried < self.min_attempts or self.hard_below * tried <= passed <= self.easy_above * tried

    def ruled_out(self) -> int:
        """Prompts that are not wanted."""
        return sum(not self.wanted(prompt_id) for prompt_id in self.counts)

    def state(self) -> dict[str, list[float]]:
        """JSON values; `PassRates.counts` is restored with `load`."""
        return {name: list(counts) for name, counts in self.counts.items()}

    def load(self, state: Mapping[str, Sequence[float]]) -> None:
        """Continue from `state`."""
        self.counts = {name: (counts[0], counts[1]) for name, counts in state.items()}
