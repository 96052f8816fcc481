"""The GPU benchmark without a GPU: what it counts, what it says about peers, what it keeps."""

import itertools
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from m1_kernels import benchmark, benchmark_entries, benchmark_plot, lightning_attention
from m1_kernels import benchmark_peers as peers
from m1_kernels import benchmark_report as reports
from m1_kernels.benchmark_cases import PACKS, difference, long_and_short_lengths, ragged_lengths, sample
from m1_kernels.benchmark_peers import Contender
from m1_kernels.benchmark_report import OURS, Report, Row, decode_bytes, floor_bytes, problems, tables
from m1_kernels.benchmark_timing import copy_rate, measure


class FakeDevice:
    """Clocks that tests move: a call takes `ms` of device time and `host` ms to issue."""

    flush_ms = 0.5

    def __init__(self, ms: float = 1.0, host: float = 0.2) -> None:
        self.ms = itertools.cycle([ms] if isinstance(ms, float) else ms)
        self.host, self.now, self.device_now = host, 0.0, 0.0
        self.passes: list[int] = []

    def flush(self, passes: int) -> None:
        self.passes.append(passes)

    def mark(self) -> int:
        return len(self.passes)

    def elapsed_ms(self, start: int, end: int) -> float:
        return next(self.ms)

    def host_ms(self) -> float:
        self.now += self.host
        return self.now

    def reset_peak(self) -> None:
        pass

    def peak_bytes(self) -> int:
        return 3 << 30


def empty_report() -> Report:
    return Report(
        command="python -m m1_kernels.benchmark --quick",
        commit="abc123",
        hardware={"device": "GPU 1", "memory_gib": 80.0},
        versions={"torch": "2.11", "triton": "3.6", "fla-core": "not installed"},
        started="2026-01-01T00:00:00+00:00",
        ceilings={"copy_bytes_per_s": 4e12},
    )


def run_bench(
    *arguments: str,
    report: Report | None = None,
    out_of_time: Callable[[], bool] = lambda: False,
    run: tuple[str, str] = ("", ""),
) -> Report:
    options = benchmark.parser().parse_args([*"--head-dim 16 --heads 2 --tokens 200 --repeat-ms 1".split(), *arguments])
    report = report or empty_report()
    bench = benchmark.Bench(report, FakeDevice(), options, out_of_time=out_of_time, run=run, torch_device="cpu")
    list(bench.run())
    return report


