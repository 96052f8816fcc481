"""What the policy is asked, and how each answer is verified: sources of tasks, mixed by weight."""

import hashlib
import json
import math
import random
import zlib
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any, Protocol

from megatron_m1.config.errors import ConfigError
from megatron_m1.config.schema import RLConfig, TaskSource
from megatron_m1.rl.rewards.names import needed_keys, reward_specs
from megatron_m1.rl.rewards.protocol import RewardSpec
from megatron_m1.rl.schedule import curriculum_weights

__all__ = ["Task", "TaskMix", "addition", "prompt_id", "sort_digits"]

HELD_OUT_SHARE = 10
"""One in so many of the made-up tasks is held out, by a checksum of its prompt."""
DRAWS = 64
"""Prompts looked at in place of one that is not wanted; the last of them is taken whatever it is."""
NEW_DRAWS = 256
"""Held-out prompts made up in search of one that has not been; then there are taken to be no more."""


@dataclass(frozen=True)
class Task:
    """prompt: text.  reward: a name of rl/rewards/names.py.  task: JSON values that the reward understands."""

    prompt: str
    reward: str
    task: dict[str, Any] = field(default_factory=dict)


class Source(Protocol):
    """Tasks to train on by a random number generator or, where they are numbered, by place; held-out ones are never among them."""

    rewards: tuple[str, ...]

    def draw(self, rng: random.Random, place: int | None) -> Task: ...

    def held_out(self, rng: random.Random, place: int, known: Container[str]) -> Task | None:
        """One whose prompt is not known; None if there is no other."""
        ...


class TaskMix:
    """The tasks of a run: a pure function of seed, number, step and what is wanted, so that a resumed run asks the same.

    prompts_per_step: how many numbers of a step are always asked for, of the (1 + rl.refills) times as many that it has; None: all
        numbers are. With it, the prompts of a file come back only when all have been asked, in another order each time (under a
        curriculum that takes weight from the file, sooner).
    The held-out prompts differ from each other, so that a confidence interval over them counts what it says.
    Raises ConfigError for a file, data set or reward that cannot be used, and for sources with fewer than rl.held_out_prompts.
    """

    def __init__(self, config: RLConfig, *, seed: int, prompts_per_step: int | None = None) -> None:
        self.seed = seed
        self.prompts_per_step, self.refills = prompts_per_step, config.refills
        self.specs = reward_specs(config.rewards)
        for index, source in enumerate(config.tasks):
            if source.reward is not None and source.reward not in self.specs:
                raise ConfigError(
                    f"rl.tasks[{index}].reward={source.reward} is unknown; use one of {', '.join(self.specs)}."
                )
        self.sources: list[Source] = [
            _source(source, self.specs, f"{seed}/{index}") for index, source in enumerate(config.tasks)
        ]
        self.weights = [source.weight for source in config.tasks]
        self.curriculum = config.curriculum
        self._wanted_held_out = config.held_out_prompts
        self._held_out: list[Task] = []
        self._known: set[str] = set()
        if config.held_out_prompts:
            self._hold_out(config.held_out_prompts)

    def task(
        self, number: int, *, held_out: bool = False, step: int = 0, wanted: Callable[[str], bool] | None = None
    ) -> Task:
        """Task `number` of the training or the held-out sequence.

        In training the curriculum's weights at `step` (0-based) choose the source, if there is one, and where `wanted`
        refuses the prompt another of the same source is drawn, up to DRAWS of them.
        """
        if held_out:
            self._hold_out(number + 1)
            return self._held_out[number]
        rng = self._rng("train", number)
        position, refill = self._position(number)
        index, place = _share_out(
            position, curriculum_weights(step, self.curriculum) if self.curriculum else self.weights
        )
        for draw in range(DRAWS):
            task = self.sources[index].draw(rng, None if refill or draw else place)
            if wanted is None or wanted(task.prompt):
                break
        return task

    def rewards(self) -> dict[str, RewardSpec]:
        """The rewards that these tasks may name."""
        names = {name for source in self.sources for name in source.rewards}
        return {name: self.specs[name] for name in sorted(names)}

    def check_lengths(self, encode: Callable[[str], Sequence[int]], most: int) -> None:
        """Raises ConfigError, with path and line, for a prompt of a file that has no tokens or more than `most`."""
        for source in self.sources:
            for where, task in source.records if isinstance(source, _File) else []:
                tokens = len(encode(task.prompt))
                if not 0 < tokens <= most:
                    raise ConfigError(
                        f"{where}: the prompt {task.prompt[:60]!r} has {tokens} tokens; training.seq_length and rl.max_new_tokens "
                        f"leave room for 1 to {most}. Change one of them, or take the prompt out."
                    )

    def _hold_out(self, count: int) -> None:
        """Make the first `count` held-out tasks. One after the other: each differs from those before it."""
        for number in range(len(self._held_out), count):
            index, place = _share_out(number, self.weights)
            task = self.sources[index].held_out(self._rng("held out", number), place, self._known)
            if task is None:
                raise ConfigError(
                    f"rl.tasks[{index}] has {place} different held-out prompts, and its share of rl.held_out_prompts="
                    f"{self._wanted_held_out} is more; lower that, or give the source more of them."
                )
            self._known.add(task.prompt)
            self._held_out.append(task)

    def _rng(self, sequence: str, number: int) -> random.Random:
        rng = random.Random(f"{self.seed}/{sequence}/{number}")
        rng.random()  # earlier versions chose the source by it; runs that they began go on with the same prompts
        return rng

    def _position(self, number: int) -> tuple[int, bool]:
        """Place of a number among those that are always asked for; of one that may not be, the number, and True."""
        if self.prompts_per_step is None:
            return number, False
        step, within = divmod(number, self.prompts_per_step * (1 + self.refills))
        if within < self.prompts_per_step:
            return step * self.prompts_per_step + within, False
        return number, True


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


