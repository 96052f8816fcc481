"""The one table between native tensors and Hugging Face tensors; import, export and verify all execute it.

A row says where each Hugging Face tensor lies inside a native tensor, as a view. Reading the view exports, writing into it
imports, so the two directions cannot disagree. Both formats use these names on disk: transformers' `minimax` fuses the
experts in memory only. Dimensions:
    V vocab_size, h hidden_size, H heads, G key/value heads, r = H/G, D head_dim, E experts, F and Fs expert and shared width
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from megatron_m1.config.schema import ModelConfig

__all__ = [
    "HF_BLOCK_SIZE",
    "HfFormat",
    "NativeTensor",
    "Piece",
    "hf_buffers",
    "hf_tensors",
    "join",
    "native_layout",
    "native_tensors",
    "split",
]

HfFormat = Literal["minimax_m1", "minimax"]
Scope = Literal["first", "every layer", "lightning", "softmax", "shared", "last"]
View = Callable[[Tensor, ModelConfig], Tensor]

HF_BLOCK_SIZE = 256
"""Tokens per lightning block of transformers' `minimax`; the decay buffers it keeps in the checkpoint have this length."""


def whole(native: Tensor, model: ModelConfig) -> Tensor:
    return native


def w1(fc1: Tensor, model: ModelConfig) -> Tensor:
    return fc1[0]


def w3(fc1: Tensor, model: ModelConfig) -> Tensor:
    return fc1[1]


def queries(qkv: Tensor, model: ModelConfig) -> Tensor:
    return key_value_groups(qkv, model)[:, :-2]


def keys(qkv: Tensor, model: ModelConfig) -> Tensor:
    return key_value_groups(qkv, model)[:, -2]


def values(qkv: Tensor, model: ModelConfig) -> Tensor:
    return key_value_groups(qkv, model)[:, -1]


def key_value_groups(qkv: Tensor, model: ModelConfig) -> Tensor:
    """[G*(r+2)*D, h] as [G, r+2, D, h]: r query heads, then k, then v."""
    return qkv.unflatten(0, (model.num_key_value_heads, -1, model.head_dim))


@dataclass(frozen=True)
class Row:
    native: str
    shape: str
    pieces: tuple[tuple[str, str, View], ...]
    """(Hugging Face name, its shape, its view); `{e}` in the name: one per expert, the view taken of native[e]."""
    scope: Scope
    fp32: bool = False
    """Stored in float32 whatever the dtype of the model."""


def same(
    native: str,
    hf: str,
    shape: str,
    scope: Scope,
    *,
    fp32: bool = False,
) -> Row:
    return Row(native, shape, ((hf, shape, whole),), scope, fp32)


N, P = "decoder.layers.{i}.", "model.layers.{i}."
TABLE = (
    same("embedding.word_embeddings.weight", "model.embed_tokens.weight", "V h", "first"),
    same(N + "input_layernorm.weight", P + "input_layernorm.weight", "h", "every layer"),
    same(N + "self_attention.qkv_proj.weight", P + "self_attn.qkv_proj.weight", "3HD h", "lightning"),
    same(N + "self_attention.output_gate.weight", P + "self_attn.output_gate.weight", "HD h", "lightning"),
    same(N + "self_attention.norm.weight", P + "self_attn.norm.weight", "HD", "lightning"),
    same(N + "self_attention.out_proj.weight", P + "self_attn.out_proj.weight", "h HD", "lightning"),
    Row(
        N + "self_attention.qkv_proj.weight",
        "HD+2GD h",
        (
            (P + "self_attn.q_proj.weight", "HD h", queries),
            (P + "self_attn.k_proj.weight", "GD h", keys),
            (P + "self_attn.v_proj.weight", "GD h", values),
        ),
        "softmax",
    ),
    same(N + "self_attention.o_proj.weight", P + "self_attn.o_proj.weight", "h HD", "softmax"),
    same(N + "post_attention_layernorm.weight", P + "post_attention_layernorm.weight", "h", "every layer"),
    same(N + "mlp.router.weight", P + "block_sparse_moe.gate.weight", "E h", "every layer", fp32=True),
    Row(
        N + "mlp.experts.fc1",
        "E 2 F h",
        (
            (P + "block_sparse_moe.experts.{e}.w1.weight", "F h", w1),
            (P + "block_sparse_moe.experts.{e}.w3.weight", "F h", w3),
        ),
        "every layer",
    ),
    Row(N + "mlp.experts.fc2", "E h F", ((P + "block_sparse_moe.experts.{e}.w2.weight", "h F", whole),), "every layer"),
    same(N + "shared_mlp.gate_proj.weight", P + "shared_mlp.gate_proj.weight", "Fs h", "shared"),
    same(N + "shared_mlp.up_proj.weight", P + "shared_mlp.up_proj.weight", "Fs h", "shared"),
    same(N + "shared_mlp.down_proj.weight", P + "shared_mlp.down_proj.weight", "h Fs", "shared"),
    same(N + "shared_mlp.coefficient.weight", P + "coefficient.weight", "1 h", "shared"),
    same("decoder.final_layernorm.weight", "model.norm.weight", "h", "last"),
    same("output_layer.weight", "lm_head.weight", "V h", "last", fp32=True),
)


