"""Lightning attention layer: linear attention with a fixed decay per head."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from m1_kernels import lightning_attention_packed, slopes
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, checkpoint
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from megatron_m1.model.cache import AttentionCache
from megatron_m1.model.norm import GatedRMSNorm
from megatron_m1.model.transformer_config import M1TransformerConfig
from megatron_m1.model.transient_silu import transient_silu
from megatron_m1.parallel import SequenceLayout, SequenceParams
from megatron_m1.parallel.lightning_context import LightningContext

__all__ = ["LightningAttention", "column_linear", "row_linear"]


def column_linear(config: M1TransformerConfig, inputs: int, outputs: int, group: Any) -> ColumnParallelLinear:
    """Bias-free linear whose output channels are spread over `group`."""
    return ColumnParallelLinear(
        inputs,
        outputs,
        config=config,
        init_method=torch.nn.init.zeros_,
        bias=False,
        gather_output=False,
        tp_group=group,
    )


def row_linear(config: M1TransformerConfig, inputs: int, outputs: int, group: Any) -> RowParallelLinear:
    """Bias-free linear whose input channels are spread over `group`; its output is reduced (scattered) over it."""
    return RowParallelLinear(
        inputs,
        outputs,
        config=config,
        init_method=torch.nn.init.zeros_,
        bias=False,
        input_is_parallel=True,
        skip_bias_add=False,
        tp_group=group,
    )


class LightningAttention(MegatronModule):
    """out = out_proj(sigmoid(output_gate(x)) * RMSNorm_{H*D}(lightning(silu(qkv_proj(x)))))

    forward(hidden [s, b, h]) -> (out [s, b, h], None); s is local under sequence parallelism; with packed documents b is 1.
    Heads are spread over the tensor-parallel group; decays and state are fp32.  Source: MiniMax-01 paper, section 2.2.
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
        self.local_heads = m1.num_attention_heads // group.size()
        channels = m1.num_attention_heads * m1.head_dim
        first = group.rank() * self.local_heads
        with torch.device("cpu"):
            every = slopes(m1.num_attention_heads, layer_number - 1, m1.num_hidden_layers)
        # A plain attribute: buffers would follow the model to bf16, where the slowest decays round to 1.
        self.slopes = every[first : first + self.local_heads].clone()
        self.strategy = config.lightning_strategy
        self.context = LightningContext(
            pg_collection.cp, self.slopes.tolist(), method=config.context_lightning, strategy=self.strategy
        )
        self.qkv_proj = column_linear(config, m1.hidden_size, 3 * channels, group)
        self.output_gate = column_linear(config, m1.hidden_size, channels, group)
        self.norm = GatedRMSNorm(config, channels, m1.lightning_norm_eps, group)
        self.out_proj = row_linear(config, channels, m1.hidden_size, group)
        self.recompute_core = config.recompute_granularity == "selective" and "core_attn" in config.recompute_modules

    def forward(
        self,
        hidden_states: Tensor,
        *,
        rotary_pos_emb: Tensor | None = None,
        packed_seq_params: SequenceParams | None = None,
        inference_context: AttentionCache | None = None,
    ) -> tuple[Tensor, None]:
        qkv, _ = self.qkv_proj(hidden_states)
        if self.slopes.device != qkv.device:
            self.slopes = self.slopes.to(qkv.device)

        def start(qkv: Tensor) -> Callable[[], Tensor]:
            return self._start(qkv, packed_seq_params, inference_context)

        recompute = self.recompute_core and self.training
        finish = partial(checkpoint, lambda qkv: start(qkv)(), False, qkv) if recompute else start(qkv)
        gate, _ = self.output_gate(hidden_states)  # while states travel between context-parallel ranks
        out, _ = self.out_proj(self.norm(finish(), gate))
        return out, None

    def _start(self, qkv: Tensor, packed: SequenceParams | None, cache: AttentionCache | None) -> Callable[[], Tensor]:
        """[s, b, heads*3*D] head-major [q|k|v] -> a function that returns [s, b, heads*D]."""
        seq, batch = qkv.shape[:2]
        qkv = qkv.view(seq, batch, self.local_heads, 3 * self.head_dim).transpose(0, 1)
        layout = None if packed is None else packed.layout
        finish: Callable[[], Tensor]
        if layout is not None:
            finish = self._start_over_ranks(qkv, layout)
        elif cache is not None:
            q, k, v = torch.nn.functional.silu(qkv).split(self.head_dim, dim=-1)
            finish = partial(cache.lightning, self.layer_number, q, k, v, self.slopes, strategy=self.strategy)
        else:
            cu_seqlens = None if packed is None else packed.cu_seqlens_q
            finish = partial(
                lightning_attention_packed,
                qkv,
                self.slopes,
                cu_seqlens=cu_seqlens,
                recompute_activation=not self.recompute_core,  # the backward of what is recomputed follows at once
                strategy=self.strategy,
            )
        return lambda: finish().transpose(0, 1).reshape(seq, batch, -1)

    def _start_over_ranks(self, qkv: Tensor, layout: SequenceLayout) -> Callable[[], Tensor]:
        """qkv [b, s, heads, 3*D] -> a function that returns [b, s, heads, D]; as the operator for one rank, keeps qkv alone."""
        activated, drop = transient_silu(qkv)
        q, k, v = activated.split(self.head_dim, dim=-1)
        finish = self.context.start(q, k, v, self.slopes, layout)

        def out() -> Tensor:
            result = finish()
            if result.requires_grad and not self.recompute_core:
                drop(result)
            return result

        return out
