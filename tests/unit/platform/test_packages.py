"""What probe() and doctor_report() say about packages that are absent, broken, or somebody else's."""

import sys
import types

import pytest
import torch
from m1_kernels.choice import Implementation

from megatron_m1 import platform
from megatron_m1.platform import packages
from megatron_m1.platform.packages import Package


def place_package(folder, monkeypatch, name: str, files: dict[str, str]) -> None:
    for file, text in files.items():
        path = folder / name / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.syspath_prepend(folder)
    for module in [module for module in sys.modules if module.split(".")[0] == name]:
        monkeypatch.delitem(sys.modules, module)


def test_absent_package():
    assert packages._importable("no-such-thing", "no_such_thing", needs_cuda=True) == Package(
        False, "", "not installed"
    )


def test_the_other_apex_of_pypi_is_not_taken_for_nvidias(tmp_path, monkeypatch):
    place_package(tmp_path, monkeypatch, "apex", {"__init__.py": ""})
    found = packages._importable("apex", "apex.optimizers", needs_cuda=False)
    assert not found.present
    assert "`import apex.optimizers` fails: No module named 'apex.optimizers'" in found.reason


def test_nvidias_apex_is_found(tmp_path, monkeypatch):
    place_package(tmp_path, monkeypatch, "apex", {"__init__.py": "", "optimizers/__init__.py": ""})
    assert packages._importable("apex", "apex.optimizers", needs_cuda=False) == Package(True, "unknown", "usable")


def test_package_that_needs_a_gpu_is_not_imported_without_one(tmp_path, monkeypatch):
    place_package(tmp_path, monkeypatch, "flash_attn", {"__init__.py": "raise SystemExit"})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = packages._importable("flash_attn", "flash_attn", needs_cuda=True)
    assert (found.present, found.reason) == (False, "installed, but there is no CUDA device")


@pytest.mark.parametrize("error", ["ImportError('bad symbol')", "OSError('libcuda.so missing')"])
def test_package_that_fails_to_import_says_why(tmp_path, monkeypatch, error):
    place_package(tmp_path, monkeypatch, "transformer_engine", {"__init__.py": f"raise {error}"})
    found = packages._importable("transformer_engine", "transformer_engine.pytorch", needs_cuda=False)
    assert not found.present and error.split("'")[1] in found.reason


def test_grouped_mm_of_this_torch():
    assert platform.probe().grouped_mm.present


def test_old_torch_has_no_grouped_mm(monkeypatch):
    monkeypatch.setattr(torch.nn, "functional", types.ModuleType("functional"))
    assert "torch >= 2.11" in packages._grouped_mm().reason


def test_device_and_backend_agree(monkeypatch):
    expected = ("cuda", "nccl") if torch.cuda.is_available() else ("cpu", "gloo")
    assert (platform.device().type, platform.distributed_backend()) == expected
    monkeypatch.setattr(platform, "is_cuda", lambda: True)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert (platform.device(), platform.distributed_backend()) == (torch.device("cuda", 3), "nccl")


def test_doctor_names_versions_devices_and_choices():
    report = platform.doctor_report()
    for word in ("megatron-core", "0.19.2", torch.__version__.split("+")[0], "AdamW", "lightning attention"):
        assert word in report
    assert platform.distributed_backend() in report


@pytest.mark.skipif(platform.is_cuda(), reason="the resident size is reported on CPU only")
def test_peak_memory_is_in_bytes_and_grows():
    before = platform.peak_memory_bytes()
    held = torch.ones(before // 4 + 2**26)  # 4 bytes each
    assert 2**26 < before < platform.peak_memory_bytes() <= before + 2 * held.nbytes


def test_doctor_names_what_the_kernel_dispatch_would_take(monkeypatch):
    obstacles = {"cpu": None, "meta": "needs a real device"}
    table = {
        "elsewhere": Implementation(run=None, obstacle=lambda q: None, why="fastest", auto_on=("cuda",)),
        "blocked": Implementation(run=None, obstacle=lambda q: "needs a moon", why="fastest"),
        "taken": Implementation(
            run=None, obstacle=lambda q: obstacles[q.device.type], why="second best", auto_on=("cpu", "meta")
        ),
    }
    monkeypatch.setattr(packages, "IMPLEMENTATIONS", table)
    assert packages._lightning("cpu") == "taken (second best)"
    assert packages._lightning("meta") == "none can run here"
