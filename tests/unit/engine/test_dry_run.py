import subprocess
import sys

import pytest

from megatron_m1.config import ConfigError
from megatron_m1.engine.dry_run import main

LAYOUT = ["--parallel.tensor=8", "--parallel.pipeline=8", "--parallel.expert=8", "--parallel.expert_tensor=1"]


def test_reports_a_512_rank_layout_on_one_process(capsys):
    main([*LAYOUT, "--training.global_batch=512", "--training.seq_length=32768", "--world-size", "512"])
    text = capsys.readouterr().out
    assert "456,089,655,296" in text and "45,944,920,064" in text
    assert "expert         size    8   [0,1,2,3,4,5,6,7]" in text
    assert "pipeline       size    8   [0,64,128,192,256,320,384,448]" in text
    assert "stage 7: layers 70-79 (2 softmax)" in text
    assert "301.8 GFLOP per token" in text
    assert text.endswith("dry run: the configuration is valid\n")


def test_takes_the_world_size_of_the_launcher(capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ConfigError, match="data-parallel size=1\\*3=3"):
        main(["--training.global_batch=8"])


@pytest.mark.parametrize("world_size", ["0", "x", "-1"])
def test_bad_world_size(world_size):
    with pytest.raises(ConfigError, match="--world-size="):
        main([f"--world-size={world_size}"])


def test_needs_neither_torch_nor_megatron():
    code = (
        "import sys; from megatron_m1.__main__ import main; "
        "code = main(['pretrain', '--dry-run', '--world-size=2']); "
        "print(sorted({'torch', 'megatron'} & set(sys.modules)), code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.endswith("[] 0\n"), done.stdout[-500:] + done.stderr
