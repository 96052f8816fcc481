"""The rl command: a policy that learns from a supervised start, and a run that kill -9 does not change."""

import contextlib
import errno
import json
import math
import os
import pty
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Literal
from unittest import mock

import pytest
import torch

from megatron_m1.checkpoint.native import load_checkpoint, save_checkpoint
from megatron_m1.config import Config, ConfigError, from_yaml, load_config, to_yaml
from megatron_m1.config.schema import CheckpointConfig, ModelConfig
from megatron_m1.data.tokenizer import Tokenizer
from megatron_m1.data.train_tokenizer import train_tokenizer
from megatron_m1.engine.trainer import Trainer
from megatron_m1.parallel import destroy_groups, init_groups
from megatron_m1.rl.journal import Journal, read_journal
from megatron_m1.rl.loop import main
from megatron_m1.rl.packing import pack_samples
from megatron_m1.rl.rewards.pool import RewardPool
from megatron_m1.rl.rewards.protocol import RewardRequest, RewardResult, Score
from megatron_m1.rl.samples import Sample
from megatron_m1.rl.schedule import PassRates
from megatron_m1.rl.step_journal import StepJournal
from megatron_m1.rl.tasks import TaskMix, prompt_id
from megatron_m1.rl.update import PolicyBatch, UpdateResult
from tests.e2e.pretrain_jobs import ROOT, environment
from tests.unit.rl.loop_cases import tiny_config

STEPS = 3
SAMPLES = 64
"""Of one generation batch: 8 prompts x 8."""


def supervised_start(
    rank: int, world: int, folder: Path, model: ModelConfig | None = None, precision: Literal["fp32", "bf16"] = "fp32"
) -> None:
    """folder/rl.yaml, folder/tokenizer and folder/start: a policy that has seen digits in rising and in falling order."""
    config = tiny_config(samples_per_prompt=8, updates_per_batch=4, held_out_prompts=9, reward_workers=1)
    config.model, config.training.precision = model or config.model, precision
    (folder / "text.txt").write_text("sort 123:123\n")
    train_tokenizer([str(folder / "text.txt")], folder / "tokenizer", vocab_size=257, globs=["*.txt"])
    config.data.tokenizer = str(folder / "tokenizer")
    config.logging.tensorboard = False
    to_yaml(config, folder / "rl.yaml")
    tokenizer, tasks = Tokenizer(folder / "tokenizer"), TaskMix(config.rl, seed=99)
    trainer = Trainer(config, init_groups(config.parallel, seed=3))
    for step in range(120):
        demonstrations = []
        for number in range(16 * step, 16 * step + 16):
            task = tasks.task(number)
            answer = task.task["answer"][:: 1 if number % 2 else -1]
            ids = (tuple(tokenizer.encode(task.prompt)), (*tokenizer.encode(answer), tokenizer.eod_id))
            demonstrations.append(Sample(number, number, "", task, *ids, [], "eos", answer))
        packs = pack_samples(demonstrations, range(16), rows=4, length=64)
        trainer.train_step([pack.batch for pack in packs], lr=1e-2 * (1 - step / 120))
    save_checkpoint(trainer, replace(config, checkpoint=CheckpointConfig(save=str(folder / "start"))), step=0)
    destroy_groups()


def rl_rank(rank: int, world: int, argv: list[str]) -> None:
    main(argv)


def weights(rank: int, world: int, config: Config, path: Path) -> dict[str, torch.Tensor]:
    trainer = Trainer(config, init_groups(config.parallel, seed=3))
    load_checkpoint(trainer, config, path=path, weights_only=True)
    found = {name: tensor.detach().clone() for name, tensor in trainer.parameters().items()}
    destroy_groups()
    return found


def options(folder: Path, run: str, *, resume: bool = False, **values: object) -> list[str]:
    load = {"load": folder / run / "save"} if resume else {"load": folder / "start", "weights_only": "true"}
    keys = {f"checkpoint.{key}": value for key, value in load.items()} | {
        "checkpoint.save": folder / run / "save",
        "checkpoint.every_steps": 1,
        "logging.dir": folder / run / "log",
        "rl.journal": folder / run / "journal",
        "training.steps": STEPS,
    }
    keys |= {key.replace("__", "."): value for key, value in values.items()}
    return [
        "--config",
        str(folder / "rl.yaml"),
        *(part for key, value in keys.items() for part in (f"--{key}", str(value))),
    ]


