"""Rates for the step-time estimate from what benchmarks.long_context and benchmarks.any_rank measured, and how far they are off.

    python -m benchmarks.long_context_rates benchmarks/results/long_context.json benchmarks/results/any_rank_*.json \
        [--output benchmarks/results/rates.json]
    python tools/plan_layout.py --rates benchmarks/results/rates.json ...

Fitted: a factor on all terms of a lightning layer and one on those of a softmax layer without its kernel, and that kernel's rates
forward and backward, by least squares of relative errors over the single layers that take the device at least twice as long as the
quickest, which the host limits. From softmax layers of context-parallel ranks: what the ring costs over one kernel. Then, from whole
ranks: the host's time for a layer from the stages without head, where it exceeds their work, and the rate of the fp32 head from last
stages that do not wait for the host. All other rates stay as they are.
"""

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks.long_context import STAGES, Point, is_warm, layer_config
from megatron_m1.config import Config, from_yaml
from megatron_m1.config.schema import ModelConfig
from megatron_m1.engine.cluster import DEVICES, Cluster
from megatron_m1.engine.rates import Rates
from megatron_m1.engine.step_time import COMPUTE, stage_seconds

__all__ = ["fit_context", "fit_layers", "fit_ranks", "rank_errors"]

EXPERTS = 32
HOST_BOUND = 1.25
"""A rank that takes more than this times its work is taken to wait for the host."""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args(argv)
    results = [json.loads(path.read_text()) for path in options.results]
    device = next(name for name in DEVICES if name in results[0]["hardware"]["device"])
    layers = next(result for result in results if "points" in result)
    ranks = [result for result in results if "ranks" in result]
    model = ModelConfig(**layers["model"])
    rates = fit_layers(layers["points"], model, DEVICES[device])
    rates = fit_context(layers["points"], model, replace(DEVICES[device], rates=rates))
    rates = fit_ranks(ranks, rates, DEVICES[device])
    fitted = replace(DEVICES[device], rates=rates)
    errors = list(layer_errors(layers["points"], model, fitted))
    text = (
        f"fitted to {len(errors)} single layers alone on an {layers['hardware']['device']} "
        f"(median error {statistics.median(errors):.0%}, largest {max(errors):.0%})"
    )
    whole = list(rank_errors(ranks, fitted))
    if whole:
        text += f"; estimates of {len(whole)} whole ranks without communication are off by {min(whole):+.0%} to {max(whole):+.0%}"
    text += "; communication, bubbles and overlap were not measured"
    found = asdict(replace(rates, calibration=text))
    print(json.dumps(found, indent=1))
    if options.output:
        options.output.write_text(json.dumps(found, indent=1) + "\n")
    return 0


def fit_layers(rows: list[dict[str, Any]], model: ModelConfig, device: Cluster) -> Rates:
    """The device's rates with those of the layers fitted. rows: points of benchmarks.long_context on `device`."""
    lightning = []
    equations: list[tuple[list[float], float]] = []
    for point, row in _measured(rows):
        terms = _terms(point, model, device)
        if point.kind == "lightning":
            lightning.append((row["forward_s"] + row["backward_s"]) / sum(terms.values()))
            continue
        # x = (factor of the rest, seconds per default second of the kernel forward, the same backward)
        plain = _terms(replace(point, recompute="none"), model, device)
        rest, kernel = sum(plain.values()) - plain["softmax"], plain["softmax"]
        rates = device.rates
        forward = kernel / (1 + 2.5 * rates.softmax_tflops / rates.softmax_backward_tflops)
        again = sum(terms.values()) - terms["softmax"] - rest
        repeated = forward if point.recompute == "selective" else 0.0
        equations.append(([rest / 3, forward, 0.0], row["forward_s"]))
        equations.append(([2 * rest / 3 + again, repeated, kernel - forward], row["backward_s"]))
    matrix = torch.tensor([[c / seconds for c in row] for row, seconds in equations], dtype=torch.float64)
    factor, kernel_forward, kernel_backward = (
        torch.linalg.lstsq(matrix, torch.ones(len(matrix), 1).double()).solution.flatten().tolist()
    )
    return replace(
        device.rates,
        lightning_layer=device.rates.lightning_layer * statistics.median(lightning),
        softmax_layer=device.rates.softmax_layer * factor,
        softmax_tflops=device.rates.softmax_tflops / kernel_forward,
        softmax_backward_tflops=device.rates.softmax_backward_tflops / kernel_backward,
    )


