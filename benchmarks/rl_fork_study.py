"""CISPO against GRPO and DAPO on a rare token that leads to right answers (benchmarks/rl_fork_task.py), on CPU.

    python -m benchmarks.rl_fork_study --processes 16 [--resume]
    python -m benchmarks.rl_fork_study --report           table and plot of the results that are there

Every arm trains from the start of its seed at every learning rate: 32 prompts x 16 samples a generation batch, 16 updates. The
control has one update per batch, where no cap and no mask can act: there all arms must agree to the last digit. The results
are written after every run; --resume runs only what is missing. The table and the plot lie beside them (.md, .png).
"""

import argparse
import json
import os
import sys
import time
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # small products on many cores; inherited by the processes

import torch

from benchmarks import rl_fork_task as task
from benchmarks.rl_fork_report import draw, table
from benchmarks.rl_policy import provenance

ROOT = Path(__file__).resolve().parents[1]
UPDATES = 16
CONTROL = {"seeds": 2, "lr": 3e-3, "batches": 6}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--arms", nargs="+", choices=list(task.ARMS), default=list(task.ARMS))
    parser.add_argument("--lrs", type=float, nargs="+", default=[1e-4, 3e-4, 1e-3, 3e-3])
    parser.add_argument("--seeds", type=int, default=6)
    parser.add_argument("--batches", type=int, default=24, help="generation batches of a run")
    parser.add_argument("--start-steps", type=int, default=300, help="of the supervised start")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/rl_fork_study.json")
    parser.add_argument("--resume", action="store_true", help="keep the runs that the output has")
    parser.add_argument("--report", action="store_true", help="run nothing")
    arguments = parser.parse_args()
    settings = {"batches": arguments.batches, "start_steps": arguments.start_steps}
    results: dict[str, Any] = provenance("rl_fork_study") | {
        "settings": settings,
        "starts": {},
        "runs": [],
    }
    results["hardware"]["processes"] = arguments.processes
    if arguments.resume or arguments.report:
        if not arguments.output.exists():
            print(f"error: {arguments.output} does not exist; run without --resume and --report.", file=sys.stderr)
            return 1
        kept = json.loads(arguments.output.read_text())
        if arguments.report:
            results = kept
        elif kept["settings"] != settings:
            print(f"error: {arguments.output} has settings {kept['settings']}, not {settings}.", file=sys.stderr)
            return 1
        else:
            results |= {"starts": kept["starts"], "runs": kept["runs"]}
    if not arguments.report:
        started = time.perf_counter()
        run_all(planned(arguments), results, arguments)
        results["wall_s"] = round(time.perf_counter() - started, 1)
        write(arguments.output, results)
    text = table(results)
    print(text)
    arguments.output.with_suffix(".md").write_text(text)
    print(f"written: {arguments.output} and {draw(results, arguments.output.with_suffix('.png'))}")
    return 0


def planned(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """What is to run, the longest-lasting questions first: keys arm, lr, seed, batches, updates."""
    runs = [
        {"arm": arm, "lr": lr, "seed": seed, "batches": arguments.batches, "updates": UPDATES}
        for seed in range(1, arguments.seeds + 1)
        for lr in arguments.lrs
        for arm in arguments.arms
    ]
    control = [
        {"arm": arm, "lr": CONTROL["lr"], "seed": seed, "batches": CONTROL["batches"], "updates": 1}
        for seed in range(1, min(arguments.seeds, int(CONTROL["seeds"])) + 1)
        for arm in arguments.arms
    ]
    return runs + control


def run_all(runs: list[dict[str, Any]], results: dict[str, Any], arguments: argparse.Namespace) -> None:
    """Add to `results` the runs that are missing there, and write them as they end."""
    have = [{key: run[key] for key in runs[0]} for run in results["runs"]]
    missing = [run for run in runs if run not in have]
    seeds = sorted({run["seed"] for run in missing})
    with ProcessPoolExecutor(arguments.processes, mp_context=get_context("spawn"), initializer=prepare) as pool:
        starts = dict(zip(seeds, pool.map(start_of, seeds, [arguments.start_steps] * len(seeds)), strict=True))
        for seed, (_, figures) in starts.items():
            results["starts"][str(seed)] = figures
            print(f"start of seed {seed}: " + "  ".join(f"{name} {value:.4f}" for name, value in figures.items()))
        write(arguments.output, results)
        futures: dict[Future, dict[str, Any]] = {pool.submit(one, starts[run["seed"]][0], run): run for run in missing}
        for number, future in enumerate(as_completed(futures), start=1):
            run = futures[future]
            history, seconds = future.result()
            results["runs"].append(run | {"seconds": round(seconds, 2), "history": history})
            write(arguments.output, results)
            last = history[-1]
            print(
                f"[{number}/{len(missing)}] {run['arm']} lr {run['lr']:g} seed {run['seed']} updates {run['updates']}: "
                f"fork {last['fork']:.3f}  accuracy {last['accuracy']:.3f}  entropy {last['entropy']:.3f}  {seconds:.1f} s",
                flush=True,
            )


def prepare() -> None:
    """Of a worker process: one thread, a job of its own."""
    from megatron_m1.engine.distributed import init_distributed

    torch.set_num_threads(1)
    init_distributed(600)


def start_of(seed: int, steps: int) -> tuple[dict[str, torch.Tensor], task.Figures]:
    """See `rl_fork_task.supervised_start`."""
    return task.supervised_start(seed, steps=steps)


def one(start: dict[str, torch.Tensor], run: dict[str, Any]) -> tuple[list[task.Figures], float]:
    """(history, seconds) of one run."""
    began = time.perf_counter()
    history = task.train(
        start,
        seed=run["seed"],
        settings=task.ARMS[run["arm"]],
        lr=run["lr"],
        batches=run["batches"],
        updates=run["updates"],
    )
    return history, time.perf_counter() - began


def write(path: Path, results: dict[str, Any]) -> None:
    """Replace the file in one go, so that a killed study leaves a sound one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(".tmp")
    fresh.write_text(json.dumps(results, indent=1) + "\n")
    fresh.replace(path)


if __name__ == "__main__":
    sys.exit(main())