def metrics(folder: Path, run: str) -> dict[int, dict]:
    """By step, without times; the later line of a step counts."""
    entries = [json.loads(line) for line in (folder / run / "log/metrics.jsonl").read_text().splitlines()]
    return {
        entry["step"]: {k: v for k, v in entry.items() if not k.startswith(("seconds_", "idle_", "from_journal"))}
        for entry in entries
        if "step" in entry
    }


def held_out(folder: Path, run: str) -> dict[int, dict]:
    """Evaluations by the steps before them, without times."""
    entries = [json.loads(line) for line in (folder / run / "log/metrics.jsonl").read_text().splitlines()]
    return {
        entry["after_step"]: {k: v for k, v in entry.items() if k.startswith("held_out")}
        for entry in entries
        if entry.get("event") == "evaluation"
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, rank_pool) -> Path:
    folder = tmp_path_factory.mktemp("rl")
    rank_pool.run(supervised_start, (folder,), world=1, timeout_s=120)
    return folder


def test_held_out_reward_rises_on_two_data_parallel_ranks(folder, ranks):
    ranks(
        2,
        rl_rank,
        options(
            folder,
            "dp2",
            training__steps=10,
            checkpoint__every_steps=0,
            optimizer__lr=1e-3,
            schedule__kind="constant",
            rl__held_out_samples=32,
        ),
        timeout_s=120,
    )
    steps, evaluations = metrics(folder, "dp2"), held_out(folder, "dp2")
    assert evaluations.keys() == {0, 10}
    before, after = (evaluations[step]["held_out"] for step in (0, 10))
    # There are nine such prompts: their interval is wide, the mean of 32 samples of each is not.
    assert 0.1 < before["value"] < 0.6 and after["value"] > before["value"] + 0.1, (before, after)
    for step in steps.values():
        assert step["updates"] == 4 and step["first_is_weight"] == pytest.approx(1.0, abs=1e-12)
        assert step["first_off_policy_share"] == 0.0 < step["off_policy_share"]
        assert step["max_abs_diff"] < 1e-4 and step["pearson"] > 0.999999 and step["k3_kl"] < 1e-8
        assert 0 <= step["discard_rate"] < 1 and step["kept"] == SAMPLES and math.isfinite(step["grad_norm"])
    records = [r for path in (folder / "dp2/journal").glob("step_00000001.*") for r in read_journal(path)]
    samples, verdicts = ([r for r in records if ("verdict" in r) == judged] for judged in (False, True))
    assert len({r["number"] for r in samples}) == len(samples) == steps[1]["sampled"]
    assert sorted(r["verdict"] for r in verdicts) == sorted(r["number"] for r in samples)
    assert (folder / "dp2/log/rollouts/step_00000010.html").read_text().count('class="sample"') >= SAMPLES
    assert len(list((folder / "dp2/journal").glob("step_00000001.replica_*"))) == 2


def sampled(path: Path) -> list[dict]:
    """The records of samples of a journal."""
    return [record for record in read_journal(path) if "verdict" not in record]


SCHEDULED = {
    "training__steps": STEPS,
    "rl__engine": "reference",
    "rl__held_out_prompts": 0,
    "rl__updates_per_batch": 2,
    "rl__refills": 1,
    # Two batches of any lengths and perplexity move the window on: the third has the second one.
    "rl__max_new_tokens": 3,
    "rl__windows": [
        {"max_new_tokens": 2, "is_weight_cap": 2.0, "clip_grad": 0.5},
        {"max_new_tokens": 3, "is_weight_cap": 0.9},
    ],
    "rl__window_patience": 2,
    "rl__window_tolerance": 1e3,
    "rl__window_near_share": 1e-9,
    "rl__tasks": [{"kind": "sort", "size": 2}, {"kind": "sort", "size": 1}],
    "rl__curriculum": [{"step": 0, "weights": [1, 3]}, {"step": 2, "weights": [3, 1]}],
    "rl__easy_above": 0.3,
    "rl__hard_below": 0.05,
    "rl__pass_rate_attempts": 8,
}


