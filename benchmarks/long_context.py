"""One layer of M1 at true width, forward and backward, from 8K tokens to a million or what one GPU holds.

    python -m benchmarks.long_context [--parts slice tensor_share context_share] [--time-limit-s 200] [--point-limit-s 25]
        [--resume] [--output FILE.json] [--model.key value]
    python -m benchmarks.long_context_plot FILE.json     # memory and time against tokens, as PNG
    python -m benchmarks.long_context --predict-again --output FILE.json     # no GPU: estimates again, what was measured stays

A lightning and a softmax layer, each with its experts (32, one on each expert-parallel rank), are built as the middle stage of a job
of fake ranks (fake_ranks.py), with and without selective recomputation of attention core and experts:
slice          all heads and channels, the whole sequence on this GPU
tensor_share   what one of 8 tensor-parallel ranks holds of it: 8 heads, an eighth of the tokens between the projections
context_share  all heads, one context-parallel rank's two zig-zag chunks of 1,048,576 tokens, over 8, 16 and 32 ranks; the states and
               keys and values of the neighbours are supplied
Measured: seconds with the device idle before and after (median of 3 after a first, which compiles; `rounds` 1: the first alone, where
that is estimated to take above 4 s; `first_call`, entered by hand: it compiled too), bytes kept for the backward pass, and peak bytes
over what is there before. Modelled: communication, from counted bytes and link speeds. Out of memory ends a series of growing
sequences; a point expected above --point-limit-s is left out, and says so. Written after every point.
Exit code 1 if a point failed otherwise or its gradients are not finite.
"""

import argparse
import gc
import json
import math
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from megatron_m1 import platform
from megatron_m1.config import Config, load_config
from megatron_m1.config.schema import ModelConfig, ParallelConfig, TrainingConfig

platform.setup()

from benchmarks.any_rank import device_kind, environment, now, stored_device, version_of, why, write  # noqa: E402
from benchmarks.fake_ranks import (  # noqa: E402
    RECEIVED_STD,
    Arrivals,
    balance_routing,
    fake_rank,
    fill_weights,
    modelled_again,
)
from megatron_m1.engine.batch import MicroBatch  # noqa: E402
from megatron_m1.engine.cluster import DEVICES, Cluster  # noqa: E402
from megatron_m1.engine.step_time import COMPUTE, forward_waits, stage_seconds  # noqa: E402
from megatron_m1.model.build import build_model, routers  # noqa: E402

__all__ = ["Point", "measure_point"]

ROOT = Path(__file__).resolve().parents[1]
MILLION = 1 << 20
STAGES = 3
KINDS = {"lightning": 0, "softmax": 1}
LONG_S = 4.0
"""Calls that are estimated to take longer are not repeated."""
LABELS = {
    "measured": "forward_s, backward_s, kept_bytes, peak_bytes: one rank alone, neighbours' data supplied, balanced routing",
    "modelled": "communication: counted bytes over link speeds, nothing hidden; estimated_s: engine/step_time.py",
    "kept_attention": "whether recomputation had the results of softmax attention and did not repeat it",
    "cudnn_blocks": "whether cuDNN computed softmax attention between context-parallel ranks, not flash",
}


@dataclass(frozen=True)
class Point:
    """One measurement."""

    part: str
    kind: str
    recompute: str
    tensor: int
    context: int
    tokens: int
    """Of the whole sequence; this rank has tokens / context."""

    @property
    def series(self) -> tuple[str, str, str, int]:
        """Points that differ in length alone."""
        return self.part, self.kind, self.recompute, self.tensor


