"""The presets and the scripts under examples/, tools/ and tests/."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_m1.config import from_yaml, load_config, validate
from megatron_m1.config.layout import head_chunk_tokens
from megatron_m1.engine.cluster import DEVICES
from megatron_m1.engine.context_exchange import key_value_exchange, state_exchange
from megatron_m1.engine.schedule import consumed_samples, learning_rate
from megatron_m1.engine.step_time import step_time
from megatron_m1.generation.blocks import blocks_for
from megatron_m1.generation.cache import HybridCache
from megatron_m1.rl.dry_run import rollout_memory

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "examples" / "configs"
SCRIPTS = sorted(
    [*ROOT.glob("examples/*.sh"), *ROOT.glob("examples/slurm/*"), *ROOT.glob("tools/*.sh"), ROOT / "tests/run.sh"]
)


def run(command, **environment):
    environment = {"PYTHON": sys.executable, **environment}
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("SLURM_")}
    return subprocess.run(command, cwd=ROOT, env=inherited | environment, capture_output=True, text=True, timeout=200)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_is_silent(script):
    shellcheck = Path(sys.executable).with_name("shellcheck")
    done = run([str(shellcheck), "-x", str(script)])
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("nodes", [32, 64])
@pytest.mark.parametrize("stage", ["pretrain", "continual"])
@pytest.mark.parametrize("launcher", ["torchrun", "slurm"])
def test_456b_dry_run_on_256_and_512_gpus(launcher, stage, nodes, tmp_path):
    script = "examples/pretrain_456b.sh" if launcher == "torchrun" else f"examples/slurm/{stage}_456b.sbatch"
    sizes = {"NNODES": str(nodes)} if launcher == "torchrun" else {"NODES": str(nodes)}
    done = run(["bash", script], DRY_RUN="1", STAGE=stage, RUN=str(tmp_path / "run"), **sizes)
    assert done.returncode == 0, done.stderr
    command, report = done.stdout.split("\n", 1)
    assert "-m megatron_m1 pretrain --config examples/configs/m1_456b.yaml" in command
    assert (f"--nnodes {nodes} " in command) if launcher == "torchrun" else (f"srun --nodes {nodes} " in command)
    assert ("--checkpoint.weights_only true" in command) == (stage == "continual")
    assert "456,089,655,296" in report and f"layout of {nodes * 8} ranks" in report
    assert f"data           size {nodes // 8:4d} " in report and "expert_tensor  size    1" in report
    assert report.endswith("dry run: the configuration is valid\n")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("stage, micro_batches", [("pretrain", 512), ("continual", 512)])
def test_456b_presets_are_complete_without_a_script(stage, micro_batches):
    configs = ["--config", "examples/configs/m1_456b.yaml", "--config", f"examples/configs/m1_456b_{stage}.yaml"]
    done = run([sys.executable, "-m", "megatron_m1", "pretrain", *configs, "--dry-run", "--world-size", "512"])
    assert done.returncode == 0, done.stderr
    assert f"save: runs/m1_456b_{stage}/checkpoints" in done.stdout and f"dir: runs/m1_456b_{stage}/logs" in done.stdout
    assert f"sums up to {micro_batches} micro-batches" in done.stdout


@pytest.mark.parametrize(
    "launcher, nodes, length, tokens, theta, context",
    [
        ("slurm", 32, "32k", 2**15, "1000000.0", 1),
        ("torchrun", 64, "128k", 2**17, "5000000.0", 8),
        ("slurm", 32, "512k", 2**19, "10000000.0", 16),
        ("torchrun", 32, "1m", 2**20, "10000000.0", 32),
        ("slurm", 64, "1m", 2**20, "10000000.0", 32),
    ],
)
def test_456b_context_stages_dry_run(launcher, nodes, length, tokens, theta, context, tmp_path):
    script = "examples/pretrain_456b.sh" if launcher == "torchrun" else "examples/slurm/context_456b.sbatch"
    environment = {"DRY_RUN": "1", "STAGE": f"context_{length}", "RUN": str(tmp_path / "run")}
    done = run(["bash", script], **environment, NODES=str(nodes), NNODES=str(nodes))
    assert done.returncode == 0, done.stderr
    command, report = done.stdout.split("\n", 1)
    layout = f"--config examples/configs/m1_456b_{length}_{nodes * 8}gpu.yaml"
    assert f"--config examples/configs/m1_456b.yaml {layout} " in command
    before = {"32k": "pretrain", "128k": "context_32k", "512k": "context_128k", "1m": "context_512k"}[length]
    assert f"--checkpoint.load runs/m1_456b_{before}/checkpoints --checkpoint.weights_only true" in command
    assert f"rope_theta: {theta}" in report and f"seq_length: {tokens}\n" in report
    assert f"context        size {context:4d} " in report and "456,089,655,296" in report
    assert "134,217,728 tokens and " in report and "\n== warnings" not in report


STAGES = ("pretrain", "continual", "context_32k", "context_128k", "context_512k", "context_1m")


def stage_config(stage, gpus):
    """What the launchers take for a stage, by the rules of stages_456b.sh."""
    script = 'source examples/stages_456b.sh; printf "%s\\n" "${CONFIG_ARGS[@]}"'
    done = run(["bash", "-c", f"set -eu; {script}"], STAGE=stage, WORLD_SIZE=str(gpus))
    assert done.returncode == 0, done.stderr
    return load_config(done.stdout.split())


def longest_step_s(config, gpus):
    """Estimated, of the largest batch of the ramp."""
    batch = max([config.training.global_batch, *(stage.global_batch for stage in config.training.batch_ramp)])
    largest = replace(config, training=replace(config.training, global_batch=batch))
    return step_time(largest, replace(DEVICES["H800"], gpus=gpus)).total


@pytest.mark.parametrize("gpus", [256, 512])
@pytest.mark.parametrize("stage", STAGES)
def test_456b_jobs_save_before_their_time_is_up(stage, gpus):
    """A job that is asked to end does so after its step: the signal comes early enough for one and for the checkpoint, and what a job
    that dies can lose is less than a quarter of a day."""
    config = stage_config(stage, gpus)
    script = (ROOT / f"examples/slurm/{stage.partition('_')[0]}_456b.sbatch").read_text()
    lead, requeue = (
        int(re.search(pattern, script).group(1)) for pattern in (r"--signal=B:USR1@(\d+)", r"REQUEUE_AFTER_S:-(\d+)")
    )
    step = longest_step_s(config, gpus)
    assert 1.5 * step < requeue < lead
    assert 0 < config.checkpoint.every_steps * step < 6 * 3600 and config.checkpoint.keep > 1


def test_torchrun_waits_for_the_longest_step(tmp_path):
    """With a stand-in for Python that has the option."""
    log, python = tmp_path / "log", tmp_path / "python"
    python.write_text(
        f'#!/usr/bin/env bash\necho "$*" >> {log}\n[[ "$*" == *--help ]] && echo --shutdown-timeout\nexit 0\n'
    )
    python.chmod(0o755)
    done = run(["bash", "examples/pretrain_456b.sh"], PYTHON=str(python), RUN=str(tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    timeout = int(re.search(r"--shutdown-timeout (\d+)", log.read_text()).group(1))
    assert timeout > 1.5 * max(longest_step_s(stage_config(stage, 256), 256) for stage in STAGES)


def test_456b_rl_dry_run_on_512_gpus(tmp_path):
    done = run(["bash", "examples/slurm/rl_456b.sbatch"], DRY_RUN="1", RUN=str(tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    command, report = done.stdout.split("\n", 1)
    assert "srun --nodes 64 " in command and "-m megatron_m1 rl --config examples/configs/m1_456b.yaml" in command
    assert f"--rl.journal {tmp_path}/run/journal" in command and "--data.train" not in command
    assert "1000 batches of 512 prompts x 16 samples, 16 updates of 512 samples each" in report
    assert "output windows 40000, 48000, 56000, 64000, 72000, 80000" in report and "eps: 1.0e-15" in report
    assert "32 replicas of 16 ranks generate 256 samples each, 48 at a time" in report
    totals = [float(line.split()[6]) for line in report.split("== memory of rollouts")[1].splitlines()[2:4]]
    assert all(50 < total < 74 for total in totals)  # of 80, beside 3 to 6 that are not counted
    assert report.endswith("dry run: the configuration is valid\n")
    assert not (tmp_path / "run").exists()


def test_rollout_memory_is_that_of_the_cache():
    """One pipeline stage of the engine's cache, allocated; the formula is for any shape."""
    config = from_yaml(CONFIGS / "rl_tiny_cpu.yaml")
    config.rl.slots = 5
    (memory,) = rollout_memory(config, 1)
    model, length = config.model, config.training.seq_length
    cache = HybridCache(
        dict(enumerate(model.layer_types(), start=1)),
        slots=5,
        blocks=5 * blocks_for(length) + 1,
        longest=length,
        heads=model.num_attention_heads,
        groups=model.num_key_value_heads,
        head_dim=model.head_dim,
        dtype=torch.float32,
        device=torch.device("cpu"),
        on_device=False,
    )
    states, keys, values = (
        sum(tensor.numel() * tensor.element_size() for tensor in store.values())
        for store in (cache._states, cache._keys, cache._values)
    )
    assert memory.states == states + memory.slot and memory.slot * 5 == states
    assert memory.blocks == keys + values and memory.total > memory.weights + memory.training + states + keys + values


