"""Parameters, arithmetic and device peaks of the hybrid model: what throughput and MFU are counted with."""

from dataclasses import dataclass

from megatron_m1.config.schema import ModelConfig

__all__ = [
    "ParameterCount",
    "count_parameters",
    "decode_flops",
    "device_peak_tflops",
    "layer_parameters",
    "training_flops_per_token",
]

LIGHTNING_CHUNK = 256
"""Tokens per chunk that the count of a lightning layer assumes (its inner blocks are computed whole, not halved)."""

_BF16_DENSE_TFLOPS = (
    # First match wins, so the longer names stand first. Source: NVIDIA data sheets, dense bf16 tensor-core peak.
    ("H100 PCIe", 756.0),
    ("H100 NVL", 835.0),
    ("H100", 989.4),
    ("H200 NVL", 835.0),
    ("H200", 989.4),
    ("H800 PCIe", 756.0),
    ("H800", 989.4),
    ("H20", 148.0),
    ("GH200", 989.4),
    ("GB200", 2500.0),
    ("B200", 2250.0),
    ("A100", 312.0),
    ("A800", 312.0),
    ("L40S", 362.0),
)


@dataclass(frozen=True)
class ParameterCount:
    """Parameters by kind over the whole model."""

    embedding: int
    lightning: int
    softmax: int
    router: int
    experts: int
    shared: int
    norms: int
    """The RMSNorms outside attention: two per layer and the final one."""
    head: int
    active: int
    """Parameters that one token passes through, without embedding and head."""

    @property
    def total(self) -> int:
        return (
            self.embedding + self.lightning + self.softmax + self.router + self.experts + self.shared
            + self.norms + self.head
        )  # fmt: skip


def layer_parameters(model: ModelConfig, layer_type: int) -> dict[str, int]:
    """Parameters of one layer (0 lightning, 1 softmax) by kind: attention, attention_norm, router, experts, shared, norms."""
    hidden, inner = model.hidden_size, model.num_attention_heads * model.head_dim
    if layer_type == 0:
        attention = 5 * hidden * inner  # q, k, v, output gate, output projection
    else:
        attention = 2 * hidden * inner + 2 * hidden * model.num_key_value_heads * model.head_dim
    shared = 3 * hidden * model.shared_intermediate_size
    return {
        "attention": attention,
        "attention_norm": inner if layer_type == 0 else 0,
        "router": model.num_local_experts * hidden,
        "experts": model.num_local_experts * 3 * hidden * model.intermediate_size,
        "shared": shared + hidden if shared else 0,
        "norms": 2 * hidden,
    }


def count_parameters(model: ModelConfig) -> ParameterCount:
    """ParameterCount of the whole model; 456,089,655,296 in total for the default ModelConfig."""
    layers = [(kind, layer_parameters(model, kind)) for kind in model.layer_types()]
    attention = [sum(p["attention"] + p["attention_norm"] for kind, p in layers if kind == wanted) for wanted in (0, 1)]
    router, experts, shared, norms = (
        sum(p[name] for _, p in layers) for name in ("router", "experts", "shared", "norms")
    )
    norms += model.hidden_size
    return ParameterCount(
        embedding=model.vocab_size * model.hidden_size,
        lightning=attention[0],
        softmax=attention[1],
        router=router,
        experts=experts,
        shared=shared,
        norms=norms,
        head=model.vocab_size * model.hidden_size,
        active=sum(attention)
        + router
        + experts // model.num_local_experts * model.num_experts_per_tok
        + shared
        + norms,
    )


def training_flops_per_token(model: ModelConfig, seq_length: int) -> float:
    """FLOPs of forward and backward per token in causal sequences of `seq_length` tokens (recomputation not counted).

    Backward counts twice the forward. Norms, activations and the router's softmax are left out. Documents packed into
    a sequence count as one, so the share of the softmax layers is an upper bound with `document_boundaries: reset`.
    """
    inner = model.num_attention_heads * model.head_dim
    lightning = inner * (4 * model.head_dim + 4 * min(LIGHTNING_CHUNK, seq_length))
    softmax = 2 * inner * seq_length  # q k^T and p v over seq_length / 2 keys on average
    return 3 * (2 * _multiplied(model) + _per_kind(model, lightning, softmax))


def decode_flops(model: ModelConfig, context: int) -> float:
    """FLOPs to generate one token after `context` tokens, from the cache."""
    inner = model.num_attention_heads * model.head_dim
    return 2 * _multiplied(model) + _per_kind(model, 4 * inner * model.head_dim, 4 * inner * context)


def device_peak_tflops(name: str) -> float | None:
    """Dense bf16 peak in TFLOP/s of a device by its CUDA name (`NVIDIA H100 80GB HBM3`); None if it is not known."""
    return next((peak for part, peak in _BF16_DENSE_TFLOPS if part in name), None)


def _multiplied(model: ModelConfig) -> int:
    """Parameters that one token is multiplied with: the matrices of the active layers and the head."""
    count = count_parameters(model)
    attention_norms = model.layer_types().count(0) * model.num_attention_heads * model.head_dim
    return count.active - count.norms - attention_norms + count.head


def _per_kind(model: ModelConfig, lightning: float, softmax: float) -> float:
    kinds = model.layer_types()
    return kinds.count(0) * lightning + kinds.count(1) * softmax