class _Endless:
    """Tasks made up by a random number generator."""

    def __init__(self, reward: str) -> None:
        self.reward = reward
        self.rewards: tuple[str, ...] = (reward,)

    def draw(self, rng: random.Random, place: int | None) -> Task:
        return _apart(lambda: self._task(rng), held_out=False)

    def held_out(self, rng: random.Random, place: int, known: Container[str]) -> Task | None:
        tasks = (_apart(lambda: self._task(rng), held_out=True) for _ in range(NEW_DRAWS))
        return next((task for task in tasks if task.prompt not in known), None)

    def _task(self, rng: random.Random) -> Task:
        raise NotImplementedError


class _MadeUp(_Endless):
    def __init__(self, source: TaskSource) -> None:
        super().__init__(source.reward or "exact")
        self.make, self.size = MADE_UP[source.kind], source.size

    def _task(self, rng: random.Random) -> Task:
        prompt, answer = self.make(rng, self.size)
        return Task(prompt, self.reward, {"answer": answer})


class _ReasoningGym(_Endless):
    def __init__(self, source: TaskSource) -> None:
        from megatron_m1.rl.rewards.logic import logic_tasks

        super().__init__(source.reward or "logic")
        assert source.dataset is not None
        self.make, self.dataset, self.options = logic_tasks, source.dataset, source.options
        try:
            self.make(self.dataset, size=1, seed=0, options=self.options)
        except (ValueError, TypeError, AssertionError) as error:
            raise ConfigError(f"rl.tasks: {self.dataset} with options={self.options}: {error}") from None

    def _task(self, rng: random.Random) -> Task:
        (entry,) = self.make(self.dataset, size=1, seed=rng.randrange(2**31), options=self.options)
        return Task(f"{entry['question']}\nGive the answer as <answer>...</answer>.\n", self.reward, {"entry": entry})