def test_456b_context_stages_follow_the_reports_tokens():
    for length, tokens in (("128k", 300e9), ("512k", 32e9), ("1m", 26e9)):
        stage = from_yaml(CONFIGS / f"m1_456b_context_{length}.yaml")
        training = stage.training
        assert training.steps * training.global_batch * training.seq_length == pytest.approx(tokens, rel=3e-3)


def test_dry_run_refuses_a_world_that_does_not_divide():
    done = run(["bash", "examples/pretrain_456b.sh"], DRY_RUN="1", NNODES="3")
    assert done.returncode == 2
    assert "world_size=24 must be a multiple of parallel.tensor*pipeline*context=8*8*1=64; start 64" in done.stderr
    assert run(["bash", "examples/pretrain_456b.sh"], STAGE="sft", DRY_RUN="1").returncode == 2
    done = run(["bash", "examples/pretrain_456b.sh"], DRY_RUN="1", NNODES="48", STAGE="context_1m")
    assert done.returncode == 2 and "LAYOUT=1m_384gpu has no examples/configs/m1_456b_1m_384gpu.yaml" in done.stderr


def test_a_started_run_is_resumed_and_not_started_again(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "latest").write_text("step_00000250")
    for script in ("examples/pretrain_456b.sh", "examples/slurm/continual_456b.sbatch"):
        done = run(["bash", script], DRY_RUN="1", RUN=str(tmp_path), LOAD="weights")
        assert done.returncode == 0, done.stderr
        assert f"--checkpoint.load {tmp_path}/checkpoints" in done.stdout
        assert "weights_only true" not in done.stdout


