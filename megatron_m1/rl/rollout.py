"""From tasks to judged samples: generation in the training modules, rewards, dynamic sampling."""

import contextlib
import json
from collections.abc import Generator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import cast

import torch
import torch.distributed as dist

from megatron_m1 import platform
from megatron_m1.checkpoint.together import together
from megatron_m1.config.errors import ConfigError
from megatron_m1.config.schema import Config
from megatron_m1.data.tokenizer import Tokenizer
from megatron_m1.engine.stop import EarlyStop
from megatron_m1.engine.trainer import Trainer
from megatron_m1.generation.engine import Engine
from megatron_m1.generation.reference import ReferenceEngine
from megatron_m1.generation.requests import Request, Result, Running, Sampling, request_seed
from megatron_m1.rl.advantages import informative_samples
from megatron_m1.rl.evaluation import HeldOut
from megatron_m1.rl.exchange import facts_of_all
from megatron_m1.rl.phases import Phases
from megatron_m1.rl.progress import Progress
from megatron_m1.rl.rewards.pool import RewardPool, TooManyRewardErrors
from megatron_m1.rl.rewards.protocol import RewardRequest
from megatron_m1.rl.samples import Facts, Sample, counted_reward, facts_of, sample_of
from megatron_m1.rl.schedule import length_quantile
from megatron_m1.rl.step_journal import StepJournal, journal_path, remove_old_journals
from megatron_m1.rl.tasks import Task, TaskMix

__all__ = ["Collected", "Rollouts"]


@dataclass
class Collected:
    """What a step trains on, and all that was sampled for it.

    samples: those that this replica generated, of all that were sampled.  facts, kept: of all samples of all replicas, and of those
    to train on, whole groups in order.  tasks: by group.  from_journal: how many were not generated anew.
    groups, discarded: prompts sampled, and those whose samples all had one reward.
    stopped: why the run is to end before this batch is complete; the journal has what was finished.
    """

    samples: list[Sample] = field(default_factory=list)
    facts: list[Facts] = field(default_factory=list)
    kept: list[Facts] = field(default_factory=list)
    tasks: dict[int, Task] = field(default_factory=dict)
    from_journal: int = 0
    groups: int = 0
    discarded: int = 0
    stopped: str | None = None

    def figures(self) -> dict[str, float]:
        """For the log: means over all that was sampled."""
        rewards = [sample.reward for sample in self.facts if sample.reward is not None]
        lengths = [sample.length for sample in self.facts]
        total = max(len(self.facts), 1)
        return {
            "reward": sum(rewards) / max(len(rewards), 1),
            "reward_errors": len(self.facts) - len(rewards),
            "response_tokens_mean": sum(lengths) / total,
            "response_tokens_p99": length_quantile(lengths, 0.99),
            "truncated_share": sum(sample.truncated for sample in self.facts) / total,
            "repetitive_share": sum(sample.repetitive for sample in self.facts) / total,
            "sampled": len(self.facts),
            "kept": len(self.kept),
            "discard_rate": self.discarded / max(self.groups, 1),
            "from_journal": self.from_journal,
        }


@dataclass(frozen=True)
class _Plan:
    """What one call of the engine is to sample: the same on every rank."""

    prompts: range
    tasks: dict[int, Task]
    per_prompt: int
    seed: int
    sampling: Sampling