def main(argv: list[str] | None = None) -> int:
    started = time.perf_counter()
    options, rest = parser().parse_known_args(argv)
    if options.predict_again:
        predict_again(options.output, experts=options.experts, cluster=DEVICES[options.device])
        return 0
    model, cluster = load_config(rest).model, DEVICES[options.device]
    results = environment("long_context", argv) | {"labels": LABELS, "model": asdict(model), "points": []}
    if options.resume and options.output.exists():
        before = json.loads(options.output.read_text())
        results["points"] = [{"commit": before["commit"]} | row for row in before["points"] if is_done(row)]
    done = {Point(**row["point"]): row for row in results["points"]}
    for point in points(options):
        if point in done:
            continue
        left = options.time_limit_s - (time.perf_counter() - started)
        why = left_out(point, list(done.values()), limit_s=min(left, options.point_limit_s))
        row = {"skipped": why} if why else measured_or_why(point, model, cluster, options.experts)
        done[point] = {"point": asdict(point), "commit": results["commit"]} | row
        results["points"].append(done[point])
        write(options.output, results)
        print(line(done[point]), flush=True)
    print(f"written: {options.output}")
    return 1 if any(unexpected(row) for row in results["points"]) else 0


def is_done(row: dict[str, Any]) -> bool:
    """Whether a point was measured, or failed, and was repeated if it should be."""
    once = row.get("rounds") == 1 and sum(row["estimated_s"].values()) <= LONG_S
    return "skipped" not in row and not once


def is_warm(row: dict[str, Any]) -> bool:
    """Whether a point was measured by calls that did not compile."""
    return "forward_s" in row and not row.get("first_call", False)


def unexpected(row: dict[str, Any]) -> bool:
    """Whether a point failed for another reason than memory, or with numbers that are not finite."""
    return not row.get("finite", True) or ("error" in row and not row["error"].startswith("OutOfMemoryError"))


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parts = ["slice", "tensor_share", "context_share"]
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1 << 13, 1 << 15, 1 << 17, 1 << 18, 1 << 19, MILLION])
    parser.add_argument("--contexts", type=int, nargs="+", default=[32, 16, 8], help="ranks of context_share")
    parser.add_argument("--context-tokens", type=int, default=MILLION, help="of the whole sequence of context_share")
    parser.add_argument("--tensor", type=int, default=8, help="ranks of tensor_share")
    parser.add_argument("--experts", type=int, default=32, help="expert-parallel ranks")
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--recompute", nargs="+", choices=["none", "selective"], default=["none", "selective"])
    parser.add_argument(
        "--device", choices=sorted(DEVICES), default="H800", help="whose links communication is modelled with"
    )
    parser.add_argument(
        "--time-limit-s", type=float, default=200.0, help="of all; no point starts that is expected to pass it"
    )
    parser.add_argument("--point-limit-s", type=float, default=25.0)
    parser.add_argument(
        "--predict-again", action="store_true", help="measure nothing, make the output's estimates again"
    )
    parser.add_argument("--resume", action="store_true", help="keep the points that the output has")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/long_context.json")
    return parser


def points(options: argparse.Namespace) -> Iterator[Point]:
    """The cheap ones first."""
    modes = [(kind, recompute) for kind in options.kinds for recompute in options.recompute]
    for part, tensor in (("tensor_share", options.tensor), ("slice", 1)):
        if part in options.parts:
            for tokens in sorted(options.tokens):
                for kind, recompute in modes:
                    yield Point(part, kind, recompute, tensor, 1, tokens)
    if "context_share" in options.parts:
        for context in sorted(options.contexts, reverse=True):
            for kind, recompute in modes:
                yield Point("context_share", kind, recompute, 1, context, options.context_tokens)


def left_out(point: Point, rows: list[dict[str, Any]], *, limit_s: float) -> str | None:
    """Why a point is not to be measured, from what is known of its series; None: it is."""
    measured = []
    for row in rows:
        earlier = Point(**row["point"])
        if earlier.series != point.series:
            continue
        if "error" in row and point.tokens * earlier.context >= earlier.tokens * point.context:
            return f"with {earlier.tokens // earlier.context} tokens: {row['error']}"
        if row.get("rounds", 0) > 1:
            measured.append((earlier.tokens / earlier.context, earlier.tokens, row["forward_s"] + row["backward_s"]))
    if measured:
        # From the longest, since short ones are bound by the host. Softmax attention works on all tokens of the
        # sequence, of which context ranks take equal parts.
        local, tokens, seconds = max(measured)
        expected = seconds * point.tokens / point.context / local
        expected *= point.tokens / tokens if point.kind == "softmax" else 1
        if expected > limit_s:
            return f"expected up to {expected:.0f} s, above the {max(limit_s, 0):.0f} s that are left for it"
    return None if limit_s > 0 else "no time left"


