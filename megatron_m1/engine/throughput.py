"""Tokens and floating-point operations per second."""

from megatron_m1 import platform
from megatron_m1.config.schema import Config
from megatron_m1.engine.flops import device_peak_tflops, training_flops_per_token

__all__ = ["Throughput"]


class Throughput:
    """figures(global_batch, seconds) -> step_time_s, tokens_per_s (all tokens, all ranks), tflops (per device, forward and backward
    without recomputation) and mfu (share of the device's bf16 peak; left out where that is unknown)."""

    def __init__(self, config: Config, *, world_size: int) -> None:
        self.world_size, self.seq_length = world_size, config.training.seq_length
        self.flops_per_token = training_flops_per_token(config.model, config.training.seq_length)
        self.peak = config.logging.peak_tflops or device_peak_tflops(platform.device_name())

    def figures(self, global_batch: int, *, seconds: float) -> dict[str, float]:
        tokens_per_s = global_batch * self.seq_length / seconds
        tflops = tokens_per_s * self.flops_per_token / self.world_size / 1e12
        figures = {"step_time_s": seconds, "tokens_per_s": tokens_per_s, "tflops": tflops}
        return figures if self.peak is None else figures | {"mfu": tflops / self.peak}
