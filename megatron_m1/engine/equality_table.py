"""`python -m megatron_m1 equality`: the table of every parallel layout against one rank."""

import argparse
import functools
import time

from megatron_m1 import platform
from megatron_m1.platform.rank_pool import RankPool

__all__ = ["main"]

BOUND = 1e-5


def main(argv: list[str]) -> int:
    """Print the table; 0 if every difference is within the bound, else 1."""
    platform.setup()
    from megatron_m1.engine.equality import LAYOUTS, RankResult, compare, equality_config, run_layout

    parser = argparse.ArgumentParser(prog="python -m megatron_m1 equality", description=__doc__)
    parser.add_argument(
        "--ranks",
        type=int,
        default=4,
        help="largest world size, on GPUs at most as many as there are; larger layouts are left out (and named)",
    )
    parser.add_argument("--only", default="", help="only layouts whose name contains this")
    options = parser.parse_args(argv)
    gpus = platform.device_count()
    ranks, limit = options.ranks, f"--ranks {options.ranks}"
    if gpus is not None and gpus < ranks:
        ranks, limit = gpus, f"GPUs on this machine: {gpus}"
    print(f"relative to one rank, fp32, 5 optimizer steps; bound {BOUND:g}; per tensor ||a-b||/||b||")
    header = f"{'layout':28} {'ranks':>5} {'loss':>8} {'grad norm':>9} {'aux loss':>8} {'gradient':>8} {'weight':>8}  worst gradient"
    print(header + "\n" + "-" * len(header))
    failed = []
    with RankPool(ranks) as pool:
        run = functools.partial(pool.run, run_layout, timeout_s=600)
        references: dict[bool, RankResult] = {}
        for name, (world, parallel, training) in LAYOUTS.items():
            if options.only not in name:
                continue
            if world > ranks:
                print(f"{name:28} {world:>5}  left out: {limit}")
                continue
            started = time.perf_counter()
            dense = bool(training.get("dense"))
            if dense not in references:
                references[dense] = run((equality_config({}, {"dense": dense}),), world=1)[0]
            d = compare(references[dense], run((equality_config(parallel, training),), world=world))
            worst = max(d.loss, d.grad_norm, d.aux_loss, d.gradient, d.weight)
            print(
                f"{name:28} {world:>5} {d.loss:8.1e} {d.grad_norm:9.1e} {d.aux_loss:8.1e} {d.gradient:8.1e} {d.weight:8.1e}"
                f"  {d.worst_gradient} ({time.perf_counter() - started:.0f} s)",
                flush=True,
            )
            if not worst <= BOUND:
                failed.append(name)
    print(f"beyond the bound: {', '.join(failed)}" if failed else "all within the bound")
    return 1 if failed else 0
