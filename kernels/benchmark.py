"""Measure the kernels on a CUDA device against the floor and other packages: `python -m m1_kernels.benchmark --help`.

Sections: forward; backward (alone, and with the forward); block (SiLU of the packed qkv, attention, gated RMSNorm, where
the peers' kernels get the same pieces from eager PyTorch and from torch.compile); packed (ragged documents); packed long (one
long document and short ones); decode; ring block (softmax attention to keys of another rank, without a mask).
Times are medians of CUDA events with a cold L2 cache, the host's launches hidden. The floor is the least traffic
(benchmark_report.PASSES) over the copy bandwidth measured in the same run. A peer that is not installed is named; one
that fails shows why in its cell. Bfloat16 inputs, q, k and v contiguous in the layout that each implementation prefers.
Writes kernels/results/gpu_DEVICE.json after every point; `--resume FILE` runs what a file lacks. Exits with 1 if a row of
ours failed or its results are wrong (`benchmark_report.problems`).
"""

import argparse
import datetime
import gc
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from m1_kernels import benchmark_report as reports
from m1_kernels.benchmark_cases import PACKS, Shape, difference, sample
from m1_kernels.benchmark_entries import MEASURES, Entry, Section, section_of
from m1_kernels.benchmark_peers import versions
from m1_kernels.benchmark_report import Report, Row
from m1_kernels.benchmark_timing import CudaDevice, Device, copy_rate, measure

__all__ = ["Bench", "main", "parser"]

OUT_OF_TIME = "time limit"
TOKENS = (1024, 4096, 8192, 16384, 65536, 262144, 1048576)
SIZES = {name: (1, 8, 64, 256, 512) if name == "decode" else TOKENS for name in MEASURES}
QUICK_SIZES = {**dict.fromkeys(MEASURES, (8192,)), "forward": (1024, 8192), "decode": (1, 64)}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="python -m m1_kernels.benchmark", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--sections", nargs="+", choices=tuple(MEASURES), default=list(MEASURES))
    made.add_argument("--tokens", type=int, nargs="+", help="default: 1k to 1M, by section")
    made.add_argument("--slots", type=int, nargs="+", help="of the decode section; default 1 to 512")
    made.add_argument("--heads", type=int, nargs="+", default=[64, 8, 16])
    made.add_argument("--head-dim", type=int, default=128)
    made.add_argument("--only", nargs="+", metavar="NAME", help="implementations whose name starts with one of these")
    made.add_argument("--quick", action="store_true", help="few shapes, for a first look")
    made.add_argument("--repeat-ms", type=float, default=60.0, help="device time to spend on the repeats of one row")
    made.add_argument("--call-limit-ms", type=float, default=800.0, help="rows predicted to take longer are not run")
    made.add_argument("--time-limit-s", type=float, default=360.0, help="rows left by then are named, not run")
    made.add_argument("--output", type=Path)
    made.add_argument("--resume", type=Path, metavar="FILE", help="run what FILE lacks and add it there")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    options = parser().parse_args(arguments)
    if not torch.cuda.is_available():
        print("this benchmark needs a CUDA device; on the CPU: python -m m1_kernels.benchmark_cpu", file=sys.stderr)
        return 2
    started = time.monotonic()
    device = CudaDevice()
    hardware = reports.hardware("cuda")
    path = options.resume or options.output or reports.default_path("gpu", hardware["device"])
    if options.resume and (earlier := Report.read(options.resume).hardware["device"]) != hardware["device"]:
        print(
            f"--resume {options.resume} holds rows of {earlier}, this device is {hardware['device']}; times of two devices do not "
            "belong in one table: leave --resume out",
            file=sys.stderr,
        )
        return 2
    report = Report.read(options.resume) if options.resume else _new_report(arguments, hardware, device)
    logger = logging.getLogger("m1_kernels")
    logger.setLevel(logging.INFO)
    logger.addHandler(Notes(report.notes))
    bench = Bench(
        report,
        device,
        options,
        out_of_time=lambda: time.monotonic() - started > options.time_limit_s,
        run=(reports.commit(), reports.command("m1_kernels.benchmark", arguments)),
    )
    for _ in bench.run():
        report.save(path)
        if _context_is_dead():
            _restart(arguments, path, options.time_limit_s - (time.monotonic() - started))
    print(reports.tables(report))
    print(f"\nsaved to {path}")
    wrong = reports.problems(report)
    for problem in wrong:
        print(f"wrong: {problem}", file=sys.stderr)
    return 1 if wrong else 0


class Notes(logging.Handler):
    """Keeps what the dispatch logs: which implementations run, and why."""

    def __init__(self, notes: list[str]) -> None:
        super().__init__()
        self.notes = notes

    def emit(self, record: logging.LogRecord) -> None:
        if record.getMessage() not in self.notes:
            self.notes.append(record.getMessage())


