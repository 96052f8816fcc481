import importlib.util
import subprocess
import sys
from dataclasses import replace
from importlib.machinery import ModuleSpec

import pytest

from megatron_m1.config import ConfigError, from_yaml, load_config
from megatron_m1.engine.cluster import DEVICES
from megatron_m1.engine.dry_run import dry_run_report, main
from megatron_m1.engine.memory import RESERVE_GIB, estimate_memory

LAYOUT = ["--parallel.tensor=8", "--parallel.pipeline=8", "--parallel.expert=8", "--parallel.expert_tensor=1"]


def test_reports_a_512_rank_layout_on_one_process(capsys):
    main([*LAYOUT, "--training.global_batch=512", "--training.seq_length=32768", "--world-size", "512"])
    text = capsys.readouterr().out
    assert "456,089,655,296" in text and "45,944,920,064" in text
    assert "expert         size    8   [0,1,2,3,4,5,6,7]" in text
    assert "pipeline       size    8   [0,64,128,192,256,320,384,448]" in text
    assert "stage 7: layers 70-79 (2 softmax)" in text
    assert "301.8 GFLOP per token" in text and "estimated time of a step on H800" in text and " MFU: imbalance " in text
    assert "weights   gradients   optimizer activations      logits      update     buffers       total" in text
    assert text.endswith("dry run: the configuration is valid\n")


def test_takes_the_world_size_of_the_launcher(capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ConfigError, match="data-parallel size=1\\*3=3"):
        main(["--training.global_batch=8"])


def test_says_what_the_balance_statistics_span_and_what_the_head_costs(capsys):
    options = [*LAYOUT, "--training.micro_batch=2", "--training.seq_length=32768", "--world-size=512"]
    main([*options, "--training.global_batch=16", "--moe.aux_loss=global"])
    text = capsys.readouterr().out
    assert "(moe.aux_loss=global) span 16 sequences: training.micro_batch=2 x 8 data-parallel ranks" in text
    # 6 * 200064 * 6144 against (301.8 - 7.375) / 8 for the ten layers of the last stage, which has 2 of 10 softmax layers.
    assert "head: 7.375 GFLOP per token in fp32, 20% of the 37.36 GFLOP of its stage's layers" in text
    main([*options, "--training.global_batch=16"])
    assert "(moe.aux_loss=micro_batch) span 2 sequences: training.micro_batch=2\n" in capsys.readouterr().out


@pytest.mark.parametrize("micro_batches, dtype, warned", [(65, "bf16", True), (64, "bf16", False), (65, "fp32", False)])
def test_warns_of_many_micro_batches_summed_in_bf16(micro_batches, dtype, warned, capsys):
    main([f"--training.global_batch={micro_batches}", f"--training.grad_reduce_dtype={dtype}"])
    warning = f"grad_reduce_dtype=bf16 sums up to {micro_batches} micro-batches per step and rank in bf16"
    assert (warning in capsys.readouterr().out) == warned


FILES = "examples/configs/m1_456b"


def report(capsys, *names, options=(), world_size=512):
    files = [option for name in names for option in ("--config", f"{FILES}{name}.yaml")]
    main([*files, *options, "--checkpoint.every_steps=0", f"--world-size={world_size}"])
    return capsys.readouterr().out


def test_warns_of_a_layout_that_does_not_fit(capsys):
    text = report(capsys, "", "_context_1m")
    assert "\nstage 0 needs 255." in text and "6 GiB in reserve, above the 79.6 GiB of an H800: it will run out" in text
    assert "tools/plan_layout.py --gpus 512 --seq-length 1048576 lists layouts that fit" in text
    assert "above the 79.6" not in report(capsys, "", "_1m_512gpu", "_context_1m")


def test_the_reserve_and_the_margin_count(capsys, monkeypatch):
    config = from_yaml(f"{FILES}.yaml")
    needed = max(stage.with_margin for stage in estimate_memory(config, 512)) / 2**30
    for spare, warned in ((-0.01, True), (0.01, False)):
        device = replace(DEVICES["H800"], memory_gib=needed + RESERVE_GIB + spare)
        monkeypatch.setitem(DEVICES, "H800", device)
        assert ("it will run out of memory" in dry_run_report(config, 512)) == warned


def test_says_how_context_ranks_exchange(capsys):
    text = report(capsys, "", "_1m_512gpu")
    # 2 x 31 states of 16 heads; K and V of 2^20 tokens, two heads of 128 a rank.
    assert (
        "lightning states all_gather (auto: 62 MiB gathered a layer, limit 64); keys and values ring (auto: 1024 MiB"
        in text
    )
    fixed = ["--parallel.context_lightning=ring", "--parallel.context_softmax=all_gather"]
    text = report(capsys, "", "_1m_512gpu", options=[*fixed, "--parallel.context_layout=document"])
    assert "lightning states ring; keys and values all_gather; every document of a sequence has 2 MiB of states" in text
    assert "context exchange" not in report(capsys, "")


def test_warns_of_a_missing_transformer_engine(monkeypatch):
    config = load_config(["--config", f"{FILES}.yaml", "--config", f"{FILES}_1m_512gpu.yaml"])
    config.parallel.context_softmax, config.parallel.context_layout = "transformer_engine", "document"
    warning = "needs Transformer Engine, which is not installed here"
    for found in (None, ModuleSpec("transformer_engine", None)):
        # The packages of this environment, and what platform/cpu.py makes of them, do not matter.
        monkeypatch.setattr(importlib.util, "find_spec", {"transformer_engine": found}.get)
        text = dry_run_report(config, 512)
        assert (warning in text) == (found is None)


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
