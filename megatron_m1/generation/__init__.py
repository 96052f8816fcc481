"""Text from a trained model: hybrid cache, sampling, slots of sequences, the `generate` command."""

from megatron_m1.generation.command import main

__all__ = ["main"]
