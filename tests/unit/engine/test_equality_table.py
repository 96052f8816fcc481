from megatron_m1 import platform
from megatron_m1.engine.equality_table import main


def test_layouts_beyond_the_gpus_are_named(capsys, monkeypatch):
    monkeypatch.setattr(platform, "device_count", lambda: 1)
    assert main(["--ranks", "8", "--only", "TP2"]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("TP2")]
    assert rows and all(row.endswith("left out: GPUs on this machine: 1") for row in rows)
