"""examples/rl_quickstart.sh with few steps, the preset by hand on what it makes, and the tools that it uses."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_m1.config import from_yaml
from megatron_m1.config.errors import ConfigError
from megatron_m1.rl.journal import read_journal
from megatron_m1.rl.loop import main
from megatron_m1.rl.tasks import TaskMix
from tests.e2e.pretrain_jobs import ROOT, environment
from tools import plot_rl, rl_demonstrations

PNG = b"\x89PNG\r\n\x1a\n"
CONFIGS = ROOT / "examples/configs"
SHORT = ("--rl.updates_per_batch", "2", "--rl.refills", "0", "--rl.held_out_prompts", "4", "--rl.held_out_samples", "2")


def quickstart(out: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    variables = {"M1_PYTHON": sys.executable, "RL_QUICKSTART_OUT": str(out), "RL_QUICKSTART_RANKS": "1", **variables}
    command = ["bash", str(ROOT / "examples/rl_quickstart.sh"), *arguments]
    # From another folder: the script must find its own way.
    return subprocess.run(
        command, capture_output=True, text=True, timeout=280, cwd=out.parent, env=environment() | variables
    )


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished quickstart of 3 steps of the start and 2 generation batches."""
    out = tmp_path_factory.mktemp("rl_quickstart") / "runs/rl_quickstart"
    out.parent.mkdir()
    few = {"RL_QUICKSTART_START": "3", "RL_QUICKSTART_STEPS": "2", "RL_QUICKSTART_DEMONSTRATIONS": "400"}
    done = quickstart(out, *SHORT, **few)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (out / "stdout.txt").write_text(done.stdout)
    return out


def test_ends_with_the_held_out_reward_and_paths(out):
    printed = (out / "stdout.txt").read_text()
    assert re.search(r"^held-out reward (\d\.\d{4} \[\d\.\d{4}, \d\.\d{4}\]( -> )?){2}$", printed, re.MULTILINE)
    paths = re.findall(r"^[\w ]+?  +(\S+)(?: |$)", printed[printed.index("reward curve") :], re.MULTILINE)
    assert len(paths) == 5 and all(Path(path).exists() for path in paths), paths
    assert (out / "reward.png").read_bytes().startswith(PNG)
    assert re.match("1 processes on [CG]PU, output in ", printed) and "step 2/2  reward " in printed


