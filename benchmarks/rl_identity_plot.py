"""Plot of `rl_identity_study`'s results: training against rollout probability, a panel for each variant."""

import importlib.util
import math
from pathlib import Path
from typing import Any

__all__ = ["draw"]


def draw(results: dict[str, Any], path: Path) -> str:
    """Write the plot; its path, or what to do where matplotlib is missing."""
    if importlib.util.find_spec("matplotlib") is None:
        return "no plot (matplotlib is missing; draw it elsewhere with --plot)"
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    variants = results["variants"]
    figure, axes = plt.subplots(1, len(variants), figsize=(3.4 * len(variants), 3.9), sharex=True, sharey=True)
    for axis, (name, variant) in zip(axes, variants.items(), strict=True):
        x, y = zip(*((math.exp(ours), math.exp(theirs)) for ours, theirs in variant["points"]), strict=True)
        axis.plot([0, 1], [0, 1], color="0.7", linewidth=1)
        axis.plot(x, y, ".", markersize=3)
        rounds = variant["rounds"]
        pearson = sum(figures["pearson"] for figures in rounds) / len(rounds)
        worst = max(figures["max_abs_diff"] for figures in rounds)
        axis.set_title(f"{name}\n1 - Pearson {1 - pearson:.1e}, max |d log p| {worst:.2g}", fontsize=9)
        axis.set_xlabel("probability in rollout")
    axes[0].set_ylabel("probability in training")
    figure.suptitle(
        f"{results['parameters'] / 1e6:.1f}M parameters, {results['precision']}, {results['hardware']['device']}"
    )
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return str(path)
