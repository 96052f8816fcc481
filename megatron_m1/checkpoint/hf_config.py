"""config.json in both formats, to and from ModelConfig, and what transformers' `minimax` computes differently."""

import json
from pathlib import Path
from typing import Any

from megatron_m1.checkpoint.names import HfFormat
from megatron_m1.config.errors import ConfigError
from megatron_m1.config.schema import ModelConfig

__all__ = ["from_hf_config", "read_hf_config", "semantic_differences", "semantic_notes", "to_hf_config"]

SAME_NAME = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "num_local_experts",
    "num_experts_per_tok",
    "max_position_embeddings",
    "rms_norm_eps",
)
"""Keys that ModelConfig and both formats share; all are required on import."""

SUBLAYERS = {"linear_attention": "linear_attn", "full_attention": "full_attn", "mlp": "mlp"}
FACTORS = {
    f"layernorm_{ours}_{letter}": f"{theirs}_{letter}_factor"
    for ours, theirs in SUBLAYERS.items()
    for letter in ("alpha", "beta")
}
"""ModelConfig and `minimax_m1` key -> `minimax` key of the residual weights."""

LAYER_NAMES = ("linear_attention", "full_attention")
FORMATS: dict[str, dict[str, object]] = {
    "minimax_m1": {"architectures": ["MiniMaxM1ForCausalLM"], "model_type": "minimax_m1"},
    "minimax": {"architectures": ["MiniMaxForCausalLM"], "model_type": "minimax"},
}

FIXED: dict[str, tuple[object, ...]] = {
    "hidden_act": ("silu",),
    "tie_word_embeddings": (False,),
    "sliding_window": (None,),
    "rope_scaling": (None,),
    "attention_bias": (False,),
    "shared_moe_mode": ("sigmoid",),
    "attention_dropout": (0, None),
}
"""Keys that may stand in a config.json with these values only: the model has nothing else."""

OWN = ("shared_intermediate_size", "postnorm", "rotary_dim", "lightning_norm_eps")
WITHOUT_EFFECT = frozenset(
    "_attn_implementation _name_or_path architectures auto_map block_size bos_token_id chunk_size_feed_forward dtype "
    "eos_token_id experts_implementation id2label initializer_range is_encoder_decoder label2id model_type "
    "output_attentions output_hidden_states output_router_logits pad_token_id problem_type return_dict "
    "router_aux_loss_coef router_jitter_noise torch_dtype transformers_version use_cache".split()
)
"""Keys of transformers that leave the function of the weights alone."""


def to_hf_config(
    model: ModelConfig, format: HfFormat, *, dtype: str = "bfloat16", eos_token_id: int | None = None
) -> dict[str, object]:
    """config.json as a dict. dtype: name of the torch dtype of most weights.

    `minimax` also carries `postnorm`, `rotary_dim` and the shared expert's width, which transformers ignores: import reads them.
    """
    config = FORMATS[format] | {key: getattr(model, key) for key in SAME_NAME}
    config |= {
        "attention_dropout": 0.0,
        "bos_token_id": None,
        "eos_token_id": eos_token_id,
        "hidden_act": "silu",
        "initializer_range": model.init_std,
        "output_router_logits": False,
        "postnorm": model.postnorm,
        "rotary_dim": model.rotary_dim,
        "router_aux_loss_coef": 0.001,
        "router_jitter_noise": 0.0,
        "shared_intermediate_size": model.shared_intermediate_size,
        "shared_moe_mode": "sigmoid",
        "sliding_window": None,
        "tie_word_embeddings": False,
        "use_cache": True,
    }
    if model.lightning_norm_eps != ModelConfig.lightning_norm_eps:
        config["lightning_norm_eps"] = model.lightning_norm_eps
    if format == "minimax_m1":
        config |= {"attn_type_list": model.layer_types(), "rope_theta": model.rope_theta, "torch_dtype": dtype}
        return config | {key: getattr(model, key) for key in FACTORS}
    config |= {
        "block_size": 256,
        "dtype": dtype,
        "layer_types": [LAYER_NAMES[kind] for kind in model.layer_types()],
        "rope_parameters": {"rope_theta": model.rope_theta, "rope_type": "default"},
    }
    return config | {theirs: getattr(model, ours) for ours, theirs in FACTORS.items()}


def read_hf_config(folder: str | Path, format: HfFormat) -> ModelConfig:
    """ModelConfig of `folder`/config.json. Raises ConfigError for a missing or damaged file and as `from_hf_config` does."""
    path = Path(folder) / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be read: {error.strerror}; --hf must name a Hugging Face model directory."
        ) from None
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON ({error}); fetch it again.") from None
    if not isinstance(config, dict):
        raise ConfigError(f"{path} holds a {type(config).__name__}; it must be a JSON object.")
    return from_hf_config(config, format, where=str(path))