@pytest.fixture
def contenders(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """contenders(...) replaces all implementations but ours."""

    def replace_them(*others: Contender) -> None:
        monkeypatch.setattr(peers, "CONTENDERS", (peers.CONTENDERS[0], *others))
        benchmark_entries.section_of.cache_clear()

    yield replace_them
    benchmark_entries.section_of.cache_clear()


def test_median_of_enough_repeats_with_the_host_hidden() -> None:
    device = FakeDevice(ms=(9.0, 4.0, 5.0, 6.0), host=2.0)
    calls = []
    timed = measure(lambda: calls.append(1), device, target_ms=63.0)
    assert timed.repeats == 7 and len(calls) == 2 + 7
    assert timed.ms == 5.0  # of 4 5 6 9 4 5 6; the call that compiles is not timed, the first timed one took 9
    assert timed.host_ms == 2.0
    assert timed.peak_bytes == 3 << 30
    assert device.passes == [1] + [1 + 6] * 7  # 2 ms of host time, half as much again, in passes of 0.5 ms
    assert measure(lambda: None, FakeDevice(ms=1e4), target_ms=1.0).repeats == 3
    assert measure(lambda: None, FakeDevice(ms=1e-6)).repeats == 40


def test_copy_rate_counts_both_ways() -> None:
    assert copy_rate(FakeDevice(ms=2.0), torch.zeros(1000)) == 2 * 4000 / 2e-3


def test_floors_are_those_of_the_design_notes() -> None:
    def ms(measure_name: str, tokens: int, name: str = "ours") -> float:
        return floor_bytes("forward", measure_name, name, tokens, 64, 128) / 4.30e12 * 1e3

    assert ms("forward", 8192) == pytest.approx(0.125, rel=0.01)
    assert ms("forward", 2**20) == pytest.approx(16, rel=0.01)
    assert ms("backward", 65536) == pytest.approx(2.5, rel=0.01)
    assert ms("forward+backward", 8192) == pytest.approx(0.125 + 0.31, rel=0.01)
    assert ms("forward", 8192, "ours segmented") == pytest.approx(1.5 * 0.125, rel=0.01)
    assert floor_bytes("block", "forward", "ours", 1, 1, 1) == 7 * 2
    assert decode_bytes(1, 64, 128) == pytest.approx(2 * 64 * 65536, rel=0.01)


@pytest.mark.parametrize("tokens", [1, 2, 1000, 8192, 65536])
def test_ragged_documents_fill_the_pack(tokens: int) -> None:
    lengths = ragged_lengths(tokens)
    assert sum(lengths) == tokens and min(lengths) >= 1
    if tokens >= 8192:
        assert 1 in lengths and len(set(lengths)) > 4


@pytest.mark.parametrize("tokens", [1, 7, 1000, 8192, 65536])
def test_one_long_document_and_short_ones_fill_the_pack(tokens: int) -> None:
    longest, *others = long_and_short_lengths(tokens)
    assert longest + sum(others) == tokens and all(1 <= length <= 128 for length in others)
    assert longest >= 7 / 8 * tokens
    if tokens >= 8192:
        assert len(set(others)) > 3


def test_all_sections_but_decoding_go_from_1k_to_1m() -> None:
    assert set(benchmark.SIZES) == set(benchmark.QUICK_SIZES) == set(benchmark_entries.MEASURES)
    for name in {*benchmark.SIZES} - {"decode"}:
        assert benchmark.SIZES[name][0] == 1024 and benchmark.SIZES[name][-1] == 2**20


def test_missing_peers_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("fla", "lightning_attn"):
        monkeypatch.setitem(sys.modules, package, None)
    benchmark_entries.section_of.cache_clear()
    report = run_bench("--sections", "forward", "block", "decode", "--slots", "3", "--only", "fla", "lightning-attn")
    benchmark_entries.section_of.cache_clear()
    notes = {(row.section, row.name): row.note for row in report.rows}
    assert all(row.ms is None for row in report.rows)
    for key in (("forward", "fla"), ("block", "fla compiled"), ("decode", "fla")):
        assert notes[key].startswith("fla-core is not installed")
    assert notes["forward", "lightning-attn"].startswith("lightning-attn is not installed")
    assert "fla-core is not installed" in tables(report)


def test_every_section_measures_ours_and_finds_it_right(contenders) -> None:
    contenders()
    report = run_bench("--slots", "3")
    measured = {(row.section, row.measure): row for row in report.rows if row.name == "ours"}
    assert set(measured) == {
        ("forward", "forward"),
        ("backward", "backward"),
        ("backward", "forward+backward"),
        ("block", "forward"),
        ("block", "forward+backward"),
        ("packed", "forward"),
        ("packed", "forward+backward"),
        ("packed long", "forward"),
        ("packed long", "forward+backward"),
        ("decode", "step"),
        ("ring block", "forward"),
        ("ring block", "backward"),
    }
    for row in measured.values():
        assert row.ms == 1.0 and row.repeats == 3 and row.peak_gib == 3.0
        assert row.error is not None and row.error < 0.02, row
    assert measured["forward", "forward"].floor_ms == 4 * 200 * 2 * 16 * 2 / 4e12 * 1e3
    for name, lengths in PACKS.items():
        assert measured[name, "forward"].documents == len(lengths(200))
    found = problems(report)
    assert len(found) == (not torch.cuda.is_available()) and all("CUDA graph" in problem for problem in found)


def late_by_one(q, k, v, slopes, documents):
    return lightning_attention(q * torch.exp(-slopes)[:, None].to(q.dtype), k, v, slopes)


def with_heads_first(q, k, v, slopes, documents):
    return lightning_attention(*(x.transpose(1, 2) for x in (q, k, v)), -slopes).transpose(1, 2)


def out_of_memory(q, k, v, slopes, documents):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 64 GiB")


def broken(q, k, v, slopes, documents):
    raise RuntimeError("offsets overflow\nat line 3")


def test_wrong_and_failing_peers_are_visible(contenders) -> None:
    contenders(
        Contender("right", lambda: with_heads_first, "right", heads_first=True, negative=True),
        Contender("late", lambda: late_by_one, "late"),
        Contender("hungry", lambda: out_of_memory, "hungry"),
        Contender("broken", lambda: broken, "broken"),
        Contender("small", lambda: late_by_one, "small", overflows=6400),
    )
    report = run_bench("--sections", "forward", "backward")
    rows = {(row.measure, row.name): row for row in report.rows}
    for measure_name in ("forward", "backward", "forward+backward"):
        assert rows[measure_name, "right"].error < 0.01
        assert rows[measure_name, "late"].error > 0.025
        assert rows[measure_name, "hungry"].note == "out of memory: more than the 80.0 GiB of this device"
        assert rows[measure_name, "broken"].note == "failed: RuntimeError: offsets overflow"
        assert rows[measure_name, "small"].note == "not run: its int32 offsets overflow from 2^31 elements"
    text = tables(report)
    assert "out of memory" in text and "offsets overflow [200]" in text
    assert problems(report) == []  # of peers


@pytest.mark.parametrize(
    "attention, said",
    [(late_by_one, "differs by "), (broken, "failed: RuntimeError: offsets overflow"), (out_of_memory, None)],
)
def test_what_is_wrong_with_ours_is_a_problem(contenders, monkeypatch: pytest.MonkeyPatch, attention, said) -> None:
    monkeypatch.setattr(peers, "CONTENDERS", (Contender(OURS, lambda: attention, "m1_kernels"),))
    benchmark_entries.section_of.cache_clear()
    report = run_bench("--sections", "forward")
    found = problems(report)
    assert len(found) == (said is not None)
    assert said is None or found[0].startswith(f"forward forward of ours at 200, H=2 {said}")


def test_where_the_torch_path_is_too_slow_one_exact_peer_must_agree() -> None:
    ours = Row("forward", "forward", OURS, 65536, 64, 128, ms=1.0)
    elsewhere = replace(ours, name="fla", tokens=8192, error=0.5)
    wrong, right = replace(ours, name="fla", error=float("nan")), replace(ours, name="lightning-attn", error=3e-3)
    segmented = replace(ours, name="ours segmented", error=0.3)
    for rows, count in (
        ((ours, elsewhere), 0),
        ((ours, wrong), 1),
        ((ours, wrong, right), 0),
        ((ours, segmented), 1),
        ((replace(ours, error=float("nan")), right), 1),
    ):
        assert len(problems(replace(empty_report(), rows=list(rows)))) == count


def test_the_block_around_a_peer_is_the_block(contenders) -> None:
    contenders(Contender("right", lambda: with_heads_first, "right", heads_first=True, negative=True))
    yardstick = benchmark_entries.section_of("block").yardstick
    right = next(e for e in benchmark_entries.section_of("block").entries if e.name == "right eager")
    shape = benchmark.Shape(100, 2, 16, torch.device("cpu"), torch.float32)
    for name in ("forward", "forward+backward"):
        assert difference(right.make(name, shape)(), yardstick.make(name, shape)()) < 1e-5


def test_long_rows_and_late_rows_are_named_and_resumed(contenders) -> None:
    contenders(Contender("slow", lambda: late_by_one, "slow", growth=2))
    arguments = "--sections", "forward", "--tokens", "200", "400", "--call-limit-ms", "3"
    report = run_bench(*arguments)
    notes = {(row.name, row.tokens): row.note for row in report.rows}
    assert notes == {
        ("ours", 200): "",
        ("ours", 400): "",
        ("slow", 200): "",
        ("slow", 400): "not run: 0.0 s predicted for one call",
    }
    late = run_bench(*arguments, out_of_time=lambda: True)
    assert {row.note for row in late.rows} == {"time limit"}
    finished = run_bench(*arguments, report=late)
    assert [row.key for row in finished.rows] == [row.key for row in report.rows]
    assert len(run_bench(*arguments, report=replace(report, rows=list(report.rows))).rows) == 4


def test_resumed_rows_name_their_own_commit_and_command(contenders) -> None:
    contenders()
    report = run_bench("--sections", "forward", run=("abc123", "first"))
    report = run_bench("--sections", "forward", "--tokens", "200", "300", report=report, run=("def456", "second"))
    assert [(row.tokens, row.commit, row.command) for row in report.rows] == [
        (200, "abc123", "first"),
        (300, "def456", "second"),
    ]
    lines = tables(report).splitlines()
    assert [line for line in lines if line.startswith("$ ")] == [
        "$ python -m m1_kernels.benchmark --quick  (commit abc123)",
        "$ first  (commit abc123)",
        "$ second  (commit def456)",
    ]


@pytest.mark.parametrize("attention, status", [(lightning_attention, 0), (late_by_one, 1), (broken, 1)])
def test_the_exit_status_says_whether_ours_is_right(
    contenders,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    attention,
    status: int,
) -> None:
    def ours(q, k, v, slopes, documents):
        return (
            attention(q, k, v, slopes, documents)
            if attention is not lightning_attention
            else attention(q, k, v, slopes)
        )

    monkeypatch.setattr(peers, "CONTENDERS", (Contender(OURS, lambda: ours, "m1_kernels"),))
    benchmark_entries.section_of.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(benchmark, "CudaDevice", FakeDevice)
    monkeypatch.setattr(benchmark, "Bench", partial(benchmark.Bench, torch_device="cpu"))
    monkeypatch.setattr(benchmark, "_new_report", lambda *_: empty_report())
    monkeypatch.setattr(benchmark, "_context_is_dead", lambda: False)
    monkeypatch.setattr(benchmark.reports, "hardware", lambda device: empty_report().hardware)
    path = tmp_path / "gpu.json"
    arguments = f"--sections forward --tokens 200 --heads 2 --head-dim 16 --repeat-ms 1 --output {path}".split()
    assert benchmark.main(arguments) == status
    assert ("wrong: forward forward of ours" in capsys.readouterr().err) == bool(status)
    (row,) = Report.read(path).rows
    assert row.command == reports.command("m1_kernels.benchmark", arguments) and row.commit == reports.commit()
    monkeypatch.setattr(benchmark.reports, "hardware", lambda device: {"device": "GPU 2"})
    assert benchmark.main(["--resume", str(path)]) == 2
    assert "GPU 1" in capsys.readouterr().err


def test_the_sample_sees_start_middle_and_end() -> None:
    x = torch.zeros(1, 1000, 2, 4)
    for token in (0, 500, 999):
        y = x.clone()
        y[0, token] = 1
        assert sample([y])[0].sum() == 8
    assert difference([torch.tensor([3.0, 4.0])], [torch.tensor([3.0, 5.0])]) == pytest.approx((1 / 34) ** 0.5)
    assert not difference([torch.tensor([float("nan")])], [torch.ones(1)]) < 1


def canned(path: Path) -> Report:
    report = empty_report()
    for tokens, heads in itertools.product((1024, 8192), (64, 8)):
        base = Row("forward", "forward", "ours", tokens, heads, 128, ms=0.2, host_ms=0.1, floor_ms=0.1, peak_gib=1.5)
        report.rows += [
            base,
            replace(base, name="fla", ms=0.6, host_ms=0.9, error=3e-3),
            replace(base, name="lightning-attn", ms=None, note="out of memory"),
        ]
    report.save(path)
    return report


def test_tables_and_file(tmp_path: Path) -> None:
    path = tmp_path / "results" / "gpu.json"
    report = canned(path)
    assert Report.read(path) == report
    content = json.loads(path.read_text())
    assert content["hardware"] == empty_report().hardware and content["commit"] == "abc123"
    text = tables(report)
    assert "fla-core not installed" in text
    lines = text.splitlines()
    start = lines.index("== forward: forward, H=64, D=128; ms (share of the floor)")
    assert lines[start + 1].split() == ["tokens", "floor", "ours", "fla", "lightning-attn"]
    assert lines[start + 2].split() == ["1024", "0.1", "0.2", "(50%)", "0.6", "(17%)*", "out", "of", "memory"]
    ratios = lines.index("-- time over ours", start)
    assert lines[ratios + 2].split() == ["1024", "3.00"]
    assert "   lightning-attn: out of memory [1024, 8192]" in lines


def test_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "gpu.json"
    canned(path)
    assert benchmark_plot.main([str(path)]) == 0
    picture = tmp_path / "gpu_forward.png"
    assert capsys.readouterr().out.split() == [str(picture)]
    assert picture.read_bytes().startswith(b"\x89PNG")
    path.write_text("{}")
    assert benchmark_plot.main([str(path)]) == 1


def test_without_cuda_it_names_the_other_benchmark(capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert benchmark.main([]) == 2
    assert "m1_kernels.benchmark_cpu" in capsys.readouterr().err