def fit_context(rows: list[dict[str, Any]], model: ModelConfig, device: Cluster) -> Rates:
    """The device's rates with softmax_context, from softmax layers of context-parallel ranks, which take seconds and are not repeated."""
    factors = []
    for row in rows:
        point = Point(**row["point"])
        if point.context > 1 and point.kind == "softmax" and is_warm(row):
            terms = _terms(point, model, device)
            rest = sum(terms.values()) - terms["softmax"]
            factors.append((row["forward_s"] + row["backward_s"] - rest) / terms["softmax"])
    ring = device.rates.softmax_context * (statistics.median(factors) if factors else 1.0)
    return replace(device.rates, softmax_context=ring)


def fit_ranks(results: list[dict[str, Any]], rates: Rates, device: Cluster) -> Rates:
    """`rates` with the host's time for a layer and the rate of the fp32 head from benchmarks.any_rank, as far as it has them."""
    for last in (False, True):
        found = []
        for config, row, is_last in _ranks(results):
            if is_last != last:
                continue
            terms = _rank_terms(config, row, replace(device, rates=rates))
            seconds = row["measured"]["micro_batch_s"]
            if last:
                # Behind layers that wait for the host, what the head adds is lost in the host's own spread.
                if terms["launch"] == 0:
                    found.append(rates.fp32_tflops * terms["head"] / (seconds - sum(terms.values()) + terms["head"]))
            elif seconds > HOST_BOUND * (sum(terms.values()) - terms["launch"]):
                found.append(seconds / len(row["layers"]))
        found = [value for value in found if value > 0]
        if found:
            rates = replace(rates, **{"fp32_tflops" if last else "layer_host_s": statistics.median(found)})
    return rates


def layer_errors(rows: list[dict[str, Any]], model: ModelConfig, device: Cluster) -> Iterator[float]:
    """Relative error, without sign, of every layer."""
    for point, row in _measured(rows):
        yield abs(sum(_terms(point, model, device).values()) / (row["forward_s"] + row["backward_s"]) - 1)


def rank_errors(results: list[dict[str, Any]], device: Cluster) -> Iterator[float]:
    """Estimate over measurement, less 1, of every rank's micro-batch without communication."""
    for config, row, _ in _ranks(results):
        yield sum(_rank_terms(config, row, device).values()) / row["measured"]["micro_batch_s"] - 1


def _measured(rows: list[dict[str, Any]]) -> Iterator[tuple[Point, dict[str, Any]]]:
    """The points that were repeated and that the device limits, not the host."""
    repeated = [row for row in rows if row.get("rounds", 0) > 1]
    quickest = min(row["forward_s"] + row["backward_s"] for row in repeated)
    return ((Point(**r["point"]), r) for r in repeated if r["forward_s"] + r["backward_s"] >= 2 * quickest)


def _terms(point: Point, model: ModelConfig, device: Cluster) -> dict[str, float]:
    config = layer_config(point, model, EXPERTS)
    terms = stage_seconds(config, replace(device, gpus=STAGES * point.tensor * point.context * EXPERTS))[1]
    return {name: terms[name] for name in COMPUTE}


def _rank_terms(config: Config, row: dict[str, Any], device: Cluster) -> dict[str, float]:
    """Work of a rank's micro-batch, and what is left of the host's time."""
    parallel = config.parallel
    # A number of GPUs that the layout divides: the work of a rank does not depend on it.
    gpus = parallel.tensor * parallel.pipeline * parallel.context * parallel.expert
    terms = stage_seconds(config, replace(device, gpus=gpus))[row["stage"]]
    work = {name: terms[name] for name in COMPUTE}
    host = device.rates.layer_host_s * len(row["layers"])
    return work | {"launch": max(0.0, host - sum(work.values()) + work["head"])}


def _ranks(results: list[dict[str, Any]]) -> Iterator[tuple[Config, dict[str, Any], bool]]:
    for result in results:
        with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
            yaml.safe_dump(result["config"], file)
            file.flush()
            config = from_yaml(file.name)
        for row in result["ranks"]:
            if "measured" in row:
                yield config, row, row["stage"] == config.parallel.pipeline - 1


if __name__ == "__main__":
    sys.exit(main())