def from_hf_config(config: dict[str, object], format: HfFormat, *, where: str = "config.json") -> ModelConfig:
    """ModelConfig from the content of config.json.

    Raises ConfigError naming key, value and rule for: another model_type, a missing key (transformers would silently take
    alpha = 1), a key that the model has no meaning for, a value it does not implement, keys that contradict each other.
    A `minimax` config without `rotary_dim` means what transformers computes: rotary over the whole head.
    """
    reader = Reader(config | implied_head_dim(config), where)
    reader.require_format(format)
    kwargs: dict[str, object] = {key: reader.number(key, float if key == "rms_norm_eps" else int) for key in SAME_NAME}
    for ours, theirs in FACTORS.items():
        kwargs[ours] = reader.number(ours if format == "minimax_m1" else theirs, float)
    if format == "minimax_m1":
        kwargs["attn_type_list"] = reader.list_of("attn_type_list", (0, 1))
        kwargs["rope_theta"] = reader.number("rope_theta", float)
        kwargs["rotary_dim"] = reader.number("rotary_dim", int)
        kwargs["postnorm"] = reader.flag("postnorm")
    else:
        kwargs["attn_type_list"] = [LAYER_NAMES.index(name) for name in reader.list_of("layer_types", LAYER_NAMES)]
        kwargs["rope_theta"] = reader.rope_theta()
        kwargs["rotary_dim"] = reader.number("rotary_dim", int, default=kwargs["head_dim"])
        kwargs["postnorm"] = reader.flag("postnorm", default=True)
    kwargs["shared_intermediate_size"] = reader.number("shared_intermediate_size", int, default=0)
    kwargs["lightning_norm_eps"] = reader.number("lightning_norm_eps", float, default=ModelConfig.lightning_norm_eps)
    kwargs["init_std"] = reader.number("initializer_range", float, default=ModelConfig.init_std)
    reader.refuse_unknown(format)
    model = ModelConfig(**kwargs)  # type: ignore[arg-type]
    check(model, where)
    return model