@dataclass(frozen=True)
class Piece:
    """One Hugging Face tensor inside a native tensor."""

    name: str
    shape: tuple[int, ...]
    expert: int | None
    view: View


@dataclass(frozen=True)
class NativeTensor:
    """One native tensor and the Hugging Face tensors that tile it."""

    name: str
    shape: tuple[int, ...]
    fp32: bool
    layer: int | None
    pieces: tuple[Piece, ...]

    @property
    def per_expert(self) -> bool:
        """True: the leading dimension counts experts and may be cut anywhere."""
        return self.pieces[0].expert is not None

    def within(self, start: int, stop: int) -> list[Piece]:
        """Pieces inside rows [start, stop) of the leading dimension; all of them for a tensor without experts."""
        return [piece for piece in self.pieces if piece.expert is None or start <= piece.expert < stop]


def native_layout(model: ModelConfig) -> list[NativeTensor]:
    """Every native tensor of `model` in layer order. Nothing is allocated."""
    sizes = dimensions(model)
    scopes = {0: ("every layer", "lightning", "shared"), 1: ("every layer", "softmax", "shared")}
    layout = [instance(row, sizes, None) for row in TABLE if row.scope == "first"]
    for layer, kind in enumerate(model.layer_types()):
        for row in TABLE:
            if row.scope in scopes[kind] and (row.scope != "shared" or model.shared_intermediate_size):
                layout.append(instance(row, sizes, layer))
    layout += [instance(row, sizes, None) for row in TABLE if row.scope == "last"]
    return layout


def native_tensors(model: ModelConfig, dtype: torch.dtype) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Native name -> (global shape, stored dtype). `dtype` is the model's; router and head are float32 always."""
    return {native.name: (native.shape, torch.float32 if native.fp32 else dtype) for native in native_layout(model)}


def hf_tensors(model: ModelConfig, format: HfFormat) -> dict[str, tuple[int, ...]]:
    """Hugging Face name -> shape of all that a directory in `format` holds, in layer order (8,243 for MiniMax-M1).

    `minimax` adds the decay buffers that transformers keeps in a checkpoint, see `hf_buffers`.
    """
    shapes = {piece.name: piece.shape for native in native_layout(model) for piece in native.pieces}
    return shapes | (hf_buffers(model) if format == "minimax" else {})


def hf_buffers(model: ModelConfig, block_size: int = HF_BLOCK_SIZE) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the buffers (no parameters) that transformers' `minimax` stores for each lightning layer."""
    heads = model.num_attention_heads
    shapes = {
        "slope_rate": (heads, 1, 1),
        "query_decay": (heads, block_size, 1),
        "key_decay": (heads, block_size, 1),
        "diagonal_decay": (1, heads, block_size, block_size),
    }
    return {
        f"model.layers.{layer}.self_attn.{name}": shape
        for layer, kind in enumerate(model.layer_types())
        if kind == 0
        for name, shape in shapes.items()
    }


def split(native: NativeTensor, data: Tensor, model: ModelConfig, *, start: int = 0) -> Iterator[tuple[Piece, Tensor]]:
    """The Hugging Face tensors in `data`, in their own shapes (views where strides allow, else copies).

    data: the whole native tensor or, for experts, its rows from expert `start` on.
    """
    for piece in native.within(start, start + len(data)):
        part = data if piece.expert is None else data[piece.expert - start]
        yield piece, piece.view(part, model).reshape(piece.shape)


def join(
    native: NativeTensor,
    read: Callable[[Piece], Tensor],
    model: ModelConfig,
    *,
    start: int,
    stop: int,
    dtype: torch.dtype,
) -> Tensor:
    """Rows [start, stop) of the native tensor in `dtype`, put together from `read(piece)`, which gives piece.shape."""
    data = torch.empty((stop - start, *native.shape[1:]), dtype=dtype)
    for piece in native.within(start, stop):
        view = piece.view(data if piece.expert is None else data[piece.expert - start], model)
        view.copy_(read(piece).reshape(view.shape))
    return data


def dimensions(model: ModelConfig) -> dict[str, int]:
    q, kv = model.num_attention_heads * model.head_dim, model.num_key_value_heads * model.head_dim
    return {
        "1": 1,
        "2": 2,
        "V": model.vocab_size,
        "h": model.hidden_size,
        "HD": q,
        "3HD": 3 * q,
        "GD": kv,
        "HD+2GD": q + 2 * kv,
        "E": model.num_local_experts,
        "F": model.intermediate_size,
        "Fs": model.shared_intermediate_size,
    }


def instance(row: Row, sizes: dict[str, int], layer: int | None) -> NativeTensor:
    def shaped(symbols: str) -> tuple[int, ...]:
        return tuple(sizes[symbol] for symbol in symbols.split())

    pieces = []
    per_expert = "{e}" in row.pieces[0][0]
    for expert in range(sizes["E"]) if per_expert else [None]:
        for name, shape, view in row.pieces:
            pieces.append(Piece(name.format(i=layer, e=expert), shaped(shape), expert, view))
    return NativeTensor(row.native.format(i=layer), shaped(row.shape), row.fp32, layer, tuple(pieces))
