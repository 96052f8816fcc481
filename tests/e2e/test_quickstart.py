"""examples/quickstart.sh from text to a completion, with little text and few steps; the tools it adds."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.pretrain_jobs import ROOT, environment
from tools import plot_metrics, standard_library_text

PNG = b"\x89PNG\r\n\x1a\n"


def quickstart(out: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    variables = {"M1_PYTHON": sys.executable, "QUICKSTART_OUT": str(out), **variables}
    command = ["bash", str(ROOT / "examples/quickstart.sh"), *arguments]
    # From another folder: the script must find its own way.
    return subprocess.run(
        command, capture_output=True, text=True, timeout=280, cwd=out.parent, env=environment() | variables
    )


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished quickstart of 6 steps on 4 MB of text."""
    out = tmp_path_factory.mktemp("quickstart") / "runs"
    done = quickstart(out, "--training.micro_batch", "2", QUICKSTART_STEPS="6", QUICKSTART_MEGABYTES="4")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (out / "stdout.txt").write_text(done.stdout)
    return out


def test_ends_with_loss_sample_and_paths(out):
    printed = (out / "stdout.txt").read_text()
    (line,) = re.findall(r"^held-out loss (\d+\.\d+) -> (\d+\.\d+)$", printed, re.MULTILINE)
    before, after = map(float, line)
    assert 8.2 < before < 8.5 and after < before - 0.3
    completion = json.loads((out / "completions.jsonl").read_text().splitlines()[0])
    assert len(completion["token_ids"]) == len(completion["logprobs"]) and completion["text"] in printed
    paths = re.findall(r"^[\w ]+?  +(\S+)(?: |$)", printed[printed.index("loss curve") :], re.MULTILINE)
    assert len(paths) == 5 and all(Path(path).exists() for path in paths), paths
    assert (out / "loss.png").read_bytes().startswith(PNG)
    assert "step 6/6  loss " in printed and re.match("[12] processes on [CG]PU, output in ", printed)


def test_the_run_is_what_it_says(out):
    entries = [json.loads(line) for line in (out / "log/metrics.jsonl").read_text().splitlines()]
    assert entries[0]["process_groups"]["data"] == entries[0]["process_groups"]["world"]
    assert [entry["step"] for entry in entries if "loss" in entry] == [1, 2, 3, 4, 5, 6]
    train, valid = ((out / f"text/{split}.txt").read_text().splitlines() for split in ("train", "valid"))
    assert train and valid and not set(train) & set(valid)
    assert len(json.loads((out / "tokenizer/tokenizer.json").read_text())["model"]["vocab"]) == 4096
    assert (out / "checkpoints/latest").read_text() == "step_00000006\n"


def test_the_export_is_what_transformers_and_vllm_expect(out):
    config = json.loads((out / "hf/config.json").read_text())
    assert config["model_type"] == "minimax_m1" and config["num_hidden_layers"] == 8
    assert (out / "hf/tokenizer.json").read_bytes() == (out / "tokenizer/tokenizer.json").read_bytes()
    assert list((out / "hf").glob("*.safetensors")) and not list((out / "hf").glob("*.bin"))
    verify = [
        sys.executable,
        str(ROOT / "tools/convert_checkpoint.py"),
        "verify",
        "--checkpoint",
        str(out / "checkpoints"),
    ]
    done = subprocess.run(
        [*verify, "--hf", str(out / "hf"), "--strict"], capture_output=True, text=True, timeout=240, env=environment()
    )
    assert done.returncode == 0 and "0 differences" in done.stdout, done.stdout + done.stderr


def test_somebody_elses_folder_is_left_alone(tmp_path):
    (tmp_path / "mine/checkpoints").mkdir(parents=True)
    done = quickstart(tmp_path / "mine")
    assert done.returncode == 1 and "is not from a quickstart; set QUICKSTART_OUT" in done.stderr
    assert [path.name for path in tmp_path.rglob("*")] == ["mine", "checkpoints"]


def test_the_split_is_by_file_and_stable(tmp_path, capsys):
    assert standard_library_text.main(["--output", str(tmp_path / "a")]) == 0
    assert standard_library_text.main(["--output", str(tmp_path / "b"), "--max-megabytes", "3"]) == 0
    lists = {
        (folder, split): (tmp_path / folder / f"{split}.txt").read_text().splitlines()
        for folder in "ab"
        for split in ("train", "valid")
    }
    for split in ("train", "valid"):
        assert set(lists["b", split]) < set(lists["a", split])  # less text moves no file to the other side
    everything = [Path(path) for path in lists["a", "train"] + lists["a", "valid"]]
    assert len(everything) == len(set(everything)) > 300 and all(path.suffix == ".py" for path in everything)
    assert not any({"test", "site-packages"} & set(path.parts) for path in everything)
    assert 0.02 < len(lists["a", "valid"]) / len(everything) < 0.08
    assert sum(path.stat().st_size for path in map(Path, lists["b", "train"] + lists["b", "valid"])) <= 3e6
    assert standard_library_text.main(["--output", str(tmp_path / "c"), "--max-megabytes", "0.01"]) == 1
    assert "both are needed" in capsys.readouterr().err and not (tmp_path / "c").exists()


def test_plot_reads_resumed_and_killed_runs(tmp_path, capsys):
    lines = [
        {"event": "evaluation", "after_step": 0, "valid_loss": 6.5},
        {"step": 1, "loss": 6.0},
        {"step": 2, "loss": 99.0},
        {"event": "start", "from_step": 1},
        {"step": 2, "loss": 5.0, "valid_loss": 5.25},
    ]
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 3, "lo')
    assert plot_metrics.read(path) == ({1: 6.0, 2: 5.0}, {0: 6.5, 2: 5.25})
    picture = tmp_path / "pictures/loss.png"
    assert plot_metrics.main([str(tmp_path), "--output", str(picture)]) == 0
    assert capsys.readouterr().out.splitlines() == [str(picture), "held-out loss 6.5000 -> 5.2500"]
    assert picture.read_bytes().startswith(PNG)


@pytest.mark.parametrize(
    "text, message", [("", "has no step yet"), ('{"a":\n{"step": 1}\n', "metrics.jsonl:1 is not JSON")]
)
def test_plot_says_what_is_wrong(tmp_path, capsys, text, message):
    (tmp_path / "metrics.jsonl").write_text(text)
    assert plot_metrics.main([str(tmp_path), "--output", str(tmp_path / "x.png")]) == 1
    assert message in capsys.readouterr().err and not (tmp_path / "x.png").exists()


def test_shellcheck():
    checker = Path(sys.executable).with_name("shellcheck")
    done = subprocess.run(
        [checker, "-x", "examples/quickstart.sh"], capture_output=True, text=True, cwd=ROOT, env=os.environ
    )
    assert done.returncode == 0, done.stdout