@pytest.fixture(scope="module")
def whole(folder, rank_pool) -> dict[int, dict]:
    """Metrics of a run that nothing disturbs."""
    rank_pool.run(rl_rank, (options(folder, "whole", **SCHEDULED),), world=1, timeout_s=120)
    return metrics(folder, "whole")


def test_window_curriculum_and_filter_act_in_the_loop(folder, whole):
    assert [whole[step]["window"] for step in (1, 2, 3)] == [2, 2, 3] and whole[2]["next_window"] == 3
    samples = {step: sampled(folder / f"whole/journal/step_{step:08d}.replica_00000.jsonl") for step in (1, 2, 3)}
    assert {step: max(len(r["response"]) for r in samples[step]) for step in (1, 2, 3)} == {1: 2, 2: 2, 3: 3}
    rl = from_yaml(folder / "whole/log/config.yaml").rl
    tasks, replaced = TaskMix(rl, seed=3, prompts_per_step=8), 0
    rates = PassRates(easy_above=0.3, hard_below=0.05, min_attempts=8)
    for step, records in samples.items():
        groups: dict[int, list[dict]] = {}
        for record in records:
            groups.setdefault(record["group"], []).append(record)
        for group, members in groups.items():
            wanted = tasks.task(group, step=step - 1, wanted=lambda prompt: rates.wanted(prompt_id(prompt)))
            assert {r["task"]["prompt"] for r in members} == {wanted.prompt}
            replaced += wanted != tasks.task(group, step=step - 1)
        for members in groups.values():
            right = sum(r["text"].strip() == r["task"]["task"]["answer"] for r in members)
            rates.record(prompt_id(members[0]["task"]["prompt"]), right=right, attempts=len(members))
        assert rates.ruled_out() == whole[step]["prompts_ruled_out"]
    assert replaced > 0
    short = {s: sum(len(r["task"]["task"]["answer"]) == 1 for r in samples[s]) / len(samples[s]) for s in (1, 3)}
    assert short[3] < 0.5 < short[1]


def signalled(folder: Path, run: str, number: signal.Signals, *, step: int, samples: int, **values: object) -> str:
    """What the rl command prints until it ends on the signal, which it gets when so many samples of the step are on disk."""
    resume = (folder / run / "save/latest").exists()
    job = subprocess.Popen(
        [sys.executable, "-m", "megatron_m1", "rl", *options(folder, run, resume=resume, **values)],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    journal = folder / run / f"journal/step_{step:08d}.replica_00000.jsonl"
    try:
        deadline = time.monotonic() + 60
        while not journal.exists() or journal.read_bytes().count(b"\n") < samples:
            assert job.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        os.killpg(job.pid, number)
        said, _ = job.communicate(timeout=60)
    finally:
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)
            job.wait()
    assert job.returncode == (0 if number == signal.SIGTERM else -number)
    return said