class Rollouts:
    """Samples of the weights as they are at the time of the call. Every method is collective over the world.

    The replicas (data- and context-parallel ranks) share out the prompts. Each judges what it generated, in `rl.reward_workers`
    processes under its first rank, and keeps it; what all ranks get is a few facts about each sample. Use it as a context manager.
    Raises ConfigError for tasks, a tokenizer or rewards that cannot be used.
    """

    def __init__(self, config: Config, trainer: Trainer) -> None:
        self.config, self.trainer, self.groups = config, trainer, trainer.groups
        rl, training = config.rl, config.training
        assert config.data.tokenizer is not None, "validate_rl() demands it"
        self.judges = self.groups.tp.rank() == 0 and self.groups.pp.rank() == 0
        self.lock_step = self.groups.tp.size() % self.groups.tp_ep.size() != 0
        self.pool: RewardPool | None = None
        self.prompts_per_step = training.global_batch * rl.updates_per_batch // rl.samples_per_prompt
        with together():
            self.tokenizer = Tokenizer(config.data.tokenizer, model_vocab_size=config.model.vocab_size)
            self.tasks = TaskMix(rl, seed=training.seed, prompts_per_step=self.prompts_per_step)
            if dist.get_rank() == 0:
                self.tasks.check_lengths(self.tokenizer.encode, training.seq_length - rl.max_new_tokens + 1)
            if self.judges:
                self.pool = RewardPool(
                    self.tasks.rewards(),
                    workers=rl.reward_workers,
                    timeout_s=rl.reward_timeout_s,
                    max_error_share=rl.reward_max_error_share,
                )
                _make_folder(rl.journal)
        end = config.data.eod_token_id if config.data.eod_token_id is not None else self.tokenizer.eod_id
        self.ends = () if end is None else (end,)

    def collect(self, step: int, progress: Progress, phases: Phases, stop: EarlyStop | None = None) -> Collected:
        """The generation batch of step `step` (0-based): `prompts_per_step` groups whose rewards differ, or as many as
        `rl.refills` further rounds give; without dynamic sampling all groups of one round. `progress` has the window and the
        prompts that are wanted, and is not changed. With a journal, `stop` ends it early."""
        rl, wanted = self.config.rl, self.prompts_per_step
        out, kept_groups, now = Collected(), 0, progress.config().rl
        first = step * wanted * (1 + rl.refills)
        stop = None if rl.journal is None else stop
        with self._journal("step", step, step + 1) as journal:
            for _ in range(1 + rl.refills):
                prompts = range(first + out.groups, first + out.groups + wanted - kept_groups)
                tasks = {prompt: self.tasks.task(prompt, step=step, wanted=progress.wanted) for prompt in prompts}
                sampling = self._sampling(now.max_new_tokens)
                plan = _Plan(prompts, tasks, rl.samples_per_prompt, self.config.training.seed, sampling)
                samples, reused = self._generate(plan, journal, phases, "rollout", stop=stop)
                if stop is not None and (reason := stop.reason()):
                    return Collected(stopped=reason)
                samples, facts = self._judge(samples, journal, phases, "reward")
                kept = self._informative(facts)
                kept_now = len({sample.group for sample in kept})
                out.from_journal += reused
                out.samples += samples
                out.facts += facts
                out.kept += kept
                out.tasks |= tasks
                out.groups += len(prompts)
                out.discarded += len(prompts) - kept_now
                kept_groups += kept_now
                if not rl.dynamic_sampling or kept_groups >= wanted:
                    break
        return out

    def held_out(self, step: int, phases: Phases, stop: EarlyStop) -> HeldOut | None:
        """avg@k and pass@k over the held-out prompts after `step` steps, always the same prompts with the same seeds and
        `rl.max_new_tokens`; a reward of 1 counts as right. None: `stop` ended it.

        Samples with a reward_error are left out; raises ConfigError if a prompt has no other.
        """
        rl = self.config.rl
        tasks = {prompt: self.tasks.task(prompt, held_out=True) for prompt in range(rl.held_out_prompts)}
        sampling = self._sampling(rl.max_new_tokens)
        plan = _Plan(range(rl.held_out_prompts), tasks, rl.held_out_samples, self.config.training.seed + 1, sampling)
        with self._journal("held_out", step, step) as journal:
            samples, _ = self._generate(plan, journal, phases, "evaluation", stop=stop)
            if stop.reason():
                return None
            _, facts = self._judge(samples, journal, phases, "evaluation")
        right: dict[int, list[bool]] = {sample.group: [] for sample in facts}
        for sample in facts:
            if sample.reward is not None:
                right[sample.group].append(sample.reward >= 1.0)
        if not all(right.values()):
            raise ConfigError("A held-out prompt has no sample that could be judged; mend its reward or task data.")
        return HeldOut.of(list(right.values()), samples=rl.held_out_samples, pass_at=rl.held_out_pass_at)

    def remove_old_journals(self) -> None:
        """Those that no checkpoint needs, see `rl.journal_keep`."""
        with together():
            if self.judges:
                replica = None if dist.get_rank() == 0 else self.groups.dp_cp.rank()
                remove_old_journals(self.config, replica=replica)

    def close(self) -> None:
        """End the reward workers."""
        if self.pool is not None:
            self.pool.close()

    def __enter__(self) -> "Rollouts":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _sampling(self, max_new_tokens: int) -> Sampling:
        rl = self.config.rl
        return Sampling(
            max_new_tokens=max_new_tokens,
            end_tokens=self.ends,
            repetition_tokens=rl.repetition_tokens,
            repetition_probability=rl.repetition_probability,
        )

    def _generate(
        self, plan: _Plan, journal: StepJournal, phases: Phases, phase: str, *, stop: EarlyStop | None
    ) -> tuple[list[Sample], int]:
        """This replica's samples, and how many of everybody's were taken over from its journal; the others go there as they end.

        stop: asked after every sample, so that a replica that works on its own ends early; replicas in lock-step go on to the end.
        Raises ConfigError, then, on all ranks if samples could not be kept.
        """
        with phases.measure(phase):
            samples, reused, waited = self._sampled(plan, journal, stop)
            journal.sync()
        phases.waited(phase, waited)
        with together():
            journal.check()
        return samples, reused

    def _sampled(self, plan: _Plan, journal: StepJournal, stop: EarlyStop | None) -> tuple[list[Sample], int, float]:
        """(samples, those from journals, seconds of waiting for replicas in lock-step)"""
        encoded = {prompt: self._encoded(task.prompt, plan) for prompt, task in plan.tasks.items()}
        per_prompt, finished = plan.per_prompt, journal.finished
        numbers = range(plan.prompts.start * per_prompt, plan.prompts.stop * per_prompt)
        own = [
            _of_task(finished[n], plan.tasks[n // per_prompt])
            for n in numbers
            if n in finished and _fits(finished[n], encoded[n // per_prompt], plan)
        ]
        done = self._everybodys([sample.number for sample in own])
        asked = [number for number in numbers if number not in done]
        if not asked:
            return own, len(done), 0.0
        requests = [
            Request(encoded[number // per_prompt], request_seed(plan.seed, number), plan.sampling) for number in asked
        ]
        engine = self._engine()
        results = cast(Generator[tuple[int, Result], None, None], engine.stream(requests))
        with contextlib.closing(results):
            for index, result in results:
                number = asked[index]
                sample = sample_of(
                    result,
                    number=number,
                    group=number // per_prompt,
                    task=plan.tasks[number // per_prompt],
                    prompt=requests[index].prompt,
                    weights=journal.weights,
                    text=self.tokenizer.decode(result.tokens) if self.judges else "",
                )
                journal.add_sample(sample)
                own.append(sample)
                if stop is not None and not self.lock_step and stop.reason(self.groups.mp):
                    break
        return sorted(own, key=lambda sample: sample.number), len(done), engine.idle_s

    def _everybodys(self, numbers: list[int]) -> set[int]:
        shares: list[list[int]] = [[] for _ in range(self.groups.dp_cp.size())]
        dist.all_gather_object(shares, numbers, group=self.groups.dp_cp)
        return {number for share in shares for number in share}

    def _engine(self) -> Engine | ReferenceEngine:
        self.trainer.complete_parameters()
        if self.config.rl.engine == "reference":
            return ReferenceEngine(
                self.trainer.models,
                self.groups,
                tokens=self.config.training.seq_length,
                record_routing=self.config.rl.routing_replay,
            )
        return Engine(
            self.trainer.models,
            self.groups,
            slots=self.config.rl.slots,
            cache_tokens=self.config.rl.cache_tokens,
            record_routing=self.config.rl.routing_replay,
            # So that a run which goes on with samples of its journal ends with the same bits.
            batch_invariant=not platform.is_cuda(),
        )

    def _encoded(self, prompt: str, plan: _Plan) -> tuple[int, ...]:
        ids, length, new = self.tokenizer.encode(prompt), self.config.training.seq_length, plan.sampling.max_new_tokens
        if not 0 < len(ids) <= length - new + 1:
            raise ConfigError(
                f"The prompt {prompt[:60]!r} has {len(ids)} tokens; training.seq_length={length} and {new} new tokens leave room "
                f"for 1 to {length - new + 1}. Change training.seq_length, rl.max_new_tokens or the task."
            )
        return tuple(ids)

    def _judge(
        self, samples: list[Sample], journal: StepJournal, phases: Phases, phase: str
    ) -> tuple[list[Sample], list[Facts]]:
        """(this replica's samples, with their verdicts where they were judged; the facts of all replicas' samples)"""
        failure: Exception | None = None
        with phases.measure(phase):  # which holds no wait for others
            try:
                samples = self._judged(samples, journal)
            except Exception as error:
                failure = error
        with together():
            if failure is not None:
                raise failure
            journal.check()
        return samples, facts_of_all([facts_of(sample) for sample in samples] if self.judges else [])

    def _judged(self, samples: list[Sample], journal: StepJournal) -> list[Sample]:
        """With verdicts, those of the journal and new ones, which go there; on ranks that do not judge as they are."""
        if self.pool is None:
            return samples
        waiting = [sample for sample in samples if not sample.has_verdict]
        requests = [RewardRequest(s.task.reward, s.task.prompt, s.text, s.task.task) for s in waiting]
        try:
            verdicts = self.pool.score(requests)
        except TooManyRewardErrors as error:
            raise ConfigError(str(error)) from None
        new = {s.number: s.judged(verdict) for s, verdict in zip(waiting, verdicts, strict=True)}
        journal.add_verdicts(list(new.values()))
        return [new.get(sample.number, sample) for sample in samples]

    def _informative(self, facts: list[Facts]) -> list[Facts]:
        """Those to train on."""
        rewards = [counted_reward(sample, self.config.rl) for sample in facts]
        kept = torch.tensor([reward is not None for reward in rewards])
        if self.config.rl.dynamic_sampling:
            values = torch.tensor([0.0 if reward is None else reward for reward in rewards])
            groups = torch.tensor([sample.group for sample in facts])
            kept, _ = informative_samples(values, groups, valid=kept)
        return [sample for sample, keep in zip(facts, kept.tolist(), strict=True) if keep]

    def _weights_version(self, step: int) -> str:
        """Changes with any weight: the step and the sum of all bit patterns. In another layout it is another."""
        total = torch.zeros((), dtype=torch.int64, device=self.trainer.device)
        for tensor in self.trainer.parameters().values():
            bits = torch.int16 if tensor.element_size() == 2 else torch.int32
            total += tensor.detach().contiguous().view(bits).sum(dtype=torch.int64)
        dist.all_reduce(total)
        return f"{step}-{total.item() & (2**64 - 1):016x}"

    def _journal(self, kind: str, weights_step: int, number: int) -> StepJournal:
        """That of this replica for `kind` number `number`, with the weights after `weights_step` steps."""
        weights, rl = self._weights_version(weights_step), self.config.rl
        path = journal_path(self.config, kind, number, replica=self.groups.dp_cp.rank())
        with together():
            journal = StepJournal(path, weights, routing=rl.routing_replay, writes=self.judges)
        return journal


def _fits(sample: Sample, prompt: tuple[int, ...], plan: _Plan) -> bool:
    """Whether the journal's sample is what would be asked for now: options may have been changed since."""
    sampling = plan.sampling
    ended = Running(0, Request(prompt, 0, sampling))
    for token, logprob in zip(sample.response, sample.logprobs.tolist(), strict=True):
        if ended.done:
            return False
        ended.take(token, logprob)
    return tuple(sample.prompt) == prompt and ended.result.finish_reason == sample.finish_reason


def _of_task(sample: Sample, task: Task) -> Sample:
    """With `task` as it is now; its verdict, if that was on another."""
    if _as_json(sample.task) == _as_json(task):
        return sample
    return replace(sample, task=task, reward=None, reward_error=None, parts={})


def _as_json(task: Task) -> str:
    return json.dumps([task.reward, task.task])


def _make_folder(path: str | None) -> None:
    try:
        if path is not None:
            Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"rl.journal={path} cannot be made: {error.strerror}; name another folder.") from None