def test_the_run_is_what_it_says(out):
    entries = [json.loads(line) for line in (out / "log/metrics.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in entries if "step" in entry] == [1, 2]
    assert [entry["after_step"] for entry in entries if entry.get("event") == "evaluation"] == [0, 2]
    assert (out / "start/latest").read_text() == "step_00000003\n"
    assert (out / "checkpoints/latest").read_text() == "step_00000002\n"
    assert from_yaml(out / "start/step_00000003/config.yaml").moe.aux_loss == "micro_batch"
    records = [record for path in (out / "journal").glob("step_*") for record in read_journal(path)]
    assert len(records) == 2 * 32 * 2  # batches, samples of each, and a verdict on every sample
    demonstrated = {json.loads(line)["text"].split(":")[0] for line in (out / "demonstrations.jsonl").open()}
    tasks = TaskMix(from_yaml(CONFIGS / "rl_tiny_cpu.yaml").rl, seed=1234)
    assert not demonstrated & {tasks.task(n, held_out=True).prompt.split(":")[0] for n in range(128)}


def by_hand(rank: int, world: int, folder: Path, *arguments: str) -> None:
    """The rl command with the preset and nothing else to name, in `folder`."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        main(["--config", str(CONFIGS / "rl_tiny_cpu.yaml"), *arguments])
    finally:
        os.chdir(before)


def test_the_preset_starts_from_what_the_script_makes(out, ranks):
    ranks(1, by_hand, out.parents[1], "--training.steps", "1", *SHORT)
    run = out.parent / "rl_tiny_cpu"
    assert (run / "checkpoints/latest").read_text() == "step_00000001\n" and list((run / "journal").iterdir())
    first = [
        {record["number"]: record["response"] for record in read_journal(path) if "verdict" not in record}
        for path in (folder / "journal/held_out_00000000.replica_00000.jsonl" for folder in (out, run))
    ]
    assert len(first[0]) == 8 and first[0] == first[1]  # one and the same start


def test_without_a_start_the_preset_says_how_to_make_it(tmp_path):
    with pytest.raises(ConfigError, match=r"checkpoint\.load=runs/rl_quickstart/start does not exist") as error:
        by_hand(0, 1, tmp_path)
    assert "RL_QUICKSTART_STEPS=0 bash examples/rl_quickstart.sh" in str(error.value)


def test_the_presets_agree_with_the_script():
    script = (ROOT / "examples/rl_quickstart.sh").read_text()
    for task, name in (("sort", "rl_tiny_cpu"), ("reasoning_gym", "rl_reasoning_gym_cpu")):
        (folder,) = re.findall(rf"{task}\) CONFIG=examples/configs/{name}.yaml OUT=(\S+) ", script)
        config = from_yaml(CONFIGS / f"{name}.yaml")
        assert config.checkpoint.load == f"{folder}/start" and config.data.tokenizer == f"{folder}/tokenizer"
        ours = (config.checkpoint.save, config.logging.dir, config.rl.journal)
        assert ours == tuple(f"runs/{name}/{folder}" for folder in ("checkpoints", "log", "journal"))
        assert config.checkpoint.weights_only


def test_somebody_elses_folder_is_left_alone(tmp_path):
    (tmp_path / "mine/checkpoints").mkdir(parents=True)
    done = quickstart(tmp_path / "mine")
    assert done.returncode == 1 and "is not from an rl_quickstart; set RL_QUICKSTART_OUT" in done.stderr
    assert [path.name for path in tmp_path.rglob("*")] == ["mine", "checkpoints"]
    done = quickstart(tmp_path / "new", RL_QUICKSTART_TASK="chess")
    assert done.returncode == 2 and "RL_QUICKSTART_TASK=chess must be sort or reasoning_gym" in done.stderr
    assert not (tmp_path / "new").exists()


def test_demonstrations_are_right_as_often_as_asked(tmp_path):
    config = CONFIGS / "rl_tiny_cpu.yaml"
    path, tasks = tmp_path / "d.jsonl", TaskMix(from_yaml(config).rl, seed=0)
    options = ["--config", str(config), "--output", str(path), "--count", "150"]
    for share, low, high in ((1.0, 1.0, 1.0), (0.5, 0.4, 0.8)):
        assert rl_demonstrations.main([*options, "--right-share", str(share)]) == 0
        texts = [json.loads(line)["text"] for line in path.read_text().splitlines()]
        wanted = [task.prompt + rl_demonstrations.answer_to(task) for task in map(tasks.task, range(150))]
        assert low <= sum(a == b for a, b in zip(texts, wanted, strict=True)) / 150 <= high


def line(step: int, value: float, **more: object) -> dict:
    return {"step": step, "reward": value, "held_out": {"value": value, "low": value - 0.1, "high": value + 0.1}} | more


def test_plot_reads_resumed_and_killed_runs(tmp_path, capsys):
    lines = [
        {"event": "evaluation", "after_step": 0, "held_out": {"value": 0.25, "low": 0.2, "high": 0.3}},
        line(1, 0.5, response_tokens_mean=3.0, capped_share=0.1, max_abs_diff=1e-6),
        line(2, 0.1),
        {"event": "start", "from_step": 1},
        line(2, 0.75),
    ]
    path = tmp_path / "log/metrics.jsonl"
    path.parent.mkdir()
    path.write_text("".join(json.dumps(entry) + "\n" for entry in lines) + '{"step": 3, "rew')
    steps, held_out = plot_rl.read(path)
    assert {step: entry["reward"] for step, entry in steps.items()} == {1: 0.5, 2: 0.75}
    assert {step: estimate["value"] for step, estimate in held_out.items()} == {0: 0.25, 1: 0.5, 2: 0.75}
    picture = tmp_path / "pictures/reward.png"
    assert plot_rl.main([str(path.parent), "--output", str(picture)]) == 0
    last = "held-out reward 0.2500 [0.2000, 0.3000] -> 0.7500 [0.6500, 0.8500]"
    assert capsys.readouterr().out.splitlines() == [str(picture), last]
    assert picture.read_bytes().startswith(PNG)
    other = tmp_path / "other"
    shutil.copytree(path.parent, other)
    assert plot_rl.main([str(path.parent), str(other), "--output", str(picture)]) == 0
    assert capsys.readouterr().out.splitlines() == [str(picture)]


@pytest.mark.parametrize(
    "text, message", [("", "has no step yet"), ('{"a":\n{"step": 1}\n', "metrics.jsonl:1 is not JSON")]
)
def test_plot_says_what_is_wrong(tmp_path, capsys, text, message):
    (tmp_path / "metrics.jsonl").write_text(text)
    assert plot_rl.main([str(tmp_path), "--output", str(tmp_path / "x.png")]) == 1
    assert message in capsys.readouterr().err and not (tmp_path / "x.png").exists()


def test_shellcheck():
    checker = Path(sys.executable).with_name("shellcheck")
    done = subprocess.run(
        [checker, "-x", "examples/rl_quickstart.sh"], capture_output=True, text=True, cwd=ROOT, env=os.environ
    )
    assert done.returncode == 0, done.stdout
