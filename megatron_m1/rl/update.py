"""Old log-probabilities and policy updates of one generation batch on the trainer."""

import contextlib
import operator
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial, reduce

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_m1.config.schema import Config, RLConfig
from megatron_m1.engine.batch import MicroBatch
from megatron_m1.engine.trainer import StepResult, Trainer
from megatron_m1.model.build import routers
from megatron_m1.model.experts import exact_experts
from megatron_m1.rl.advantages import group_advantages, overlong_penalty
from megatron_m1.rl.exchange import gathered, samples_from_replicas
from megatron_m1.rl.identity import IdentityStats
from megatron_m1.rl.losses import LossSettings, LossStats, Normalizer, policy_loss
from megatron_m1.rl.packing import Pack, assign, pack_samples
from megatron_m1.rl.samples import Facts, Sample, counted_reward, facts_of

__all__ = ["PolicyBatch", "split_groups"]


@dataclass
class UpdateResult:
    """Figures of one update, the same on every rank: the trainer's, and the loss's over all tokens."""

    step: StepResult
    stats: LossStats


class PolicyBatch:
    """The samples of one generation batch, cut into updates and packed once, so that scoring and the first update see one and the
    same micro-batches. The data-parallel ranks take turns in the samples of an update, and hold those alone.

    facts: of the samples to train on, each with a reward, the same on every rank; by its place in it, its index, a sample is known
    here.  samples: of these and others, those that this rank's replica generated, for the ranks that train on them. Without `facts`
    they are the whole batch, on every rank.
    """

    def __init__(
        self,
        trainer: Trainer,
        config: Config,
        samples: Sequence[Sample],
        *,
        settings: LossSettings,
        facts: Sequence[Facts] | None = None,
    ) -> None:
        self.trainer, self.settings = trainer, settings
        self.facts = [facts_of(sample) for sample in samples] if facts is None else list(facts)
        self.advantages = _advantages(self.facts, config.rl)
        self.exact = config.rl.engine == "reference"
        groups = torch.tensor([sample.group for sample in self.facts])
        lengths = torch.tensor([sample.length for sample in self.facts])
        self.updates = split_groups([sample.group for sample in self.facts], config.rl.updates_per_batch)
        self.samples = self._share(samples)
        self.normalizers = []
        for chosen in self.updates:
            self.normalizers.append(
                Normalizer.for_batch(
                    lengths[chosen],
                    groups[chosen],
                    normalization=settings.normalization,
                    sample_share=settings.sample_share,
                )
            )
        self.packs = [self._packs(config, chosen) for chosen in self.updates]
        self.old: dict[int, Tensor] = {}
        self.routing_replayed, self.routing_changed_share = 0.0, 0.0
        """Choices of the routers, over tokens and layers, that `score` replayed, and the share in which it would have chosen otherwise."""
        self._capped: dict[int, Tensor] = {}

    def score(self) -> IdentityStats:
        """Take the log-probabilities of all samples under the weights as they are for pi_old of the updates that follow; how far
        they are from what the engine said."""
        own: dict[int, Tensor] = {}
        packs = [pack for packs in self.packs for pack in packs]
        for router in routers(self.trainer.models):
            router.replay_counts.zero_()
        with self._bits():
            for pack, scores in zip(packs, self.trainer.score([pack.batch for pack in packs]), strict=True):
                own |= pack.take(scores)
        self.old = own
        self._count_replayed()
        return self._identity()

    def update(self, number: int, *, lr: float) -> UpdateResult:
        """Update `number` of the batch: gradients of the policy loss over its samples, clipped, and one AdamW step."""
        loss, stats = self.gradients(number)
        return UpdateResult(self.trainer.update(loss, int(stats.tokens.item()), lr=lr), stats)

    def gradients(self, number: int) -> tuple[float, LossStats]:
        """(loss, statistics) of the samples of update `number`; the gradients end in the data-parallel buffers."""
        values: dict[str, dict[int, Tensor]] = {"old_logp": self.old, "advantage": {}, "token_weight": {}}
        if self.settings.correction_cap is not None:
            values["rollout_logp"] = {i: torch.from_numpy(sample.logprobs) for i, sample in self.samples.items()}
        for row, index in enumerate(self.updates[number]):
            if index not in self.samples:
                continue
            ones = torch.ones(self.facts[index].length)
            values["advantage"][index] = ones * self.advantages[index].float()
            values["token_weight"][index] = ones * self.normalizers[number].weights[row].float()
        batches = [pack.with_values(values) for pack in self.packs[number]]
        with self._bits():
            capped: list[Tensor] = []
            loss_of = partial(_token_loss, settings=self.settings, capped=capped, context=self.trainer.groups.cp)
            figures = self.trainer.accumulate_gradients(batches, loss=loss_of, figures=8)
        if capped:  # on the last pipeline stage
            for pack, marks in zip(self.packs[number], capped, strict=True):
                self._capped |= pack.take(marks)
        loss, *sums = figures.cpu().unbind()
        return loss.item(), LossStats(*sums)

    def capped(self, numbers: Collection[int]) -> dict[int, Tensor]:
        """On rank 0: of the samples `numbers` those trained on, by number -> bool [response tokens], True where the importance weight
        hit the cap in its update. Collective over the world."""
        own = {self.facts[index].number: marks for index, marks in self._capped.items()}
        shares = gathered({number: marks for number, marks in own.items() if number in numbers})
        return {number: marks for share in shares for number, marks in share.items()}

    def figures(self, results: Sequence[UpdateResult]) -> dict[str, float]:
        """Of all updates together, for the log; of the first alone `first_is_weight`, the mean importance weight, and
        `first_off_policy_share`, tokens whose ratio is not exactly 1: none where scoring and update have the same bits."""
        total, first = reduce(operator.add, (result.stats for result in results)), results[0].stats.means()
        norms = [result.step.grad_norm for result in results]
        return total.means() | {
            "loss": sum(result.step.loss for result in results) / len(results),
            "grad_norm": sum(norms) / len(norms),
            "grad_norm_max": max(norms),
            "updates": len(results),
            "loss_tokens": sum(result.step.tokens for result in results),
            "first_is_weight": first["mean_is_weight"],
            "first_off_policy_share": first["off_policy_share"],
            "expert_load_max": max(float(result.step.expert_load.max()) for result in results),
            "routing_replayed": self.routing_replayed,
            "routing_changed_share": self.routing_changed_share,
        }

    def _count_replayed(self) -> None:
        counts = torch.zeros(2, dtype=torch.float64, device=self.trainer.device)
        for router in routers(self.trainer.models):
            counts += router.replay_counts.to(self.trainer.device)
        dist.all_reduce(counts)
        replayed, changed = counts.tolist()
        self.routing_replayed, self.routing_changed_share = replayed, changed / max(replayed, 1.0)

    def _share(self, samples: Sequence[Sample]) -> dict[int, Sample]:
        """Index -> sample of those that this data-parallel rank trains on, out of all replicas' `samples`."""
        groups = self.trainer.groups
        chosen = [index for update in self.updates for index in update[groups.dp.rank() :: groups.dp.size()]]
        numbers = {self.facts[index].number: index for index in chosen}
        kept = {facts.number for facts in self.facts}
        own = [sample for sample in samples if sample.number in kept]
        found = samples_from_replicas(own, numbers, replicas=groups.dp_cp)
        assert found.keys() == numbers.keys(), f"samples {sorted(numbers.keys() - found.keys())[:5]} are on no replica"
        return {numbers[number]: sample for number, sample in found.items()}

    def _identity(self) -> IdentityStats:
        """Of the samples of all data-parallel ranks; the same on every rank."""
        own, group = IdentityStats(), self.trainer.groups.dp
        for index in sorted(self.samples):
            scored = self.old[index]
            rollout = torch.from_numpy(self.samples[index].logprobs)
            own = own.merge(IdentityStats.of(rollout, scored, torch.ones_like(scored, dtype=torch.bool)))
        row = own.to_tensor().to(self.trainer.device)
        rows = [torch.empty_like(row) for _ in range(group.size())]
        dist.all_gather(rows, row, group=group)
        return IdentityStats.from_tensors(torch.stack(rows))

    def _packs(self, config: Config, chosen: list[int]) -> list[Pack]:
        """This data-parallel rank's micro-batches; all ranks have equally many."""
        dp, parallel, training = self.trainer.groups.dp, config.parallel, config.training
        shape = {"rows": training.micro_batch, "length": training.seq_length}
        packed = not self.exact
        tokens = [self.facts[index].prompt_length + self.facts[index].length - 1 for index in chosen]
        most = max(len(assign(tokens[rank :: dp.size()], **shape, packed=packed)) for rank in range(dp.size()))
        if parallel.virtual_pipeline > 1:
            most = -(-most // parallel.pipeline) * parallel.pipeline
        return pack_samples(self.samples, chosen[dp.rank() :: dp.size()], **shape, packs=max(most, 1), packed=packed)

    def _bits(self) -> contextlib.AbstractContextManager[None]:
        return exact_experts(self.trainer.models) if self.exact else contextlib.nullcontext()


def split_groups(groups: Sequence[int], updates: int) -> list[list[int]]:
    """Indices of the samples of each update: whole groups in order, nearly equally many; fewer updates than asked for where there
    are fewer groups."""
    order = list(dict.fromkeys(groups))
    parts = min(updates, len(order))
    part_of = {group: number * parts // len(order) for number, group in enumerate(order)}
    return [[index for index, group in enumerate(groups) if part_of[group] == part] for part in range(parts)]


def _advantages(facts: Sequence[Facts], rl: RLConfig) -> Tensor:
    """[samples] float64, from the rewards after penalties."""
    rewards = torch.tensor([counted_reward(sample, rl) for sample in facts], dtype=torch.float64)
    if rl.overlong_tokens:
        lengths = torch.tensor([sample.length for sample in facts])
        rewards += overlong_penalty(lengths, max_length=rl.max_new_tokens, cache_length=rl.overlong_tokens)
    groups = torch.tensor([sample.group for sample in facts])
    return group_advantages(rewards, groups, std=rl.advantage_std)


def _token_loss(
    nll: Tensor, *, batch: MicroBatch, settings: LossSettings, capped: list[Tensor], context: dist.ProcessGroup
) -> tuple[Tensor, Tensor, Tensor]:
    """Trainer.accumulate_gradients' loss: the part of these tokens, an unused count, [loss, LossStats] to sum.

    capped: takes the marks of the whole micro-batch, all context-parallel ranks' parts in order.
    """
    values = batch.per_token
    output = policy_loss(
        -nll.float(),
        values["old_logp"],
        values["advantage"],
        values["token_weight"],
        batch.loss_mask > 0,
        settings=settings,
        rollout_logp=values.get("rollout_logp"),
    )
    capped.append(batch.gather(output.capped, context))
    figures = torch.cat([output.loss.detach().double().view(1), output.stats.as_tensor()])
    return output.loss, torch.ones((), dtype=torch.int, device=nll.device), figures
