import json
import subprocess
import sys
from pathlib import Path

TOOL = Path(__file__).parents[2] / "tools" / "compare_runs.py"


def write(folder, losses, first=1):
    folder.mkdir()
    lines = [{"event": "start", "process_groups": {"data": 1}}]
    lines += [
        {"step": first + i, "loss": loss, "grad_norm": 1.0, "tokens_per_s": 100.0 + i, "mfu": 0.5}
        for i, loss in enumerate(losses)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(folder)


def compare(*arguments):
    return subprocess.run([sys.executable, str(TOOL), *arguments], capture_output=True, text=True, timeout=60)


def test_bound_band_and_first_step(tmp_path):
    reference = write(tmp_path / "reference", [4.0, 2.0])
    close = write(tmp_path / "close", [4.0, 2.02])
    far = write(tmp_path / "far", [4.0, 2.2])
    seed = write(tmp_path / "seed", [4.0, 2.1])
    resumed = write(tmp_path / "resumed", [2.0], first=2)

    done = compare("--reference", reference, "--band", seed, close)
    assert done.returncode == 0 and "bound: 5.00e-02" in done.stdout
    assert done.stdout.splitlines()[-1].split() == ["close", "2", "1.00e-02", "0.00e+00", "101", "0.500"]
    assert compare("--reference", reference, "--band", seed, close, far).returncode == 1
    assert compare("--reference", reference, "--bound", "1e-9", "--from-step", "2", resumed).returncode == 0
    assert compare("--reference", reference, "--bound", "1e-9", close).returncode == 1


def test_no_common_step_nan_or_missing_file_fails(tmp_path):
    reference = write(tmp_path / "reference", [4.0])
    assert compare("--reference", reference, "--bound", "1", write(tmp_path / "later", [4.0], first=9)).returncode == 1
    assert compare("--reference", reference, "--bound", "1", write(tmp_path / "nan", [float("nan")])).returncode == 1
    done = compare("--reference", reference, "--bound", "1", str(tmp_path / "nowhere"))
    assert done.returncode == 2 and "cannot be read" in done.stderr
