"""Rows of a benchmark: their floors, the tables on the screen, and the file that keeps them."""

import json
import os
import platform
import shlex
import subprocess
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

__all__ = ["OURS", "PASSES", "Report", "Row", "commit", "decode_bytes", "floor_bytes", "problems", "tables"]

# Times that one tensor [N, H, D] must cross the memory bus, for a design with two sweeps backward.
# block: the norm reads o and gate and writes its result, backward it reads three and writes two.
PASSES = {
    ("attention", "forward"): 4,
    ("attention", "backward"): 10,
    ("attention", "forward+backward"): 14,
    ("block", "forward"): 7,
    ("block", "forward+backward"): 22,
}
OURS = "ours"
MOST_ERROR = 0.01  # relative RMS; bf16 rounding of results and gradients gives 3e-3 to 5e-3
SEGMENTED_EXTRA = 2  # the state pre-pass reads k and v once more
GIB = 1 << 30


@dataclass(frozen=True)
class Row:
    """One implementation at one shape; ms None with the reason in `note` where it did not run.

    tokens: slots in the decode section.  ms: median of `repeats`, least_ms the least where it is kept.  host_ms: to issue
    the call.  error: relative RMS of its results, sampled at the start, middle and end, against ours (ours: against the
    torch path).  commit, command: of the run that measured it; empty in files older than these fields: those of the file.
    """

    section: str
    measure: str
    name: str
    tokens: int
    heads: int
    dim: int
    documents: int | None = None
    ms: float | None = None
    host_ms: float | None = None
    floor_ms: float | None = None
    peak_gib: float | None = None
    error: float | None = None
    repeats: int = 0
    note: str = ""
    least_ms: float | None = None
    commit: str = ""
    command: str = ""

    @property
    def key(self) -> tuple[str, str, str, int, int]:
        return self.section, self.measure, self.name, self.tokens, self.heads

    @property
    def share_of_floor(self) -> float | None:
        return None if self.ms is None or self.floor_ms is None else self.floor_ms / self.ms


@dataclass
class Report:
    """Everything about one run that is kept; rows of a later --resume name their own commit and command.

    ceilings: what the floors are made of, measured in the same run: copy_bytes_per_s, or matmul_flop_per_s.
    """

    command: str
    commit: str
    hardware: dict[str, Any]
    versions: dict[str, str]
    started: str
    ceilings: dict[str, float]
    notes: list[str] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        part.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")
        part.replace(path)

    @classmethod
    def read(cls, path: Path) -> "Report":
        content = json.loads(path.read_text(encoding="utf-8"))
        rows = [Row(**row) for row in content.pop("rows")]
        return cls(**content, rows=rows)


def floor_bytes(section: str, measure: str, name: str, tokens: int, heads: int, dim: int, element_size: int = 2) -> int:
    """Bytes that the measured work must move at least; a segmented forward is set against its own six passes."""
    passes = PASSES["block" if section == "block" else "attention", measure]
    if name.endswith("segmented") and measure != "backward":
        passes += SEGMENTED_EXTRA
    return passes * tokens * heads * dim * element_size


def decode_bytes(slots: int, heads: int, dim: int, element_size: int = 2) -> int:
    """Bytes of one decoding step: the float32 state read and written, q, k, v read, o written."""
    return slots * heads * (2 * 4 * dim * dim + 4 * element_size * dim)


