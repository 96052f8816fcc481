"""The name table against independently written layouts."""

import math

import pytest
import torch
from torch import Tensor

from megatron_m1.checkpoint.names import Piece, hf_tensors, join, native_layout, native_tensors, split
from tests.model_cases import CASES, ORACLE_ONLY_CASES, random_weights, weight_shapes

MODELS = CASES | ORACLE_ONLY_CASES
all_models = pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)


@all_models
def test_hf_names_and_shapes_are_the_released_ones(model):
    assert hf_tensors(model, "minimax_m1") == weight_shapes(model)


@all_models
def test_pieces_tile_every_native_tensor_exactly_once(model):
    for native in native_layout(model):
        data = torch.arange(math.prod(native.shape)).reshape(native.shape)
        found = torch.cat([part.flatten() for _, part in split(native, data, model)])
        assert torch.equal(found.sort().values, data.flatten()), native.name


@all_models
def test_join_undoes_split_for_the_whole_and_for_single_experts(model):
    for native in native_layout(model):
        data = torch.randn(native.shape)
        parts = {piece.name: part.clone() for piece, part in split(native, data, model)}

        def read(piece: Piece, parts: dict[str, Tensor] = parts) -> Tensor:
            return parts[piece.name]

        joined = join(native, read, model, start=0, stop=len(data), dtype=data.dtype)
        assert torch.equal(joined, data)
        if native.per_expert:
            one = join(native, read, model, start=2, stop=3, dtype=data.dtype)
            assert torch.equal(one, data[2:3])
            assert [p.expert for p, _ in split(native, data[2:3], model, start=2)] == [2] * (len(parts) // len(data))


@pytest.mark.parametrize("name", ["gqa_1", "gqa_8", "heads_6", "shared_expert"])
def test_native_layouts_are_those_of_the_model(name):
    model = MODELS[name]
    weights = random_weights(model, seed=1)
    native = {
        n.name: join(n, lambda p: weights[p.name], model, start=0, stop=n.shape[0], dtype=torch.float64)
        for n in native_layout(model)
    }
    D, G = model.head_dim, model.num_key_value_heads
    r = model.num_attention_heads // G
    for layer, kind in enumerate(model.layer_types()):
        ours, theirs = f"decoder.layers.{layer}.", f"model.layers.{layer}."
        for e in range(model.num_local_experts):
            expert = f"{theirs}block_sparse_moe.experts.{e}."
            assert torch.equal(native[ours + "mlp.experts.fc1"][e, 0], weights[expert + "w1.weight"])
            assert torch.equal(native[ours + "mlp.experts.fc1"][e, 1], weights[expert + "w3.weight"])
            assert torch.equal(native[ours + "mlp.experts.fc2"][e], weights[expert + "w2.weight"])
        assert torch.equal(native[ours + "mlp.router.weight"], weights[theirs + "block_sparse_moe.gate.weight"])
        attention = native[ours + "self_attention.qkv_proj.weight"]
        if kind == 0:
            assert torch.equal(attention, weights[theirs + "self_attn.qkv_proj.weight"])
            continue
        q, k, v = (weights[f"{theirs}self_attn.{x}_proj.weight"] for x in "qkv")
        for group in range(G):
            rows = attention[group * (r + 2) * D : (group + 1) * (r + 2) * D]
            assert torch.equal(rows[: r * D], q[group * r * D : (group + 1) * r * D])
            assert torch.equal(rows[r * D : (r + 1) * D], k[group * D : (group + 1) * D])
            assert torch.equal(rows[(r + 1) * D :], v[group * D : (group + 1) * D])
        if model.shared_intermediate_size:
            for x in ("gate", "up", "down"):
                name = f"shared_mlp.{x}_proj.weight"
                assert torch.equal(native[ours + name], weights[theirs + name])
            assert torch.equal(native[ours + "shared_mlp.coefficient.weight"], weights[theirs + "coefficient.weight"])


def test_router_and_head_are_stored_in_float32():
    stored = native_tensors(CASES["base"], torch.bfloat16)
    fp32 = {name for name, (_, dtype) in stored.items() if dtype == torch.float32}
    assert fp32 == {"output_layer.weight"} | {f"decoder.layers.{i}.mlp.router.weight" for i in range(4)}


def test_minimax_adds_four_decay_buffers_per_lightning_layer():
    model = CASES["base"]
    extra = hf_tensors(model, "minimax").keys() - hf_tensors(model, "minimax_m1").keys()
    assert len(extra) == 4 * 3
    assert {name.rsplit(".", 1)[1] for name in extra} == {"slope_rate", "query_decay", "key_decay", "diagonal_decay"}
