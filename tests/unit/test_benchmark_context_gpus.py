"""The benchmark of context parallelism between GPUs, on CPU: what it counts, supplies and reports of ranks that fail."""

import json
import os
import re
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from m1_kernels import slopes

from benchmarks import context_gpus
from benchmarks.context_formulas import Shape, lightning_bytes, softmax_bytes
from benchmarks.context_gpu_ranks import supplied
from benchmarks.context_gpus import Point, left_out, main, parser
from megatron_m1 import platform

TINY = ["--heads", "4", "--key-value-heads", "2", "--head-dim", "16", "--local-tokens", "32", "--tokens", "128"]


def run(tmp_path, *arguments: str) -> tuple[int, dict]:
    output = tmp_path / "result.json"
    code = main([*TINY, "--link-bytes", "4096", "--rounds", "1", "--output", str(output), *arguments])
    return code, json.loads(output.read_text())


def test_rows_have_the_bytes_of_the_formulas_and_the_difference_of_the_windows(tmp_path, capsys):
    code, found = run(tmp_path, "--ranks", "1", "2")
    assert code == 0, capsys.readouterr().out
    assert {link["operation"] for link in found["links"]} == {"shift", "all_gather", "reduce_scatter"}
    alone, together = ([r for r in found["points"] if r["point"]["ranks"] == n] for n in (1, 2))
    assert len(alone) == 4 and len(together) == 8  # two kinds of two lengths, over ranks by two methods
    assert all(row["exposed_s"] == row["sent_bytes"] == 0 for row in alone)
    for row in together:
        shape = Shape(2, row["point"]["tokens"], 4, 2, 16)
        if row["point"]["kind"] == "softmax":
            expected = softmax_bytes(shape, direction="forward") + softmax_bytes(shape, direction="backward")
        else:
            gone = shape.left_out(slopes(4, 40, 80).tolist()) if row["method"] == "all_gather" else 0
            expected = 2 * lightning_bytes(shape, rank=0, method=row["method"], left_out=gone)
        assert row["sent_bytes"] == expected
        sums = [sum(row[f"{prefix}{side}_s"] for side in ("forward", "backward")) for prefix in ("", "alone_")]
        assert row["exposed_s"] == pytest.approx(sums[0] - sums[1])
        operation = {"ring": "shift", "all_gather": "all_gather"}[row["method"]]
        [link] = [link for link in found["links"] if link["operation"] == operation]
        assert row["modelled_s"] == pytest.approx(expected / link["sent_bytes"] * link["seconds"])
        assert row["finite"]


def test_ranks_that_fail_are_named_and_the_others_go_on(tmp_path, capsys):
    code, found = run(tmp_path, "--ranks", "2", "--local-tokens", "33")
    assert code == 1
    failed, others = ([r for r in found["points"] if r["point"]["tokens"] == tokens] for tokens in (66, 128))
    assert len(failed) == 2
    for row in failed:
        # Of two ranks that raise at the same time one may be killed before it has said so.
        assert "rank 0 of 2 raised" in row["error"] or "rank 1 of 2 raised" in row["error"]
    assert len(others) == 4 and all(row["finite"] for row in others)
    assert re.search(
        r"W 2 N +66  (rank . of 2 raised )+ValueError: the sequence has 66 tokens", (out := capsys.readouterr().out)
    )
    assert "2 failed" in out


def test_points_without_time_are_left_out(tmp_path):
    code, found = run(tmp_path, "--ranks", "1", "--time-limit-s", "0")
    assert code == 0 and {row["skipped"] for row in found["points"]} == {"no time left"}


def test_what_does_not_fit_is_left_out(monkeypatch):
    options = parser().parse_args([])
    assert "expected 10 s" in left_out(Point("softmax", 1, 1 << 18), options)
    assert left_out(Point("softmax", 1, 1 << 17), options) is None
    monkeypatch.setattr(platform, "is_cuda", lambda: True)
    memory = SimpleNamespace(total_memory=80 << 30)
    monkeypatch.setattr(context_gpus.torch.cuda, "get_device_properties", lambda _: memory)
    assert "88 GiB of 80" in left_out(Point("lightning", 2, 1 << 20), options)
    assert left_out(Point("lightning", 4, 1 << 20), options) is None


def exchanged(rank: int, world: int) -> list[torch.Tensor]:
    """What arrives of a message, an all-gather and a reduce-scatter of the rank's number while nothing is sent."""
    x = torch.full((2, 3), float(rank))
    message, gathered, scattered = torch.empty(2, 3), torch.empty(2 * world, 3), torch.empty(2, 3)
    with supplied():
        operations = [dist.P2POp(dist.isend, x, 1 - rank), dist.P2POp(dist.irecv, message, 1 - rank)]
        for work in dist.batch_isend_irecv(operations):
            work.wait()
        dist.all_gather_into_tensor(gathered, x, group=dist.group.WORLD, async_op=True).wait()
        dist.reduce_scatter_tensor(scattered, gathered + torch.arange(4)[:, None], group=dist.group.WORLD)
    return [message, gathered, scattered]


def test_supplied_data_are_this_ranks_own(ranks):
    for rank, (message, gathered, scattered) in enumerate(ranks(2, exchanged)):
        assert torch.equal(message, torch.full((2, 3), float(rank)))
        assert torch.equal(gathered, torch.full((4, 3), float(rank)))
        assert scattered[:, 0].tolist() == [rank + 2 * rank, rank + 2 * rank + 1]


def launched(tmp_path: Path, *parts: str, **environment: str) -> tuple[int, str, list[str]]:
    """Exit code, output and commands of the launcher with a stand-in for Python, which fails for the equality table."""
    python, log = tmp_path / "python", tmp_path / "log"
    python.write_text(
        f'#!/usr/bin/env bash\necho "$NCCL_NVLS_ENABLE ${{CUDA_DEVICE_MAX_CONNECTIONS:-unset}} $*" >> {log}\n'
        '[[ "$*" != *megatron_m1\\ equality* ]] || { echo "CP4 of the table"; exit 1; }\necho "step 1/4 of training"\n'
    )
    python.chmod(0o755)
    log.write_text("")
    variables = {"PYTHON": str(python), "OUT": str(tmp_path / "out"), **environment}
    command = ["bash", "benchmarks/run_multi_gpu.sh", *parts]
    done = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout, log.read_text().splitlines()


def test_launcher_runs_every_part_and_tells_which_failed(tmp_path):
    code, output, commands = launched(tmp_path)
    assert code == 1 and output.splitlines()[-1].startswith("== failed: multi_gpu_equality; ")
    assert "CP4 of the table" in output and output.count("step 1/4 of training") == 3
    assert [("benchmarks.context_gpus" in c, "pretrain" in c, "-m pytest" in c) for c in commands] == [
        (True, False, False), (False, False, False), *[(False, True, False)] * 3, (False, False, True),
    ]  # fmt: skip
    assert all(command.startswith("0 ") for command in commands)
    assert [command.split()[1] for command in commands] == ["unset"] * 3 + ["1"] + ["unset"] * 2  # with TP2 alone


def test_launcher_starts_nothing_without_time(tmp_path):
    code, output, commands = launched(tmp_path, "context", "train_cp4", LIMIT_S="3")
    assert code == 1 and commands == []
    assert "== context_gpus: no time left" in output and "== failed: context_gpus train_cp4; " in output
