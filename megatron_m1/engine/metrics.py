"""metrics.jsonl, TensorBoard and the console, on rank 0."""

import json
import sys
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch.utils.tensorboard import SummaryWriter

from megatron_m1.config.schema import LoggingConfig

__all__ = ["MetricsLog"]

SHOWN = ("loss", "valid_loss", "grad_norm", "lr", "aux_loss", "tokens_per_s", "mfu")


class MetricsLog:
    """Writes a step's metrics where they are wanted; does nothing on ranks other than 0.

    metrics.jsonl gets one JSON object per call at full precision (floats round-trip); nested dicts become `a/b` in TensorBoard.
    On a terminal a progress bar, otherwise plain lines.
    """

    def __init__(self, config: LoggingConfig, *, rank: int, steps: int) -> None:
        self.enabled, self.steps = rank == 0, steps
        self.file = self.writer = self.progress = None
        if not self.enabled:
            return
        if config.dir is not None:
            folder = Path(config.dir)
            folder.mkdir(parents=True, exist_ok=True)
            self.file = (folder / "metrics.jsonl").open("a")
            if config.tensorboard:
                self.writer = SummaryWriter(str(folder))
        if sys.stdout.isatty():
            self.progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                transient=True,
            )
            self.task = self.progress.add_task("training", total=steps)
            self.progress.start()

    def event(self, values: dict[str, Any]) -> None:
        """Record something that is not a step, in metrics.jsonl only."""
        if self.file is not None:
            self.file.write(json.dumps(values) + "\n")
            self.file.flush()

    def step(self, values: dict[str, Any], *, show: bool) -> None:
        """Record one step; values["step"] is its number, from 1."""
        if not self.enabled:
            return
        self.event(values)
        if self.writer is not None:
            for name, value in _flatten(values):
                self.writer.add_scalar(name, value, values["step"])
        if self.progress is not None:
            self.progress.update(self.task, completed=values["step"], description=f"loss {values['loss']:.4f}")
        if show:
            parts = [f"{name} {_readable(name, values[name])}" for name in SHOWN if values.get(name) is not None]
            self.say(f"step {values['step']}/{self.steps}  " + "  ".join(parts))

    def say(self, text: str) -> None:
        """Print a line on rank 0."""
        if self.enabled:
            (self.progress.console.print if self.progress is not None else print)(text)
            sys.stdout.flush()

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.progress is not None:
            self.progress.stop()
        if self.writer is not None:
            self.writer.close()
        if self.file is not None:
            self.file.close()


def _flatten(values: dict[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    flat: list[tuple[str, float]] = []
    for name, value in values.items():
        if isinstance(value, dict):
            flat += _flatten(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and name != "step":
            flat.append((prefix + name, float(value)))
    return flat


def _readable(name: str, value: float) -> str:
    if name == "tokens_per_s":
        return f"{value:,.0f}"
    return f"{value:.2e}" if name == "lr" else f"{value:.4f}"