def test_acceptance_dry_run_validates_every_layout():
    done = run(["bash", "examples/acceptance_8gpu.sh"], DRY_RUN="1", NNODES="8", RUN="out")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("dry run: the configuration is valid") == 13
    assert done.stdout.count("layout of 64 ranks") == 13
    assert re.findall(r"context +size +(\d+)", done.stdout) == [*"111111", "8", "2", *"1111", "8"]
    layouts, resumed = re.findall(r"tools/compare_runs\.py .*", done.stdout)
    others = "tp8 ep8 pp4_vpp2 tp2_pp2_ep4 pp2_ep2_etp2 cp8 cp2_tp2_ep4".split()
    assert layouts.split()[5:] == [f"out/{name}" for name in ("dp", *others)]
    assert resumed.split()[-3:] == ["out/resumed_same", "out/resumed_ep8", "out/resumed_cp8"]


def test_acceptance_goes_on_after_a_failed_comparison_and_fails_at_the_end(tmp_path):
    """With a stand-in for Python whose first comparison fails: no node leaves the others waiting for its next run."""
    log, python = tmp_path / "log", tmp_path / "python"
    python.write_text(
        f'#!/usr/bin/env bash\necho "$CUDA_DEVICE_MAX_CONNECTIONS $*" >> {log}\n'
        '[[ "$*" == *compare_runs*--band* ]] && exit 1\nexit 0\n'
    )
    python.chmod(0o755)
    launches = []
    for node, code in (("0", 1), ("1", 0)):
        log.write_text("")
        environment = {"PYTHON": str(python), "NNODES": "2", "NODE_RANK": node, "RUN": str(tmp_path / "run")}
        done = run(["bash", "examples/acceptance_8gpu.sh"], **environment)
        assert done.returncode == code, done.stderr
        assert (done.stderr == "failed: layouts\n") == (node == "0")
        lines = log.read_text().splitlines()
        assert all(line.startswith("1 ") for line in lines)
        assert ("megatron_m1 equality" in lines[-1]) == (node == "0")
        launches.append(sum("torch.distributed.run" in line for line in lines))
    assert launches == [13, 13]


