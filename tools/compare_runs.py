"""Compare the metrics.jsonl of runs that should be the same training in different layouts.

python tools/compare_runs.py --reference DIR [--band DIR | --bound X] [--from-step N] RUN_DIR ...
Prints one line per run: the largest relative difference of loss and gradient norm over the steps both have, and tokens/s
and MFU over the second half. Exit code 1 if a loss differs by more than the bound, or than the run `--band` (another
seed) does, 2 if a run cannot be read.
"""

import argparse
import json
import math
import sys
from pathlib import Path

from megatron_m1.config.errors import ConfigError


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="folders with metrics.jsonl")
    parser.add_argument("--reference", required=True, type=Path)
    parser.add_argument("--band", type=Path, help="run with another seed, whose difference is the bound")
    parser.add_argument("--bound", type=float, help="largest relative difference of a loss")
    parser.add_argument("--from-step", type=int, default=0, help="first step compared")
    options = parser.parse_args()
    if (options.band is None) == (options.bound is None):
        parser.error("give either --band or --bound")

    reference = read_metrics(options.reference)
    bound = options.bound
    if options.band is not None:
        bound = largest_difference(reference, read_metrics(options.band), "loss", options.from_step)
        print(f"bound: {bound:.2e}, the loss of another seed ({options.band})")
    print(f"{'run':32s} {'steps':>5s} {'loss':>9s} {'grad norm':>9s} {'tokens/s':>10s} {'MFU':>6s}")
    worst = 0.0
    for folder in options.runs:
        run = read_metrics(folder)
        loss = largest_difference(reference, run, "loss", options.from_step)
        norm = largest_difference(reference, run, "grad_norm", options.from_step)
        steps = len([step for step in run if step >= options.from_step])
        speed, mfu = late_mean(run, "tokens_per_s"), late_mean(run, "mfu")
        print(f"{folder.name:32s} {steps:5d} {loss:9.2e} {norm:9.2e} {speed:10.0f} {mfu:6.3f}")
        worst = max(worst, loss)
    if not worst <= bound:
        print(f"FAILED: a loss differs by {worst:.2e}, above the bound {bound:.2e}", file=sys.stderr)
        return 1
    return 0


def read_metrics(folder: Path) -> dict[int, dict[str, float]]:
    """Metrics by step of a run's metrics.jsonl; a resumed run's later line for a step replaces the earlier."""
    try:
        lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ConfigError(
            f"{folder}/metrics.jsonl cannot be read: {error.strerror}; name a run's logging.dir."
        ) from error
    entries = [json.loads(line) for line in lines]
    return {entry["step"]: entry for entry in entries if "step" in entry and "loss" in entry}


def largest_difference(reference: dict[int, dict], run: dict[int, dict], key: str, from_step: int) -> float:
    """max |a - b| / |b| over the steps from `from_step` on; inf if they have no step in common or a value is not finite."""
    common = [step for step in reference if step in run and step >= from_step]
    differences = [abs(run[step][key] - reference[step][key]) / abs(reference[step][key]) for step in common]
    if not differences or not all(math.isfinite(difference) for difference in differences):
        return math.inf
    return max(differences)


def late_mean(run: dict[int, dict], key: str) -> float:
    """Mean over the second half of the steps; nan where the run did not log `key`."""
    values = [run[step][key] for step in sorted(run)[len(run) // 2 :] if run[step].get(key) is not None]
    return sum(values) / len(values) if values else math.nan


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
