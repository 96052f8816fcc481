"""Rates for the step-time estimate from what benchmarks.long_context and benchmarks.any_rank measured, and how far they are off.

    python -m benchmarks.long_context_rates benchmarks/results/long_context.json benchmarks/results/any_rank_*.json \
        [--compare benchmarks/results/rank_of_32k_preset.json] [--output benchmarks/results/rates.json]
    python tools/plan_layout.py --rates benchmarks/results/rates.json ...

Fitted: a factor on all terms of a lightning layer and the device's wait in a forward pass, then a factor on those of a softmax layer
without its kernel and that kernel's rates forward and backward, by least squares of relative errors over the single layers that take at
least twice as long as the quickest, which the host limits. What the ring costs over one kernel: the median over softmax layers of
context-parallel ranks whose calls did not compile, and over whole ranks without head that hardly wait for the host. Then, from whole
ranks: the host's time for a layer from the stages without head, where it exceeds their work and waits, and the rate of the fp32 head
from what a last stage takes longer than another one with as many layers of both kinds, where neither waits for the host. All other
rates stay as they are. --compare: whole ranks that nothing is fitted to.
"""

import argparse
import json
import statistics
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.any_rank import stored_config, version_of, work_seconds
from benchmarks.long_context import Point, estimate, is_warm, layer_config, world_of
from megatron_m1.config import Config
from megatron_m1.config.schema import ModelConfig
from megatron_m1.engine.cluster import DEVICES, Cluster
from megatron_m1.engine.rates import Rates
from megatron_m1.engine.step_time import forward_waits

__all__ = ["fit_context", "fit_layers", "fit_ranks", "rank_errors"]

EXPERTS = 32
HOST_BOUND = 1.25
"""A rank that takes more than this times its work and waits is taken to be limited by the host."""
HARDLY = 0.1
"""Waits of a rank that do not blur the rest, over its work."""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("--compare", type=Path, nargs="+", default=[])
    parser.add_argument("--output", type=Path)
    options = parser.parse_args(argv)
    results = [json.loads(path.read_text()) for path in options.results]
    device = next(name for name in DEVICES if name in results[0]["hardware"]["device"])
    layers = next(result for result in results if "points" in result)
    ranks = [result for result in results if "ranks" in result]
    model = ModelConfig(**layers["model"])
    rates = fit_layers(layers["points"], model, DEVICES[device])
    rates = fit_context(layers["points"], ranks, model, replace(DEVICES[device], rates=rates))
    rates = fit_ranks(ranks, rates, DEVICES[device])
    fitted = replace(DEVICES[device], rates=rates)
    errors = list(layer_errors(layers["points"], model, fitted))
    text = (
        f"fitted on an {layers['hardware']['device']}: {len(errors)} single layers alone to {max(errors):.0%} "
        f"(median {statistics.median(errors):.0%})"
    )
    whole = list(rank_errors(ranks, fitted))
    if whole:
        text += f", {len(whole)} whole ranks without communication to {min(whole):+.0%} and {max(whole):+.0%}"
    others = list(rank_errors([json.loads(path.read_text()) for path in options.compare], fitted))
    if others:
        text += f", {len(others)} to which nothing was fitted to {min(others):+.0%} and {max(others):+.0%}"
    text += "; communication, bubbles, overlap and anything at scale are not measured"
    found = asdict(replace(rates, calibration=text))
    print(json.dumps(found, indent=1))
    if options.output:
        options.output.write_text(json.dumps(found, indent=1) + "\n")
    return 0


def fit_layers(rows: list[dict[str, Any]], model: ModelConfig, device: Cluster) -> Rates:
    """The device's rates with those of the layers fitted. rows: points of benchmarks.long_context on `device`."""
    points = list(_measured(rows))
    lightning = []
    for point, row in points:
        if point.kind == "lightning":
            terms = _terms(row, model, device)
            waits = terms.pop("launch")
            lightning.append(([sum(terms.values()), waits], row["forward_s"] + row["backward_s"]))
    whole_layer, wait = _least_squares(lightning)
    equations: list[tuple[list[float], float]] = []
    for point, row in points:
        if point.kind == "lightning":
            continue
        terms = _terms(row, model, device)
        waits = wait * terms.pop("launch")
        # x = (factor of the rest, seconds per default second of the kernel forward, the same backward)
        plain = _terms(row | {"point": asdict(replace(point, recompute="none"))}, model, device)
        first = wait * plain.pop("launch")
        rest, kernel = sum(plain.values()) - plain["softmax"], plain["softmax"]
        rates = device.rates
        forward = kernel / (1 + 2.5 * rates.softmax_tflops / rates.softmax_backward_tflops)
        again = sum(terms.values()) - terms["softmax"] - rest
        repeated = forward if point.recompute == "selective" else 0.0
        equations.append(([rest / 3, forward, 0.0], row["forward_s"] - first))
        equations.append(([2 * rest / 3 + again, repeated, kernel - forward], row["backward_s"] - (waits - first)))
    factor, kernel_forward, kernel_backward = _least_squares(equations)
    return replace(
        device.rates,
        lightning_layer=device.rates.lightning_layer * whole_layer,
        forward_wait_s=device.rates.forward_wait_s * wait,
        softmax_layer=device.rates.softmax_layer * factor,
        softmax_tflops=device.rates.softmax_tflops / kernel_forward,
        softmax_backward_tflops=device.rates.softmax_backward_tflops / kernel_backward,
    )