@pytest.mark.parametrize("case", ["pretrain", "rl", "context in a long step", "rl in a long batch"])
def test_slurm_job_saves_and_queues_itself_again(case, tmp_path):
    """With stand-ins for srun and scontrol: USR1 reaches the rank as SIGTERM, and the job is queued once it has saved, or shortly before
    its time is up."""
    stage, saves = case.split()[0], "long" not in case
    log = tmp_path / "log"
    stand_ins = {
        # srun runs one task and, as the real one does, forwards SIGTERM to it.
        "srun": f'echo "srun $*" >> {log}\nwhile [[ "$1" != bash ]]; do shift; done\n'
        'export SLURM_PROCID=7 SLURM_LOCALID=3\n"$@" & task=$!\ntrap \'kill -TERM "$task"\' TERM\n'
        'wait "$task"; wait "$task"\n',
        "scontrol": f'echo "scontrol $*" >> {log}\n[[ "$1" == show ]] && echo node0 || true\n',
        "python": f'echo "rank $RANK local $LOCAL_RANK of $WORLD_SIZE at $MASTER_ADDR: $*" >> {log}\n'
        f"trap '{f'echo saved >> {log}; exit 0' if saves else f'echo asked >> {log}'}' TERM\nwhile true; do sleep 0.1; done\n",
    }
    for name, body in stand_ins.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{body}")
        (tmp_path / name).chmod(0o755)
    environment = os.environ | {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "PYTHON": str(tmp_path / "python"),
        "RUN": str(tmp_path / "run"),
        "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_JOB_ID": "42",
        "SLURM_JOB_NUM_NODES": "32",
        "SLURM_JOB_NODELIST": "node[0-31]",
        "REQUEUE_AFTER_S": "2" if saves else "0.2",
    }
    script = ROOT / f"examples/slurm/{stage}_456b.sbatch"
    job = subprocess.Popen(["bash", str(script)], env=environment, start_new_session=True)
    try:
        wait_for(log, "rank 7")
        job.send_signal(signal.SIGUSR1)
        if saves:
            assert job.wait(timeout=30) == 0
        else:
            wait_for(log, "scontrol requeue 42")
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(job.pid, signal.SIGKILL)
        job.wait()
    text, command = log.read_text(), "rl" if stage == "rl" else "pretrain"
    assert f"rank 7 local 3 of 256 at node0: -m megatron_m1 {command} --config examples/configs/m1_456b.yaml" in text
    assert text.index("saved" if saves else "asked") < text.index("scontrol requeue 42")
    assert text.count("scontrol requeue 42") == 1


def wait_for(log, word):
    deadline = time.monotonic() + 30
    while not (log.exists() and word in log.read_text()):
        assert time.monotonic() < deadline, f"{word} never appeared in {log}"
        time.sleep(0.05)


@pytest.mark.parametrize("name, world_size", [("tiny_cpu", 1), ("tiny_cpu", 4), ("single_gpu", 1), ("acceptance", 8)])
def test_presets_are_valid(name, world_size):
    validate(from_yaml(CONFIGS / f"{name}.yaml"), world_size)


# What the twin has smaller than the preset: on or off (group sizes: above 1 or not) as there.
SIZES = (
    "model.vocab_size model.hidden_size model.num_hidden_layers model.num_attention_heads model.num_key_value_heads model.head_dim "
    "model.intermediate_size model.num_local_experts model.rotary_dim parallel.pipeline parallel.last_stage_layers parallel.context "
    "parallel.expert parallel.timeout_s training.steps training.global_batch training.seq_length optimizer.lr schedule.warmup_steps "
    "data.num_workers evaluation.every_steps checkpoint.save checkpoint.every_steps checkpoint.keep logging.dir "
    "logging.layer_stats_every_steps"
).split()
# What it has otherwise: bf16 would be slow; eight processes would be many; its data are drawn.
OTHERWISE = (
    "model.attn_type_list parallel.tensor parallel.sequence training.precision training.head_chunk_tokens "
    "data.train data.valid data.tokenizer data.mock"
).split()
# `auto` in the preset, by name in the twin, whose sizes would resolve it otherwise: compared by what is chosen.
RESOLVED = ["parallel.context_lightning", "parallel.context_softmax"]


def chosen_methods(config):
    """How states travel, how keys and values, and whether the head's logits are computed in chunks."""
    chunked = head_chunk_tokens(config) < config.training.seq_length // config.parallel.context
    return state_exchange(config).method, key_value_exchange(config).method, chunked


