"""The command line of tools/plan_layout.py."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_m1.engine.rates import Rates

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
    assert "anything at scale are not measured" in text and "world_size, e.g. " in text


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
    assert found["layout"] == "4/4/32/32/1/1/14" and found["recompute"] == "full"
    modes = list(found["activation_bytes"].values())
    assert len(modes) == 5 and modes == sorted(modes, reverse=True)
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
        (["--seq-length", "0"], "--seq-length=0 must be 1 or more."),
        (["--seq-length", "-5"], "--seq-length=-5 must be 1 or more."),
        (["--global-batch-tokens", "0"], "--global-batch-tokens=0 must be 1 or more."),
        (["--top", "0"], "--top=0 must be 1 or more."),
        (["--gpus", "0"], "gpus=0 of a cluster must be above 0"),
        (["--gpus", "100"], "--gpus=100 must be a multiple of --gpus-per-node=8, or fewer; use 96 or 104."),
        (["--config", "examples/configs/m1_456b_2m_512gpu.yaml"], "name an existing YAML file"),
        (["--rates", "nowhere.json"], "--rates=nowhere.json cannot be read"),
        (["--reserve-gib", "80"], "--reserve-gib=80 must be from 0 to below the 79.6 GiB of a GPU."),
        (["--document-tokens", "0"], "--document-tokens=0 must be 1 or more."),
        (["--training.sequence", "1"], "training.sequence"),
    ],
)
def test_bad_input_is_named(arguments, message):
    done = plan(*arguments)
    assert done.returncode == 2 and message in done.stderr


def test_says_what_would_fit():
    done = plan(*TINY, "--memory-gib", "6.6", "--seq-length", "16384", "--global-batch-tokens", str(8 * 16384))
    assert done.returncode == 1 and "0 layouts fit" in done.stdout, done.stderr
    found = re.search(r"\n(\S+) needs least: 4 GPUs of (6\.\d) GiB would do, reserve included\n", done.stdout)
    enough = [*TINY, "--memory-gib", found[2], "--seq-length", "16384", "--global-batch-tokens", str(8 * 16384)]
    assert f"\n{found[1]} " in plan(*enough).stdout
    least = plan(
        *TINY, "--memory-gib", "6.001", "--seq-length", "16384", "--global-batch-tokens", str(8 * 16384), "--json"
    )
    assert least.returncode == 1 and json.loads(least.stdout) == []
    remedy = "no layout fits; {} needs least: 4 GPUs of {} GiB would do, reserve included\n".format(*found.groups())
    assert (
        least.stderr
        == remedy + "no number of such GPUs up to 256 times as many would do; the reasons say what to change\n"
    )


def test_finds_the_cluster_for_a_million_tokens_from_one_node():
    done = plan("--gpus", "8", "--seq-length", "1048576")
    assert done.returncode == 1 and "\n256 such GPUs would do: 4/2/32/32/4/5/35, recompute full, " in done.stdout


def test_documents_shorten_attention_and_pad():
    layout = ["--gpus", "512", "--seq-length", "1048576", "--layout", "8/2/32/32/1/5", "--json"]
    whole, packed, padded = (
        json.loads(plan(*layout, *options).stdout)[0]
        for options in ([], ["--document-tokens", "2048"],
                        ["--document-tokens", "2048", "--parallel.context_layout", "document"])
    )  # fmt: skip
    blocks = Rates().softmax_context_flash / Rates().softmax_context
    assert packed["seconds"]["softmax"] == pytest.approx(whole["seconds"]["softmax"] / 512 * blocks)
    # No document crosses two borders, so that two neighbours' states arrive and not those of 31 ranks; by document each crosses all.
    assert packed["seconds"]["states"] == pytest.approx(whole["seconds"]["states"] / 31)
    assert padded["seconds"]["states"] == pytest.approx(whole["seconds"]["states"] * 512)
    assert max(padded["activation_bytes"].values()) > 1.1 * max(packed["activation_bytes"].values())
    # 512 documents, each with 31.5 tokens of padding to a multiple of 64 on average.
    assert padded["seconds"]["gemm"] == pytest.approx((1 + 31.5 / 2048) * packed["seconds"]["gemm"], rel=1e-3)


def test_flops_curve_needs_neither_torch_nor_megatron():
    code = (
        "import runpy, sys; sys.argv = ['plan_layout.py', '--flops-curve']\n"
        "try: runpy.run_path('tools/plan_layout.py', run_name='__main__')\n"
        "except SystemExit: print(sorted({'torch', 'megatron'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.endswith("[]\n") and "  100000     127.4     573.0   22.2%" in done.stdout, done.stderr
