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
    softmax_tflops: float = 540.0
    """Causal attention in one kernel, forward, fitted to 8,192 to 262,144 tokens; over 524,288 and more it does 445, which the rate
    backward, not lower there, makes up for."""
    softmax_backward_tflops: float = 488.0
    """Fitted."""
    softmax_context: float = 0.93
    """Seconds of attention block by block over context-parallel ranks over those of one kernel, where cuDNN computes the blocks. Fitted to
    one layer of 1M tokens on a ring of 16; 3% more than cuDNN's kernels alone take for such blocks."""
    softmax_context_flash: float = 1.59
    """The same where flash does: packs, and up to version 5fb2f68 everything. Fitted to a whole rank of 1M tokens on a ring of 32, of
    version a871f37."""
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
    lightning_layer: float = 1.058
    """Seconds of a whole lightning layer, forward and backward, over the sum of its terms, fitted."""
    softmax_layer: float = 0.991
    """The same of a softmax layer without its attention kernel, fitted."""
    forward_wait_s: float = 0.00332
    """Seconds in which the device waits in every forward pass of a layer, those repeated for the backward pass included, fitted to
    single lightning layers. The host reads back how many tokens go to which expert before it can queue what follows, which is the likely
    cause: nothing of the kind shows in backward passes."""
    layer_host_s: float = 0.0235
    """Seconds in which the host queues one layer, forward and backward: what a micro-batch's layer takes at least, communication
    included. 0: the host is always in time. Of a rank of 40 layers and 2,048 tokens; it depends on the machine (30 ms where other
    processes ran), and CUDA graphs would lower it."""
    calibration: str = (
        "rates fitted on one H200: 41 single layers alone to 6% (median 2%), 4 whole ranks without communication, some of the rates "
        "fitted to them, to +0% and +11%, 3 of another layout, beside other load, to -15% and -8%; communication, bubbles, overlap and "
        "anything at scale are not measured"
    )
    """What sums of these terms were compared with, and the error."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name == "calibration":
                if not isinstance(value, str):
                    raise ConfigError(f"calibration={value!r} of the rates must be text: what they were compared with.")
                continue
            can_be_0 = field.name in ("forward_wait_s", "layer_host_s")
            least = "of at least 0" if can_be_0 else "above 0"
            is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
            if not is_number or value < 0 or (value == 0 and not can_be_0):
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