def test_a_run_that_is_ended_goes_on_with_the_same_bits(folder, whole, ranks):
    """SIGTERM in the middle of the samples of step 2, where it saves what step 1 left; kill -9 in those of step 3."""
    journals = [folder / f"ended/journal/step_{step:08d}.replica_00000.jsonl" for step in (2, 3)]
    before = {}
    said = signalled(folder, "ended", signal.SIGTERM, step=2, samples=10, **SCHEDULED | {"checkpoint__every_steps": 0})
    assert "stopping in step 2, whose finished samples are in the journal: SIGTERM" in said
    assert (folder / "ended/save/latest").read_text().strip() == "step_00000001"
    before[2] = {r["number"] for r in sampled(journals[0])}
    said = signalled(folder, "ended", signal.SIGKILL, step=3, samples=10, **SCHEDULED)
    assert "window of 3 tokens from step 3 on" in said and "warning: is_weight_cap=0.9 is below 1" in said
    assert (folder / "ended/save/latest").read_text().strip() == "step_00000002"
    before[3] = {r["number"] for r in sampled(journals[1])}
    ranks(1, rl_rank, options(folder, "ended", resume=True, **SCHEDULED), timeout_s=120)
    for step, journal in zip((2, 3), journals, strict=True):
        after = [r["number"] for r in sampled(journal)]
        assert len(after) == len(set(after)) == whole[step]["sampled"]  # none was generated twice
        assert len(before[step]) >= 10 and before[step] < set(after)
    assert whole == metrics(folder, "ended")
    for step in whole.values():
        assert step["first_off_policy_share"] == step["max_abs_diff"] == step["not_bit_equal_share"] == 0.0
    config = from_yaml(folder / "rl.yaml")
    (a,), (b,) = (ranks(1, weights, config, folder / run / "save" / f"step_{STEPS:08d}") for run in ("whole", "ended"))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def dies_between_updates(rank: int, world: int, argv: list[str]) -> None:
    """As if killed after the first update of the batch: nothing is saved from then on."""
    first = PolicyBatch.update

    def update(self: PolicyBatch, number: int, *, lr: float) -> UpdateResult:
        if number == 1:
            raise KeyboardInterrupt
        return first(self, number, lr=lr)

    with mock.patch.object(PolicyBatch, "update", update), pytest.raises(KeyboardInterrupt):
        main(argv)
    destroy_groups()


def judges_nothing(rank: int, world: int, argv: list[str]) -> None:
    """The rl command with verifiers that would now say something else."""

    def score(self: RewardPool, requests: list[RewardRequest]) -> list[RewardResult]:
        return [RewardResult(Score(0.5), None, 0.0) for _ in requests]

    with mock.patch.object(RewardPool, "score", score):
        main(argv)


def test_a_run_that_dies_between_two_updates_goes_on_with_the_same_bits(folder, whole, ranks):
    run = folder / "died"
    shutil.copytree(folder / "whole", run)
    (run / "save/latest").write_text("step_00000002\n")
    shutil.rmtree(run / "save/step_00000003")
    (run / "journal/step_00000003.replica_00000.jsonl").unlink()
    (run / "log/metrics.jsonl").unlink()
    ranks(1, dies_between_updates, options(folder, "died", resume=True, **SCHEDULED), timeout_s=120)
    assert metrics(folder, "died") == {} and not (run / "save/step_00000003").exists()
    ranks(1, judges_nothing, options(folder, "died", resume=True, **SCHEDULED), timeout_s=120)
    assert metrics(folder, "died") == {3: whole[3]}
    last = [json.loads(line) for line in (run / "log/metrics.jsonl").read_text().splitlines()][-1]
    assert last["from_journal"] == whole[3]["sampled"]


KILLED = """
import os, signal, sys
from megatron_m1.rl.step_journal import StepJournal

add, left = StepJournal.add_sample, [int(sys.argv[1])]

def counted(self, sample):
    add(self, sample)
    left[0] -= self.weights.startswith("1-")  # those of the second step
    if not left[0]:
        os.kill(os.getpid(), signal.SIGKILL)

StepJournal.add_sample = counted
from megatron_m1.rl.loop import main
main(sys.argv[2:])
"""
FAST = {
    "training__steps": 2,
    "rl__updates_per_batch": 2,
    "rl__held_out_prompts": 0,
    "rl__refills": 1,
    "rl__slots": 8,
    "rl__pages": "false",
}