def hardware(device: str) -> dict[str, Any]:
    """Name and memory of the GPU, or the CPU's model and the threads in use."""
    if device == "cuda":
        properties = torch.cuda.get_device_properties()
        return {"device": properties.name, "memory_gib": round(properties.total_memory / GIB, 1)}
    load = round(os.getloadavg()[0], 1)
    return {"device": _cpu_model(), "threads": torch.get_num_threads(), "cores": os.cpu_count(), "load at start": load}


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def commit() -> str:
    """$M1_COMMIT, else the checkout's commit, "-dirty" appended if the kernels differ from it, else "unknown"."""
    if given := os.environ.get("M1_COMMIT"):
        return given
    here = Path(__file__).resolve().parent
    try:
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=True)
        changes = subprocess.run(
            ["git", "status", "--porcelain", "--", "*.py"], cwd=here, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.strip() + ("-dirty" if changes.stdout.strip() else "")


def command(module: str, arguments: Iterable[str]) -> str:
    """The command line that repeats this run."""
    return shlex.join(["python", "-m", module, *arguments])


def problems(report: Report) -> list[str]:
    """What is wrong with ours in a report: rows that failed (not for want of memory or time), results that are not as expected.

    Those are the torch path's, and where it takes no part, those of at least one exact peer.
    """
    found = []
    for row in report.rows:
        if not row.name.startswith(OURS):
            continue
        where = f"{row.section} {row.measure} of {row.name} at {row.tokens}, H={row.heads}"
        if row.note.startswith("failed"):
            found.append(f"{where} {row.note}")
        elif row.error is not None and not row.error <= MOST_ERROR:
            found.append(f"{where} differs by {row.error:.1e}, more than {MOST_ERROR}")
        elif row.name == OURS and row.ms is not None and row.error is None:
            point = replace(row, name="").key
            peers = [
                other.error
                for other in report.rows
                if replace(other, name="").key == point and not other.name.startswith(OURS) and other.error is not None
            ]
            if peers and not any(error <= MOST_ERROR for error in peers):
                found.append(f"{where} differs from every peer, by {min(peers):.1e} and more")
    return found


def tables(report: Report) -> str:
    """The whole report as text: per section, measure and heads the times, how often ours fits in them, memory, errors."""
    lines = [
        ", ".join(f"{name} {value}" for name, value in report.hardware.items()),
        ", ".join(f"{name} {version}" for name, version in report.versions.items()),
        ", ".join(f"{name} {value:.3g}" for name, value in report.ceilings.items()) + f"; commit {report.commit[:12]}",
        *(f"$ {command}  (commit {made_by[:12]})" for made_by, command in _runs(report)),
        *report.notes,
    ]
    groups: dict[tuple[str, str, int, int], list[Row]] = {}
    for row in report.rows:
        groups.setdefault((row.section, row.measure, row.heads, row.dim), []).append(row)
    for (section, measure, heads, dim), rows in groups.items():
        unit = "slots" if section == "decode" else "tokens"
        lines += ["", f"== {section}: {measure}, H={heads}, D={dim}; ms (share of the floor)"]
        lines += _grid(rows, unit, _time_cell, with_floor=True)
        ours = {row.tokens: row.ms for row in rows if row.name == OURS and row.ms is not None}
        ratios = {
            row: f"{row.ms / ours[row.tokens]:.2f}"
            for row in rows
            if row.name != OURS and row.ms and row.tokens in ours
        }
        if ratios:
            lines += ["-- time over ours", *_grid(list(ratios), unit, ratios.__getitem__)]
        if any(row.peak_gib is not None for row in rows):
            lines += ["-- peak memory, GiB", *_grid(rows, unit, lambda row: _number(row.peak_gib, ".2f"))]
        if any(row.error is not None for row in rows):
            lines += ["-- relative RMS difference", *_grid(rows, unit, lambda row: _number(row.error, ".1e"))]
        reasons: dict[str, list[str]] = {}
        for row in rows:
            if row.note:
                reasons.setdefault(f"{row.name}: {row.note}", []).append(str(row.tokens))
        lines += [f"   {reason} [{', '.join(where)}]" for reason, where in reasons.items()]
    if any(row.host_ms is not None and row.ms is not None and row.host_ms > row.ms for row in report.rows):
        lines += ["", "*: the host takes longer to issue the call than the device to run it"]
    return "\n".join(lines)


def _runs(report: Report) -> list[tuple[str, str]]:
    """(commit, command) of the runs that made the rows."""
    runs = [(row.commit or report.commit, row.command or report.command) for row in report.rows]
    return list(dict.fromkeys([(report.commit, report.command), *runs]))


def _grid(rows: list[Row], unit: str, cell: Callable[[Row], str], *, with_floor: bool = False) -> list[str]:
    names = list(dict.fromkeys(row.name for row in rows))
    table = [[unit, *(["floor"] if with_floor else []), *names]]
    for tokens in sorted({row.tokens for row in rows}):
        here = {row.name: row for row in rows if row.tokens == tokens}
        floor = next((row.floor_ms for row in here.values() if row.floor_ms is not None), None)
        cells = [cell(here[name]) if name in here else "" for name in names]
        table.append([str(tokens), *([_number(floor, ".4g")] if with_floor else []), *cells])
    widths = [max(map(len, column)) for column in zip(*table)]
    return ["  ".join(text.rjust(width) for text, width in zip(line, widths)) for line in table]


def _time_cell(row: Row) -> str:
    if row.ms is None:
        return row.note.split(":")[0].split(" (")[0][:24]
    star = "*" if row.host_ms is not None and row.host_ms > row.ms else ""
    share = "" if row.share_of_floor is None else f" ({row.share_of_floor:.0%})"
    return f"{row.ms:.4g}{share}{star}"


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def default_path(stem: str, device: str) -> Path:
    """kernels/results/STEM_DEVICE.json."""
    name = "".join(c if c.isalnum() else "_" for c in device.lower()).strip("_")
    return Path(__file__).resolve().parent / "results" / f"{stem}_{name}.json"
