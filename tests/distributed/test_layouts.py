"""Every parallel layout gives the numbers of one rank: the table of `python -m megatron_m1 equality` as tests, and its mutants."""

from dataclasses import replace

import pytest
import torch

from megatron_m1.engine.equality import LAYOUTS, RankResult, compare, equality_config, run_layout
from megatron_m1.engine.trainer import Trainer
from megatron_m1.model.router import M1Router
from megatron_m1.parallel import destroy_groups, init_groups
from tests.distributed.mutants import MUTANTS, run_mutant

BOUND = 1e-5


@pytest.fixture(scope="module")
def reference(rank_pool) -> RankResult:
    return rank_pool.run(run_layout, (equality_config({}, {}),), world=1, timeout_s=300)[0]


@pytest.fixture(scope="module")
def first_step(rank_pool) -> RankResult:
    return rank_pool.run(run_layout, (equality_config({}, {}), 1), world=1, timeout_s=300)[0]


@pytest.mark.parametrize("name", [name for name, (_, parallel, _) in LAYOUTS.items() if "context" not in parallel])
def test_layout_equals_one_rank(name, ranks, reference):
    world, parallel, training = LAYOUTS[name]
    d = compare(reference, ranks(world, run_layout, equality_config(parallel, training), timeout_s=300))
    assert max(d.loss, d.grad_norm, d.aux_loss, d.gradient, d.weight) <= BOUND, d


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.__name__)
def test_mutant_is_noticed_in_the_first_step(mutant, ranks, first_step):
    world, parallel, training = LAYOUTS[MUTANTS[mutant]]
    d = compare(
        first_step, ranks(world, run_mutant, equality_config(parallel, training), mutant.__name__, 1, timeout_s=300)
    )
    assert not max(d.loss, d.grad_norm, d.aux_loss, d.gradient, d.weight) <= BOUND, d


def _closest_choice(rank: int, world: int, config) -> float:
    """Smallest relative gap between the logit weights of the last expert chosen and of the first one passed over."""
    gaps = []

    def watch(module, inputs, _):
        if isinstance(module, M1Router):
            hidden = inputs[0].flatten(end_dim=-2).float()
            odds = torch.nn.functional.linear(hidden, module.weight).softmax(-1).sort(dim=-1, descending=True).values
            gaps.append(float((odds[:, module.topk - 1] / odds[:, module.topk] - 1).min()))

    handle = torch.nn.modules.module.register_module_forward_hook(watch)
    try:
        run_layout(rank, world, config)
    finally:
        handle.remove()
    return min(gaps)


@pytest.mark.parametrize("dense", [False, True])
def test_no_routing_decision_is_left_to_rounding(dense, ranks):
    """A tie goes one way in one layout and the other way in another: a difference that no bound on rounding covers."""
    assert ranks(1, _closest_choice, equality_config({}, {"dense": dense}))[0] > 1e-4


def _global_aux_steps(rank: int, world: int, config) -> list[tuple[float, float, float]]:
    """Two steps whose micro-batches run at the same time: rows (2k, 2k+1) on one rank, or one each on two."""
    groups = init_groups(config.parallel, seed=1)
    trainer = Trainer(config, groups)
    rows = torch.randint(0, 96, (8, 33), generator=torch.Generator().manual_seed(3))
    size = config.training.micro_batch
    figures = []
    for _ in range(2):
        batches = []
        for start in range(groups.dp.rank() * size, 8, groups.dp.size() * size):
            ids = rows[start : start + size]
            batches.append(
                {
                    "tokens": ids[:, :-1],
                    "labels": ids[:, 1:],
                    "loss_mask": torch.ones(size, 32),
                    "position_ids": torch.arange(32).expand(size, 32),
                }
            )
        result = trainer.train_step(batches, lr=1e-3)
        figures.append((result.loss, result.grad_norm, result.aux_loss))
    destroy_groups()
    return figures


def _with_global_aux(parallel: dict, micro_batch: int):
    config = equality_config(parallel, {"micro_batch": micro_batch})
    config.moe = replace(config.moe, aux_loss="global", aux_loss_coefficient=0.1)
    return config


@pytest.fixture(scope="module")
def global_aux_of_one(rank_pool) -> torch.Tensor:
    return torch.tensor(rank_pool.run(_global_aux_steps, (_with_global_aux({}, 2),), world=1)[0])


@pytest.mark.parametrize(
    ("world", "parallel", "micro_batch"),
    [(2, {}, 1), (2, {"expert": 2}, 1), (4, {"tensor": 2}, 1), (2, {"pipeline": 2}, 2)],
)
def test_global_balance_statistics_span_what_runs_together(world, parallel, micro_batch, ranks, global_aux_of_one):
    for figures in ranks(world, _global_aux_steps, _with_global_aux(parallel, micro_batch)):
        torch.testing.assert_close(torch.tensor(figures), global_aux_of_one, rtol=1e-5, atol=0)


def test_bf16_layouts_stay_within_the_band_of_seeds(ranks):
    """bf16 with fp32 main weights: layouts differ less among each other than seeds do."""

    def losses(world: int, parallel: dict, seed: int = 7) -> torch.Tensor:
        config = equality_config(parallel, {"seed": seed}, precision="bf16")
        return torch.tensor(ranks(world, run_layout, config)[0].losses)

    one = losses(1, {})
    band = max(float((losses(1, {}, seed=seed) - one).abs().max()) for seed in (8, 9))
    for world, parallel in ((2, {"tensor": 2}), (2, {"pipeline": 2}), (2, {"expert": 2}), (2, {})):
        assert float((losses(world, parallel) - one).abs().max()) < 0.25 * band
