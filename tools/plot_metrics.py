"""Draw the loss curve of one or more runs, and say what the held-out loss was before and after.

python tools/plot_metrics.py RUN_DIR [RUN_DIR ...] --output loss.png

RUN_DIR: a run's logging.dir, which holds metrics.jsonl. With one run the last line printed is
`held-out loss BEFORE -> AFTER` (nats per token), if the run evaluated.
"""

import argparse
import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN_DIR")
    parser.add_argument("--output", required=True, type=Path, metavar="PNG")
    options = parser.parse_args(argv)
    try:
        curves = {folder: read(folder / "metrics.jsonl") for folder in options.runs}
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    options.output.parent.mkdir(parents=True, exist_ok=True)
    draw(curves, options.output)
    print(options.output)
    if len(curves) == 1:
        ((_, held_out),) = curves.values()
        if len(held_out) > 1:
            steps = sorted(held_out)
            print(f"held-out loss {held_out[steps[0]]:.4f} -> {held_out[steps[-1]]:.4f}")
    return 0


def read(path: Path) -> tuple[dict[int, float], dict[int, float]]:
    """Training and held-out loss by step; after a resume the later line for a step counts."""
    train: dict[int, float] = {}
    held_out: dict[int, float] = {}
    lines = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            if number == len(lines):
                break  # the run was killed in the middle of its last line
            raise ValueError(f"{path}:{number} is not JSON; delete the line.") from None
        if "loss" in entry:
            train[entry["step"]] = entry["loss"]
        if "valid_loss" in entry:
            held_out[entry["step"] if "step" in entry else entry["after_step"]] = entry["valid_loss"]
    if not train:
        raise ValueError(f"{path} has no step yet; let the run do at least one.")
    return train, held_out


def draw(curves: dict[Path, tuple[dict[int, float], dict[int, float]]], output: Path) -> None:
    """Write the picture: a line per run for the training loss, points for the held-out loss."""
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for folder, (train, held_out) in curves.items():
        prefix = "" if len(curves) == 1 else f"{folder.name}: "
        (line,) = axes.plot(*zip(*sorted(train.items()), strict=True), linewidth=1.2, label=f"{prefix}training")
        if held_out:
            color = "tab:orange" if len(curves) == 1 else line.get_color()
            axes.plot(
                *zip(*sorted(held_out.items()), strict=True),
                "o",
                markersize=6,
                color=color,
                label=f"{prefix}held out",
            )
    axes.set(xlabel="optimizer step", ylabel="loss (nats per token)", title="Loss")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(output, dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main())
