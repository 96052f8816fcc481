"""Layer statistics against sums taken by hand from the whole tensors, and the same in every layout."""

import pytest
import torch

from megatron_m1.config.schema import Config, DataConfig, ModelConfig, ParallelConfig, TrainingConfig

MODEL = ModelConfig(
    vocab_size=64, hidden_size=32, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
    intermediate_size=32, num_local_experts=4, attn_type_list=[0, 0, 1, 0], rotary_dim=4, shared_intermediate_size=16,
)  # fmt: skip
HEADS, LAYERS = 4, 4


def one_step(rank, world, parallel, by_hand=False):
    """Statistics of a step; by_hand: also every weight before, its gradient, and the weight after."""
    from megatron_m1.data.batches import MicroBatches
    from megatron_m1.data.dataset import build_dataset
    from megatron_m1.engine.layer_stats import LayerStats
    from megatron_m1.engine.trainer import Trainer
    from megatron_m1.parallel import init_groups

    config = Config(
        model=MODEL,
        parallel=ParallelConfig(**parallel),
        training=TrainingConfig(micro_batch=1, global_batch=4, seq_length=16, precision="fp32"),
        data=DataConfig(mock=True),
    )
    groups = init_groups(config.parallel, seed=1)
    trainer = Trainer(config, groups)
    dataset = build_dataset(config.data, seq_length=16, seed=1, split="train", vocab_size=64)
    share = MicroBatches(dataset, document_boundaries="reset").step(0, 4, 1, groups.dp.rank(), groups.dp.size())
    stats = LayerStats(trainer)
    stats.prepare()
    loss, tokens = trainer.forward_backward(share)
    stats.before_update()
    assert trainer.force_all_reduce is False
    tensors = {}
    if by_hand:
        tensors = {
            name: (weight.detach().double().clone(), weight.main_grad.double().clone())
            for name, weight in trainer.parameters().items()
        }
    result = trainer.update(loss, tokens, lr=1e-2)
    figures = stats.after_update()
    after = {name: weight.detach().double() for name, weight in trainer.parameters().items()} if by_hand else {}
    return figures, result.grad_norm, {name: (*tensors[name], after[name]) for name in tensors}


def slope(layer, head):
    """The released model's decay per token, for a number of heads that is a power of two."""
    return 2.0 ** (-8.0 * (head + 1) / HEADS) * (1 - layer / (LAYERS - 1) + 1e-5)


def group_by_hand(name):
    parts = name.split(".")
    if parts[0] == "decoder" and parts[1] == "layers":
        return f"layer_{int(parts[2]):03d}"
    return "embedding" if parts[0] == "embedding" else "output"


@pytest.fixture(scope="module")
def reference(rank_pool):
    return rank_pool.run(one_step, ({}, True), world=1, timeout_s=120)[0]


def test_norms_and_ratios_are_those_of_the_whole_tensors(reference):
    figures, grad_norm, tensors = reference
    squares = {key: torch.zeros(3, dtype=torch.float64) for key in figures["grad_norm"]}
    for name, (before, gradient, after) in tensors.items():
        parts = (gradient, after - before, before)
        squares[group_by_hand(name)] += torch.stack([part.square().sum() for part in parts])
        layer = int(name.split(".")[2]) if "layers" in name else None
        if name.endswith("self_attention.qkv_proj.weight") and MODEL.attn_type_list[layer] == 0:
            for head in range(HEADS):
                edge = next((edge for edge in ("1e-3", "1e-2", "1e-1") if slope(layer, head) < float(edge)), None)
                key = "slope>=1e-1" if edge is None else f"slope<{edge}"
                rows = [part.view(HEADS, -1)[head] for part in parts]
                squares[key] += torch.stack([row.square().sum() for row in rows])
    for key, (gradient, update, weight) in squares.items():
        assert figures["grad_norm"][key] == pytest.approx(gradient.sqrt().item(), rel=1e-9), key
        assert figures["update_ratio"][key] == pytest.approx((update / weight).sqrt().item(), rel=1e-9), key
        assert figures["grad_norm"][key] > 0, key
    whole = [value for key, value in squares.items() if not key.startswith("slope")]
    assert sum(value[0] for value in whole).sqrt().item() == pytest.approx(grad_norm, rel=1e-6)


@pytest.mark.parametrize(
    "world, parallel",
    [
        (2, {"tensor": 2}),
        (2, {"tensor": 2, "sequence": False}),
        (2, {"tensor": 2, "expert_tensor": 1}),
        (2, {"pipeline": 2}),
        (2, {"expert": 2}),
        (2, {}),
        (2, {"distributed_optimizer": False}),
        (4, {"tensor": 2, "expert": 2, "expert_tensor": 1}),
    ],
    ids=str,
)
def test_every_layout_has_the_figures_of_one_rank(ranks, reference, world, parallel):
    for figures, _, _ in ranks(world, one_step, parallel):
        for kind in ("grad_norm", "update_ratio"):
            assert figures[kind] == pytest.approx(reference[0][kind], rel=2e-5), kind