def measured_or_why(point: Point, model: ModelConfig, cluster: Cluster, experts: int) -> dict[str, Any]:
    try:
        return measure_point(point, model, cluster=cluster, experts=experts)
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError):
            traceback.print_exc()
        return {"error": why(error)}
    finally:
        gc.collect()
        if platform.is_cuda():
            torch.cuda.empty_cache()


def measure_point(point: Point, model: ModelConfig, *, cluster: Cluster, experts: int) -> dict[str, Any]:
    """Seconds, bytes and modelled communication of one layer on one rank, and whether its results are finite."""
    config, world_size = layer_config(point, model, experts), world_of(point, experts)
    rank = world_size // STAGES + point.context // 2 * point.tensor
    with fake_rank(rank, world_size, config.parallel) as (groups, received):
        models = build_model(config, groups, initial_weights=False)
        fill_weights(models)
        balance_routing(models)
        [layer] = models
        batch = micro_batch(config, rank=groups.cp.rank())
        rows = point.tokens // point.context // point.tensor
        shape, make = (rows, 1, model.hidden_size), {"dtype": torch.bfloat16, "device": platform.device()}
        x = torch.empty(shape, **make).normal_(std=RECEIVED_STD).requires_grad_()
        gradient = torch.empty(shape, **make).normal_(std=RECEIVED_STD)

        def forward() -> torch.Tensor:
            for router in routers(models):
                router.reset_statistics(micro_batches=1)
            layer.set_input_tensor(x)
            return layer(batch.tokens, batch.position_ids, packed_seq_params=batch.packed)

        weight_bytes = sum(p.nbytes for p in layer.parameters())
        links = replace(cluster, gpus=world_size)
        estimated = estimate(config, replace(DEVICES[device_kind()], gpus=world_size))
        repeat = sum(estimated.values()) <= LONG_S
        figures = timed(forward, gradient, received, gradient_bytes=x.nbytes + weight_bytes, repeat=repeat)
        gradients = [x.grad, *(p.grad for p in layer.parameters())]
        exchanged = figures.pop("received")
        return {
            "local_tokens": point.tokens // point.context,
            **figures,
            "finite": all(g is not None and bool(g.isfinite().all()) for g in gradients),
            "weight_bytes": weight_bytes,
            "kept_attention": True,
            "cudnn_blocks": True,
            "estimated_s": estimated,
            "communication": [asdict(r) | {"seconds": r.seconds(links)} for r in exchanged],
        }


def estimate(
    config: Config, device: Cluster, *, kept_attention: bool = True, cudnn_blocks: bool = True
) -> dict[str, float]:
    """Seconds of the layer by term; `launch` is the waits in forward passes alone. Without communication and the host's least time for a
    layer. The rest: see `stage_seconds`."""
    terms = stage_seconds(config, device, kept_attention=kept_attention, cudnn_blocks=cudnn_blocks)[1]
    return {name: terms[name] for name in COMPUTE} | {"launch": forward_waits(config, device.rates)}


def predict_again(file: Path, *, experts: int, cluster: Cluster) -> None:
    """Rewrite `estimated_s` and the seconds of `communication` of the points in a result.

    experts, cluster: as they were when it was measured.
    """
    results = json.loads(file.read_text())
    results["labels"] = LABELS
    model, device = ModelConfig(**results["model"]), stored_device(results)
    for row in results["points"]:
        if "estimated_s" not in row:
            continue
        point = Point(**row["point"])
        config, gpus = layer_config(point, model, experts), world_of(point, experts)
        row["estimated_s"] = estimate(config, replace(device, gpus=gpus), **version_of(row))
        row["communication"] = modelled_again(row["communication"], config.parallel, gpus, replace(cluster, gpus=gpus))
    write(file, results)