def killed(folder: Path, run: str, *, world: int, samples: int, **values: object) -> None:
    """A run whose ranks each die of SIGKILL when they have so many samples of the second step."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        job = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    argv = [sys.executable, "-c", KILLED, str(samples), *options(folder, run, **values)]
    started = [
        subprocess.Popen(argv, cwd=ROOT, env=environment() | job | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(world)
    ]
    try:
        codes = [rank.wait(timeout=120) for rank in started]
    finally:
        for rank in started:
            rank.kill()
            rank.wait()
    assert codes == [-signal.SIGKILL] * world


@pytest.mark.parametrize("world", [1, 2], ids=["one rank", "DP2"])
def test_the_fast_engine_goes_on_with_the_same_bits(folder, ranks, world):
    """Finished samples leave other ones for each pass of the resumed run, and for each replica."""
    runs = f"fast{world}", f"killed{world}"
    ranks(world, rl_rank, options(folder, runs[0], **FAST), timeout_s=120)
    killed(folder, runs[1], world=world, samples=9, **FAST)
    assert (folder / runs[1] / "save/latest").read_text().strip() == "step_00000001"
    ranks(world, rl_rank, options(folder, runs[1], resume=True, **FAST), timeout_s=120)
    whole, resumed = (metrics(folder, run) for run in runs)
    assert whole == resumed and whole[2]["updates"] == 2 and whole[2]["off_policy_share"] > 0
    lines = (folder / runs[1] / "log/metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["from_journal"] == 9 * world < whole[2]["sampled"]
    config = from_yaml(folder / "rl.yaml")
    (a,), (b,) = (ranks(1, weights, config, folder / run / "save/step_00000002") for run in runs)
    assert all(torch.equal(a[name], b[name]) for name in a)


EVALUATED = {
    "training__steps": 2,
    "rl__updates_per_batch": 1,
    "training__global_batch": 32,
    "rl__refills": 0,
    "rl__held_out_prompts": 8,
    "rl__held_out_every_steps": 1,
    "rl__pages": "false",
    "checkpoint__every_steps": 0,
}


def disturbed_evaluation(rank: int, world: int, argv: list[str], number: signal.Signals | None) -> None:
    """The rl command that gets the signal, or without one dies, when it has 5 samples of the evaluation after step 1."""
    add, kept = StepJournal.add_sample, []

    def counted(self: StepJournal, sample: Sample) -> None:
        add(self, sample)
        if self.weights.startswith("1-") and sample.task.prompt in held_out_prompts:
            kept.append(sample)
        if len(kept) == 5 and number is None:
            raise KeyboardInterrupt
        if len(kept) == 5:
            signal.raise_signal(number)

    config = load_config(argv)
    tasks = TaskMix(config.rl, seed=config.training.seed)
    held_out_prompts = {tasks.task(n, held_out=True).prompt for n in range(config.rl.held_out_prompts)}
    died = contextlib.nullcontext() if number else pytest.raises(KeyboardInterrupt)
    with mock.patch.object(StepJournal, "add_sample", counted), died:
        main(argv)
    assert len(kept) == 5
    if number is None:
        destroy_groups()


def counts_held_out_samples(rank: int, world: int, argv: list[str]) -> int:
    """Samples that the rl command, asked for no further step, generates."""
    add, kept = StepJournal.add_sample, []

    def counted(self: StepJournal, sample: Sample) -> None:
        add(self, sample)
        kept.append(sample)

    with mock.patch.object(StepJournal, "add_sample", counted):
        main(argv)
    return len(kept)


@pytest.mark.parametrize("number", [signal.SIGTERM, None], ids=["SIGTERM", "death"])
def test_an_evaluation_that_is_ended_costs_no_update_and_is_finished(folder, ranks, number):
    run = "evaluation_" + ("signal" if number else "death")
    # A death leaves what was saved before: so save after every step.
    values = EVALUATED | ({} if number else {"checkpoint__every_steps": 1})
    ranks(1, disturbed_evaluation, options(folder, run, **values), number, timeout_s=120)
    assert held_out(folder, run).keys() == {0} and metrics(folder, run).keys() == {1}
    assert (folder / run / "save/latest").read_text().strip() == "step_00000001"
    one = values | {"training__steps": 1}
    assert ranks(1, counts_held_out_samples, options(folder, run, resume=True, **one), timeout_s=120) == [8 * 4 - 5]
    first = held_out(folder, run)
    assert first.keys() == {0, 1}
    # What is finished is not done again, only told again.
    assert ranks(1, counts_held_out_samples, options(folder, run, resume=True, **one), timeout_s=120) == [0]
    assert held_out(folder, run) == first
    if number:
        ranks(1, rl_rank, options(folder, "evaluated", **one), timeout_s=120)
        assert held_out(folder, "evaluated") == first


def broken_journal(rank: int, world: int, argv: list[str], how: str) -> str:
    """The message that the rl command ends with where the second rank's disk is full, or the journals are as they are."""
    append, kept = Journal.append, []

    def full(self: Journal, record: dict) -> None:
        kept.append(record)
        if how == "full" and rank == 1 and len(kept) > 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        append(self, record)

    with mock.patch.object(Journal, "append", full), pytest.raises(ConfigError) as error:
        main(argv)
    destroy_groups()
    return str(error.value)


