import os
import subprocess
import sys

import pytest

from megatron_m1.__main__ import main


@pytest.mark.parametrize(
    "argv, message",
    [
        (["train"], "error: train is not a command; use pretrain, rl, generate, equality or doctor."),
        (
            ["pretrain", "--dry-run", "--parallel.tensor=3"],
            "parallel.tensor=3 must divide model.num_attention_heads=64",
        ),
    ],
)
def test_bad_input_is_a_message_and_exit_code_2(argv, message, capsys, monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert main(argv) == 2
    captured = capsys.readouterr()
    assert message in captured.err and "Traceback" not in captured.err


def test_help_names_the_commands(capsys):
    assert main([]) == 0
    text = capsys.readouterr().out
    assert all(command in text for command in ("pretrain", "generate", "doctor"))


def test_one_rank_of_a_job_tells_the_error():
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    command += ["-m", "megatron_m1", "pretrain", "--dry-run", "--parallel.tensr=2"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode != 0
    assert done.stderr.count("did you mean parallel.tensor?") == 1, done.stderr
    assert done.stderr.count("error: ") == 1


def test_only_the_first_rank_to_fail_tells(monkeypatch):
    """Three ranks meet one store: whoever comes first tells, the others are silent, a restarted job tells again."""
    from torch.distributed import TCPStore

    from megatron_m1.__main__ import _first_to_tell

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(store.port))
    assert [_first_to_tell(without_store=True) for _ in range(3)] == [True, False, False]
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert _first_to_tell(without_store=False)


def first_to_tell(rank, world):
    from megatron_m1.__main__ import _first_to_tell

    return _first_to_tell(without_store=False)


def test_without_torchrun_the_ranks_that_have_met_share_a_store(ranks):
    assert sorted(ranks(3, first_to_tell)) == [False, False, True]


@pytest.mark.parametrize("same_on_the_node, told", [(True, [0]), (False, [0, 1])])
def test_before_the_ranks_have_met_one_of_a_node_tells(same_on_the_node, told, capsys, monkeypatch):
    from megatron_m1.__main__ import _tell_once

    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "16")
    for local_rank in range(2):
        monkeypatch.setenv("RANK", str(8 + local_rank))
        monkeypatch.setenv("LOCAL_RANK", str(local_rank))
        _tell_once("error: no such file", same_on_the_node=same_on_the_node)
    assert capsys.readouterr().err == "".join(f"[rank {8 + local}] error: no such file\n" for local in told)
