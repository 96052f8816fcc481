"""The command line of tools/plan_layout.py."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TINY = ["--config", "examples/configs/tiny_cpu.yaml", "--gpus", "4", "--gpus-per-node", "2"]


def plan(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "tools/plan_layout.py", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)


def test_ranks_layouts_as_text_and_json():
    arguments = [*TINY, "--seq-length", "16384", "--global-batch-tokens", str(8 * 16384), "--top", "3"]
    found = json.loads(plan(*arguments, "--json").stdout)
    assert len(found) == 3
    seconds = [entry["seconds"]["total"] for entry in found]
    assert seconds == sorted(seconds)
    assert all(sum(entry["seconds"].values()) == pytest.approx(2 * entry["seconds"]["total"]) for entry in found)
    text = plan(*arguments).stdout
    assert f"\n{found[0]['layout']} " in text and "16,384 tokens a sequence, 8 sequences a step, 4 GPUs" in text
    assert "not calibrated end to end" in text and "world_size, e.g. " in text


def test_one_layout_of_the_released_model_in_detail():
    layout = ["--gpus", "512", "--seq-length", "32768", "--layout", "8/8/1/8/1/1"]
    done = plan(*layout, "--training.grad_reduce_dtype", "bf16")
    assert done.returncode == 0 and done.stdout.startswith("8/8/1/8/1/1, recompute full: "), done.stderr
    assert "stage 7     2 " in done.stdout and "balance of the stages' arithmetic without the head: 99%" in done.stdout
    own = plan(
        *("--config", "examples/configs/m1_456b.yaml", "--config", "examples/configs/m1_456b_1m_512gpu.yaml"),
        *("--gpus", "512", "--layout", "config", "--json"),
    )
    (found,) = json.loads(own.stdout)
    assert found["layout"] == "8/2/32/32/1/5" and found["recompute"] == "full"
    modes = list(found["activation_bytes"].values())
    assert len(modes) == 4 and modes == sorted(modes, reverse=True)
    refused = plan("--gpus", "64", *layout[2:])
    assert refused.returncode == 1 and "needs" in refused.stdout and "above the 79.6 GiB of a GPU" in refused.stdout


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--layout", "8/8"], "--layout=8/8 must be six sizes TP/PP/CP/EP/ETP/VPP"),
        (
            ["--seq-length", "3000"],
            "--global-batch-tokens=134217728 must be a multiple of --seq-length=3000; use 134217000.",
        ),
        (["--gpus", "0"], "gpus=0 of a cluster must be above 0"),
        (["--training.sequence", "1"], "training.sequence"),
    ],
)
def test_bad_input_is_named(arguments, message):
    done = plan(*arguments)
    assert done.returncode == 2 and message in done.stderr


def test_flops_curve_needs_neither_torch_nor_megatron():
    code = (
        "import runpy, sys; sys.argv = ['plan_layout.py', '--flops-curve']\n"
        "try: runpy.run_path('tools/plan_layout.py', run_name='__main__')\n"
        "except SystemExit: print(sorted({'torch', 'megatron'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.endswith("[]\n") and "  100000     127.4     573.0   22.2%" in done.stdout, done.stderr