def world_of(point: Point, experts: int) -> int:
    """Ranks of the job that a point is of."""
    return STAGES * math.lcm(point.tensor * point.context, experts)


def layer_config(point: Point, model: ModelConfig, experts: int) -> Config:
    """A model of one layer of the point's kind on each of three pipeline stages."""
    kinds = [KINDS[point.kind]] * STAGES
    return Config(
        model=replace(model, num_hidden_layers=STAGES, attn_type_list=kinds),
        parallel=ParallelConfig(
            tensor=point.tensor, pipeline=STAGES, context=point.context, expert=experts, expert_tensor=1
        ),
        training=TrainingConfig(
            seq_length=point.tokens,
            precision="bf16",
            recompute="selective" if point.recompute == "selective" else "none",
            recompute_modules=["core_attn", "moe"],
        ),
    )


def micro_batch(config: Config, *, rank: int) -> MicroBatch:
    """One sequence of tokens, of which a middle stage reads the positions alone."""
    length = config.training.seq_length
    text = torch.zeros(1, length, dtype=torch.int64)
    batch = {
        "tokens": text,
        "labels": text,
        "loss_mask": torch.ones(1, length),
        "position_ids": torch.arange(length)[None],
    }
    return MicroBatch.from_dict(batch, platform.device(), context_rank=rank, context_size=config.parallel.context)


def timed(
    forward: Callable[[], torch.Tensor],
    gradient: torch.Tensor,
    arrivals: Arrivals,
    *,
    gradient_bytes: int,
    repeat: bool,
) -> dict[str, Any]:
    """forward_s, backward_s, kept_bytes and peak_bytes (None on CPU), rounds, and `received` by one call.

    gradient_bytes: of the gradients that the first call leaves, which are not counted.  repeat: leave out the first call.
    """
    before = allocated()
    calls = [one_call(forward, gradient)]
    exchanged = arrivals.take()
    chosen, left = calls, gradient_bytes
    if repeat:
        chosen, left = [one_call(forward, gradient) for _ in range(3)], 0
    cuda = platform.is_cuda()
    return {
        "forward_s": statistics.median(call.forward_s for call in chosen),
        "backward_s": statistics.median(call.backward_s for call in chosen),
        "kept_bytes": chosen[0].between - chosen[0].after + left if cuda else None,
        "peak_bytes": chosen[0].peak - before - gradient_bytes if cuda else None,
        "rounds": len(chosen),
        "received": exchanged,
    }


@dataclass(frozen=True)
class Call:
    """Seconds, and bytes allocated: between forward and backward, at most, and afterwards."""

    forward_s: float
    backward_s: float
    between: int
    peak: int
    after: int


def one_call(forward: Callable[[], torch.Tensor], gradient: torch.Tensor) -> Call:
    if platform.is_cuda():
        torch.cuda.reset_peak_memory_stats()
    start = now()
    out = forward()
    middle, between = now(), allocated()
    torch.autograd.backward(out, gradient)
    end, peak = now(), platform.peak_memory_bytes()
    del out
    return Call(middle - start, end - middle, between, peak, allocated())


def allocated() -> int:
    return torch.cuda.memory_allocated() if platform.is_cuda() else 0


def line(row: dict[str, Any]) -> str:
    point = Point(**row["point"])
    name = (
        f"{point.part:14} {point.kind:9} {point.recompute:9} TP {point.tensor} CP {point.context:2} N {point.tokens:9,}"
    )
    if "forward_s" not in row:
        return f"{name}  {row.get('error') or row['skipped']}"
    kept, peak = (row[key] / 2**30 if row[key] is not None else math.nan for key in ("kept_bytes", "peak_bytes"))
    return (
        f"{name}  forward {row['forward_s'] * 1e3:9.1f} ms, backward {row['backward_s'] * 1e3:9.1f} ms "
        f"(estimated {sum(row['estimated_s'].values()) * 1e3:9.1f} ms in all), keeps {kept:6.2f} GiB, peak {peak:6.2f} GiB"
    )


if __name__ == "__main__":
    sys.exit(main())
