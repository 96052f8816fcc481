"""Pretraining and continual pretraining."""

from megatron_m1.pretrain.loop import main

__all__ = ["main"]
