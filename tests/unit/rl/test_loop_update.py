"""The policy update on the trainer: one gradient whatever the layout, the packing and the micro-batch; a first ratio of 1."""

import copy
from dataclasses import replace

import pytest
import torch

from megatron_m1.config.schema import Config
from megatron_m1.engine import equality
from megatron_m1.engine.optimizer import set_gradient_clip
from megatron_m1.engine.trainer import Trainer
from megatron_m1.parallel import destroy_groups, init_groups
from megatron_m1.rl import update as update_module
from megatron_m1.rl.losses import PRESETS
from megatron_m1.rl.packing import pack_samples
from megatron_m1.rl.samples import facts_of
from megatron_m1.rl.update import PolicyBatch, split_groups
from tests.unit.rl.loop_cases import fixed_samples, tiny_config

BOUND = 1e-5
SETTINGS = replace(PRESETS["cispo"], is_weight_cap=1.2, correction_cap=2.0)


def gradients(rank: int, world: int, config: Config, variant: str | None = None) -> equality.RankResult:
    """Gradients of the second update with old log-probabilities off policy, so that caps act on many tokens."""
    groups = init_groups(config.parallel, seed=1)
    trainer = Trainer(copy.deepcopy(config), groups)
    trainer.force_all_reduce = True
    samples = fixed_samples()
    if variant == "samples apart":
        facts = [facts_of(sample) for sample in samples]
        own = [sample for sample in samples if sample.group % world == rank]
        policy = PolicyBatch(trainer, config, own, settings=SETTINGS, facts=facts)
        assert len(policy.samples) == len(samples) // world  # a rank holds what it trains on
    else:
        policy = PolicyBatch(trainer, config, samples, settings=SETTINGS)
    policy.score()
    for index in policy.old:
        noise = torch.randn(len(policy.old[index]), generator=torch.Generator().manual_seed(index))
        policy.old[index] = policy.old[index] + 0.3 * noise
    if variant == "local normaliser":
        own = {index for pack in policy.packs[1] for index, _, _ in pack.places}
        lengths = [policy.facts[i].length if i in own else 0 for i in policy.updates[1]]
        numbers = torch.tensor([policy.facts[i].group for i in policy.updates[1]])
        policy.normalizers[1] = update_module.Normalizer.for_batch(
            torch.tensor(lengths), numbers, normalization="per_group"
        )
    loss, stats = policy.gradients(1)
    result = equality.RankResult(
        losses=[loss], grad_norms=stats.as_tensor().tolist(), gradients=equality._shards(trainer, "main_grad")
    )
    destroy_groups()
    return result


def worst(reference: equality.RankResult, found: list[equality.RankResult]) -> float:
    assert all(result.grad_norms[:3] == reference.grad_norms[:3] for result in found)  # counts of tokens
    losses = max(equality._relative(result.losses, reference.losses) for result in found)
    return max(losses, equality._worst([result.gradients for result in found], reference.gradients)[0])


@pytest.fixture(scope="module")
def reference(rank_pool) -> equality.RankResult:
    (result,) = rank_pool.run(gradients, (tiny_config(),), world=1, timeout_s=60)
    tokens, capped = result.grad_norms[:2]
    assert 0.1 < capped / tokens < 0.9
    return result


@pytest.mark.parametrize(
    "world, parallel",
    [
        (2, {}),
        (2, {"tensor": 2}),
        (2, {"pipeline": 2}),
        (2, {"context": 2}),
        (2, {"context": 2, "context_layout": "document"}),
        (2, {"expert": 2}),
    ],
    ids=["DP2", "TP2", "PP2", "CP2", "CP2 by document", "EP2"],
)
def test_gradient_is_that_of_one_rank(world, parallel, ranks, reference):
    assert worst(reference, ranks(world, gradients, tiny_config(parallel), timeout_s=60)) <= BOUND


def test_gradient_does_not_depend_on_packing(ranks, reference):
    shorter = tiny_config()
    shorter.training.micro_batch = 1
    (found,) = ranks(1, gradients, shorter)
    assert 0 < worst(reference, [found]) <= BOUND  # other packs, other rounding
    assert worst(reference, ranks(1, gradients, tiny_config(engine="reference"))) <= BOUND


def test_samples_go_to_the_rank_that_trains_on_them(ranks, reference):
    assert worst(reference, ranks(2, gradients, tiny_config(), "samples apart")) <= BOUND


def norms_after_clipping(rank: int, world: int, config: Config, clip: float) -> tuple[float, float]:
    """Gradient norm that an update reports, and that of the gradients it used."""
    trainer = Trainer(copy.deepcopy(config), init_groups(config.parallel, seed=1))
    set_gradient_clip(trainer.optimizer, clip)
    policy = PolicyBatch(trainer, config, fixed_samples(), settings=SETTINGS)
    policy.score()
    reported = policy.update(0, lr=1e-3).step.grad_norm
    used = [parameter.main_grad.norm() for model in trainer.models for parameter in model.parameters()]
    destroy_groups()
    return reported, torch.stack(used).norm().item()


def test_the_gradient_clip_of_a_window_is_applied(ranks):
    ((norm, used),) = ranks(1, norms_after_clipping, tiny_config(), 1e9)
    assert used == pytest.approx(norm, rel=1e-5)
    ((norm, used),) = ranks(1, norms_after_clipping, tiny_config(), norm / 2)
    assert used == pytest.approx(norm / 2, rel=1e-4)


def test_a_normaliser_of_the_rank_alone_is_noticed(ranks, reference):
    with pytest.raises(AssertionError):
        assert worst(reference, ranks(2, gradients, tiny_config(), "local normaliser")) <= BOUND


def test_packs_hold_every_sample_once():
    samples = fixed_samples()
    packs = pack_samples(samples, [5, 2, 9, 14], rows=1, length=32, packs=6)
    assert len(packs) == 6 and [index for pack in packs for index, _, _ in pack.places] == [5, 2, 9, 14]
    for pack in packs:
        batch = pack.batch
        assert batch["tokens"].shape == (1, 32) and batch["cu_seqlens"][-1] == 32
        assert batch["loss_mask"].sum() == sum(count for _, _, count in pack.places)
        assert not (batch["loss_mask"].bool() & batch["padding_mask"]).any()
        for index, start, count in pack.places:
            sample = samples[index]
            assert batch["labels"].flatten()[start : start + count].tolist() == list(sample.response)
            assert batch["tokens"].flatten()[start].item() == sample.prompt[-1]
            assert batch["position_ids"].flatten()[start].item() == len(sample.prompt) - 1
    (pack,) = pack_samples(samples, [3], rows=4, length=64, packed=False)
    assert pack.batch["tokens"].shape == (1, 64) and "cu_seqlens" not in pack.batch
    row = torch.arange(1.0, len(samples[3].response) + 1)
    values = pack.with_values({"x": {3: row}})["per_token"]["x"]
    assert values.sum() == row.sum() and torch.equal(pack.take(values)[3], row)


def test_updates_are_whole_groups():
    groups = [7, 7, 3, 3, 3, 9, 9]
    assert split_groups(groups, 3) == [[0, 1], [2, 3, 4], [5, 6]]
    assert split_groups(groups, 2) == [[0, 1, 2, 3, 4], [5, 6]]
    assert split_groups(groups, 16) == split_groups(groups, 3)
