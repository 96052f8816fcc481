"""GPUs and their links."""

import math
from dataclasses import dataclass

from megatron_m1.config.errors import ConfigError
from megatron_m1.engine.rates import Rates

__all__ = ["DEVICES", "Cluster"]

RATES = Rates()


@dataclass(frozen=True)
class Cluster:
    """Equal nodes of equal GPUs; links are counted per GPU and direction."""

    gpus: int
    gpus_per_node: int
    memory_gib: float
    """What a process may use of one GPU."""
    memory_tb_per_s: float
    nvlink_gb_per_s: float
    network_gb_per_s: float
    peak_tflops: float = 989.4
    """Dense bf16, for the model FLOPs utilisation."""
    rates: Rates = RATES

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if name != "rates" and not 0 < value < math.inf:
                raise ConfigError(f"{name}={value} of a cluster must be above 0, and finite.")

    @property
    def bytes_per_s(self) -> float:
        """Memory traffic of kernels that compute next to nothing."""
        return self.memory_tb_per_s * 1e12 * self.rates.copy_share

    def exchange_s(self, received: float, *, peers: int, stride: int) -> float:
        """Seconds in which each of `peers` ranks, `stride` apart, receives `received` bytes, in equal parts from the others.

        Within the node over NVLink, from other nodes over the network, both at once.
        """
        if peers == 1:
            return 0.0
        near = max(1, min(peers, self.gpus_per_node // stride))
        inside, outside = (near - 1) / (peers - 1), (peers - near) / (peers - 1)
        return max(
            received * inside / (self.nvlink_gb_per_s * 1e9 * self.rates.nvlink_share),
            received * outside / (self.network_gb_per_s * 1e9 * self.rates.network_share),
        )

    def collective_s(self, received: float, *, peers: int, stride: int) -> float:
        """Seconds of a ring or tree collective in which each rank receives `received` bytes in all: the slowest link decides."""
        if peers == 1:
            return 0.0
        if peers * stride <= self.gpus_per_node:
            return received / (self.nvlink_gb_per_s * 1e9 * self.rates.nvlink_share)
        return received / (self.network_gb_per_s * 1e9 * self.rates.network_share)

    def grouped_tflops(self, rows: float) -> float:
        """Rate of the experts' products with `rows` tokens an expert: linear between the measured points and down to 0."""
        small, large = self.rates.grouped_small_tflops, self.rates.grouped_tflops
        if rows < 256:
            return small * rows / 256
        return small + min(1.0, (rows - 256) / (1024 - 256)) * (large - small)


# Data sheets; memory as nvidia-smi shows it. NVLink: half of 400 and 900 GB/s. Network: one 400 Gb/s InfiniBand port for each GPU.
_H800 = Cluster(1, 8, 79.6, 3.35, 200.0, 50.0)
_H100 = Cluster(1, 8, 79.6, 3.35, 450.0, 50.0)
_H200 = Cluster(1, 8, 140.4, 4.8, 450.0, 50.0)
DEVICES = {"H800": _H800, "H100": _H100, "H200": _H200}
