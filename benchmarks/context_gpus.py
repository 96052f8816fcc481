"""Context parallelism over the GPUs of one machine: one layer's attention at M1's widths, with its messages and without.

    python -m benchmarks.context_gpus [--ranks 1 2 4] [--time-limit-s 150] [--point-limit-s 60] [--output FILE.json]

Real ranks, one on each GPU (NCCL; without GPUs processes on CPU, gloo), forward and backward in bf16, 64 heads of 128: a lightning
layer, and a softmax layer of 8 key and value heads, by the ring and by all-gather; on one rank what the model runs there. Sequences:
so many tokens a rank (--local-tokens), and so many in all (--tokens).
forward_s, backward_s        of the slowest rank, passes in a row without a barrier between; median of the windows
alone_forward_s, ...         of the slowest rank with nothing sent and what would arrive supplied, in windows that take turns with these
exposed_s                    the difference of both sums: communication that is not hidden, and what its kernels slow down. (The model
                             hides more: between a lightning layer's start and finish it computes the output gate.)
modelled_s                   bytes counted, of the rank that sends most, over the speed measured for such an operation by `links`
links                        GB/s that each rank sends, of the slowest rank: a shift along the ring, an all-gather, a reduce-scatter
A point that would not fit in memory, or take long by its operations, is left out and says so. A rank that raises, dies or hangs is
named, its point has `error`, and the exit code is 1, as it is for results that are not finite. Written after every point.
"""

import argparse
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from m1_kernels import slopes

from benchmarks.context_formulas import Method, Shape
from megatron_m1 import platform
from megatron_m1.config import ModelConfig
from megatron_m1.platform.rank_pool import RankError, RankPool

platform.setup()

from benchmarks.any_rank import environment, write  # noqa: E402
from benchmarks.context_gpu_ranks import Link, Times, layer_times, link_speeds, meet  # noqa: E402

__all__ = ["Point", "main"]

ROOT = Path(__file__).resolve().parents[1]
M1 = ModelConfig()
MILLION = 1 << 20
METHODS: tuple[Method, ...] = ("ring", "all_gather")
KINDS = ("lightning", "softmax")
LONGEST_S = 4.0
"""Of one pass by its operations at RATE."""
RATE = 4e14
COPIES = 11
"""What a pass holds at most, in copies of q, k, v and o of a lightning layer each: with their gradients eight, and some of the way."""
SHORTEST_S = 10.0
"""For a point that has started."""
START_S = 60.0
"""For the first meeting of ranks whose imports are done."""


@dataclass(frozen=True)
class Point:
    """One layer's attention; both methods where there are ranks to send to."""

    kind: str
    ranks: int
    tokens: int
    """N, over all ranks."""


