"""`python -m megatron_m1 equality`: the table of every parallel layout against one rank."""

import argparse
import math
import time

from megatron_m1 import platform
from megatron_m1.platform.rank_pool import RankError, RankPool

__all__ = ["main"]

BOUND = 1e-5
SHORTEST_S = 10.0  # for a layout that has started


def main(argv: list[str]) -> int:
    """Print the table; 0 if every difference is within the bound, else 1."""
    platform.setup()
    from megatron_m1.config.schema import Config
    from megatron_m1.engine.equality import LAYOUTS, RankResult, compare, equality_config, run_layout

    parser = argparse.ArgumentParser(prog="python -m megatron_m1 equality", description=__doc__)
    parser.add_argument(
        "--ranks",
        type=int,
        default=4,
        help="largest world size, on GPUs at most as many as there are; larger layouts are left out (and named)",
    )
    parser.add_argument("--only", nargs="+", default=[""], help="only layouts whose name contains one of these")
    parser.add_argument("--layout-limit-s", type=float, default=600.0, help="a layout that takes longer has failed")
    parser.add_argument(
        "--time-limit-s", type=float, default=math.inf, help="of all layouts; those that would start later are left out"
    )
    options = parser.parse_args(argv)
    gpus = platform.device_count()
    ranks, limit = options.ranks, f"--ranks {options.ranks}"
    if gpus is not None and gpus < ranks:
        ranks, limit = gpus, f"GPUs on this machine: {gpus}"
    print(f"relative to one rank, fp32, 5 optimizer steps; bound {BOUND:g}; per tensor ||a-b||/||b||")
    header = f"{'layout':28} {'ranks':>5} {'loss':>8} {'grad norm':>9} {'aux loss':>8} {'gradient':>8} {'weight':>8}  worst gradient"
    print(header + "\n" + "-" * len(header))
    failed, begun = [], time.monotonic()

    def left_s() -> float:
        return begun + options.time_limit_s - time.monotonic()

    with RankPool(ranks) as pool:

        def run(config: Config, world: int) -> list[RankResult]:
            timeout_s = min(options.layout_limit_s, max(left_s(), SHORTEST_S))
            return pool.run(run_layout, (config,), world=world, timeout_s=timeout_s)

        worlds = [world for name, (world, *_) in LAYOUTS.items() if any(part in name for part in options.only)]
        if gpus is not None and left_s() > 0 and (most := max((w for w in worlds if w <= ranks), default=0)):
            pool.run(_nothing, world=most)  # processes that start together import at the same time

        references: dict[bool, RankResult] = {}
        for name, (world, parallel, training) in LAYOUTS.items():
            if not any(part in name for part in options.only):
                continue
            if world > ranks:
                print(f"{name:28} {world:>5}  left out: {limit}")
                continue
            if left_s() <= 0:
                print(f"{name:28} {world:>5}  left out: --time-limit-s {options.time_limit_s:g}")
                continue
            started = time.perf_counter()
            dense = bool(training.get("dense"))
            try:
                if dense not in references:
                    references[dense] = run(equality_config({}, {"dense": dense}), 1)[0]
                d = compare(references[dense], run(equality_config(parallel, training), world))
            except RankError as error:
                print(f"{name:28} {world:>5}  failed: {error}", flush=True)
                failed.append(name)
                continue
            worst = max(d.loss, d.grad_norm, d.aux_loss, d.gradient, d.weight)
            print(
                f"{name:28} {world:>5} {d.loss:8.1e} {d.grad_norm:9.1e} {d.aux_loss:8.1e} {d.gradient:8.1e} {d.weight:8.1e}"
                f"  {d.worst_gradient} ({time.perf_counter() - started:.0f} s)",
                flush=True,
            )
            if not worst <= BOUND:
                failed.append(name)
    print(f"failed or beyond the bound: {', '.join(failed)}" if failed else "all within the bound")
    return 1 if failed else 0


def _nothing(rank: int, world: int) -> None:
    pass
