"""Softmax attention layer: grouped queries, partial rotary embedding in fp32."""

import torch
from m1_kernels import softmax_attention
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import checkpoint
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from megatron_m1.model.cache import AttentionCache
from megatron_m1.model.lightning import column_linear, row_linear
from megatron_m1.model.transformer_config import M1TransformerConfig
from megatron_m1.parallel import SequenceParams
from megatron_m1.parallel.ring_attention import ring_attention
from megatron_m1.parallel.sequence_params import KeptAttention
from megatron_m1.parallel.traffic import method_by_size
from megatron_m1.parallel.transformer_engine import TransformerEngineAttention

__all__ = ["SoftmaxAttention", "apply_rotary", "rotary_table"]


def rotary_table(position_ids: Tensor, rotary_dim: int, theta: float) -> Tensor:
    """cos and sin [2, b, s, 1, rotary_dim / 2], fp32, for position_ids [b, s] (int64, positions within the document)."""
    channel = torch.arange(0, rotary_dim, 2, dtype=torch.int64, device=position_ids.device).float()
    angles = position_ids.float().unsqueeze(-1) * (1.0 / theta ** (channel / rotary_dim))
    return torch.stack([angles.cos(), angles.sin()]).unsqueeze(3)


def apply_rotary(x: Tensor, table: Tensor) -> Tensor:
    """x [b, s, heads, D] with its first rotary_dim channels rotated (rotate-half), in fp32, returned in x's dtype."""
    cos, sin = table
    half = cos.shape[-1]
    first, second, rest = x.split([half, half, x.shape[-1] - 2 * half], dim=-1)
    first, second = first.float(), second.float()
    rotated = [first * cos - second * sin, second * cos + first * sin]
    return torch.cat([*(r.to(x.dtype) for r in rotated), rest], dim=-1)


class SoftmaxAttention(MegatronModule):
    """out = o_proj(softmax(q k^T / sqrt(D)) v), causal, with RoPE on the first rotary_dim channels of q and k.

    forward(hidden [s, b, h], rotary_pos_emb from `rotary_table`) -> (out [s, b, h], None). qkv_proj is laid out by KV group
    [r query heads | k | v], so that a tensor-parallel shard is a plain slice.
    """

    def __init__(
        self,
        config: M1TransformerConfig,
        layer_number: int,
        pg_collection: ProcessGroupCollection,
        name: str | None = None,
    ) -> None:
        super().__init__(config=config)
        m1, group = config.m1, pg_collection.tp
        self.layer_number, self.head_dim = layer_number, m1.head_dim
        self.queries_per_group = m1.num_attention_heads // m1.num_key_value_heads
        self.local_groups = m1.num_key_value_heads // group.size()
        self.context_group, self.context_method = pg_collection.cp, config.context_softmax
        self.transformer_engine = None
        if self.context_method == "transformer_engine" and self.context_group.size() > 1:
            self.transformer_engine = TransformerEngineAttention(
                heads=self.local_groups * self.queries_per_group,
                key_heads=self.local_groups,
                head_dim=self.head_dim,
                scale=self.head_dim**-0.5,
                group=self.context_group,
            )
        width = m1.num_key_value_heads * (self.queries_per_group + 2) * m1.head_dim
        self.qkv_proj = column_linear(config, m1.hidden_size, width, group)
        self.o_proj = row_linear(config, m1.num_attention_heads * m1.head_dim, m1.hidden_size, group)
        self.recompute_core = config.recompute_granularity == "selective" and "core_attn" in config.recompute_modules
        self.recomputed = self.recompute_core or config.recompute_granularity == "full"

    def forward(
        self,
        hidden_states: Tensor,
        *,
        rotary_pos_emb: Tensor | None = None,
        packed_seq_params: SequenceParams | None = None,
        inference_context: AttentionCache | None = None,
    ) -> tuple[Tensor, None]:
        assert rotary_pos_emb is not None, "softmax layers need the rotary table"
        qkv, _ = self.qkv_proj(hidden_states)

        def core(qkv: Tensor) -> Tensor:
            return self._attend(qkv, rotary_pos_emb, packed_seq_params, inference_context)

        out = checkpoint(core, False, qkv) if self.recompute_core and self.training else core(qkv)
        out, _ = self.o_proj(out)
        return out, None

    def _attend(
        self, qkv: Tensor, rotary: Tensor, packed: SequenceParams | None, cache: AttentionCache | None
    ) -> Tensor:
        """[s, b, groups*(r+2)*D] -> [s, b, heads*D]."""
        seq, batch = qkv.shape[:2]
        qkv = qkv.view(seq, batch, self.local_groups, self.queries_per_group + 2, self.head_dim).transpose(0, 1)
        q = apply_rotary(qkv[:, :, :, :-2].reshape(batch, seq, -1, self.head_dim), rotary)
        k = apply_rotary(qkv[:, :, :, -2], rotary)
        v, scale = qkv[:, :, :, -1], self.head_dim**-0.5
        if cache is not None:
            out = cache.softmax(self.layer_number, q, k, v, scale=scale)
        elif packed is not None and packed.layout is not None and self.transformer_engine is not None:
            out = self.transformer_engine(q, k, v, packed.layout)
        elif packed is not None and packed.layout is not None:
            method = _method(self.context_method, k, world=packed.layout.world)
            # At a million tokens attention over the ranks is most of a layer's time, and its result a fraction of its memory.
            repeated = self.recomputed and self.training
            kept = packed.attention.setdefault(self.layer_number, KeptAttention()) if repeated else None
            out = ring_attention(
                q, k, v, scale=scale, group=self.context_group, layout=packed.layout, method=method, kept=kept
            )
        else:
            cu_seqlens, longest = (None, None) if packed is None else (packed.cu_seqlens_q, packed.max_seqlen_q)
            out = softmax_attention(q, k, v, scale=scale, cu_seqlens=cu_seqlens, max_seqlen=longest)
        return out.transpose(0, 1).reshape(seq, batch, -1)


def _method(method: str, keys: Tensor, *, world: int) -> str:
    """For `auto` by size: the all-gather has one latency, the ring hides W-1 of them and needs memory for two blocks only."""
    gathered = 2 * world * keys.nbytes
    return method_by_size(method, gathered, of="keys and values of softmax layers", world=world)