def main(argv: list[str] | None = None) -> int:
    begun = time.monotonic()
    arguments = parser()
    options, gpus = arguments.parse_args(argv), platform.device_count()
    if gpus is not None and max(options.ranks) > gpus:
        arguments.error(f"--ranks {max(options.ranks)} needs as many GPUs, found {gpus}; name fewer.")
    results = environment("context_gpus", argv)
    results["hardware"] |= {
        "gpus": gpus,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if gpus else None,
        "environment": {
            name: os.environ[name] for name in sorted(os.environ) if name.startswith(("NCCL_", "CUDA_DEV"))
        },
    }
    results |= {"shape": asdict(shape_of(options, 1, 0)), "layer": options.layer, "links": [], "points": []}

    def left_s() -> float:
        return begun + options.time_limit_s - time.monotonic()

    with RankPool(max(options.ranks), preload=["benchmarks.context_gpu_ranks"]) as pool:
        pool.run(meet, world=max(options.ranks), timeout_s=START_S)
        for ranks in sorted(r for r in options.ranks if r > 1):
            results["links"] += links(
                pool, ranks, options, limit_s=min(options.point_limit_s, max(left_s(), SHORTEST_S))
            )
            write(options.output, results)
        for point in points(options):
            why = left_out(point, options) or ("no time left" if left_s() <= 0 else None)
            limit_s = min(options.point_limit_s, max(left_s(), SHORTEST_S))
            rows = [{"skipped": why}] if why else measured(pool, point, options, results["links"], limit_s=limit_s)
            for row in rows:
                results["points"].append({"point": asdict(point)} | row)
                print(line(results["points"][-1]), flush=True)
            write(options.output, results)
    rows = results["links"] + results["points"]
    failed = [row for row in rows if "error" in row or not row.get("finite", True)]
    print(f"{len(rows)} rows, {len(failed)} failed, {time.monotonic() - begun:.0f} s; written: {options.output}")
    return 1 if failed else 0


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--local-tokens", type=int, nargs="+", default=[1 << 15, 1 << 18], help="of each rank")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1 << 17, MILLION], help="of the whole sequence")
    parser.add_argument("--heads", type=int, default=M1.num_attention_heads)
    parser.add_argument("--key-value-heads", type=int, default=M1.num_key_value_heads, help="of the softmax layer")
    parser.add_argument("--head-dim", type=int, default=M1.head_dim)
    parser.add_argument("--layer", type=int, default=40, help="of M1's 80, whose slopes the lightning layer has")
    parser.add_argument("--link-bytes", type=int, nargs="+", default=[1 << 12, 1 << 22, 1 << 27])
    parser.add_argument("--rounds", type=int, default=3, help="windows of passes with messages, and as many without")
    parser.add_argument(
        "--time-limit-s", type=float, default=150.0, help="of all; no point starts later, and none that runs goes on"
    )
    parser.add_argument("--point-limit-s", type=float, default=60.0, help="a point that takes longer has failed")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/context_gpus.json")
    return parser


def shape_of(options: argparse.Namespace, ranks: int, tokens: int) -> Shape:
    return Shape(ranks, tokens, options.heads, options.key_value_heads, options.head_dim)