@pytest.mark.parametrize(
    "how, message",
    [
        ("full", r"rl\.journal: .*replica_00001.jsonl cannot be used: No space left on device; make room"),
        ("locked", r"rl\.journal: another run writes to .*replica_00001.jsonl; end that run"),
        ("damaged", r"rl\.journal: .*replica_00001.jsonl: record 0 .* is damaged .* move it away"),
    ],
)
def test_a_journal_that_fails_on_one_rank_ends_all_with_one_message(folder, ranks, how, message):
    values = EVALUATED | {"rl__held_out_prompts": 0}
    path = folder / f"journal_{how}/journal/step_00000001.replica_00001.jsonl"
    path.parent.mkdir(parents=True)
    with contextlib.ExitStack() as held:
        if how != "full":
            journal = held.enter_context(Journal(path))
            for number in range(2):
                journal.append({"number": number, "weights": "none"})
        if how == "damaged":
            journal.close()
            path.write_bytes(path.read_bytes().replace(b'"number":0', b'"number":7'))
        told = ranks(2, broken_journal, options(folder, f"journal_{how}", **values), how, timeout_s=120)
    assert len(set(told)) == 1 and re.search(message, told[0]), told


def judges_slowly(rank: int, world: int, argv: list[str]) -> None:
    score = RewardPool.score

    def late(self: RewardPool, requests: list[RewardRequest]) -> list[RewardResult]:
        if rank == 1:
            time.sleep(2.0)
        return score(self, requests)

    with mock.patch.object(RewardPool, "score", late):
        main(argv)


def test_who_waits_for_a_slow_verifier_is_idle(folder, ranks):
    ranks(2, judges_slowly, options(folder, "slow", **EVALUATED | {"rl__held_out_prompts": 0, "training__steps": 1}))
    (line,) = [json.loads(x) for x in (folder / "slow/log/metrics.jsonl").read_text().splitlines() if '"step"' in x]
    # Means of two ranks, of which one is late by 2 s and the other waits so long.
    assert 1.0 <= line["seconds_reward"] < 1.6 and line["seconds_idle"] > 0.8
    assert line["idle_share"] == pytest.approx(
        line["seconds_idle"] / sum(value for key, value in line.items() if key.startswith("seconds_"))
    )


@pytest.mark.parametrize("rule", ["score", "drop"])
def test_repetitive_responses_end_early_and_count_as_they_are_said_to(folder, ranks, rule):
    """Any two tokens in a row are a repetition."""
    stop = {"rl__repetition_tokens": 2, "rl__repetition_probability": 1e-9, "rl__repetitive": rule}
    values = EVALUATED | {"training__steps": 1, "rl__held_out_prompts": 0, "rl__dynamic_sampling": "false"} | stop
    ranks(1, rl_rank, options(folder, f"repetitive_{rule}", **values), timeout_s=120)
    (step,) = metrics(folder, f"repetitive_{rule}").values()
    records = sampled(folder / f"repetitive_{rule}/journal/step_00000001.replica_00000.jsonl")
    stopped = sum(record["finish_reason"] == "stop_repetition" for record in records)
    assert stopped > 20 and max(len(record["response"]) for record in records) == 2
    assert step["repetitive_share"] == stopped / 32 and step["truncated_share"] == 0
    assert step["kept"] == (32 if rule == "score" else 32 - stopped)


def test_old_journals_go_with_the_checkpoints_that_need_them(folder, ranks):
    values = EVALUATED | {"training__steps": 3, "checkpoint__every_steps": 1, "checkpoint__keep": 1}
    ranks(1, rl_rank, options(folder, "pruned", **values), timeout_s=120)
    left = sorted(path.name.split(".")[0] for path in (folder / "pruned/journal").iterdir())
    assert left == ["held_out_00000003"]


