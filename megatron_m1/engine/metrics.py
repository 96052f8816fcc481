"""metrics.jsonl, TensorBoard and the console, on rank 0."""

import contextlib
import json
import sys
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch.utils.tensorboard import SummaryWriter

from megatron_m1.config.errors import ConfigError
from megatron_m1.config.load import to_yaml
from megatron_m1.config.schema import Config

__all__ = ["MetricsLog"]

SHOWN = ("loss", "valid_loss", "grad_norm", "lr", "aux_loss", "tokens_per_s", "mfu", "peak_memory_gib")


class MetricsLog:
    """Writes a step's metrics where they are wanted; does nothing on ranks other than 0.

    logging.dir gets config.yaml and metrics.jsonl, with one JSON object per call at full precision (floats round-trip), appended to
    what an earlier run wrote; nested dicts become `a/b` in TensorBoard. On a terminal a progress bar, otherwise plain lines.
    Raises ConfigError if logging.dir cannot be written.
    """

    def __init__(self, config: Config, *, rank: int, headline: str = "loss") -> None:
        """headline: the metric beside the bar, which keeps its last value over steps that lack it."""
        self.enabled, self.steps, self.headline = rank == 0, config.training.steps, headline
        self.file: TextIO | None = None
        self.writer: SummaryWriter | None = None
        self.progress: Progress | None = None
        if not self.enabled:
            return
        if config.logging.dir is not None:
            self._open(config, Path(config.logging.dir))
        if sys.stdout.isatty():
            self.progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                transient=True,
            )
            self.task = self.progress.add_task("training", total=self.steps)
            self.progress.start()

    def _open(self, config: Config, folder: Path) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            to_yaml(config, folder / "config.yaml")
            self.file = (folder / "metrics.jsonl").open("a", encoding="utf-8")
            if config.logging.tensorboard:
                self.writer = SummaryWriter(str(folder))
        except OSError as error:
            raise ConfigError(
                f"logging.dir={folder} cannot be written: {error.strerror}; name a folder that can, or null."
            ) from error

    def event(self, values: dict[str, Any], *, at_step: int | None = None) -> None:
        """Record something that is not a step, in metrics.jsonl, and its numbers in TensorBoard at `at_step`. Raises ConfigError if
        that fails."""
        if self.writer is not None and at_step is not None:
            for name, value in _flatten(values):
                self.writer.add_scalar(name, value, at_step)
        if self.file is None:
            return
        try:
            self.file.write(json.dumps(values) + "\n")
            self.file.flush()
        except OSError as error:
            file, self.file = self.file, None
            with contextlib.suppress(OSError):
                file.close()
            raise ConfigError(
                f"logging.dir: {file.name} cannot be written: {error.strerror}; make room, or name another folder, and continue from "
                "the last checkpoint."
            ) from None

    def step(self, values: dict[str, Any], *, show: bool) -> None:
        """Record one step; values["step"] is its number, from 1."""
        if not self.enabled:
            return
        self.event(values, at_step=values["step"])
        if self.progress is not None:
            self.progress.update(self.task, completed=values["step"])
            if self.headline in values:
                self.progress.update(self.task, description=f"{self.headline} {values[self.headline]:.4f}")
        if show:
            parts = [f"{name} {_readable(name, values[name])}" for name in SHOWN if values.get(name) is not None]
            self.say(f"step {values['step']}/{self.steps}  " + "  ".join(parts))

    def say(self, text: str) -> None:
        """Print a line on rank 0."""
        if self.enabled:
            if self.progress is not None:
                self.progress.console.print(text, markup=False, highlight=False)
            else:
                print(text, flush=True)

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
        elif isinstance(value, int | float) and name not in ("step", "after_step"):
            flat.append((prefix + name, float(value)))
    return flat


def _readable(name: str, value: float) -> str:
    if name == "tokens_per_s":
        return f"{value:,.0f}"
    if name == "peak_memory_gib":
        return f"{value:.1f}"
    return f"{value:.2e}" if name == "lr" else f"{value:.4f}"
