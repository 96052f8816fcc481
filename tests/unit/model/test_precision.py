"""What stays in fp32 when the model computes in bf16, and weights that depend on their names only."""

import torch

from megatron_m1.engine.equality import equality_config
from megatron_m1.model.build import build_model, lightning_layers, sharded_parameters
from megatron_m1.model.softmax import apply_rotary, rotary_table
from megatron_m1.parallel import destroy_groups, init_groups


def _dtypes(rank: int, world: int) -> dict:
    config = equality_config({}, {}, precision="bf16")
    models = build_model(config, init_groups(config.parallel, seed=1))
    dtypes = {name: sharded.data.dtype for name, sharded in sharded_parameters(models).items()}
    slopes = {layer: s.dtype for layer, s in lightning_layers(models).items()}
    logits = models[0](torch.arange(8)[None], torch.arange(8)[None])
    return {"parameters": dtypes, "slopes": slopes, "logits": logits.dtype}


def test_router_head_and_slopes_stay_fp32(ranks):
    found = ranks(1, _dtypes)[0]
    fp32 = {name for name, dtype in found["parameters"].items() if dtype == torch.float32}
    assert fp32 == {"output_layer.weight"} | {f"decoder.layers.{i}.mlp.router.weight" for i in range(4)}
    assert set(found["slopes"].values()) == {torch.float32}
    assert found["logits"] == torch.float32


def test_rotary_is_fp32_and_partial():
    positions = torch.tensor([[0, 1, 1_000_003]])
    table = rotary_table(positions, 4, 1e7)
    angle = 1_000_003 * torch.tensor([1.0, 1e7 ** (-0.5)], dtype=torch.float64)
    torch.testing.assert_close(table[0, 0, 2, 0].double(), angle.cos(), rtol=0, atol=1e-1)
    assert table.dtype == torch.float32
    x = torch.randn(1, 3, 2, 6, dtype=torch.bfloat16)
    out = apply_rotary(x, table)
    assert out.dtype == x.dtype
    assert torch.equal(out[..., 4:], x[..., 4:])
    assert torch.equal(out[:, 0], x[:, 0])
    assert not torch.equal(out[:, 1, :, :4], x[:, 1, :, :4])


def _weights(rank: int, world: int, parallel: dict) -> dict:
    config = equality_config(parallel, {})
    models = build_model(config, init_groups(config.parallel, seed=1))
    shards = {n: (s.data.detach().clone(), s.global_offset) for n, s in sharded_parameters(models).items()}
    destroy_groups()
    return shards


def test_initial_weights_are_bitwise_those_of_one_rank(ranks):
    whole = ranks(1, _weights, {})[0]
    for world, parallel in (
        (2, {"tensor": 2}),
        (2, {"pipeline": 2}),
        (2, {"expert": 2}),
        (4, {"tensor": 2, "expert": 2, "expert_tensor": 1}),
    ):
        for shards in ranks(world, _weights, parallel):
            for name, (local, offset) in shards.items():
                window = tuple(slice(o, o + n) for o, n in zip(offset, local.shape, strict=True))
                assert torch.equal(local, whole[name][0][window]), (parallel, name)


def test_experts_and_layers_differ(ranks):
    weights = {name: w for name, (w, _) in ranks(1, _weights, {})[0].items()}
    fc1 = weights["decoder.layers.0.mlp.experts.fc1"]
    assert not torch.equal(fc1[0], fc1[1]) and not torch.equal(fc1[0, 0], fc1[0, 1])
    assert not torch.equal(fc1, weights["decoder.layers.1.mlp.experts.fc1"])