class _File:
    """Tasks of a file, in another order each time through; those of the held-out file in its order, each prompt once."""

    def __init__(self, source: TaskSource, specs: Mapping[str, RewardSpec], seed: str) -> None:
        self.seed = seed
        train = _read(source.path, source.reward, specs)
        held_out = _read(source.held_out_path, source.reward, specs) if source.held_out_path else []
        self.records = train + held_out
        self.rewards = tuple({task.reward for _, task in self.records})
        self.train = [task for _, task in train]
        self.kept = list({task.prompt: task for _, task in reversed(held_out)}.values())[::-1]
        both = {task.prompt for task in self.train} & {task.prompt for task in self.kept}
        if both:
            raise ConfigError(
                f"{source.held_out_path} and {source.path} share {len(both)} prompts, e.g. {min(both)[:80]!r}; "
                "remove them from one of the files."
            )
        self._order: tuple[int, list[int]] = (-1, [])

    def draw(self, rng: random.Random, place: int | None) -> Task:
        if place is None:
            return rng.choice(self.train)
        through, index = divmod(place, len(self.train))
        if self._order[0] != through:
            order = list(range(len(self.train)))
            random.Random(f"{self.seed}/{through}").shuffle(order)
            self._order = (through, order)
        return self.train[self._order[1][index]]

    def held_out(self, rng: random.Random, place: int, known: Container[str]) -> Task | None:
        # Another file may have had some of them.
        return next((task for task in self.kept[place:] if task.prompt not in known), None)


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


def _read(path: str | None, reward: str | None, specs: Mapping[str, RewardSpec]) -> list[tuple[str, Task]]:
    """Every task with its path:line. reward: in place of the lines' own."""
    assert path is not None
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}; name a file of JSON lines.") from None
    except UnicodeDecodeError as error:
        at = error.object[: error.start].count(b"\n") + 1
        raise ConfigError(f"{path}:{at} is not UTF-8 ({error.reason}); write the file anew as UTF-8.") from None
    tasks = []
    # Not splitlines(): a JSON string may hold other line ends as they are.
    for number, line in enumerate(text.removesuffix("\n").split("\n") if text else [], start=1):
        where = f"{path}:{number}"
        try:
            record = json.loads(line)
            task = Task(record["prompt"], reward or record["reward"], record["task"])
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ConfigError(f"{where} must be an object with prompt, reward and task ({error}).") from None
        fault = _fault(task, specs)
        if fault:
            raise ConfigError(f"{where}: {fault}")
        tasks.append((where, task))
    if not tasks:
        raise ConfigError(f"{path} holds no task; write lines with prompt, reward and task.")
    return tasks


def _fault(task: Task, specs: Mapping[str, RewardSpec]) -> str | None:
    """What is wrong with a line's content."""
    if not isinstance(task.prompt, str):
        return f"prompt={task.prompt!r} must be a string."
    lone = next((letter for letter in task.prompt if "\ud800" <= letter <= "\udfff"), None)
    if lone is not None:
        return f"prompt={task.prompt[:60]!r} holds {lone!r}, half of a character; write the whole pair or take it out."
    if not isinstance(task.reward, str) or task.reward not in specs:
        return f"reward {task.reward!r} is unknown; use one of {', '.join(specs)}."
    if not isinstance(task.task, dict):
        return f"task={task.task!r} must be an object, e.g. {{'answer': '4'}}."
    missing = needed_keys(specs[task.reward]) - set(task.task)
    if missing:
        return f"task lacks {', '.join(sorted(missing))}, which the reward {task.reward} judges by."
    return None


def _share_out(position: int, weights: Sequence[float]) -> tuple[int, int]:
    """(source, how many positions before this one are its): every source gets its share of any first positions, to within one."""
    left = sum(map(Fraction, weights))
    for index, weight in enumerate(weights):
        if not weight:
            continue
        share = Fraction(weight) / left
        before = math.floor(position * share)
        if math.floor((position + 1) * share) > before:
            return index, before
        position, left = position - before, left - Fraction(weight)
    raise AssertionError(f"weights={weights} leave no source")


def _source(source: TaskSource, specs: Mapping[str, RewardSpec], seed: str) -> Source:
    if source.kind == "file":
        return _File(source, specs, seed)
    return _ReasoningGym(source) if source.kind == "reasoning_gym" else _MadeUp(source)
