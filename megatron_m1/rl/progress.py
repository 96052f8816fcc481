"""What a run comes to know and what decides its next steps: the output window, and the pass rates of prompts."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from megatron_m1.config.schema import Config, WindowStage
from megatron_m1.rl.samples import Facts
from megatron_m1.rl.schedule import PassRates, WindowController, length_quantile
from megatron_m1.rl.tasks import Task, prompt_id

__all__ = ["Progress"]


class Progress:
    """The same on every rank. Its `state` is saved with the weights, so that a resumed run goes on as the run before would have."""

    def __init__(self, config: Config) -> None:
        rl = config.rl
        self._config = config
        self.windows = WindowController(
            rl.windows or [WindowStage(rl.max_new_tokens)],
            patience=rl.window_patience,
            tolerance=rl.window_tolerance,
            near_share=rl.window_near_share,
        )
        self.pass_rates = PassRates(
            easy_above=rl.easy_above,
            hard_below=rl.hard_below,
            min_attempts=rl.pass_rate_attempts,
            window=rl.pass_rate_window,
        )
        self.filters = rl.easy_above < 1 or rl.hard_below > 0

    def config(self) -> Config:
        """The configuration of the next step, with what the window in force puts in its place."""
        stage, rl, optimizer = self.windows.stage, self._config.rl, self._config.optimizer
        cap = rl.is_weight_cap if stage.is_weight_cap is None else stage.is_weight_cap
        clip = optimizer.clip_grad if stage.clip_grad is None else stage.clip_grad
        return replace(
            self._config,
            rl=replace(rl, max_new_tokens=stage.max_new_tokens, is_weight_cap=cap),
            optimizer=replace(optimizer, clip_grad=clip),
        )

    def wanted(self, prompt: str) -> bool:
        """Whether to ask this prompt."""
        return not self.filters or self.pass_rates.wanted(prompt_id(prompt))

    def take(self, facts: Sequence[Facts], tasks: Mapping[int, Task]) -> dict[str, Any]:
        """Take note of all that a step sampled; figures for the log. tasks: by group.

        `window` is that of the step; where it moves on, `next_window` is there too.
        """
        tokens = sum(sample.length for sample in facts)
        perplexity = math.exp(-math.fsum(sample.logprob_sum for sample in facts) / tokens)
        figures: dict[str, Any] = {"window": self.windows.stage.max_new_tokens, "perplexity": perplexity}
        if self.windows.update(
            perplexity=perplexity, p99_length=length_quantile([sample.length for sample in facts], 0.99)
        ):
            figures["next_window"] = self.windows.stage.max_new_tokens
        if self.filters:
            self._record(facts, tasks)
            figures["prompts_ruled_out"] = self.pass_rates.ruled_out()
        return figures

    def state(self) -> dict[str, Any]:
        """JSON values for `load`."""
        return {"windows": self.windows.state(), "pass_rates": self.pass_rates.state()}

    def load(self, state: Mapping[str, Any]) -> None:
        """Continue from `state`; {} is that of a run without a past. Raises ConfigError if its window is none of rl.windows."""
        if state:
            self.windows.load(state["windows"])
            self.pass_rates.load(state["pass_rates"])

    def _record(self, facts: Sequence[Facts], tasks: Mapping[int, Task]) -> None:
        rewards: dict[int, list[float]] = {}
        for sample in facts:
            if sample.reward is not None:
                rewards.setdefault(sample.group, []).append(sample.reward)
        for group, values in rewards.items():
            right = sum(value >= 1.0 for value in values)
            self.pass_rates.record(prompt_id(tasks[group].prompt), right=right, attempts=len(values))
