"""Plot of `rl_identity_study`'s results: how far the log-probabilities lie apart, and the correlation that is left."""

import importlib.util
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

    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.4))
    variants = results["variants"]
    for row, (name, variant) in enumerate(variants.items()):
        distances = sorted((abs(difference) for _, difference in variant["points"]), reverse=True)
        shares = [(rank + 1) / len(distances) for rank in range(len(distances))]
        seen = [(distance, share) for distance, share in zip(distances, shares, strict=True) if distance > 0]
        (line,) = left.plot(*zip(*seen or [(1e-7, 0.0)], strict=True), label=name)
        values = [1 - figures["pearson"] for figures in variant["rounds"]]
        right.barh(row, sum(values) / len(values), color=line.get_color())
        right.plot(values, [row] * len(values), ".", color="black", markersize=5)
    left.set(
        xscale="log", yscale="log", xlabel="distance of log-probabilities, nats", ylabel="share of tokens farther apart"
    )
    left.legend()
    right.set(
        xscale="log", xlabel="1 - Pearson correlation of probabilities (dots: rounds)", yticks=range(len(variants))
    )
    right.set_yticklabels(list(variants))
    right.invert_yaxis()
    hardware = results["hardware"]["device"]
    figure.suptitle(
        f"Rollout against training: {results['parameters'] / 1e6:.0f}M parameters, {results['precision']}, {hardware}"
    )
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return str(path)
