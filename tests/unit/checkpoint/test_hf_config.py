"""config.json in both formats: round trip, and an error for everything that would be read wrongly."""

import json
from dataclasses import replace

import pytest
from transformers import MiniMaxConfig

from megatron_m1.checkpoint.hf_config import (
    from_hf_config,
    read_hf_config,
    semantic_differences,
    semantic_notes,
    to_hf_config,
)
from megatron_m1.config.errors import ConfigError
from megatron_m1.config.schema import ModelConfig
from tests.hf_reference import hf_config
from tests.model_cases import CASES, ORACLE_ONLY_CASES

MODELS = CASES | ORACLE_ONLY_CASES | {"m1": ModelConfig(), "eps": replace(CASES["base"], lightning_norm_eps=1e-5)}


@pytest.mark.parametrize("format", ["minimax_m1", "minimax"])
@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_round_trip(model, format):
    config = json.loads(json.dumps(to_hf_config(model, format)))
    assert from_hf_config(config, format) == replace(model, attn_type_list=model.layer_types())


def test_released_keys_are_written():
    config = to_hf_config(ModelConfig(), "minimax_m1")
    assert config["architectures"] == ["MiniMaxM1ForCausalLM"] and "auto_map" not in config
    assert config["postnorm"] is True and config["rotary_dim"] == 64 and config["rope_theta"] == 1e7
    assert [layer for layer, kind in enumerate(config["attn_type_list"]) if kind] == list(range(7, 80, 8))
    assert config["layernorm_mlp_alpha"] == 3.5565588200778455 and config["shared_intermediate_size"] == 0


@pytest.mark.parametrize("model", CASES.values(), ids=CASES)
def test_transformers_understands_the_minimax_config(model, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(to_hf_config(model, "minimax", dtype="float32")))
    ours = MiniMaxConfig.from_pretrained(tmp_path).to_dict()
    reference = hf_config(model).to_dict()
    for key in reference.keys() - {"dtype", "use_cache", "block_size", "architectures", "bos_token_id", "eos_token_id"}:
        assert ours[key] == reference[key], key


def test_saved_by_transformers_without_our_keys_means_full_rotary(tmp_path):
    hf_config(CASES["gqa_1"]).save_pretrained(tmp_path)
    assert read_hf_config(tmp_path, "minimax").rotary_dim == CASES["gqa_1"].head_dim


M1, HF = "minimax_m1", "minimax"


@pytest.mark.parametrize(
    ("format", "change", "message"),
    [
        (M1, {"model_type": "minimax"}, "use --format minimax"),
        (HF, {"model_type": "minimax_m1"}, "use --format minimax_m1"),
        (M1, {"model_type": "llama"}, "only minimax_m1 and minimax"),
        (M1, {"layernorm_mlp_alpha": None}, "layernorm_mlp_alpha is null"),
        (M1, {"postnorm": "yes"}, "postnorm='yes'"),
        (M1, {"hidden_size": 48.5}, "hidden_size=48.5"),
        (M1, {"hidden_size": "48"}, "hidden_size='48'"),
        (M1, {"attn_type_list": [0, 1]}, "2 entries, num_hidden_layers=4"),
        (M1, {"attn_type_list": [0, 1, 2, 0]}, "holds 2"),
        (M1, {"new_key": 3, "other": 4}, "unknown keys new_key, other"),
        (M1, {"layer_types": ["full_attention"] * 4}, "unknown key layer_types"),
        (M1, {"hidden_act": "gelu"}, "hidden_act='gelu' must be 'silu'"),
        (M1, {"tie_word_embeddings": True}, "tie_word_embeddings"),
        (M1, {"sliding_window": 4096}, "sliding_window"),
        (M1, {"shared_moe_mode": "softmax"}, "shared_moe_mode"),
        (M1, {"rotary_dim": 24}, "rotary_dim=24 must be even and at most head_dim=16"),
        (M1, {"num_key_value_heads": 3}, "num_key_value_heads=3 must divide"),
        (M1, {"num_experts_per_tok": 9}, "num_experts_per_tok=9"),
        (HF, {"layernorm_mlp_alpha": 3.5}, "rename it to mlp_alpha_factor"),
        (HF, {"layer_types": ["full_attention", "sliding", "linear_attention", "full_attention"]}, "'sliding'"),
        (HF, {"rope_theta": 5.0}, "contradicting values"),
        (HF, {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e7}}, "rope_type='yarn'"),
        (HF, {"rope_parameters": None}, "rope_theta has no value"),
    ],
)
def test_wrong_keys_are_named(format, change, message):
    config = to_hf_config(CASES["base"], format) | change
    with pytest.raises(ConfigError, match=message):
        from_hf_config(config, format)


@pytest.mark.parametrize("format", [M1, HF])
def test_every_missing_architecture_key_is_named(format):
    full = to_hf_config(CASES["base"], format)
    optional = set(
        "architectures attention_dropout block_size bos_token_id dtype eos_token_id head_dim hidden_act initializer_range "
        "output_router_logits router_aux_loss_coef router_jitter_noise shared_intermediate_size shared_moe_mode "
        "sliding_window tie_word_embeddings torch_dtype use_cache".split()
    ) | ({"postnorm", "rotary_dim"} if format == HF else set())
    for key in full.keys() - optional:
        without = {name: value for name, value in full.items() if name != key}
        with pytest.raises(ConfigError, match="rope_theta" if key == "rope_parameters" else key):
            from_hf_config(without, format)
    reduced = {name: value for name, value in full.items() if name not in optional - {"head_dim"}}
    assert from_hf_config(reduced, format).shared_intermediate_size == 0


def test_unreadable_files_are_named(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        read_hf_config(tmp_path, M1)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="is not JSON"):
        read_hf_config(tmp_path, M1)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ConfigError, match="must be a JSON object"):
        read_hf_config(tmp_path, M1)


def test_semantic_differences_name_what_applies():
    full_rotary = replace(CASES["base"], rotary_dim=16)
    assert semantic_differences(full_rotary, dtype="float32") == []
    cases = [
        (CASES["base"], "rotary"),
        (replace(full_rotary, postnorm=False), "postnorm=false"),
        (replace(full_rotary, shared_intermediate_size=8), "shared expert"),
        (replace(full_rotary, lightning_norm_eps=1e-5), "lightning norm"),
    ]
    for model, word in cases:
        (found,) = semantic_differences(model, dtype="float32")
        assert word in found
    (found,) = semantic_differences(full_rotary, dtype="bfloat16")
    assert "never decay" in found
    assert semantic_differences(CASES["softmax_only"], dtype="bfloat16")[0].startswith("rotary")
    assert "no power of two" in semantic_notes(CASES["heads_6"], HF)[0]
    assert "1e-5 (relative)" in semantic_notes(CASES["base"], HF)[0]
    assert semantic_notes(CASES["softmax_only"], HF) == []