def fit_context(rows: list[dict[str, Any]], ranks: list[dict[str, Any]], model: ModelConfig, device: Cluster) -> Rates:
    """The device's rates with softmax_context and softmax_context_flash, as far as there are measurements of either.

    rows: of layers, which take seconds and are not repeated; ranks: results of any_rank.
    """
    factors: dict[bool, list[float]] = {True: [], False: []}
    for row in rows:
        point = Point(**row["point"])
        if point.context > 1 and point.kind == "softmax" and is_warm(row):
            found = _of_attention(row["forward_s"] + row["backward_s"], _terms(row, model, device))
            factors[row.get("cudnn_blocks", False)].append(found)
    for rank in _ranks(ranks, device):
        if rank.config.parallel.context > 1 and not rank.is_last and not rank.waits and rank.terms["softmax"]:
            factors[rank.cudnn_blocks].append(_of_attention(rank.seconds, rank.terms))
    rates = device.rates
    cudnn, flash = (statistics.median(found) if found else 1.0 for found in (factors[True], factors[False]))
    return replace(
        rates,
        softmax_context=rates.softmax_context * cudnn,
        softmax_context_flash=rates.softmax_context_flash * flash,
    )


def fit_ranks(results: list[dict[str, Any]], rates: Rates, device: Cluster) -> Rates:
    """`rates` with the host's time for a layer and the rate of the fp32 head from benchmarks.any_rank, as far as it has them."""
    ranks = list(_ranks(results, replace(device, rates=rates)))
    waiting = [r.seconds / r.layers.total() for r in ranks if not r.is_last and r.seconds > HOST_BOUND * r.floor]
    heads = [
        rates.fp32_tflops * last.terms["head"] / (last.seconds - other.seconds)
        for last in ranks
        for other in ranks
        # Behind layers that wait for the host, what the head adds is lost in the host's own spread.
        if last.is_last and not other.is_last and other.config == last.config and other.layers == last.layers
        if not other.waits and last.seconds > other.seconds
    ]
    fitted = {"layer_host_s": waiting, "fp32_tflops": heads}
    return replace(rates, **{name: statistics.median(found) for name, found in fitted.items() if found})


def layer_errors(rows: list[dict[str, Any]], model: ModelConfig, device: Cluster) -> Iterator[float]:
    """Relative error, without sign, of every layer whose call did not compile, those that were not fitted to included."""
    for _, row in _measured(rows, rounds=1):
        yield abs(sum(_terms(row, model, device).values()) / (row["forward_s"] + row["backward_s"]) - 1)


def rank_errors(results: list[dict[str, Any]], device: Cluster) -> Iterator[float]:
    """Estimate over measurement, less 1, of every rank's micro-batch without communication."""
    for rank in _ranks(results, device):
        yield sum(rank.terms.values()) / rank.seconds - 1


def _measured(rows: list[dict[str, Any]], *, rounds: int = 2) -> Iterator[tuple[Point, dict[str, Any]]]:
    """The points of calls that did not compile, of at least so many, that the device limits and not the host."""
    warm = [row for row in rows if is_warm(row)]
    quickest = min(row["forward_s"] + row["backward_s"] for row in warm)
    limited = (row for row in warm if row["forward_s"] + row["backward_s"] >= 2 * quickest)
    return ((Point(**row["point"]), row) for row in limited if row["rounds"] >= rounds)


def _terms(row: dict[str, Any], model: ModelConfig, device: Cluster) -> dict[str, float]:
    """Estimated work of a layer, as it was when `row` was measured."""
    point = Point(**row["point"])
    config, gpus = layer_config(point, model, EXPERTS), world_of(point, EXPERTS)
    return estimate(config, replace(device, gpus=gpus), **version_of(row))


def _least_squares(equations: list[tuple[list[float], float]]) -> list[float]:
    """The factors of the coefficients whose sums are the seconds, in relative errors."""
    matrix = torch.tensor([[c / seconds for c in row] for row, seconds in equations], dtype=torch.float64)
    return torch.linalg.lstsq(matrix, torch.ones(len(matrix), 1).double()).solution.flatten().tolist()


def _of_attention(seconds: float, terms: dict[str, float]) -> float:
    """Measured over estimated attention, the other terms as estimated."""
    return (seconds - sum(terms.values()) + terms["softmax"]) / terms["softmax"]


@dataclass(frozen=True)
class _Rank:
    """A whole rank's micro-batch: as measured, and its estimated work and waits for the host."""

    config: Config
    layers: Counter[int]
    """By kind."""
    is_last: bool
    cudnn_blocks: bool
    seconds: float
    forward_waits_s: float
    """In one layer."""
    terms: dict[str, float]

    @property
    def waits(self) -> bool:
        """Whether for so long that nothing else can be told from its seconds."""
        return self.terms["launch"] > HARDLY * (sum(self.terms.values()) - self.terms["launch"])

    @property
    def floor(self) -> float:
        """Work, and waits in forward passes: what it would take if the host were in time."""
        return sum(self.terms.values()) - self.terms["launch"] + self.layers.total() * self.forward_waits_s


def _ranks(results: list[dict[str, Any]], device: Cluster) -> Iterator[_Rank]:
    for result in results:
        config, version = stored_config(result), version_of(result)
        parallel, types = config.parallel, config.model.layer_types()
        # A number of GPUs that the layout divides: the work of a rank does not depend on it.
        gpus = parallel.tensor * parallel.pipeline * parallel.context * parallel.expert
        for row in result["ranks"]:
            if "measured" not in row:
                continue
            terms = work_seconds(config, row["stage"], replace(device, gpus=gpus), **version)
            layers, is_last = Counter(types[layer] for layer in row["layers"]), row["stage"] == parallel.pipeline - 1
            seconds = row["measured"]["micro_batch_s"]
            waits = forward_waits(config, device.rates)
            yield _Rank(config, layers, is_last, version["cudnn_blocks"], seconds, waits, terms)


if __name__ == "__main__":
    sys.exit(main())
