"""Operators of MiniMax-M1's layers: lightning attention (training, packed, stateful, decoding), softmax attention, norms, SwiGLU.

Depends on torch (and triton) only. Importing has no side effects.
"""

from m1_kernels.decode import lightning_attention_step, lightning_attention_step_packed
from m1_kernels.dispatch import (
    lightning_attention,
    lightning_attention_packed,
    lightning_attention_read,
    lightning_attention_state,
)
from m1_kernels.paged import softmax_attention_step
from m1_kernels.pointwise import gated_rms_norm, rms_norm, swiglu
from m1_kernels.reference import lightning_attention_reference
from m1_kernels.routing import route
from m1_kernels.slopes import slopes
from m1_kernels.softmax import softmax_attention
from m1_kernels.softmax_blocks import merge_attention, softmax_attention_backward, softmax_attention_forward

__all__ = [
    "gated_rms_norm",
    "lightning_attention",
    "lightning_attention_packed",
    "lightning_attention_read",
    "lightning_attention_reference",
    "lightning_attention_state",
    "lightning_attention_step",
    "lightning_attention_step_packed",
    "merge_attention",
    "rms_norm",
    "route",
    "slopes",
    "softmax_attention",
    "softmax_attention_backward",
    "softmax_attention_forward",
    "softmax_attention_step",
    "swiglu",
]