def rl_rank_in_a_terminal(rank: int, world: int, argv: list[str]) -> str:
    """What the rl command shows on a terminal of 120 columns."""
    reader, writer = pty.openpty()
    shown: list[bytes] = []

    def read() -> None:
        with contextlib.suppress(OSError):  # EIO: nothing more will come
            while chunk := os.read(reader, 1 << 16):
                shown.append(chunk)

    thread = threading.Thread(target=read)
    thread.start()
    wide = mock.patch.dict(os.environ, {"TERM": "xterm", "COLUMNS": "120"})
    with wide, os.fdopen(writer, "w") as terminal, mock.patch.object(sys, "stdout", terminal):
        main(argv)
    thread.join()
    os.close(reader)
    return b"".join(shown).decode()


def test_batches_in_which_nothing_differs_update_nothing(folder, ranks):
    """Answers nobody gives: all prompts are sampled again as often as allowed, logged and left out."""
    for name in ("train", "held_out"):
        lines = [{"prompt": f"{name} {n}", "reward": "exact", "task": {"answer": "none"}} for n in range(8)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    source = {"kind": "file", "path": f"{folder}/train.jsonl", "held_out_path": f"{folder}/held_out.jsonl"}
    run = options(folder, "equal", rl__tasks=[source], training__steps=2, rl__refills=1, rl__held_out_prompts=4)
    (shown,) = ranks(1, rl_rank_in_a_terminal, run, timeout_s=120)
    assert "reward 0.0000" in shown and shown.count("no update") == 2 and "2/2" in shown
    for step in metrics(folder, "equal").values():
        assert step["sampled"] == 2 * SAMPLES and step["discard_rate"] == 1.0 and step["kept"] == 0 == step["reward"]
        assert "loss" not in step and "grad_norm" not in step
    assert (folder / "equal/log/rollouts/step_00000002.html").read_text().count("not trained on") > 0
    config = from_yaml(folder / "rl.yaml")
    paths = (folder / "start/step_00000000", folder / "equal/save/step_00000002")
    (a,), (b,) = (ranks(1, weights, config, path) for path in paths)
    assert all(torch.equal(a[name], b[name]) for name in a)


ONE_STEP = {
    "training__steps": 1,
    "rl__updates_per_batch": 1,
    "training__global_batch": 32,
    "rl__refills": 1,
    "rl__held_out_prompts": 8,
    "rl__pages": "false",
    "checkpoint__save": "null",
    "checkpoint__every_steps": 0,
}


def one_step(folder: Path, run: str) -> tuple[dict[int, tuple], dict]:
    """(samples by number, metrics) of a run of ONE_STEP."""
    samples = {
        r["number"]: (r["prompt"], r["response"], r["finish_reason"])
        for path in (folder / run / "journal").glob("step_00000001.*")
        for r in sampled(path)
    }
    return samples, metrics(folder, run)[1] | held_out(folder, run)[1]


@pytest.fixture(scope="module")
def alone(folder, rank_pool) -> tuple[dict[int, tuple], dict]:
    """The step on one rank."""
    rank_pool.run(rl_rank, (options(folder, "alone", **ONE_STEP),), world=1, timeout_s=120)
    return one_step(folder, "alone")


@pytest.mark.parametrize(
    "world, parallel",
    [(2, {}), (2, {"tensor": 2}), (2, {"pipeline": 2}), (2, {"expert": 2}), (2, {"context": 2})],
    ids=["DP2", "TP2", "PP2", "EP2", "CP2"],
)
def test_a_step_is_that_of_one_rank(folder, alone, ranks, request, world, parallel):
    run = request.node.callspec.id
    layout = {f"parallel__{key}": value for key, value in parallel.items()}
    ranks(world, rl_rank, options(folder, run, **ONE_STEP, **layout), timeout_s=120)
    (samples, found), (expected, figures) = one_step(folder, run), alone
    assert samples == expected and len(samples) == figures["sampled"] >= 32
    for key in ("reward", "kept", "sampled", "discard_rate", "held_out", "held_out_pass@4", "loss_tokens"):
        assert found[key] == figures[key], key
    for key in ("loss", "grad_norm", "perplexity"):
        assert found[key] == pytest.approx(figures[key], rel=1e-5, abs=1e-6), key
