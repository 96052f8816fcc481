from megatron_m1 import platform
from megatron_m1.engine import equality_table
from megatron_m1.engine.equality_table import main
from megatron_m1.platform.rank_pool import RankError


def rows_of(capsys) -> list[str]:
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith(("TP2", "CP4"))]


def test_layouts_beyond_the_gpus_are_named(capsys, monkeypatch):
    monkeypatch.setattr(platform, "device_count", lambda: 1)
    assert main(["--ranks", "8", "--only", "TP2"]) == 0
    rows = rows_of(capsys)
    assert rows and all(row.endswith("left out: GPUs on this machine: 1") for row in rows)


def test_layouts_without_time_are_named(capsys):
    assert main(["--only", "TP2xEP2", "CP4, ring", "--time-limit-s", "0"]) == 0
    rows = rows_of(capsys)
    assert [row.split("  ")[0] for row in rows] == ["TP2xEP2", "TP2xEP2, ETP1", "CP4, ring", "CP4, ring, dense"]
    assert all(row.endswith("left out: --time-limit-s 0") for row in rows)


def test_a_layout_that_fails_is_named_and_the_others_go_on(capsys, monkeypatch):
    def fail(self, fn, args, *, world, timeout_s):
        raise RankError(f"rank 0 of {world} raised after {timeout_s:g} s")

    monkeypatch.setattr(equality_table.RankPool, "run", fail)
    assert main(["--only", "CP4, ring", "--layout-limit-s", "7"]) == 1
    output = capsys.readouterr().out
    assert output.count("failed: rank 0 of 1 raised after 7 s") == 2
    assert output.endswith("failed or beyond the bound: CP4, ring, CP4, ring, dense\n")


def test_ranks_on_gpus_start_together(capsys, monkeypatch):
    worlds = []

    def note(self, fn, args=(), *, world, timeout_s=120.0):
        worlds.append(world)
        if args:
            raise RankError("enough")

    monkeypatch.setattr(equality_table.RankPool, "run", note)
    monkeypatch.setattr(platform, "device_count", lambda: 4)
    assert main(["--ranks", "8", "--only", "TP2xPP2", "PP3"]) == 1
    # PP3 and TP2xPP2 twice, as far as their reference; the layout of 8 ranks starts none.
    assert worlds == [4, 1, 1, 1]
