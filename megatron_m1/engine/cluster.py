"""GPUs, their links, and the rates at which they are taken to work."""

from dataclasses import dataclass

from megatron_m1.config.errors import ConfigError

__all__ = ["DEVICES", "Cluster"]

# Rates of one Hopper GPU. "Measured" is on an H200, kernel by kernel. H100 and H800 have the same tensor cores; what is bound by
# memory scales with its bandwidth. Launches, waiting and unbalanced experts are not counted, and no whole step of the 456B model
# was measured. The one step that was, examples/configs/single_gpu.yaml on an H100 with the torch path of lightning attention, ran
# at 54,000 to 59,000 tokens/s where these terms give 140,000: take ratios between layouts from them, not durations.
DENSE_TFLOPS = 700.0  # bf16 matrix products, measured 700-800
GROUPED_TFLOPS = 600.0  # torch's grouped_mm at M1's expert shapes from 1024 rows an expert on, measured 600-666
GROUPED_SMALL_TFLOPS = 410.0  # the same with 256 rows an expert, measured 410-450
SOFTMAX_TFLOPS = 554.0  # causal flash attention, forward, 65,536 tokens, 64 heads of 128: measured 127 ms
SOFTMAX_BACKWARD_TFLOPS = 390.0  # assumed: 0.7 of the forward's rate
FP32_TFLOPS = 50.0  # the head without TF32, assumed: three quarters of the data sheet's 67
COPY_SHARE = 4.3 / 4.8  # of the data sheet's memory bandwidth that a copy reaches, measured
NVLINK_SHARE = 0.8  # of the link, one direction: the 160 of 200 GB/s that the DeepSeek-V3 report counts on for the H800
NETWORK_SHARE = 0.8  # assumed


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

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value > 0:
                raise ConfigError(f"{name}={value} of a cluster must be above 0.")

    @property
    def bytes_per_s(self) -> float:
        """Memory traffic of kernels that compute next to nothing."""
        return self.memory_tb_per_s * 1e12 * COPY_SHARE

    def exchange_s(self, received: float, *, peers: int, stride: int) -> float:
        """Seconds in which each of `peers` ranks, `stride` apart, receives `received` bytes, in equal parts from the others.

        Within the node over NVLink, from other nodes over the network, both at once.
        """
        if peers == 1:
            return 0.0
        near = max(1, min(peers, self.gpus_per_node // stride))
        inside, outside = (near - 1) / (peers - 1), (peers - near) / (peers - 1)
        return max(
            received * inside / (self.nvlink_gb_per_s * 1e9 * NVLINK_SHARE),
            received * outside / (self.network_gb_per_s * 1e9 * NETWORK_SHARE),
        )

    def collective_s(self, received: float, *, peers: int, stride: int) -> float:
        """Seconds of a ring or tree collective in which each rank receives `received` bytes in all: the slowest link decides."""
        if peers == 1:
            return 0.0
        if peers * stride <= self.gpus_per_node:
            return received / (self.nvlink_gb_per_s * 1e9 * NVLINK_SHARE)
        return received / (self.network_gb_per_s * 1e9 * NETWORK_SHARE)

    @staticmethod
    def grouped_tflops(rows: float) -> float:
        """Rate of the experts' products with `rows` tokens an expert: linear between the measured points and down to 0."""
        if rows < 256:
            return GROUPED_SMALL_TFLOPS * rows / 256
        share = min(1.0, (rows - 256) / (1024 - 256))
        return GROUPED_SMALL_TFLOPS + share * (GROUPED_TFLOPS - GROUPED_SMALL_TFLOPS)


# Data sheets; memory as nvidia-smi shows it. NVLink: half of 400 and 900 GB/s. Network: one 400 Gb/s InfiniBand port for each GPU.
_H800 = Cluster(1, 8, 79.6, 3.35, 200.0, 50.0)
_H100 = Cluster(1, 8, 79.6, 3.35, 450.0, 50.0)
_H200 = Cluster(1, 8, 140.4, 4.8, 450.0, 50.0)
DEVICES = {"H800": _H800, "H100": _H100, "H200": _H200}
