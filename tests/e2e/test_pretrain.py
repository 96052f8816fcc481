"""`megatron_m1 pretrain` as a user runs it: what it writes, how it resumes, how it stops and fails.

Where the launcher is part of the question the job runs under torchrun, elsewhere the command runs in the ranks of the pool.
"""

import contextlib
import io
import json
import math
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_m1.platform.rank_pool import RankError
from tests.e2e.pretrain_jobs import (
    ROOT,
    SEQ,
    VOCAB,
    entries,
    environment,
    job_folder,
    options,
    pretrain_rank,
    ranks_of,
    run,
    running,
    steps,
    write_tokens,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return job_folder(tmp_path_factory.mktemp("pretrain"))


@pytest.fixture(scope="module")
def one_rank(folder: Path, rank_pool) -> Path:
    """Logs of five steps on one rank, with a checkpoint after every step and an evaluation after every other."""
    logs = folder / "one_rank"
    keys = {
        "training.steps": 5,
        "checkpoint.save": folder / "checkpoints",
        "checkpoint.every_steps": 1,
        "evaluation.every_steps": 2,
        "logging.dir": logs,
    }
    assert rank_pool.run(pretrain_rank, (options(folder, keys),), world=1, timeout_s=120) == [None]
    return logs


def close(ours: dict[int, dict], theirs: dict[int, dict], *keys: str) -> None:
    assert ours.keys() == theirs.keys()
    for step in ours:
        for key in keys:
            assert ours[step][key] == pytest.approx(theirs[step][key], rel=1e-5), (step, key)


# --- what a run writes -----------------------------------------------------------------------------------------------


def test_two_processes_write_what_one_does(folder, one_rank, tmp_path):
    keys = {"training.steps": 5, "logging.dir": tmp_path, "evaluation.every_steps": 2}
    done = run(options(folder, keys), world=2)
    assert done.returncode == 0, done.stderr
    close(steps(tmp_path), steps(one_rank), "loss", "grad_norm", "aux_loss")
    lines = [line for line in done.stdout.splitlines() if line.startswith("step ")]
    assert [line.split("  ")[0] for line in lines] == [f"step {n}/5" for n in range(1, 6)]
    for line, entry in zip(lines, steps(tmp_path).values(), strict=True):
        assert f"  loss {entry['loss']:.4f}  " in line and "  tokens_per_s " in line
    assert done.stderr.count("lightning_attention_packed on cpu: torch (chunked batched matmuls in PyTorch)") == 1

    first, evaluation, *rest = entries(tmp_path)
    assert first == {
        "event": "start",
        "from_step": 0,
        "process_groups": {
            "world": 2, "tensor": 1, "pipeline": 1, "context": 1, "data": 2, "expert": 1, "expert_tensor": 1, "expert_data": 2,
        },
    }  # fmt: skip
    assert evaluation.keys() == {"event", "after_step", "valid_loss"} and evaluation["after_step"] == 0
    assert evaluation["valid_loss"] == pytest.approx(math.log(VOCAB), abs=0.3)
    assert [entry["step"] for entry in rest] == [1, 2, 3, 4, 5]
    for entry in rest:
        assert {
            "loss",
            "grad_norm",
            "lr",
            "tokens_per_s",
            "tflops",
            "peak_memory_gib",
            "consumed_samples",
            "expert_load_max",
        } <= entry.keys()
        assert entry["tokens_per_s"] == pytest.approx(4 * SEQ / entry["step_time_s"], rel=1e-12)
        assert entry["expert_load_min"] <= 1 <= entry["expert_load_max"]
    assert rest[0]["lr"] == 1e-2 and rest[-1]["loss"] < rest[0]["loss"] - 0.2
    assert [("valid_loss" in entry) for entry in rest] == [False, True, False, True, True]
    # Full precision: hardly any of these would survive rounding to 12 digits.
    values = [entry[key] for entry in rest for key in ("loss", "grad_norm", "tokens_per_s")]
    assert sum(float(f"{value:.12g}") == value for value in values) <= 2


OVERLAP = {"overlap_grad_reduce": "true", "overlap_param_gather": "true"}


@pytest.mark.parametrize(
    "world, layout, sizes",
    [
        (2, {"tensor": 2}, {"tensor": 2, "expert_tensor": 2}),
        (2, {"pipeline": 2}, {"pipeline": 2}),
        (2, {"expert": 2}, {"data": 2, "expert": 2}),
        (2, {"distributed_optimizer": "false"}, {"data": 2, "expert_data": 2}),
        (2, OVERLAP, {"data": 2, "expert_data": 2}),
        (4, {"pipeline": 2, "virtual_pipeline": 2, **OVERLAP}, {"pipeline": 2, "data": 2, "expert_data": 2}),
    ],
    ids=lambda value: "_".join(value) if isinstance(value, dict) else None,
)
def test_layouts_train_as_one_rank(folder, one_rank, tmp_path, ranks, world, layout, sizes):
    keys = {f"parallel.{key}": value for key, value in layout.items()}
    keys |= {"training.steps": 5, "logging.dir": tmp_path, "evaluation.every_steps": 2}
    keys |= {"logging.layer_stats_every_steps": 2}
    assert ranks(world, pretrain_rank, options(folder, keys)) == [None] * world
    close(steps(tmp_path), steps(one_rank), "loss", "grad_norm")
    first, *_ = entries(tmp_path)
    names = ("tensor", "pipeline", "context", "data", "expert", "expert_tensor", "expert_data")
    assert first["process_groups"] == {"world": world} | {name: sizes.get(name, 1) for name in names}
    for step in (2, 4, 5):
        assert steps(tmp_path)[step]["valid_loss"] == pytest.approx(steps(one_rank)[step]["valid_loss"], rel=1e-5)
    for step in (2, 4):
        check_layer_stats(steps(tmp_path)[step])


def check_layer_stats(entry: dict) -> None:
    """The squares of the parts' gradient norms add up to that of the whole."""
    norms, ratios = entry["layers"]["grad_norm"], entry["layers"]["update_ratio"]
    whole = [key for key in norms if not key.startswith("slope")]
    assert sorted(whole) == ["embedding", "layer_000", "layer_001", "layer_002", "layer_003", "output"]
    assert math.hypot(*(norms[key] for key in whole)) == pytest.approx(entry["grad_norm"], rel=1e-6)
    assert all(0 < ratios[key] < 0.5 for key in whole)
    slopes = [value for key, value in norms.items() if key.startswith("slope")]
    assert 0 < math.hypot(*slopes) < math.hypot(*(norms[f"layer_{layer:03d}"] for layer in range(3)))


def test_looking_changes_nothing(folder, one_rank, tmp_path, ranks):
    """Evaluation, statistics, workers for the data and asynchronous saves leave the training bit by bit as it is."""
    keys = {
        "training.steps": 5,
        "logging.dir": tmp_path / "log",
        "logging.layer_stats_every_steps": 1,
        "data.valid": "[]",
        "data.num_workers": 2,
        "checkpoint.save": tmp_path / "checkpoints",
        "checkpoint.every_steps": 2,
        "checkpoint.async_save": "true",
        "checkpoint.keep": 2,
    }
    assert ranks(1, pretrain_rank, options(folder, keys)) == [None]
    for step, entry in steps(tmp_path / "log").items():
        expected = {key: value for key, value in steps(one_rank)[step].items() if key != "valid_loss"}
        check_layer_stats(entry)
        del entry["layers"]
        assert entry == expected
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["latest", "step_00000004", "step_00000005"]


def test_batch_ramp(folder, tmp_path, ranks):
    ramp = [{"from_step": 1, "global_batch": 2}, {"from_step": 3, "global_batch": 6}]
    keys = {"training.batch_ramp": json.dumps(ramp), "training.steps": 5, "logging.dir": tmp_path}
    assert ranks(2, pretrain_rank, options(folder, keys)) == [None, None]
    found = steps(tmp_path).values()
    assert [entry["global_batch"] for entry in found] == [4, 2, 2, 6, 6]
    assert [entry["consumed_samples"] for entry in found] == [4, 6, 8, 14, 20]
    assert all(entry["loss_tokens"] <= entry["global_batch"] * SEQ for entry in found)


# --- resuming --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("done", [1, 3])
def test_a_resumed_run_goes_on_bit_by_bit(folder, one_rank, tmp_path, ranks, done):
    keys = {
        "training.steps": 5,
        "checkpoint.load": folder / f"checkpoints/step_0000000{done}",
        "evaluation.every_steps": 2,
        "logging.dir": tmp_path,
    }
    assert ranks(1, pretrain_rank, options(folder, keys)) == [None]
    assert entries(tmp_path)[0]["from_step"] == done
    assert steps(tmp_path) == {step: entry for step, entry in steps(one_rank).items() if step > done}


def printed(rank, world, argv):
    """What the command prints."""
    with contextlib.redirect_stdout(io.StringIO()) as output:
        assert pretrain_rank(rank, world, argv) is None
    return output.getvalue()


def test_a_finished_run_has_nothing_to_do(folder, one_rank, ranks, tmp_path):
    keys = {"training.steps": 5, "checkpoint.load": folder / "checkpoints", "logging.dir": tmp_path}
    (output,) = ranks(1, printed, options(folder, keys))
    assert (
        f"continuing after step 5: {folder / 'checkpoints'}\n" in output and "nothing to do: 5 steps are done" in output
    )
    assert steps(tmp_path) == {} and entries(tmp_path)[0]["from_step"] == 5


def resumes(folder: Path, checkpoints: Path, tmp_path: Path, ranks, *, world: int) -> int:
    """The number of steps of the checkpoint that `latest` names, after a step more was trained from it."""
    done = int((checkpoints / "latest").read_text().strip().removeprefix("step_"))
    keys = {"training.steps": done + 1, "checkpoint.load": checkpoints, "logging.dir": tmp_path / "resumed"}
    assert ranks(world, pretrain_rank, options(folder, keys)) == [None] * world
    assert list(steps(tmp_path / "resumed")) == [done + 1]
    return done


# --- stopping --------------------------------------------------------------------------------------------------------


def test_a_signal_to_one_rank_saves_and_ends_all(folder, tmp_path, ranks):
    keys = {"training.steps": 100_000, "logging.dir": tmp_path / "log", "checkpoint.save": tmp_path / "checkpoints"}
    with running(options(folder, keys), world=2, logs=tmp_path / "log", until_step=2) as job:
        ranks_of(job)[1].send_signal(signal.SIGUSR1)
        output, errors = job.communicate(timeout=120)
    assert job.returncode == 0, errors
    assert "stopping after step" in output and "SIGUSR1" in output and "Traceback" not in errors
    assert f"saving step {max(steps(tmp_path / 'log'))} to {tmp_path / 'checkpoints'}\n" in output
    assert max(steps(tmp_path / "log")) == resumes(folder, tmp_path / "checkpoints", tmp_path, ranks, world=2)


def test_sigterm_to_the_launcher_saves_and_ends_all(folder, tmp_path, ranks):
    """torchrun passes the signal on, waits for the ranks, and itself reports that it was stopped."""
    keys = {"training.steps": 100_000, "logging.dir": tmp_path / "log", "checkpoint.save": tmp_path / "checkpoints"}
    with running(options(folder, keys), world=2, logs=tmp_path / "log", until_step=2) as job:
        processes = ranks_of(job)
        job.send_signal(signal.SIGTERM)
        output, errors = job.communicate(timeout=120)
    assert job.returncode != 0 and "error: " not in errors and "[rank" not in errors
    assert "SIGTERM" in output and not any(process.is_running() for process in processes)
    assert max(steps(tmp_path / "log")) == resumes(folder, tmp_path / "checkpoints", tmp_path, ranks, world=2)


def test_a_time_limit_ends_the_run(folder, tmp_path, ranks):
    keys = {"training.steps": 100_000, "training.exit_after_s": 1, "logging.dir": tmp_path / "log"}
    keys |= {"checkpoint.save": tmp_path / "checkpoints"}
    started = time.monotonic()
    assert ranks(2, pretrain_rank, options(folder, keys)) == [None, None]
    assert time.monotonic() - started > 1
    assert max(steps(tmp_path / "log")) == resumes(folder, tmp_path / "checkpoints", tmp_path, ranks, world=1)


# --- failing ---------------------------------------------------------------------------------------------------------


def test_a_killed_rank_ends_the_job(folder, tmp_path, ranks):
    keys = {"training.steps": 100_000, "logging.dir": tmp_path / "log", "checkpoint.save": tmp_path / "checkpoints"}
    keys |= {"checkpoint.every_steps": 1, "checkpoint.keep": 2}
    with running(options(folder, keys), world=2, logs=tmp_path / "log", until_step=4) as job:
        processes = ranks_of(job)
        processes[1].send_signal(signal.SIGKILL)
        _, errors = job.communicate(timeout=120)
    assert job.returncode != 0 and not any(process.is_running() for process in processes)
    ours = errors[: errors.index("torch.distributed.elastic.multiprocessing.errors.ChildFailedError")]
    assert ours.count("error: another rank has died or does not answer") <= 1
    assert "[rank0]: Traceback" not in ours, ours
    assert resumes(folder, tmp_path / "checkpoints", tmp_path, ranks, world=2) >= 3


def test_a_loss_that_is_not_finite_ends_the_job(folder, tmp_path, ranks):
    checkpoints = tmp_path / "checkpoints"
    keys = {"checkpoint.save": checkpoints, "checkpoint.every_steps": 2, "logging.dir": tmp_path / "log"}
    assert ranks(2, pretrain_rank, options(folder, keys | {"training.steps": 2})) == [None, None]
    keys |= {"training.steps": 8, "checkpoint.load": checkpoints, "optimizer.lr": 1e30, "data.valid": "[]"}
    done = run(options(folder, keys), world=2)
    assert done.returncode != 0
    assert done.stderr.count("error: ") == 1 and "=nan is not finite; lower optimizer.lr" in done.stderr, done.stderr
    assert "]: Traceback" not in done.stderr
    assert sorted(steps(tmp_path / "log")) == [1, 2, 3]
    assert sorted(path.name for path in checkpoints.iterdir()) == ["latest", "step_00000002"]
    assert resumes(folder, checkpoints, tmp_path, ranks, world=2) == 2


def test_a_save_in_the_background_is_finished_when_the_loss_is_not_finite(folder, tmp_path, ranks):
    keys = {
        "checkpoint.save": tmp_path,
        "checkpoint.every_steps": 1,
        "checkpoint.async_save": "true",
        "optimizer.lr": 1e30,
    }
    with pytest.raises(RankError, match=r"FloatingPointError: .*=nan is not finite"):
        ranks(2, pretrain_rank, options(folder, keys | {"data.valid": "[]"}))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_00000001"]


def test_an_unknown_key_is_refused_before_anything_else():
    command = [sys.executable, "-m", "megatron_m1", "pretrain", "--training.stepz", "3"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT, env=environment())
    assert done.returncode == 2
    assert done.stderr == (
        "error: --training.stepz (command line) is not a known key; did you mean training.steps? --help lists all keys.\n"
    )


def truncated(folder: Path) -> None:
    (folder / "train.bin").write_bytes((folder / "train.bin").read_bytes()[:-10])


def damaged_index(folder: Path) -> None:
    (folder / "train.idx").write_bytes(b"no index at all" * 9)


def bad_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{")


def another_model(folder: Path) -> None:
    """`folder` as a save folder whose step has nothing in it."""
    (folder / "step_00000001").mkdir()
    (folder / "latest").write_text("step_00000001\n")


@pytest.mark.parametrize(
    "prepare, keys, message",
    [
        (None, {"parallel.tensor": 3}, "parallel.tensor=3 must divide model.num_attention_heads=4"),
        (None, {"parallel.expert": 4}, "world_size=2 must be a multiple of"),
        (None, {"training.global_batch": 5}, "training.global_batch=5 must be a multiple of"),
        (None, {"data.train": "[nowhere/train]"}, "nowhere/train"),
        (None, {"data.train": "[]"}, "data.train is empty"),
        (None, {"data.tokenizer": "nowhere"}, "nowhere/tokenizer.json does not exist"),
        (None, {"model.vocab_size": 40}, "model.vocab_size"),
        (None, {"training.seq_length": 4096}, "shorten training.seq_length or add text"),
        (None, {"checkpoint.load": "nowhere"}, "checkpoint.load=nowhere does not exist"),
        (None, {"logging.dir": "{folder}/tiny.yaml/log"}, "logging.dir={folder}/tiny.yaml/log cannot be written"),
        (truncated, {}, "train.bin"),
        (damaged_index, {}, "train.idx"),
        (bad_tokenizer, {"data.tokenizer": "{folder}"}, "tokenizer.json"),
        (another_model, {"checkpoint.load": "{folder}"}, "step_00000001"),
        (another_model, {"checkpoint.save": "{folder}"}, "set checkpoint.load to it to continue that run"),
        (
            another_model,
            {"checkpoint.save": "{folder}", "checkpoint.load": "{folder}", "checkpoint.weights_only": "true"},
            "(newest: step_00000001), which a run from step 0 would replace",
        ),
    ],
    ids=lambda value: getattr(value, "__name__", None) or str(value)[:40],
)
def test_bad_input_is_one_message_on_every_rank_and_writes_nothing(tmp_path, ranks, prepare, keys, message):
    folder = tmp_path / "job"
    folder.mkdir()
    job_folder(folder)
    if prepare is not None:
        prepare(folder)
    keys = {key: str(value).replace("{folder}", str(folder)) for key, value in keys.items()}
    before = sorted(folder.rglob("*"))
    ours = {"logging.dir": tmp_path / "log", "checkpoint.save": tmp_path / "checkpoints"}
    first, second = ranks(2, pretrain_rank, options(folder, ours | keys))
    assert first is not None and first == second
    assert message.replace("{folder}", str(folder)) in first
    assert sorted(folder.rglob("*")) == before and sorted(tmp_path.iterdir()) == [folder]


def test_bad_data_of_one_rank_ends_all_with_its_message(tmp_path):
    """As on several hosts, one of which misses a file."""
    folder = tmp_path / "job"
    folder.mkdir()
    job_folder(folder)
    for rank, prefix in enumerate(("rank0", "rank1")):
        write_tokens(tmp_path / f"{prefix}/train", seed=rank)
    (tmp_path / "rank1/train.bin").unlink()
    script = tmp_path / "rank.sh"
    # Each rank in a folder of its own, so that the same relative prefix names different files.
    script.write_text(f'#!/bin/sh\ncd "{tmp_path}/rank$RANK" && exec "{sys.executable}" -m megatron_m1 pretrain "$@"\n')
    script.chmod(0o755)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        "--no-python",
        str(script),
    ]
    done = subprocess.run(
        [*command, *options(folder, {"data.train": "[train]", "logging.dir": tmp_path / "log"})],
        capture_output=True, text=True, timeout=240, cwd=ROOT, env=environment(),
    )  # fmt: skip
    assert done.returncode != 0 and not (tmp_path / "log").exists()
    assert done.stderr.count("error: ") == 1 and "train.bin" in done.stderr and "]: Traceback" not in done.stderr, (
        done.stderr
    )