def test_the_twin_of_the_million_token_preset_turns_the_same_switches():
    preset = stage_config("context_1m", 512)
    twin = load_config(
        [part for name in ("tiny_cpu", "tiny_cpu_1m") for part in ("--config", f"{CONFIGS}/{name}.yaml")]
    )
    assert chosen_methods(preset) == chosen_methods(twin) == ("all_gather", "ring", True)
    assert (preset.training.precision, twin.training.precision) == ("bf16", "fp32")
    assert set(preset.model.layer_types()) == set(twin.model.layer_types()) == {0, 1}
    differing = []
    for section in vars(preset):
        for name, value in vars(getattr(preset, section)).items():
            key, ours = f"{section}.{name}", getattr(getattr(twin, section), name)
            if key in SIZES:
                off = 1 if section == "parallel" else 0
                same = (value in (off, None)) == (ours in (off, None))
            else:
                same = value == ours
            if not same:
                differing.append(key)
    assert sorted(differing) == sorted([*OTHERWISE, *RESOLVED])
    validate(twin, 4)
    twin.parallel.tensor, twin.parallel.sequence = 2, True
    validate(twin, 8)


def test_tiny_cpu_is_what_scripts_rely_on():
    config = from_yaml(CONFIGS / "tiny_cpu.yaml")
    parallel, model = config.parallel, config.model
    assert config.training.precision == "fp32" and config.training.global_batch % 4 == 0
    assert config.schedule.warmup_steps <= 1
    assert [parallel.tensor, parallel.pipeline, parallel.virtual_pipeline] == [1, 1, 1]
    assert [parallel.context, parallel.expert, parallel.expert_tensor] == [1, 1, 1]
    assert model.layer_types() == [0, 0, 0, 0, 0, 0, 0, 1]
    assert (model.num_experts_per_tok, model.num_local_experts) == (2, 8)
    alphas = {model.layernorm_linear_attention_alpha, model.layernorm_full_attention_alpha, model.layernorm_mlp_alpha}
    assert alphas == {(2 * 80) ** 0.25}
    for layout in ("tensor=2", "pipeline=2 virtual_pipeline=2", "expert=2", "tensor=2 expert_tensor=2"):
        options = [f"--parallel.{size}" for size in layout.split()]
        validate(load_config(["--config", str(CONFIGS / "tiny_cpu.yaml"), *options]), 4)


def test_456b_stages_follow_the_reports_tokens():
    length = 32768
    pretrain, continual = (
        load_config(["--config", str(CONFIGS / "m1_456b.yaml"), "--config", str(CONFIGS / f"m1_456b_{stage}.yaml")])
        for stage in ("pretrain", "continual")
    )
    starts = [stage.from_step for stage in pretrain.training.batch_ramp]
    tokens = [consumed_samples(step, pretrain.training) * length for step in starts]
    assert tokens == pytest.approx([69e9, 790e9, 4.7e12], rel=1e-3)

    schedule, steps = continual.schedule, continual.training.steps
    assert consumed_samples(steps, continual.training) * length == pytest.approx(7.5e12, rel=1e-3)
    plateau = schedule.warmup_steps + schedule.constant_steps
    assert consumed_samples(plateau, continual.training) * length == pytest.approx(2.5e12, rel=1e-3)
    rates = [learning_rate(s, schedule, continual.optimizer, steps) for s in (plateau, steps - 1)]
    assert rates == pytest.approx([8e-5, 8e-6], rel=1e-4)


def test_a_python_that_does_not_run_is_passed_over(tmp_path):
    """A pyenv shim for a version that is not selected exists, is found first, and fails."""
    for folder, name, body in (
        ("shims", "python3.12", "echo 'pyenv: python3.12: command not found' >&2; exit 127"),
        ("shims", "python3", "exit 1"),
        ("pyenv/versions/3.12.9/bin", "python", f'exec {sys.executable} "$@"'),
    ):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        (tmp_path / folder / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / folder / name).chmod(0o755)
    bash, nothing = shutil.which("bash"), shutil.which("true")
    command = [bash, "-c", "source tools/setup_env.sh; find_python"]
    path = f"{tmp_path / 'shims'}:/usr/bin:/bin"
    done = run(command, M1_PYTHON=nothing, PYENV_ROOT=str(tmp_path / "pyenv"), PATH=path)
    assert done.stdout.strip() == str(tmp_path / "pyenv/versions/3.12.9/bin/python"), done.stderr
    done = run(command, M1_PYTHON=nothing, PYENV_ROOT=str(tmp_path / "none"), PATH=str(tmp_path / "shims"))
    assert done.returncode == 1 and "no Python >= 3.12" in done.stderr
