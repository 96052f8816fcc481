"""Draw time against tokens, log-log, from the benchmark's file: `python -m m1_kernels.benchmark_plot FILE.json`.

One picture per section that was run, FILE_SECTION.png beside it or in --output-dir: a panel per measure and head count, a
line per implementation, the floor dashed. Needs matplotlib.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from m1_kernels.benchmark_report import Report, Row

__all__ = ["draw", "main"]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m m1_kernels.benchmark_plot", description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path, metavar="FILE.json")
    parser.add_argument("--output-dir", type=Path, help="default: beside the file")
    options = parser.parse_args(arguments)
    try:
        report = Report.read(options.file)
    except (OSError, ValueError, KeyError, TypeError) as error:
        print(f"error: {options.file} is no file of this benchmark: {error}", file=sys.stderr)
        return 1
    folder = options.output_dir or options.file.parent
    folder.mkdir(parents=True, exist_ok=True)
    for section in dict.fromkeys(row.section for row in report.rows if row.ms is not None):
        output = folder / f"{options.file.stem}_{section.replace(' ', '_')}.png"
        draw(report, section, output)
        print(output)
    return 0


def draw(report: Report, section: str, output: Path) -> None:
    """Write the picture of one section."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in report.rows if row.section == section and row.ms is not None]
    heads = list(dict.fromkeys(row.heads for row in rows))
    measures = list(dict.fromkeys(row.measure for row in rows))
    names = list(dict.fromkeys(row.name for row in rows))
    size = 5.2 * len(heads), 4.2 * len(measures)
    figure, panels = plt.subplots(len(measures), len(heads), figsize=size, squeeze=False, layout="constrained")
    for measure, line_of_panels in zip(measures, panels):
        for count, axes in zip(heads, line_of_panels):
            here = [row for row in rows if row.measure == measure and row.heads == count]
            _panel(axes, here, names)
            axes.set(
                xscale="log",
                yscale="log",
                xlabel="slots" if section == "decode" else "tokens",
                ylabel="ms",
                title=f"{measure}, {count} heads of {here[0].dim}" if here else measure,
            )
            axes.grid(alpha=0.3, which="both")
            axes.legend(fontsize="small")
    figure.suptitle(f"{section}: {report.hardware['device']}, torch {report.versions['torch']}, {report.commit[:12]}")
    figure.savefig(output, dpi=130)
    plt.close(figure)


def _panel(axes, rows: list[Row], names: list[str]) -> None:
    for index, name in enumerate(names):
        points = sorted((row.tokens, row.ms) for row in rows if row.name == name and row.ms is not None)
        if points:
            width = 2.2 if name.startswith("ours") else 1.3
            axes.plot(*zip(*points), marker="o", markersize=4, linewidth=width, color=f"C{index}", label=name)
    floor = sorted({row.tokens: row.floor_ms for row in reversed(rows) if row.floor_ms is not None}.items())
    if floor:
        axes.plot(*zip(*floor), linestyle="--", color="black", linewidth=1, label="floor")


if __name__ == "__main__":
    sys.exit(main())