def points(options: argparse.Namespace) -> Iterator[Point]:
    """The short ones first."""
    found = {
        Point(kind, ranks, tokens)
        for kind in options.kinds
        for ranks in options.ranks
        for tokens in {*options.tokens, *(local * ranks for local in options.local_tokens)}
    }
    yield from sorted(found, key=lambda point: (point.tokens // point.ranks, point.kind, point.tokens))


def left_out(point: Point, options: argparse.Namespace) -> str | None:
    """Why a point is not to be measured; None: it is."""
    shape = shape_of(options, point.ranks, point.tokens)
    needed = COPIES * 2 * shape.local_tokens * shape.heads * shape.head_dim
    memory = torch.cuda.get_device_properties(0).total_memory if platform.is_cuda() else None
    if memory is not None and needed > memory:
        return f"would need about {needed / 2**30:.0f} GiB of {memory / 2**30:.0f}"
    seconds = 3.5 * 2 * point.tokens**2 * shape.heads * shape.head_dim / point.ranks / RATE
    if point.kind == "softmax" and seconds > LONGEST_S:
        return f"expected {seconds:.0f} s a pass, above {LONGEST_S:g}"
    return None


def links(pool: RankPool, ranks: int, options: argparse.Namespace, *, limit_s: float) -> list[dict[str, Any]]:
    """GB/s of every operation and size."""
    try:
        by_rank = pool.run(link_speeds, (options.link_bytes, 20), world=ranks, timeout_s=limit_s)
    except RankError as error:
        rows: list[dict[str, Any]] = [{"ranks": ranks, "error": str(error)}]
    else:
        rows = [link_row(ranks, of_ranks) for of_ranks in zip(*by_rank)]
    for row in rows:
        speed = (
            f"{row['seconds'] * 1e6:9.1f} us, {row['gb_per_s']:6.1f} GB/s" if "seconds" in row else short(row["error"])
        )
        print(f"link {row.get('operation', ''):14} W {ranks} {row.get('sent_bytes', 0):12,} B  {speed}", flush=True)
    return rows


def link_row(ranks: int, of_ranks: tuple[Link, ...]) -> dict[str, Any]:
    slowest = max(of_ranks, key=lambda link: link.seconds)
    return {"ranks": ranks} | asdict(slowest) | {"gb_per_s": slowest.sent_bytes / slowest.seconds / 1e9}


def measured(
    pool: RankPool, point: Point, options: argparse.Namespace, speeds: list[dict[str, Any]], *, limit_s: float
) -> list[dict[str, Any]]:
    """A row for each method."""
    shape = shape_of(options, point.ranks, point.tokens)
    rates = slopes(options.heads, options.layer, 80).tolist()
    methods = METHODS if point.ranks > 1 else METHODS[:1]
    arguments = (shape, point.kind, rates, methods, options.rounds)
    try:
        by_rank = pool.run(layer_times, arguments, world=point.ranks, timeout_s=limit_s)
    except RankError as error:
        return [{"error": str(error)}]
    return [
        {"method": method if point.ranks > 1 else None} | row([times[method] for times in by_rank], speeds, method)
        for method in methods
    ]


def row(by_rank: list[Times], speeds: list[dict[str, Any]], method: Method) -> dict[str, Any]:
    """Of the slowest ranks, and the communication that was not hidden."""
    together, alone = (
        max((asdict(times)[f"{prefix}forward_s"], asdict(times)[f"{prefix}backward_s"]) for times in by_rank)
        for prefix in ("", "alone_")
    )
    sent = max(times.forward_bytes + times.backward_bytes for times in by_rank)
    return {
        "forward_s": together[0],
        "backward_s": together[1],
        "alone_forward_s": alone[0],
        "alone_backward_s": alone[1],
        "exposed_s": sum(together) - sum(alone),
        "sent_bytes": sent,
        "modelled_s": sent / speed if (speed := link_bytes_per_s(speeds, len(by_rank), method)) else None,
        "finite": all(times.finite for times in by_rank),
        "peak_bytes": max(times.peak_bytes for times in by_rank),
        "by_rank": [asdict(times) for times in by_rank],
    }


def link_bytes_per_s(speeds: list[dict[str, Any]], ranks: int, method: Method) -> float | None:
    """Of the largest transfers of that kind."""
    operation = {"ring": "shift", "all_gather": "all_gather"}[method]
    fitting = [link for link in speeds if link["ranks"] == ranks and link.get("operation") == operation]
    return max(fitting, key=lambda link: link["sent_bytes"])["gb_per_s"] * 1e9 if fitting else None


def line(row: dict[str, Any]) -> str:
    point = Point(**row["point"])
    name = f"{point.kind:9} {row.get('method') or '':10} W {point.ranks} N {point.tokens:9,}"
    if "forward_s" not in row:
        return f"{name}  {short(row['error']) if 'error' in row else 'left out: ' + row['skipped']}"
    figures = f"forward {row['forward_s'] * 1e3:8.2f}, backward {row['backward_s'] * 1e3:8.2f} ms"
    if point.ranks > 1:
        modelled = f", modelled {row['modelled_s'] * 1e3:6.2f}" if row["modelled_s"] is not None else ""
        figures += f"; exposed {row['exposed_s'] * 1e3:6.2f}{modelled} ({row['sent_bytes'] / 2**20:.0f} MiB)"
    return f"{name}  {figures}; peak {row['peak_bytes'] / 2**30:.1f} GiB" + ("" if row["finite"] else "  NOT FINITE")


def short(error: str) -> str:
    """Which ranks failed, and the last words; the whole of it is in the JSON."""
    lines = error.splitlines()
    return " ".join([*(text for text in lines[:-1] if text.startswith("rank")), lines[-1]])


if __name__ == "__main__":
    sys.exit(main())
