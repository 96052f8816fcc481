"""Draw reward, response length and identity of one or more RL runs, and say what the held-out reward was before and after.

python tools/plot_rl.py RUN_DIR [RUN_DIR ...] --output reward.png

RUN_DIR: a run's logging.dir, which holds metrics.jsonl. With one run the last line printed is
`held-out reward BEFORE [LOW, HIGH] -> AFTER [LOW, HIGH]` (95% intervals), if the run evaluated.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

PANELS = (
    ("reward", "training reward"),
    ("response_tokens_mean", "tokens per response"),
    ("capped_share", "share of tokens at the cap"),
    ("max_abs_diff", "training against rollout, max |log p difference|"),
)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN_DIR")
    parser.add_argument("--output", required=True, type=Path, metavar="PNG")
    options = parser.parse_args(argv)
    try:
        runs = {folder: read(folder / "metrics.jsonl") for folder in options.runs}
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    options.output.parent.mkdir(parents=True, exist_ok=True)
    draw(runs, options.output)
    print(options.output)
    if len(runs) == 1:
        ((_, held_out),) = runs.values()
        if len(held_out) > 1:
            ends = (held_out[min(held_out)], held_out[max(held_out)])
            print("held-out reward " + " -> ".join(f"{e['value']:.4f} [{e['low']:.4f}, {e['high']:.4f}]" for e in ends))
    return 0


def read(path: Path) -> tuple[dict[int, dict[str, Any]], dict[int, dict[str, float]]]:
    """Metrics and held-out estimates by step; after a resume the later line for a step counts."""
    steps: dict[int, dict[str, Any]] = {}
    held_out: dict[int, dict[str, float]] = {}
    lines = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            if number == len(lines):
                break  # the run was killed in the middle of its last line
            raise ValueError(f"{path}:{number} is not JSON; delete the line.") from None
        if "step" in entry:
            steps[entry["step"]] = entry
        if "held_out" in entry:
            held_out[entry["step"] if "step" in entry else entry["after_step"]] = entry["held_out"]
    if not steps:
        raise ValueError(f"{path} has no step yet; let the run do at least one.")
    return steps, held_out


def draw(runs: dict[Path, tuple[dict[int, dict[str, Any]], dict[int, dict[str, float]]]], output: Path) -> None:
    """Write the picture: four panels over the steps; the held-out reward with its interval stands with the training reward."""
    figure, grid = plt.subplots(2, 2, figsize=(11, 7), layout="constrained")
    for folder, (steps, held_out) in runs.items():
        label = folder.parent.name if folder.name == "log" else folder.name
        for axes, (key, title) in zip(grid.flat, PANELS, strict=True):
            points = [(step, entry[key]) for step, entry in sorted(steps.items()) if key in entry]
            (line,) = axes.plot(*zip(*points, strict=True), linewidth=1.2, label=label) if points else (None,)
            axes.set(xlabel="generation batch", title=title)
            axes.grid(alpha=0.3)
            if key == "reward" and held_out and line is not None:
                at = sorted(held_out)
                values = [held_out[step]["value"] for step in at]
                bars = [
                    [value - held_out[step]["low"] for step, value in zip(at, values, strict=True)],
                    [held_out[step]["high"] - value for step, value in zip(at, values, strict=True)],
                ]
                axes.errorbar(at, values, bars, fmt="o", capsize=3, color=line.get_color(), label=f"{label}, held out")
    grid[0, 0].set_ylim(0, 1.02)
    grid[1, 1].set_yscale("symlog", linthresh=1e-8)
    grid[0, 0].legend()
    figure.savefig(output, dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main())
