"""CPU training step (forward, backward, clipping, AdamW) of ours against transformers' MiniMax on the same shapes.

    python -m benchmarks.train_step_cpu [--shapes tiny hidden512] [--rounds 7] [--threads N] [--output FILE.json]

Each side lives in its own process; the processes take turns within every round, as does a large float32 matrix
product, so that a change of the machine's speed meets all alike. transformers runs with the fastest of its settings
(measured first). Tokens are random, the same for both. Figures: median over the rounds of tokens/s, peak resident
memory, share of the matrix product's rate, CPU time, seconds by stage (torch.profiler, one extra step).
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks.flops import train_flops_per_token
from benchmarks.sides import SIDES
from benchmarks.worker import Report, Worker
from megatron_m1.config import from_yaml
from megatron_m1.config.schema import Config

ROOT = Path(__file__).resolve().parents[1]
SHAPES = {"tiny": "examples/configs/tiny_cpu.yaml", "hidden512": "benchmarks/configs/hidden512.yaml"}
GEMM_SIZE = 2048
TRANSFORMERS_VARIANTS = [(experts, block) for experts in ("grouped_mm", "eager") for block in (64, 128, 256)]
"""(experts implementation, lightning block size) to choose from. The third implementation, batched_mm, gathers a copy
of the expert weights for every token: tens of GB at these shapes."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), help="tiny, hidden512, or paths of YAML files")
    parser.add_argument("--sides", nargs="+", default=list(SIDES), choices=list(SIDES))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/train_step_cpu.json")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    results = {
        "command": "python -m benchmarks.train_step_cpu " + " ".join(sys.argv[1:]),
        "commit": git("rev-parse", "--short", "HEAD"),
        "uncommitted_changes": bool(git("status", "--porcelain", "--untracked-files=no")),
        "date": time.strftime("%Y-%m-%d"),
        "hardware": hardware(arguments.threads),
        "shapes": {},
    }
    for shape in arguments.shapes:
        config = from_yaml(ROOT / SHAPES.get(shape, shape))
        results["shapes"][shape] = measure(config, arguments)
        print_shape(shape, results["shapes"][shape])
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(results, indent=2) + "\n")
    print(f"written: {arguments.output}")


def measure(config: Config, arguments: argparse.Namespace) -> dict:
    options: dict[str, dict[str, object]] = {side: {} for side in arguments.sides}
    candidates: dict[str, float] = {}
    if "transformers" in arguments.sides:
        options["transformers"], candidates = fastest_transformers(config, arguments.threads)
    workers = {side: Worker(side, config, threads=arguments.threads) for side in arguments.sides}
    settings = {side: worker.build(options[side]) for side, worker in workers.items()}
    for worker in workers.values():
        worker.run(2)
    reports: dict[str, list[Report]] = {side: [] for side in workers}
    gemm = []
    for round_index in range(arguments.rounds):
        gemm.append(gemm_flops_per_second())
        for side in list(workers) if round_index % 2 == 0 else list(workers)[::-1]:
            reports[side].append(workers[side].run(1))

    tokens = config.training.global_batch * config.training.seq_length
    flops = train_flops_per_token(config.model, config.training.seq_length)
    gemm_rate = statistics.median(gemm)
    result: dict = {
        "model": asdict(config.model),
        "training": {key: getattr(config.training, key) for key in ("micro_batch", "global_batch", "seq_length")},
        "train_gflops_per_token": flops / 1e9,
        "gemm_gflops_per_s": gemm_rate / 1e9,
        "transformers_candidates_cpu_s": candidates,
        "sides": {},
    }
    for side, worker in workers.items():
        wall = [report.wall_s[0] for report in reports[side]]
        rate = tokens / statistics.median(wall)
        last = reports[side][-1]
        result["sides"][side] = {
            "settings": settings[side],
            "tokens_per_s": rate,
            "wall_s": wall,
            "cpu_s": [report.cpu_s[0] for report in reports[side]],
            "share_of_gemm_rate": rate * flops / gemm_rate,
            "peak_rss_mib": last.peak_rss / 2**20,
            "peak_rss_over_imports_mib": (last.peak_rss - last.base_rss) / 2**20,
            "last_loss": last.loss,
            "stages_s": worker.stages(),
        }
        worker.close()
    if {"ours", "transformers"} <= workers.keys():
        for key in ("wall_s", "cpu_s"):
            pairs = zip(result["sides"]["ours"][key], result["sides"]["transformers"][key], strict=True)
            result[f"speed_ours_over_transformers_{key}"] = statistics.median(theirs / ours for ours, theirs in pairs)
    return result


def fastest_transformers(config: Config, threads: int) -> tuple[dict[str, object], dict[str, float]]:
    """Options of the variant that takes least CPU time, and CPU seconds per step of all (best of three)."""
    worker = Worker("transformers", config, threads=threads)
    seconds = {}
    for experts, block_size in TRANSFORMERS_VARIANTS:
        worker.build({"experts": experts, "block_size": block_size})
        seconds[experts, block_size] = min(worker.run(4).cpu_s[1:])
    worker.close()
    experts, block_size = min(seconds, key=seconds.__getitem__)
    named = {f"{experts}, block {block}": value for (experts, block), value in seconds.items()}
    return {"experts": experts, "block_size": block_size}, named


def gemm_flops_per_second() -> float:
    """Best of five float32 products of two GEMM_SIZE x GEMM_SIZE matrices."""
    a, b = torch.randn(GEMM_SIZE, GEMM_SIZE), torch.randn(GEMM_SIZE, GEMM_SIZE)
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        torch.mm(a, b)
        best = min(best, time.perf_counter() - start)
    return 2 * GEMM_SIZE**3 / best


def print_shape(shape: str, result: dict) -> None:
    training = result["training"]
    print(f"\n{shape}: {training['global_batch']} x {training['seq_length']} tokens per step,", end=" ")
    print(f"{result['train_gflops_per_token']:.3f} GFLOP per token, GEMM {result['gemm_gflops_per_s']:.0f} GFLOP/s")
    for side, figures in result["sides"].items():
        print(
            f"  {side:13s}{figures['tokens_per_s']:9.0f} tokens/s{figures['share_of_gemm_rate']:7.1%} of GEMM  "
            f"{statistics.median(figures['cpu_s']):.2f} CPU s per step  peak {figures['peak_rss_mib']:.0f} MiB "
            f"({figures['peak_rss_over_imports_mib']:.0f} over imports)  {figures['settings']}"
        )
        total = sum(sum(times.values()) for times in figures["stages_s"].values())
        for stage, times in sorted(figures["stages_s"].items(), key=lambda item: -sum(item[1].values())):
            shares = f"forward {times['forward']:7.3f} s  backward {times['backward']:7.3f} s"
            print(f"      {stage:20s} {shares}{sum(times.values()) / total:7.1%}")
    if "speed_ours_over_transformers_wall_s" in result:
        wall, cpu = (result[f"speed_ours_over_transformers_{key}"] for key in ("wall_s", "cpu_s"))
        print(f"  ours / transformers: {wall:.2f}x tokens/s, {cpu:.2f}x by CPU time")


def hardware(threads: int) -> dict[str, object]:
    model_name = platform.processor()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model_name = line.split(":", 1)[1].strip()
            break
    return {"cpu": model_name, "threads": threads, "torch": torch.__version__, "transformers": transformers_version()}


def transformers_version() -> str:
    from importlib.metadata import version

    return version("transformers")


def git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


if __name__ == "__main__":
    main()
