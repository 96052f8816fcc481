"""Table and plot of `rl_fork_study`'s results: means over the seeds with intervals, ties called ties."""

import importlib.util
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

__all__ = ["crossing", "difference", "draw", "table"]

LEVEL = 0.5
PANELS = (("fork", "probability of the fork token"), ("accuracy", "accuracy"), ("entropy", "entropy, nats per token"))


def crossing(history: Sequence[dict[str, float]]) -> int:
    """Generation batches until the fork token's probability is above LEVEL; one more than there were if it never was."""
    return next((number for number, point in enumerate(history) if point["fork"] > LEVEL), len(history))


def difference(values: Sequence[float], digits: int, *, draws: int = 10_000) -> str:
    """Mean over seeds and its 95% percentile bootstrap interval, `tie` if 0 lies in it; somewhat narrow for a handful of seeds."""
    mean = statistics.fmean(values)
    if len(values) == 1:
        return f"{mean:+.{digits}f} (one seed: no interval)"
    data = torch.tensor(values, dtype=torch.float64)
    chosen = torch.randint(len(data), (draws, len(data)), generator=torch.Generator().manual_seed(0))
    tails = torch.tensor([0.025, 0.975], dtype=torch.float64)
    low, high = data[chosen].mean(dim=1).quantile(tails).tolist()
    return f"{mean:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]{' tie' if low <= 0 <= high else ''}"


def table(results: dict[str, Any]) -> str:
    """Markdown. Differences are paired by seed, first arm of the results as the reference; a tie: the interval has 0 in it."""
    hardware = results["hardware"]
    lines = [
        "# Fork-token study",
        "",
        f"`{results['command'].strip()}`, commit {results['commit']}, {hardware['cpu']}, {hardware['processes']} processes of one "
        f"thread, torch {hardware['torch']}, {results['date']}. Batches until P(fork) > {LEVEL}, accuracy and entropy after "
        f"{results['settings']['batches']} batches: mean over the seeds and range. Against the first arm: mean difference, paired by "
        "seed, with a 95% bootstrap interval.",
        "",
        "| lr | arm | seeds | batches to fork | against | accuracy at the end | against | lowest accuracy after the fork won | entropy "
        "at the end |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    main = [run for run in results["runs"] if run["updates"] > 1]
    for lr in sorted({run["lr"] for run in main}):
        arms: dict[str, dict[int, Any]] = {}
        for run in sorted((run for run in main if run["lr"] == lr), key=lambda run: run["seed"]):
            arms.setdefault(run["arm"], {})[run["seed"]] = run["history"]
        order = [name for name in ("GRPO", "DAPO", "CISPO", "CISPO + mask") if name in arms]
        for name in order:
            lines.append(_row(lr, name, arms[name], None if name == order[0] else arms[order[0]]))
    return "\n".join([*lines, "", *_control(results), ""])


def _row(lr: float, name: str, runs: dict[int, Any], reference: dict[int, Any] | None) -> str:
    batches = [crossing(history) for history in runs.values()]
    never = sum(count == len(history) for count, history in zip(batches, runs.values(), strict=True))
    speed = _span(batches, 0) + (f", {never} never" if never else "")
    final = {key: [history[-1][key] for history in runs.values()] for key in ("accuracy", "entropy")}
    worst = [
        min(point["accuracy"] for point in history[crossing(history) :])
        for history in runs.values()
        if crossing(history) < len(history)
    ]
    against = ["", ""]
    if reference is not None:
        both = sorted(runs.keys() & reference.keys())
        measures = (crossing, lambda history: history[-1]["accuracy"])
        for column, measure in enumerate(measures):
            against[column] = difference([measure(runs[s]) - measure(reference[s]) for s in both], 2 + column)
    cells = [
        f"{lr:g}", name, str(len(runs)), speed, against[0], _span(final["accuracy"], 3), against[1],
        _span(worst, 3) if worst else "", _span(final["entropy"], 3),
    ]  # fmt: skip
    return "| " + " | ".join(cells) + " |"


def _span(values: Sequence[float], digits: int) -> str:
    mean = statistics.fmean(values)
    return f"{mean:.{max(digits, 1)}f} [{min(values):.{digits}f}, {max(values):.{digits}f}]"


def _control(results: dict[str, Any]) -> list[str]:
    """Whether all arms of a seed have one history, to the last digit, with one update per batch."""
    control = [run for run in results["runs"] if run["updates"] == 1]
    lines = []
    for seed in sorted({run["seed"] for run in control}):
        runs = [run for run in control if run["seed"] == seed]
        policies = [[(p["fork"], p["accuracy"], p["entropy"]) for p in run["history"]] for run in runs]
        spread = max(
            abs(a - b) for other in policies for mine, theirs in zip(policies[0], other) for a, b in zip(mine, theirs)
        )
        moved = abs(policies[0][-1][0] - policies[0][0][0])
        lines.append(
            f"Control, one update per batch, seed {seed}, {len(runs)} arms, {len(policies[0]) - 1} batches: largest difference "
            f"between arms {spread:.1e} (P(fork) moved by {moved:.3f})."
        )
    return lines


def draw(results: dict[str, Any], path: Path) -> str:
    """Write the plot; its path, or what to do where matplotlib is missing."""
    if importlib.util.find_spec("matplotlib") is None:
        return "no plot (matplotlib is missing; draw it elsewhere with --report)"
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    main = [run for run in results["runs"] if run["updates"] > 1]
    rates = sorted({run["lr"] for run in main})
    figure, axes = plt.subplots(
        len(PANELS), len(rates), figsize=(4 * len(rates), 8), sharex=True, sharey="row", squeeze=False
    )
    for column, lr in enumerate(rates):
        for name, style in (("GRPO", "-"), ("DAPO", "-"), ("CISPO", "-"), ("CISPO + mask", "--")):
            histories = [run["history"] for run in main if run["lr"] == lr and run["arm"] == name]
            for row, (key, label) in enumerate(PANELS if histories else ()):
                values = torch.tensor([[point[key] for point in history] for history in histories])
                steps = range(values.shape[1])
                (line,) = axes[row][column].plot(steps, values.mean(dim=0), style, label=name)
                low, high = values.min(dim=0).values, values.max(dim=0).values
                axes[row][column].fill_between(steps, low, high, alpha=0.12, color=line.get_color())
                axes[row][0].set_ylabel(label)
        axes[0][column].set_title(f"lr {lr:g}")
        axes[-1][column].set_xlabel("generation batch (16 updates each)")
    axes[0][0].legend()
    figure.suptitle("Fork-token study: mean and range over the seeds")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return str(path)
