"""Sequences over several ranks: lightning attention, the whole model, checkpoints."""

from dataclasses import replace
from unittest.mock import patch

import pytest
import torch

from megatron_m1.engine import batch as batch_module
from megatron_m1.engine import trainer as trainer_module
from megatron_m1.engine.equality import (
    LAYOUTS,
    RankResult,
    compare,
    equality_batches,
    equality_config,
    run_layout,
)
from megatron_m1.parallel import destroy_groups, init_groups, lightning_exchange
from megatron_m1.parallel.sequence_layout import SequenceLayout
from megatron_m1.parallel.traffic import Traffic
from tests.distributed import checkpoint_runs
from tests.distributed.lightning_cases import (
    differences,
    exchanged_states,
    in_bf16,
    limited_and_unlimited,
)

BOUND = 1e-5
STEPS = 1
# The others: python -m megatron_m1 equality --only CP --ranks 8
TESTED = (
    "CP2, ring",
    "CP2, all-gather, dense",
    "CP4, all-gather",
    "CP4, ring, dense",
    "CP2xTP2",
    "CP2xPP2, VPP2",
    "CP2xEP2",
    "CP2, ring, recompute full",
    "CP2, by document",
    "CP2xPP2, by document",
    "CP8, EP4, all-gather",
    "CP2xTP2xPP2",
)


@pytest.mark.parametrize("world", [1, 2, 3, 4, 8])
def test_lightning_attention_equals_one_rank_in_fp64(world, ranks):
    for found in ranks(world, differences):
        assert max(found.values()) < 1e-12, found


def test_lightning_attention_in_bf16_sends_fp32_states(ranks):
    for found in ranks(2, in_bf16):
        for error, as_fp32 in found.values():
            # One rounding is 1.7e-3; parts of two pieces are rounded one by one.
            assert error < 5e-3 and as_fp32, found


@pytest.mark.parametrize("world", [2, 4, 8])
def test_ring_and_all_gather_give_the_same_bits(world, ranks):
    for results in ranks(world, exchanged_states):
        assert all(torch.equal(ring, gathered) for ring, gathered in results)


def test_horizon_leaves_heads_out_and_changes_no_bit(ranks):
    found = ranks(4, limited_and_unlimited)
    assert all(limits.same for of_rank in found for limits in of_rank.values())
    for of_rank in found:
        gathered = of_rank["one document", "all_gather"]
        # A chunk has 6 tokens: slopes 20 and 120 are beyond 104 / 6, 9, 3 and 0.01 are not; once forward, once back.
        assert (gathered.limited.neighbour_heads, gathered.limited.chained_heads) == (2 * 2, 2 * 3)
        assert gathered.limited.sent_bytes < gathered.unlimited.sent_bytes
    inner = found[1]
    # Two borders each way, none of them in front of the first chunk forward, or behind the last back.
    assert (inner["one document", "ring"].limited.neighbour_heads) == 2 * (2 * 2)
    assert inner["one document", "ring"].unlimited.neighbour_heads == 0
    # Where no document has more than one border every head goes to the neighbour alone, and no collective is needed.
    alone = inner["crosses one border at most", "all_gather"].limited
    assert alone.chained_heads == 0 and alone.messages == 2 * 2
    assert inner["no document crosses a border", "ring"].limited == Traffic()


@pytest.fixture(scope="module")
def references(rank_pool) -> dict[bool, RankResult]:
    """One rank's result on dense rows, and on packs."""
    return {
        dense: rank_pool.run(run_layout, (equality_config({}, {"dense": dense}), STEPS), world=1)[0]
        for dense in (True, False)
    }


def worst(reference: RankResult, results: list[RankResult]) -> float:
    d = compare(reference, results)
    figures = (d.loss, d.grad_norm, d.aux_loss, d.gradient, d.weight)
    return max(figures) if all(figure == figure for figure in figures) else float("nan")


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("method", ["ring", "all_gather"])
@pytest.mark.parametrize(
    "sizes", [{"context": 2}, {"context": 4}, *({"context": 2, other: 2} for other in ("tensor", "pipeline", "expert"))]
)
def test_the_table_has_every_combination(sizes, method, dense):
    """Sequence parallelism and virtual stages aside; both layer kinds by one method."""
    wanted = {**sizes, "context_lightning": method, "context_softmax": method}
    aside = {"sequence", "virtual_pipeline"}
    assert any(
        {key: value for key, value in parallel.items() if key not in aside} == wanted
        and training == ({"dense": True} if dense else {})
        for _, parallel, training in LAYOUTS.values()
    )


