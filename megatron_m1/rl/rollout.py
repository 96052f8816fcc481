"""From tasks to judged samples: generation in the training modules, rewards, dynamic sampling."""

import contextlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_m1.checkpoint.together import from_rank_0, together
from megatron_m1.config.errors import ConfigError
from megatron_m1.config.schema import Config
from megatron_m1.data.tokenizer import Tokenizer
from megatron_m1.engine.trainer import Trainer
from megatron_m1.generation.engine import Engine
from megatron_m1.generation.reference import ReferenceEngine
from megatron_m1.generation.requests import Request, Sampling, request_seed
from megatron_m1.rl.advantages import informative_samples
from megatron_m1.rl.evaluation import Estimate, avg_at_k
from megatron_m1.rl.journal import Journal, read_journal
from megatron_m1.rl.phases import Phases
from megatron_m1.rl.rewards.pool import RewardPool, TooManyRewardErrors
from megatron_m1.rl.rewards.protocol import RewardRequest, RewardResult
from megatron_m1.rl.samples import Sample, from_record, sample_of, to_record
from megatron_m1.rl.schedule import length_quantile
from megatron_m1.rl.tasks import TaskMix

__all__ = ["Collected", "Rollouts"]


@dataclass
class Collected:
    """What a step trains on, and all that was sampled for it.

    samples: kept ones, whole groups in order.  everything: with those left out.  from_journal: how many were not generated anew.
    groups, discarded: prompts sampled, and those whose samples all had one reward.
    """

    samples: list[Sample] = field(default_factory=list)
    everything: list[Sample] = field(default_factory=list)
    from_journal: int = 0
    groups: int = 0
    discarded: int = 0

    def figures(self) -> dict[str, float]:
        """For the log: means over all that was sampled."""
        rewards = [sample.reward for sample in self.everything if sample.reward is not None]
        lengths = [len(sample.response) for sample in self.everything]
        total = max(len(self.everything), 1)
        return {
            "reward": sum(rewards) / max(len(rewards), 1),
            "reward_errors": len(self.everything) - len(rewards),
            "response_tokens_mean": sum(lengths) / total,
            "response_tokens_p99": length_quantile(lengths, 0.99),
            "truncated_share": sum(sample.truncated for sample in self.everything) / total,
            "sampled": len(self.everything),
            "kept": len(self.samples),
            "discard_rate": self.discarded / max(self.groups, 1),
            "from_journal": self.from_journal,
        }


