"""MiniMax-M1 at full size, counted without allocating anything."""

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_m1.checkpoint.names import hf_tensors, native_layout, native_tensors
from megatron_m1.config.load import from_yaml
from megatron_m1.config.schema import Config, ModelConfig, ParallelConfig
from megatron_m1.engine.distributed import init_distributed, shutdown_distributed
from megatron_m1.model.build import build_model, sharded_parameters
from megatron_m1.parallel import destroy_groups, init_groups

PARAMETERS = 456_089_655_296
PRESET = Path(__file__).parents[2] / "examples" / "configs" / "m1_456b.yaml"


@pytest.fixture
def preset() -> Config:
    return from_yaml(PRESET)


@pytest.fixture
def groups() -> Iterator[ProcessGroupCollection]:
    init_distributed(timeout_s=60)
    yield init_groups(ParallelConfig(), seed=0)
    destroy_groups()
    shutdown_distributed()


def test_the_model_on_the_meta_device_has_the_tensors_of_the_table(groups, preset):
    config = replace(preset, parallel=ParallelConfig(), training=replace(preset.training, recompute="none"))
    models = build_model(config, groups, device=torch.device("meta"))
    parameters = [parameter for model in models for parameter in model.parameters()]
    assert sum(parameter.numel() for parameter in parameters) == PARAMETERS
    found = {name: (tuple(t.global_shape), t.dtype) for name, t in sharded_parameters(models).items()}
    assert found == native_tensors(preset.model, torch.bfloat16)


def test_hugging_face_tensors(preset):
    shapes = hf_tensors(preset.model, "minimax_m1")
    assert shapes == hf_tensors(ModelConfig(), "minimax_m1")
    assert len(shapes) == 8243
    assert sum(math.prod(shape) for shape in shapes.values()) == PARAMETERS
    kinds = Counter(
        name.split(".", 3)[3] for name in shapes if name.startswith("model.layers.") and "experts" not in name
    )
    assert kinds == {
        "input_layernorm.weight": 80,
        "post_attention_layernorm.weight": 80,
        "block_sparse_moe.gate.weight": 80,
        "self_attn.qkv_proj.weight": 70,
        "self_attn.output_gate.weight": 70,
        "self_attn.norm.weight": 70,
        "self_attn.out_proj.weight": 70,
        "self_attn.q_proj.weight": 10,
        "self_attn.k_proj.weight": 10,
        "self_attn.v_proj.weight": 10,
        "self_attn.o_proj.weight": 10,
    }
    assert shapes["model.layers.0.self_attn.qkv_proj.weight"] == (24576, 6144)
    assert shapes["model.layers.7.self_attn.k_proj.weight"] == (1024, 6144)
    assert shapes["model.layers.79.block_sparse_moe.experts.31.w2.weight"] == (6144, 9216)
    assert shapes["lm_head.weight"] == (200064, 6144)


def test_native_tensors():
    stored = native_tensors(ModelConfig(), torch.bfloat16)
    assert sum(math.prod(shape) for shape, _ in stored.values()) == PARAMETERS
    assert stored["decoder.layers.79.self_attention.qkv_proj.weight"] == ((8 * 10 * 128, 6144), torch.bfloat16)
    assert stored["decoder.layers.0.mlp.experts.fc1"] == ((32, 2, 9216, 6144), torch.bfloat16)


def test_every_layer_has_each_global_expert_once():
    for native in native_layout(ModelConfig()):
        if native.per_expert:
            per_expert = 2 if native.name.endswith("fc1") else 1
            assert Counter(piece.expert for piece in native.pieces) == dict.fromkeys(range(32), per_expert), native.name
