import pytest

from megatron_m1.config import ModelConfig
from megatron_m1.engine.flops import (
    count_parameters,
    decode_flops,
    device_peak_tflops,
    layer_parameters,
    training_flops_per_token,
)


def test_parameters_of_the_released_model():
    count = count_parameters(ModelConfig())
    assert count.total == 456_089_655_296
    assert count.active == pytest.approx(45.945e9, abs=0.5e6)
    assert count.experts == pytest.approx(434.87e9, abs=5e6)
    assert count.lightning == pytest.approx(17.62e9, abs=5e6)
    assert count.softmax == pytest.approx(1.13e9, abs=5e6)
    assert count.embedding + count.head == pytest.approx(2.46e9, abs=5e6)


def test_layers_add_up_with_a_shared_expert():
    model = ModelConfig(
        vocab_size=96, hidden_size=32, num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=2, head_dim=8,
        intermediate_size=40, num_local_experts=4, shared_intermediate_size=24, attn_type_list=[0, 1, 0],
    )  # fmt: skip
    lightning = 5 * 32 * 48 + 48  # qkv (3), gate, out and the norm over all heads
    softmax = 32 * (48 + 2 * 16) + 48 * 32
    rest = 4 * 32 + 4 * 3 * 32 * 40 + 3 * 32 * 24 + 32 + 2 * 32
    assert sum(layer_parameters(model, 0).values()) == lightning + rest
    assert sum(layer_parameters(model, 1).values()) == softmax + rest
    assert count_parameters(model).total == 2 * lightning + softmax + 3 * rest + 2 * 96 * 32 + 32


@pytest.mark.parametrize("length, gflop", [(8, 290), (32, 302), (128, 350), (512, 543), (1024, 801)])
def test_training_cost_of_a_token(length, gflop):
    assert training_flops_per_token(ModelConfig(), length * 1024) / 1e9 == pytest.approx(gflop, abs=0.5)


def test_training_cost_of_a_softmax_only_model_at_a_million_tokens():
    all_softmax = training_flops_per_token(ModelConfig(attn_type_list=[1] * 80), 2**20)
    without_attention = training_flops_per_token(ModelConfig(attn_type_list=[1] * 80), 0)
    assert (all_softmax - without_attention) / 1e9 == pytest.approx(4406 - 283, abs=1)


def test_decode_cost_of_a_token():
    base = decode_flops(ModelConfig(), 0)
    assert base / 1e9 == pytest.approx(94.6, abs=0.05)
    assert (decode_flops(ModelConfig(), 100_000) - base) / 1e9 == pytest.approx(3.28e-4 * 1e5, rel=2e-3)


def test_device_peaks():
    assert device_peak_tflops("NVIDIA H100 80GB HBM3") == 989.4
    assert device_peak_tflops("NVIDIA H100 PCIe") == 756
    assert device_peak_tflops("NVIDIA H200") == 989.4
    assert device_peak_tflops("NVIDIA H20") == 148
    assert device_peak_tflops("NVIDIA GeForce GT 710") is None