@pytest.mark.parametrize("name", TESTED)
def test_layout_equals_one_rank(name, ranks, references):
    world, parallel, training = LAYOUTS[name]
    results = ranks(world, run_layout, equality_config(parallel, training), STEPS)
    assert worst(references[bool(training.get("dense"))], results) <= BOUND


def scores(rank: int, world: int, config) -> list[torch.Tensor]:
    """Log-probabilities of every label of the first step's micro-batches."""
    groups = init_groups(config.parallel, seed=config.training.seed)
    found = trainer_module.Trainer(config, groups, train=False).score(equality_batches(config, 0))
    destroy_groups()
    return [part.cpu() for part in found]


@pytest.mark.parametrize(("layout", "dense"), [("sequence", False), ("document", False), ("sequence", True)])
def test_scores_equal_one_rank(layout, dense, ranks):
    whole = ranks(1, scores, equality_config({}, {"dense": dense}))[0]
    for found in ranks(2, scores, equality_config({"context": 2, "context_layout": layout}, {"dense": dense})):
        for a, b in zip(found, whole, strict=True):
            torch.testing.assert_close(a, b, rtol=BOUND, atol=BOUND)


def _entry_states_dropped():
    return patch.object(lightning_exchange._Travel, "in_callers_order", lambda self, states: torch.zeros_like(states))


def _passed_states_do_not_decay():
    plain = lightning_exchange._Travel.begin

    def mutant(self, states):
        plain(self, states)
        self.decays.fill_(1.0)

    return patch.object(lightning_exchange._Travel, "begin", mutant)


def _positions_count_local_tokens():
    plain = batch_module.MicroBatch.from_dict.__func__

    def mutant(cls, batch, device, **options):
        micro = plain(cls, batch, device, **options)
        return replace(micro, position_ids=torch.arange(micro.tokens.shape[1], device=device).expand_as(micro.tokens))

    return patch.object(batch_module.MicroBatch, "from_dict", classmethod(mutant))


def _tokens_counted_once_per_context_rank():
    def mutant(self, micro_batches):
        return self.groups.cp.size() * sum(int(batch["loss_mask"].sum()) for batch in micro_batches)

    return patch.object(trainer_module.Trainer, "_global_tokens", mutant)


def _contiguous_chunks():
    return patch.object(SequenceLayout, "partition", lambda self, x, dim: x.chunk(self.world, dim)[self.rank])


MUTANTS = {
    mutant.__name__: mutant
    for mutant in (
        _entry_states_dropped,
        _passed_states_do_not_decay,
        _positions_count_local_tokens,
        _tokens_counted_once_per_context_rank,
        _contiguous_chunks,
    )
}


def run_mutants(rank: int, world: int, config) -> dict[str, RankResult]:
    results = {}
    for name, mutant in MUTANTS.items():
        with mutant():
            results[name] = run_layout(rank, world, config, STEPS)
    return results


def test_mutants_are_noticed(ranks, references):
    parallel = {"context": 2, "context_lightning": "ring", "context_softmax": "ring"}
    found = ranks(2, run_mutants, equality_config(parallel, {}))
    for name in MUTANTS:
        assert not worst(references[False], [of_rank[name] for of_rank in found]) <= BOUND, name


def test_checkpoint_moves_between_layouts(ranks, tmp_path):
    """One step without context parallelism, one with, one without: as three steps on one rank."""
    whole = ranks(1, checkpoint_runs.train, checkpoint_runs.tiny_config(tmp_path / "1"), 3, (1,))[0].steps
    for world, step in ((2, 2), (1, 3)):
        config = checkpoint_runs.tiny_config(tmp_path / str(step), tmp_path / str(step - 1), context=world)
        config.checkpoint.load += f"/step_{step - 1:08d}"
        for run in ranks(world, checkpoint_runs.train, config, step, (step,)):
            assert run.start == step - 1
            torch.testing.assert_close(
                torch.tensor(run.steps), torch.tensor(whole[step - 1 : step]), rtol=BOUND, atol=0
            )