class Rollouts:
    """Samples of the weights as they are at the time of the call. Every method is collective over the world, and every rank gets
    the same; rewards are computed under rank 0, by `rl.reward_workers` processes. Use it as a context manager.

    Raises ConfigError for tasks, a tokenizer or rewards that cannot be used.
    """

    def __init__(self, config: Config, trainer: Trainer) -> None:
        self.config, self.trainer, self.groups = config, trainer, trainer.groups
        rl, training = config.rl, config.training
        assert config.data.tokenizer is not None, "validate_rl() demands it"
        self.pool: RewardPool | None = None
        with together():
            self.tokenizer = Tokenizer(config.data.tokenizer, model_vocab_size=config.model.vocab_size)
            self.tasks = TaskMix(rl, seed=training.seed)
            if dist.get_rank() == 0:
                self.pool = RewardPool(
                    self.tasks.rewards(),
                    workers=rl.reward_workers,
                    timeout_s=rl.reward_timeout_s,
                    max_error_share=rl.reward_max_error_share,
                )
                if rl.journal is not None:
                    Path(rl.journal).mkdir(parents=True, exist_ok=True)
        end = config.data.eod_token_id if config.data.eod_token_id is not None else self.tokenizer.eod_id
        self.sampling = Sampling(max_new_tokens=rl.max_new_tokens, end_tokens=() if end is None else (end,))
        self.prompts_per_step = training.global_batch * rl.updates_per_batch // rl.samples_per_prompt

    def collect(self, step: int, phases: Phases) -> Collected:
        """The generation batch of step `step` (0-based): `prompts_per_step` groups whose rewards differ, or as many as
        `rl.refills` further rounds give; without dynamic sampling all groups of one round."""
        rl, wanted = self.config.rl, self.prompts_per_step
        weights, out, kept_groups = self._weights_version(step), Collected(), 0
        finished = self._journaled(step, weights)
        first = step * wanted * (1 + rl.refills)
        for _ in range(1 + rl.refills):
            prompts = range(first + out.groups, first + out.groups + wanted - kept_groups)
            with phases.measure("rollout"):
                samples = self._generate(prompts, finished, weights, journal=self._journal_path(step))
            out.from_journal += sum(sample.number in finished for sample in samples)
            with phases.measure("reward"):
                samples = self._judge(samples)
            kept = self._informative(samples)
            kept_now = len({sample.group for sample in kept})
            out.samples += kept
            out.everything += samples
            out.groups += len(prompts)
            out.discarded += len(prompts) - kept_now
            kept_groups += kept_now
            if not rl.dynamic_sampling or kept_groups >= wanted:
                break
        return out

    def held_out(self) -> Estimate:
        """avg@k over the held-out prompts, always the same ones with the same seeds; a reward of 1 counts as right.

        Samples with a reward_error are left out; raises ConfigError if a prompt has no other.
        """
        rl = self.config.rl
        samples = self._judge(self._generate(range(rl.held_out_prompts), {}, "", journal=None, held_out=True))
        right: dict[int, list[bool]] = {sample.group: [] for sample in samples}
        for sample in samples:
            if sample.reward is not None:
                right[sample.group].append(sample.reward >= 1.0)
        if not all(right.values()):
            raise ConfigError("A held-out prompt has no sample that could be judged; mend its reward or task data.")
        return avg_at_k(list(right.values()))

    def close(self) -> None:
        """End the reward workers."""
        if self.pool is not None:
            self.pool.close()

    def __enter__(self) -> "Rollouts":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _generate(
        self,
        prompts: range,
        finished: dict[int, Sample],
        weights: str,
        *,
        journal: Path | None,
        held_out: bool = False,
    ) -> list[Sample]:
        """Samples of the tasks `prompts`, those of `finished` taken over; the others go to the journal as they end."""
        rl = self.config.rl
        per_prompt = rl.held_out_samples if held_out else rl.samples_per_prompt
        seed = self.config.training.seed + held_out
        asked: list[tuple[Request, dict[str, Any]]] = []
        done: dict[int, Sample] = {}
        for prompt in prompts:
            task = self.tasks.task(prompt, held_out=held_out)
            ids = self.tokenizer.encode(task.prompt)
            self._check_length(task.prompt, ids)
            for number in range(prompt * per_prompt, (prompt + 1) * per_prompt):
                if number in finished:
                    done[number] = finished[number]
                    continue
                request = Request(tuple(ids), request_seed(seed, number), self.sampling)
                asked.append((request, {"number": number, "group": prompt, "task": task, "prompt": ids}))
        own: list[Sample] = []
        writes = self.groups.tp.rank() == 0 and self.groups.pp.rank() == 0 and journal is not None
        with Journal(journal, sync_every=0) if writes and journal else contextlib.nullcontext() as file:
            for index, result in self._engine().stream([request for request, _ in asked]):
                text = self.tokenizer.decode(result.tokens)
                sample = sample_of(result, **asked[index][1], weights=weights, text=text)
                if file is not None:
                    file.append(to_record(sample))
                own.append(sample)
        shares: list[list[Sample]] = [[] for _ in range(self.groups.dp_cp.size())]
        dist.all_gather_object(shares, own, group=self.groups.dp_cp)
        done |= {sample.number: sample for share in shares for sample in share}
        return [done[number] for number in sorted(done)]

    def _engine(self) -> Engine | ReferenceEngine:
        self.trainer.complete_parameters()
        if self.config.rl.engine == "reference":
            return ReferenceEngine(self.trainer.models, self.groups, tokens=self.config.training.seq_length)
        return Engine(self.trainer.models, self.groups, slots=self.config.rl.slots)

    def _check_length(self, prompt: str, ids: list[int]) -> None:
        most = self.config.training.seq_length - self.config.rl.max_new_tokens + 1
        if not 0 < len(ids) <= most:
            raise ConfigError(
                f"The prompt {prompt[:60]!r} has {len(ids)} tokens; training.seq_length={self.config.training.seq_length} and "
                f"rl.max_new_tokens={self.config.rl.max_new_tokens} leave room for 1 to {most}. Change one of them or the task."
            )

    def _judge(self, samples: list[Sample]) -> list[Sample]:
        verdicts: list[RewardResult] = []
        with together():
            if self.pool is not None:
                requests = [RewardRequest(s.task.reward, s.task.prompt, s.text, s.task.task) for s in samples]
                try:
                    verdicts = self.pool.score(requests)
                except TooManyRewardErrors as error:
                    raise ConfigError(str(error)) from None
        verdicts = from_rank_0(verdicts)
        return [sample.judged(verdict) for sample, verdict in zip(samples, verdicts, strict=True)]

    def _informative(self, samples: list[Sample]) -> list[Sample]:
        """The samples to train on. A truncated one counts as rl.truncated says."""
        rl = self.config.rl
        valid = [s.reward is not None and not (rl.truncated == "drop" and s.truncated) for s in samples]
        rewards = [0.0 if rl.truncated == "zero" and s.truncated else s.reward or 0.0 for s in samples]
        kept = torch.tensor(valid)
        if rl.dynamic_sampling:
            groups = torch.tensor([sample.group for sample in samples])
            kept, _ = informative_samples(torch.tensor(rewards), groups, valid=kept)
        return [sample for sample, keep in zip(samples, kept.tolist(), strict=True) if keep]

    def _weights_version(self, step: int) -> str:
        """Changes with any weight: the step and the sum of all bit patterns. In another layout it is another."""
        total = torch.zeros((), dtype=torch.int64, device=self.trainer.device)
        for tensor in self.trainer.parameters().values():
            bits = torch.int16 if tensor.element_size() == 2 else torch.int32
            total += tensor.detach().contiguous().view(bits).sum(dtype=torch.int64)
        dist.all_reduce(total)
        return f"{step}-{total.item() & (2**64 - 1):016x}"

    def _journal_path(self, step: int) -> Path | None:
        folder = self.config.rl.journal
        replica = self.groups.dp_cp.rank()
        return None if folder is None else Path(folder) / f"step_{step + 1:08d}.replica_{replica:05d}.jsonl"

    def _journaled(self, step: int, weights: str) -> dict[int, Sample]:
        """Finished samples of this step and these weights, by number; those of other weights are of no use."""
        found: dict[int, Sample] = {}
        folder = self.config.rl.journal
        with together():
            if dist.get_rank() == 0 and folder is not None:
                for path in sorted(Path(folder).glob(f"step_{step + 1:08d}.replica_*.jsonl")):
                    for record in read_journal(path):
                        if record["weights"] == weights:
                            found[record["number"]] = from_record(record)
        return from_rank_0(found)
