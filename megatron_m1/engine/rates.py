"""The rates at which one Hopper GPU is taken to work, and where each comes from."""

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from megatron_m1.config.errors import ConfigError

__all__ = ["Rates", "read_rates"]


@dataclass(frozen=True)
class Rates:
    """Defaults, of an H200: "measured" kernel by kernel, "fitted" to whole layers and ranks alone on the GPU by
    benchmarks/long_context_rates.py (benchmarks/results/rates_h200.json). H100 and H800 have the same tensor cores; what is bound by
    memory scales with its bandwidth. Unbalanced experts and ranks that wait for each other are not counted."""

    dense_tflops: float = 700.0
    """bf16 matrix products, measured 700-800."""
    grouped_tflops: float = 600.0
    """torch's grouped_mm at M1's expert shapes from 1024 rows an expert on, measured 600-666."""
    grouped_small_tflops: float = 410.0
    """The same with 256 rows an expert, measured 410-450."""
    softmax_tflops: float = 552.0
    """Causal flash attention, forward, fitted; by itself 554 with 65,536 tokens and 64 heads of 128."""
    softmax_backward_tflops: float = 513.0
    """Fitted."""
    softmax_context: float = 1.70
    """Seconds of attention block by block over context-parallel ranks over those of one kernel, fitted to rings of 16 and 32 at 1M."""
    fp32_tflops: float = 47.4
    """The head without TF32, fitted; the data sheet has 67."""
    copy_share: float = 4.3 / 4.8
    """Of the data sheet's memory bandwidth that a copy reaches, measured."""
    nvlink_share: float = 0.8
    """Of the link, one direction: the 160 of 200 GB/s that the DeepSeek-V3 report counts on for the H800."""
    network_share: float = 0.8
    """Assumed."""
    lightning_layer: float = 1.078
    """Seconds of a whole lightning layer, forward and backward, over the sum of its terms, fitted."""
    softmax_layer: float = 1.175
    """The same of a softmax layer without its attention kernel, fitted."""
    layer_host_s: float = 0.0235
    """Seconds in which the host queues one layer, forward and backward: what a micro-batch's layer takes at least, communication
    included. 0: the device is never kept waiting. Fitted to a rank of 40 layers; it depends on the machine (30 ms where other processes
    ran), and CUDA graphs would lower it."""
    calibration: str = (
        "rates fitted on one H200: 17 single layers alone to 5% (median 2%), 4 whole ranks without communication to -1% and +7%; "
        "communication, bubbles, overlap and anything at scale are not measured"
    )
    """What sums of these terms were compared with, and the error."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name == "calibration":
                continue
            if not isinstance(value, int | float) or value < 0 or (value == 0 and field.name != "layer_host_s"):
                raise ConfigError(f"{field.name}={value} of the rates must be a number above 0.")


def read_rates(path: str | Path) -> Rates:
    """Rates from a JSON file with any of the fields of `Rates`; the others keep their defaults. Raises ConfigError."""
    try:
        given = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"--rates={path} cannot be read: {error}; name a JSON file.") from None
    known = asdict(Rates())
    unknown = sorted(set(given) - set(known)) if isinstance(given, dict) else ["(no mapping)"]
    if unknown:
        raise ConfigError(f"--rates={path} holds {', '.join(unknown)}; it may hold {', '.join(known)}.")
    return Rates(**given)