def implied_head_dim(config: dict[str, object]) -> dict[str, int]:
    """transformers' rule where head_dim is null or absent."""
    hidden, heads = config.get("hidden_size"), config.get("num_attention_heads")
    if config.get("head_dim") is None and isinstance(hidden, int) and isinstance(heads, int) and heads > 0:
        return {"head_dim": hidden // heads}
    return {}


class Reader:
    """Takes values out of a config.json with errors that say what to mend."""

    def __init__(self, config: dict[str, object], where: str):
        self.config, self.where = config, where

    def fail(self, message: str) -> ConfigError:
        return ConfigError(f"{self.where}: {message}")

    def require_format(self, format: HfFormat) -> None:
        found = self.config.get("model_type")
        if found != format:
            other = f"use --format {found}" if found in FORMATS else "only minimax_m1 and minimax are converted"
            raise self.fail(f"model_type={found!r} is not {format!r}; {other}.")
        wrong = [key for key in FACTORS if key in self.config] if format == "minimax" else []
        if wrong:
            raise self.fail(
                f"{wrong[0]} is a key of minimax_m1, which `minimax` ignores; rename it to {FACTORS[wrong[0]]}."
            )

    def number(self, key: str, kind: type, *, default: object = None) -> Any:
        value = self.config.get(key, default)
        if value is None:
            state = "null" if key in self.config else "missing"
            raise self.fail(f"{key} is {state}; add the {kind.__name__} that the weights were trained with.")
        if isinstance(value, bool) or not isinstance(value, (int, float)) or (kind is int and value != int(value)):
            raise self.fail(f"{key}={value!r} must be of type {kind.__name__}.")
        return kind(value)

    def flag(self, key: str, *, default: bool | None = None) -> bool:
        value = self.config.get(key, default)
        if not isinstance(value, bool):
            raise self.fail(f"{key}={value!r} must be true or false; MiniMax-M1 has true.")
        return value

    def list_of(self, key: str, allowed: tuple[object, ...]) -> list:
        value = self.config.get(key)
        if not isinstance(value, list):
            raise self.fail(f"{key}={value!r} must be a list with one of {', '.join(map(str, allowed))} per layer.")
        wrong = [entry for entry in value if entry not in allowed]
        if wrong:
            raise self.fail(f"{key} holds {wrong[0]!r}; allowed are {', '.join(map(str, allowed))}.")
        layers = self.config.get("num_hidden_layers")
        if len(value) != layers:
            raise self.fail(f"{key} has {len(value)} entries, num_hidden_layers={layers}; they must agree.")
        return value

    def rope_theta(self) -> float:
        parameters = self.config.get("rope_parameters") or {}
        if not isinstance(parameters, dict):
            raise self.fail(f"rope_parameters={parameters!r} must be an object with rope_theta.")
        kind = parameters.get("rope_type", "default")
        if kind != "default":
            raise self.fail(f"rope_parameters.rope_type={kind!r} must be 'default'; the model has no other.")
        given = [value for value in (parameters.get("rope_theta"), self.config.get("rope_theta")) if value is not None]
        if len(set(given)) != 1:
            state = f"contradicting values {given}" if given else "no value"
            raise self.fail(f"rope_theta has {state} (rope_parameters.rope_theta and rope_theta); give one.")
        return Reader({"rope_theta": given[0]}, self.where).number("rope_theta", float)

    def refuse_unknown(self, format: HfFormat) -> None:
        for key, allowed in FIXED.items():
            if key in self.config and self.config[key] not in allowed:
                raise self.fail(
                    f"{key}={self.config[key]!r} must be {allowed[0]!r}; the model implements nothing else."
                )
        layout = ("attn_type_list", "rope_theta", *FACTORS)
        if format == "minimax":
            layout = ("layer_types", "rope_theta", "rope_parameters", *FACTORS.values())
        known = {*SAME_NAME, *OWN, *FIXED, *WITHOUT_EFFECT, *layout}
        unknown = sorted(self.config.keys() - known)
        if unknown:
            raise self.fail(
                f"unknown key{'s' * (len(unknown) > 1)} {', '.join(unknown)}; remove what does not change the model's function."
            )


def check(model: ModelConfig, where: str) -> None:
    """Relations between keys that the tensor shapes rely on."""
    rules = (
        (
            model.num_attention_heads % model.num_key_value_heads == 0,
            f"num_key_value_heads={model.num_key_value_heads} must divide num_attention_heads={model.num_attention_heads}",
        ),
        (
            0 < model.rotary_dim <= model.head_dim and model.rotary_dim % 2 == 0,
            f"rotary_dim={model.rotary_dim} must be even and at most head_dim={model.head_dim}",
        ),
        (
            0 < model.num_experts_per_tok <= model.num_local_experts,
            f"num_experts_per_tok={model.num_experts_per_tok} must be 1 to num_local_experts={model.num_local_experts}",
        ),
    )
    for holds, rule in rules:
        if not holds:
            raise ConfigError(f"{where}: {rule}.")


def semantic_differences(model: ModelConfig, *, dtype: str = "bfloat16") -> list[str]:
    """What transformers' `minimax`, loading our export by from_pretrained, computes differently; one sentence each.

    dtype: torch dtype name in which the export will be loaded. Source: transformers 5.x models/minimax.
    """
    softmax, lightning = 1 in model.layer_types(), 0 in model.layer_types()
    found = []
    if softmax and model.rotary_dim != model.head_dim:
        found.append(
            f"rotary: transformers rotates all head_dim={model.head_dim} channels, the model the first "
            f"rotary_dim={model.rotary_dim}; logits differ (0.1% at initialisation, several % when trained)."
        )
    if lightning and dtype != "float32":
        found.append(
            f"decay and state: transformers keeps them in the dtype of the model; in {dtype} the slowest heads never decay. "
            "Load with dtype=torch.float32 for the numbers of the model."
        )
    if not model.postnorm:
        found.append(
            "postnorm=false: transformers always takes the normed input as residual; its output is another function."
        )
    if model.shared_intermediate_size:
        found.append(
            f"shared expert: transformers has none; the shared_mlp and coefficient tensors of width "
            f"{model.shared_intermediate_size} are written but not used."
        )
    if lightning and model.lightning_norm_eps != 1e-6:
        found.append(f"lightning norm: transformers fixes its eps to 1e-6, the model has {model.lightning_norm_eps:g}.")
    return found


def semantic_notes(model: ModelConfig, format: HfFormat) -> list[str]:
    """What holds for an export only as long as its reader does as expected; one sentence each."""
    if 0 not in model.layer_types():
        return []
    if format == "minimax_m1":
        same = model.rms_norm_eps == model.lightning_norm_eps
        return [] if same else ["lightning norm: vLLM takes rms_norm_eps here; the released code has 1e-6."]
    heads = model.num_attention_heads
    power_of_two = heads & (heads - 1) == 0
    size = "by up to 1e-5 (relative)" if power_of_two else f"widely, because {heads} heads are no power of two"
    return [
        "slopes: the export carries the model's decays (slope_rate, query_decay, key_decay, diagonal_decay), which "
        f"from_pretrained loads; decays that transformers recomputes from the config differ {size}."
    ]
