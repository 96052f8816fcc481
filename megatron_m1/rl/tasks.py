"""What the policy is asked, and how each answer is verified: sources of tasks, mixed by weight."""

import hashlib
import json
import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from megatron_m1.config.errors import ConfigError
from megatron_m1.config.schema import RLConfig, TaskSource
from megatron_m1.rl.rewards.protocol import RewardSpec
from megatron_m1.rl.schedule import curriculum_weights

__all__ = ["REWARDS", "Task", "TaskMix", "addition", "prompt_id", "sort_digits"]

REWARDS = {
    name: RewardSpec(f"megatron_m1.rl.rewards.{name}:{name.capitalize()}Reward")
    for name in ("exact", "format", "math", "logic", "code")
}
HELD_OUT_SHARE = 10
"""One in so many of the made-up tasks is held out, by a checksum of its prompt."""
DRAWS = 64
"""Prompts looked at in place of one that is not wanted; the last of them is taken whatever it is."""


@dataclass(frozen=True)
class Task:
    """prompt: text.  reward: key of REWARDS.  task: JSON values that the reward understands."""

    prompt: str
    reward: str
    task: dict[str, Any] = field(default_factory=dict)


class Source(Protocol):
    """Tasks by a random number generator; those held out are never among the others."""

    def draw(self, rng: random.Random, *, held_out: bool) -> Task: ...


class TaskMix:
    """The tasks of a run: a pure function of seed, number, step and what is wanted, so that a resumed run asks the same.

    Raises ConfigError for a file or data set that cannot be used.
    """

    def __init__(self, config: RLConfig, *, seed: int) -> None:
        self.seed = seed
        self.sources = [_source(source) for source in config.tasks]
        self.weights = [source.weight for source in config.tasks]
        self.curriculum = config.curriculum

    def task(
        self, number: int, *, held_out: bool = False, step: int = 0, wanted: Callable[[str], bool] | None = None
    ) -> Task:
        """Task `number` of the training or the held-out sequence.

        In training the curriculum's weights at `step` (0-based) choose the source, if there is one, and where `wanted`
        refuses the prompt another of the same source is drawn, up to DRAWS of them.
        """
        rng = random.Random(f"{self.seed}/{'held out' if held_out else 'train'}/{number}")
        weights = self.weights if held_out or not self.curriculum else curriculum_weights(step, self.curriculum)
        (source,) = rng.choices(self.sources, weights)
        for _ in range(DRAWS):
            task = source.draw(rng, held_out=held_out)
            if held_out or wanted is None or wanted(task.prompt):
                break
        return task

    def rewards(self) -> dict[str, RewardSpec]:
        """The rewards that these tasks may name."""
        names = {name for source in self.sources for name in source.rewards}
        return {name: REWARDS[name] for name in sorted(names)}


def prompt_id(prompt: str) -> str:
    """Short name of a prompt, for what is kept about it."""
    return hashlib.sha256(prompt.encode()).hexdigest()[:16]


def sort_digits(rng: random.Random, size: int) -> tuple[str, str]:
    """(prompt, answer): `size` digits, and the same in rising order."""
    digits = [str(rng.randrange(10)) for _ in range(size)]
    return f"sort {''.join(digits)}:", "".join(sorted(digits))


def addition(rng: random.Random, size: int) -> tuple[str, str]:
    """(prompt, answer): the sum of two numbers of `size` digits, in size + 1 digits, the lowest first."""
    a, b = rng.randrange(10**size), rng.randrange(10**size)
    return f"{a:0{size}}+{b:0{size}}=", f"{a + b:0{size + 1}}"[::-1]


MADE_UP = {"sort": sort_digits, "addition": addition}


class _MadeUp:
    rewards = ("exact",)

    def __init__(self, source: TaskSource) -> None:
        self.make, self.size = MADE_UP[source.kind], source.size

    def draw(self, rng: random.Random, *, held_out: bool) -> Task:
        return _apart(lambda: self._task(rng), held_out=held_out)

    def _task(self, rng: random.Random) -> Task:
        prompt, answer = self.make(rng, self.size)
        return Task(prompt, "exact", {"answer": answer})


class _ReasoningGym:
    rewards = ("logic",)

    def __init__(self, source: TaskSource) -> None:
        from megatron_m1.rl.rewards.logic import logic_tasks

        assert source.dataset is not None
        self.make, self.dataset, self.options = logic_tasks, source.dataset, source.options
        try:
            self.make(self.dataset, size=1, seed=0, options=self.options)
        except (ValueError, TypeError, AssertionError) as error:
            raise ConfigError(f"rl.tasks: {self.dataset} with options={self.options}: {error}") from None

    def draw(self, rng: random.Random, *, held_out: bool) -> Task:
        return _apart(lambda: self._task(rng), held_out=held_out)

    def _task(self, rng: random.Random) -> Task:
        (entry,) = self.make(self.dataset, size=1, seed=rng.randrange(2**31), options=self.options)
        return Task(f"{entry['question']}\nGive the answer as <answer>...</answer>.\n", "logic", {"entry": entry})


class _File:
    def __init__(self, source: TaskSource) -> None:
        self.train = _read(source.path)
        self.held_out = _read(source.held_out_path) if source.held_out_path else []
        self.rewards = tuple({task.reward for task in self.train + self.held_out})
        both = {task.prompt for task in self.train} & {task.prompt for task in self.held_out}
        if both:
            raise ConfigError(
                f"{source.held_out_path} and {source.path} share {len(both)} prompts, e.g. {min(both)[:80]!r}; "
                "remove them from one of the files."
            )

    def draw(self, rng: random.Random, *, held_out: bool) -> Task:
        return rng.choice(self.held_out if held_out else self.train)


def _apart(draw: Callable[[], Task], *, held_out: bool) -> Task:
    """The first draw whose prompt is held out, or is not."""
    for _ in range(100 * HELD_OUT_SHARE):
        task = draw()
        if (zlib.crc32(task.prompt.encode()) % HELD_OUT_SHARE == 0) == held_out:
            return task
    kind = "held out" if held_out else "to train on"
    raise ConfigError(
        f"rl.tasks: a source has no prompt {kind}, such as {task.prompt[:60]!r}; let it make more kinds of prompts."
    )


def _read(path: str | None) -> list[Task]:
    assert path is not None
    tasks = []
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}; name a file of JSON lines.") from None
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            task = Task(record["prompt"], record["reward"], record["task"])
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{path}:{number} must be an object with prompt, reward and task ({error}).") from None
        if task.reward not in REWARDS:
            raise ConfigError(f"{path}:{number}: reward {task.reward!r} is unknown; use one of {', '.join(REWARDS)}.")
        tasks.append(task)
    if not tasks:
        raise ConfigError(f"{path} holds no task; write lines with prompt, reward and task.")
    return tasks


def _source(source: TaskSource) -> Any:
    kinds: dict[str, Any] = {"reasoning_gym": _ReasoningGym, "file": _File}
    return kinds.get(source.kind, _MadeUp)(source)