class Bench:
    """Runs all rows that `options` ask for and `report` lacks, and appends them to it.

    run: the commit and the command that the new rows name.
    """

    def __init__(
        self,
        report: Report,
        device: Device,
        options: argparse.Namespace,
        *,
        out_of_time: Callable[[], bool],
        run: tuple[str, str] = ("", ""),
        torch_device: str = "cuda",
    ) -> None:
        self.commit, self.command = run
        self.report, self.device, self.options, self.out_of_time = report, device, options, out_of_time
        self.torch_device = torch.device(torch_device)
        report.rows[:] = [row for row in report.rows if row.note != OUT_OF_TIME]

    def run(self) -> Iterator[Row]:
        """Every new row, in the order in which they are measured; shapes of few tokens before those of many."""
        for heads in self.options.heads:
            for name in self.options.sections:
                section = section_of(name)
                for tokens in self._sizes(name):
                    shape = Shape(tokens, heads, self.options.head_dim, self.torch_device)
                    for measure_name in MEASURES[name]:
                        yield from self._rows(section, measure_name, shape)

    def _sizes(self, section: str) -> Sequence[int]:
        given = self.options.slots if section == "decode" else self.options.tokens
        return sorted(given or (QUICK_SIZES if self.options.quick else SIZES)[section])

    def _rows(self, section: Section, measure_name: str, shape: Shape) -> Iterator[Row]:
        done = {row.key for row in self.report.rows}
        expected = None
        for entry in section.entries:
            row = Row(
                section.name, measure_name, entry.name, shape.tokens, shape.heads, shape.dim,
                commit=self.commit, command=self.command,
            )  # fmt: skip
            wanted = self.options.only is None or entry.name.startswith(tuple(self.options.only))
            if not wanted or row.key in done:
                continue
            note = self._obstacle(entry, row, shape)
            if note is None and entry.compared and entry is not section.own and expected is None:
                expected = self._sample(section.own, measure_name, shape)
            if note is None and entry is section.own:
                row = self._measured(row, entry, shape, self._sample(section.yardstick, measure_name, shape))
            elif note is None:
                row = self._measured(row, entry, shape, expected if entry.compared else None)
            else:
                row = replace(row, note=note)
            self.report.rows.append(row)
            print(_progress(row), file=sys.stderr, flush=True)
            yield row

    def _obstacle(self, entry: Entry, row: Row, shape: Shape) -> str | None:
        """Why `entry` is not run at this shape, or None."""
        if entry.obstacle or (refusal := entry.refusal(shape)):
            return entry.obstacle or refusal
        if self.out_of_time():
            return OUT_OF_TIME
        for other in reversed(self.report.rows):
            same = (other.section, other.measure, other.name, other.heads) == (
                row.section,
                row.measure,
                row.name,
                row.heads,
            )
            if same and other.ms is not None and other.tokens < row.tokens:
                predicted = other.ms * (row.tokens / other.tokens) ** entry.growth
                if predicted > self.options.call_limit_ms:
                    return f"not run: {predicted / 1e3:.1f} s predicted for one call"
                break
        return None

    def _sample(self, entry: Entry, measure_name: str, shape: Shape) -> list[torch.Tensor] | None:
        """Part of what `entry` computes, None where it cannot."""
        if entry.obstacle or entry.refusal(shape):
            return None
        try:
            return sample(entry.make(measure_name, shape)())
        except Exception as error:
            print(f"{entry.name} cannot serve for comparison: {self._reason(error)}", file=sys.stderr)
            return None
        finally:
            self._free()

    def _measured(self, row: Row, entry: Entry, shape: Shape, expected: list[torch.Tensor] | None) -> Row:
        call, reason = None, ""
        try:
            call = entry.make(row.measure, shape)
            off = None if expected is None else difference(sample(call()), expected)
            timed = measure(call, self.device, target_ms=self.options.repeat_ms)
        except Exception as failure:
            reason = self._reason(failure)
        del call
        self._free()
        if reason:
            gc.collect()  # the failure's frames hold its tensors
            return replace(row, note=reason)
        floor_bytes = entry.floor_bytes(row.measure, shape)
        return replace(
            row,
            documents=shape.documents(row.section).count if row.section in PACKS else None,
            ms=timed.ms,
            host_ms=timed.host_ms,
            floor_ms=None if floor_bytes is None else floor_bytes / self.report.ceilings["copy_bytes_per_s"] * 1e3,
            peak_gib=timed.peak_bytes / reports.GIB,
            error=off,
            repeats=timed.repeats,
        )

    def _reason(self, error: Exception) -> str:
        if isinstance(error, torch.OutOfMemoryError):
            return f"out of memory: more than the {self.report.hardware.get('memory_gib', 'few')} GiB of this device"
        first = (str(error).strip() or "no message").splitlines()[0]
        return f"failed: {type(error).__name__}: {first[:160]}"

    def _free(self) -> None:
        if self.torch_device.type == "cuda" and not _context_is_dead():
            torch.cuda.empty_cache()


def _new_report(arguments: Sequence[str], hardware: dict, device: Device) -> Report:
    return Report(
        command=reports.command("m1_kernels.benchmark", arguments),
        commit=reports.commit(),
        hardware=hardware,
        versions=versions("torch", "triton", "fla-core", "lightning-attn"),
        started=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        ceilings={
            "copy_bytes_per_s": copy_rate(device, torch.empty(reports.GIB, dtype=torch.int8, device="cuda")),
        },
    )


def _progress(row: Row) -> str:
    outcome = row.note if row.ms is None else f"{row.ms:.4g} ms"
    return f"{row.section} {row.measure} H={row.heads} {row.tokens} {row.name}: {outcome}"


def _context_is_dead() -> bool:
    """Whether an earlier kernel broke the CUDA context, after which nothing runs in this process."""
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def _restart(arguments: Sequence[str], path: Path, seconds_left: float) -> None:
    """Become a fresh process that goes on after the row that broke the CUDA context, which `path` holds."""
    again = [*arguments, "--resume", str(path), "--time-limit-s", str(max(seconds_left, 1.0))]
    print("the CUDA context is lost; going on in a new process", file=sys.stderr, flush=True)
    os.execv(sys.executable, [sys.executable, "-m", "m1_kernels.benchmark", *again])


if __name__ == "__main__":
    sys.exit(main())
