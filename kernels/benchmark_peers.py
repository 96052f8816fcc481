"""The implementations that the benchmark compares: ours, and those of other packages where they are installed."""

import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass

import torch
from m1_kernels.benchmark_report import OURS
from m1_kernels.decode import lightning_attention_step
from m1_kernels.dispatch import lightning_attention, lightning_attention_packed
from m1_kernels.pointwise import gated_rms_norm
from m1_kernels.softmax import softmax_attention

__all__ = [
    "CONTENDERS",
    "Attention",
    "Block",
    "Contender",
    "Documents",
    "Step",
    "fla_step",
    "load",
    "own_block",
    "own_step",
    "peer_block",
    "plain_step",
    "versions",
]

NORM_EPS = 1e-6


@dataclass(frozen=True)
class Documents:
    """A ragged pack: cu_seqlens [S+1] on the device, int32 and (for fla) int64, and the longest document."""

    cu_seqlens: torch.Tensor
    cu_seqlens_long: torch.Tensor
    longest: int

    @property
    def count(self) -> int:
        return len(self.cu_seqlens) - 1


# (q, k, v in the contender's layout, slopes or their negatives as it takes them, documents) -> o in the same layout
Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, Documents | None], torch.Tensor]


@dataclass(frozen=True)
class Contender:
    """One implementation.

    load: imports what it needs and returns its attention.  requirement: the distribution that holds it, to name when
    the import fails.  heads_first: takes [B, H, T, D] instead of [B, T, H, D].  negative: takes -slopes.
    exact: computes lightning attention, so that its results can be compared.  growth: exponent of its time in the
    number of tokens.  packs: takes documents.  overflows: elements of q from which its int32 offsets overflow.
    pinned: one strategy of ours, timed forward only.  most_tokens: more would take too long.
    """

    name: str
    load: Callable[[], Attention]
    requirement: str
    heads_first: bool = False
    negative: bool = False
    exact: bool = True
    growth: int = 1
    packs: bool = True
    overflows: int | None = None
    pinned: bool = False
    most_tokens: int | None = None

    def refusal(self, tokens: int, heads: int, dim: int, packed: bool) -> str | None:
        """Why this shape is not run at all, or None."""
        if packed and not self.packs:
            return "no packed form"
        if self.overflows is not None and tokens * heads * dim >= self.overflows:
            return "not run: its int32 offsets overflow from 2^31 elements"
        if self.most_tokens is not None and tokens > self.most_tokens:
            return "not run: slow"
        return None


def _ours(strategy: str | None) -> Callable[[], Attention]:
    def attention(q, k, v, slopes, documents):
        return lightning_attention(
            q,
            k,
            v,
            slopes,
            cu_seqlens=None if documents is None else documents.cu_seqlens,
            implementation="auto" if strategy is None else "triton",
            strategy=strategy or "auto",
        )

    return lambda: attention


def _fla() -> Attention:
    from fla.ops.simple_gla import chunk_simple_gla

    def attention(q, k, v, slopes, documents):
        cu_seqlens = None if documents is None else documents.cu_seqlens_long
        return chunk_simple_gla(q, k, v, g_gamma=slopes, scale=1.0, cu_seqlens=cu_seqlens)[0]

    return attention


def _lightning_attn() -> Attention:
    from lightning_attn.ops import lightning_attn_func

    return lambda q, k, v, slopes, documents: lightning_attn_func(q, k, v, slopes)


def _torch_flash() -> Attention:
    def attention(q, k, v, slopes, documents):
        scale = q.shape[-1] ** -0.5
        if documents is None:
            return softmax_attention(q, k, v, scale=scale)
        return softmax_attention(q, k, v, scale=scale, cu_seqlens=documents.cu_seqlens, max_seqlen=documents.longest)

    return attention


# (q, k, v [slots, H, D], state, slopes or their negatives) -> o [slots, H, D]; fla's returns a new state besides
Step = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

# Ours first: the others' results are compared with it.
CONTENDERS = (
    Contender(OURS, _ours(None), "m1_kernels"),
    Contender("ours fused", _ours("fused"), "m1_kernels", pinned=True),
    Contender("ours segmented", _ours("segmented"), "m1_kernels", pinned=True),
    Contender("fla", _fla, "fla-core", negative=True),
    Contender("lightning-attn", _lightning_attn, "lightning-attn", heads_first=True, packs=False, overflows=2**31),
    Contender("torch flash", _torch_flash, "torch", exact=False, growth=2),
)


def load[T](loader: Callable[[], T], requirement: str) -> T | str:
    """What `loader` returns, or why it cannot: the distribution that is missing, and what the import said."""
    try:
        return loader()
    except ImportError as error:
        return f"{requirement} is not installed ({error})"
    except Exception as error:
        return f"{requirement} does not load ({type(error).__name__}: {error})"


def own_step(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, state: torch.Tensor, slopes: torch.Tensor
) -> torch.Tensor:
    """Ours, which moves `state` on."""
    return lightning_attention_step(q, k, v, state, slopes)


def plain_step(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, state: torch.Tensor, slopes: torch.Tensor
) -> torch.Tensor:
    """The definition, in float32; `state` stays."""
    q, k, v = q.float(), k.float(), v.float()
    state = torch.exp(-slopes)[:, None, None] * state + k[..., :, None] * v[..., None, :]
    return (q[..., None, :] @ state).squeeze(-2)


def fla_step() -> Step:
    from fla.ops.simple_gla import fused_recurrent_simple_gla

    def step(q, k, v, state, slopes):
        q, k, v = q[:, None], k[:, None], v[:, None]
        return fused_recurrent_simple_gla(
            q, k, v, g_gamma=slopes, scale=1.0, initial_state=state, output_final_state=True
        )[0][:, 0]

    return step


def versions(*packages: str) -> dict[str, str]:
    """Version of each package, or "not installed"."""
    found = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


# (qkv [B, T, H, 3D] before SiLU, gate [B, T, H*D], norm weight [H*D], slopes or their negatives) -> the block's output
Block = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def own_block(qkv: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor, slopes: torch.Tensor) -> torch.Tensor:
    """Ours: SiLU inside the attention, norm and gate in one operator."""
    o = lightning_attention_packed(qkv, slopes)
    return gated_rms_norm(o.flatten(2), gate, weight, NORM_EPS)


def peer_block(attention: Attention, heads_first: bool) -> Block:
    """The block around a peer's kernel, its other pieces in plain PyTorch."""
    kernel = torch.compiler.disable(attention)

    def block(qkv, gate, weight, slopes):
        q, k, v = torch.nn.functional.silu(qkv).split(qkv.shape[-1] // 3, dim=-1)
        if heads_first:
            q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        o = kernel(q, k, v, slopes, None)
        if heads_first:
            o = o.transpose(1, 2)
        o = torch.nn.functional.rms_norm(o.flatten(2), weight.shape, weight, NORM_EPS)
        return torch.sigmoid(gate) * o

    return block
