"""The rates at which one Hopper GPU is taken to work, and where each comes from."""

import json
import math
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
    """Causal attention in one kernel, forward, fitted; by itself 554 with 65,536 tokens and 64 heads of 128."""
    softmax_backward_tflops: float = 513.0
    """Fitted."""
    softmax_context: float = 1.03
    """Seconds of attention block by block over context-parallel ranks over those of one kernel, where cuDNN computes the blocks. Derived,
    not fitted, from kernels alone, of 65,536 tokens and 64 heads of 128: a block 236.4 ms forward and 650 backward, the causal kernel,
    half of it, 117 forward and, as the rates above stand to each other, 315 backward."""
    softmax_context_flash: float = 1.67
    """The same where flash does: packs, and up to version 5fb2f68 everything. Fitted at 1M to a layer on a ring of 16 (alone 1.61) and a
    whole rank on one of 32 (alone 1.73), of version a871f37."""
    fp32_tflops: float = 52.3
    """The head without TF32, fitted to what the last stage takes longer than the one before it; the data sheet has 67."""
    head_split_tflops: float = 540.0
    """bf16 products of the head under training.head_products, of which one of fp32 takes several; making the parts and adding up
    included. Measured at 8,192 tokens, bf16 hidden states of 6,144 and 50,016 rows: 558 with 12 products, 520 with 7."""
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
        "rates fitted on one H200: 20 single layers alone to 5% (median 3%), 4 whole ranks without communication to -3% and +5%; "
        "attention over context-parallel ranks, by cuDNN since, is derived from its kernels; communication, bubbles, overlap and anything "
        "at scale are not measured"
    )
    """What sums of these terms were compared with, and the error."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name == "calibration":
                if not isinstance(value, str):
                    raise ConfigError(f"calibration={value!r} of the rates must be text: what they were compared with.")
                continue
            least = "of at least 0" if field.name == "layer_host_s" else "above 0"
            is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
            if not is_number or value < 0 or (value == 0 and field.name != "layer_host_s"):
                raise ConfigError(f"{field.name}={value!r} of the rates must be a finite number {least}.")


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
