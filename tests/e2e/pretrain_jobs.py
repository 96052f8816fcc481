"""Tiny pretraining jobs for the end-to-end tests: their files, options and launchers."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from megatron_m1.data.token_file import TokenFileWriter

ROOT = Path(__file__).parents[2]
VOCAB, SEQ = 96, 16
# What examples/configs/tiny_cpu.yaml says, of the smallest size.
TINY = {
    "model": {
        "vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 8, "intermediate_size": 32, "num_local_experts": 4, "attn_type_list": [0, 0, 0, 1], "rotary_dim": 4,
    },
    "training": {"steps": 3, "micro_batch": 1, "global_batch": 4, "seq_length": SEQ, "precision": "fp32"},
    "optimizer": {"lr": 1e-2},
    "schedule": {"kind": "cosine", "warmup_steps": 1},
    "evaluation": {"batches": 2},
    "logging": {"tensorboard": False},
}  # fmt: skip


def write_tokens(prefix: Path, *, seed: int, tokens: int = 1200) -> Path:
    """A token file of documents of 5 to 60 tokens, in which the next token often follows from the one before."""
    rng = np.random.default_rng(seed)
    with TokenFileWriter(prefix, np.dtype(np.uint16)) as writer:
        while writer.num_tokens < tokens:
            steps = np.where(rng.random(int(rng.integers(5, 60))) < 0.8, 7, rng.integers(0, VOCAB))
            writer.add_document(np.cumsum(steps) % VOCAB)
    return prefix


def job_folder(folder: Path) -> Path:
    """`folder` with tiny.yaml (in JSON, which is YAML) and the token files train and valid."""
    data = {"train": [str(folder / "train")], "valid": [str(folder / "valid")]}
    (folder / "tiny.yaml").write_text(json.dumps(TINY | {"data": data}))
    write_tokens(folder / "train", seed=0)
    write_tokens(folder / "valid", seed=1)
    return folder


def options(folder: Path, values: dict[str, Any] | None = None) -> list[str]:
    """Command line of `pretrain` for the job of `folder`, with further keys."""
    given = [part for key, value in (values or {}).items() for part in (f"--{key}", str(value))]
    return ["--config", str(folder / "tiny.yaml"), *given]


def pretrain_rank(rank: int, world: int, argv: list[str]) -> str | None:
    """For the `ranks` fixture: the `pretrain` command, in a process that runs already; the ConfigError it ended with, if any."""
    from megatron_m1.config.errors import ConfigError
    from megatron_m1.pretrain import main

    try:
        main(argv)
    except ConfigError as error:
        return str(error)
    return None


def entries(logs: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (logs / "metrics.jsonl").read_text().splitlines()]


def steps(logs: Path) -> dict[int, dict[str, Any]]:
    """Metrics by step; the time-dependent ones left out."""
    timed = {"step_time_s", "tokens_per_s", "tflops", "mfu", "peak_memory_gib"}
    return {
        entry["step"]: {key: value for key, value in entry.items() if key not in timed}
        for entry in entries(logs)
        if "loss" in entry
    }


def command(argv: list[str], *, world: int) -> list[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)] if world > 1 else []
    return [sys.executable, *launcher, "-m", "megatron_m1", "pretrain", *argv]


def environment() -> dict[str, str]:
    """Without the variables by which this process may itself be a rank."""
    ours = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    return {key: value for key, value in os.environ.items() if key not in ours} | {"OMP_NUM_THREADS": "1"}


def run(argv: list[str], *, world: int = 1, timeout_s: float = 240) -> subprocess.CompletedProcess[str]:
    """The finished job."""
    return subprocess.run(
        command(argv, world=world), capture_output=True, text=True, timeout=timeout_s, cwd=ROOT, env=environment()
    )


@contextmanager
def running(argv: list[str], *, world: int, logs: Path, until_step: int) -> Iterator[subprocess.Popen[str]]:
    """A job that has done `until_step` steps. What is left of it at the end of the block is killed."""
    with subprocess.Popen(
        command(argv, world=world),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=environment(),
    ) as job:
        try:
            deadline = time.monotonic() + 240
            while (
                not (logs / "metrics.jsonl").exists()
                or f'"step": {until_step},' not in (logs / "metrics.jsonl").read_text()
            ):
                assert job.poll() is None and time.monotonic() < deadline, job.communicate()
                time.sleep(0.05)
            yield job
        finally:
            if job.poll() is None:
                for process in (*psutil.Process(job.pid).children(recursive=True), job):
                    process.send_signal(signal.SIGKILL)


def ranks_of(job: subprocess.Popen[str]) -> list[psutil.Process]:
    """The processes of the ranks under torchrun, by rank."""
    children = [child for child in psutil.Process(job.pid).children() if "pretrain" in child.cmdline()]
    return sorted(children, key=lambda child: int(child.environ()["RANK"]))
