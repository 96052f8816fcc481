"""Plot of benchmarks.long_context: activation memory and time against tokens, M1's hybrid and all-softmax.

    python -m benchmarks.long_context_plot benchmarks/results/long_context.json [--output FILE.png]

Eight layers of each: the hybrid's seven lightning layers and one softmax layer, or eight softmax layers, are sums of the two layers
measured one by one, which are drawn too; one layer's working memory is added once. "Recomputed": attention core and experts.
Calls that compiled are left out (of those above 4 s there is one, see benchmarks.long_context).
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import NullLocator

from benchmarks.long_context import is_warm

__all__ = ["blocks"]

STACKS = {
    "hybrid": {"lightning": 7, "softmax": 1},
    "all softmax": {"softmax": 8},
    "one lightning layer": {"lightning": 1},
    "one softmax layer": {"softmax": 1},
}
PARTS = {"tensor_share": "a tensor-parallel rank of 8", "slice": "all heads on one GPU"}
COLOURS = {
    "hybrid": "tab:blue", "all softmax": "tab:orange", "one lightning layer": "tab:cyan", "one softmax layer": "tab:olive"
}  # fmt: skip
TICKS = {1 << 13: "8K", 1 << 15: "32K", 1 << 17: "128K", 1 << 19: "512K", 1 << 20: "1M"}
STYLES = {"none": "-", "selective": "--"}
GIB = 2**30


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args(argv)
    results = json.loads(options.results.read_text())
    output = options.output or options.results.with_suffix(".png")
    draw(results, output)
    print(output)
    return 0


def blocks(rows: list[dict[str, Any]], part: str, stack: str, recompute: str) -> list[tuple[int, float, float]]:
    """(tokens, seconds forward and backward, bytes) of a stack of layers at the lengths where all their kinds were measured.

    bytes: what all of them keep, and the most that one needs beyond what it keeps itself.
    """
    measured = {
        (row["point"]["kind"], row["point"]["tokens"]): row
        for row in rows
        if row["point"]["part"] == part and row["point"]["recompute"] == recompute and is_warm(row)
    }
    found = []
    for tokens in sorted({tokens for _, tokens in measured}):
        layers = {kind: measured.get((kind, tokens)) for kind in STACKS[stack]}
        if any(row is None or row["kept_bytes"] is None for row in layers.values()):
            continue
        counted = [(STACKS[stack][kind], row) for kind, row in layers.items() if row is not None]
        seconds = sum(count * (row["forward_s"] + row["backward_s"]) for count, row in counted)
        kept = sum(count * row["kept_bytes"] for count, row in counted)
        found.append((tokens, seconds, kept + max(row["peak_bytes"] - row["kept_bytes"] for _, row in counted)))
    return found


def draw(results: dict[str, Any], output: Path) -> None:
    figure, axes = plt.subplots(len(PARTS), 2, figsize=(11, 8), squeeze=False)
    for (part, title), (memory, time) in zip(PARTS.items(), axes, strict=True):
        for stack, colour in COLOURS.items():
            for recompute, style in STYLES.items():
                points = blocks(results["points"], part, stack, recompute)
                tokens = [point[0] for point in points]
                name = f"{stack}: 8 layers" if sum(STACKS[stack].values()) == 8 else stack
                name += ", recomputed" if recompute == "selective" else ""
                if not points:
                    continue
                memory.plot(tokens, [point[2] / GIB for point in points], style, marker="o", color=colour, label=name)
                time.plot(tokens, [point[1] for point in points], style, marker="o", color=colour, label=name)
        for axis, unit in ((memory, "GiB of activations, peak"), (time, "s forward and backward")):
            axis.set(xscale="log", yscale="log", xlabel="tokens", ylabel=unit, title=title)
            axis.set_xticks(list(TICKS), list(TICKS.values()))
            axis.set_xlim(7000, 1_300_000)
            axis.xaxis.set_minor_locator(NullLocator())
            axis.grid(True, which="major", alpha=0.3)
            axis.legend(fontsize=7)
    hardware = results["hardware"]
    figure.suptitle(
        f"{hardware['device']}, torch {hardware['torch']}: sums of single layers measured alone", fontsize=10
    )
    figure.tight_layout()
    figure.savefig(output, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main())
