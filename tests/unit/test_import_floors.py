"""Imports point down only: kernels < config < platform < parallel < model < data, checkpoint < engine < generation < stages."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FLOORS = {
    "m1_kernels": 0,
    "megatron_m1.config": 10,
    "megatron_m1.platform": 11,
    "megatron_m1.parallel": 20,
    "megatron_m1.model": 30,
    "megatron_m1.data": 40,
    "megatron_m1.checkpoint": 41,
    "megatron_m1.engine": 50,
    "megatron_m1.generation": 51,
    "megatron_m1.planning": 52,
    "megatron_m1.pretrain": 60,
    "megatron_m1.rl": 60,
    "megatron_m1.__main__": 70,
}
# The rank pool closes what the last function left open.
MAY_IMPORT_PARALLEL_STATE = ("megatron_m1.parallel", "megatron_m1.platform.rank_pool")
FILES = sorted([*(ROOT / "megatron_m1").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")])


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(("m1_kernels", *parts[1:]) if parts[0] == "kernels" else parts)


def floor_of(module: str) -> int | None:
    """None for what stands on no floor: other distributions, and the bare package `megatron_m1`."""
    return next((floor for name, floor in FLOORS.items() if module == name or module.startswith(f"{name}.")), None)


def imports(path: Path) -> Iterator[tuple[int, str]]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} is a relative import"
            # `from megatron_m1 import platform` imports megatron_m1.platform
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def offences(path: Path, module: str) -> list[str]:
    own = floor_of(module)
    found = []
    for line, imported in imports(path):
        other = floor_of(imported)
        if other is not None and (other > own or (other == own and not same_package(module, imported))):
            found.append(f"{path}:{line} {module} imports {imported}")
        if imported.startswith("megatron.core.parallel_state") and not module.startswith(MAY_IMPORT_PARALLEL_STATE):
            found.append(f"{path}:{line} imports parallel_state, which only megatron_m1.parallel may")
        if imported.split(".")[0] == "megatron" and own <= FLOORS["megatron_m1.config"]:
            found.append(f"{path}:{line} imports Megatron on floor {own}")
    return found


def same_package(a: str, b: str) -> bool:
    return a.split(".")[:2] == b.split(".")[:2] or a.startswith("m1_kernels")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path):
    module = module_of(path).removesuffix(".__init__")
    if module == "megatron_m1":
        assert not list(imports(path))
        return
    assert floor_of(module) is not None, f"{module} stands on no floor; add it to FLOORS"
    assert not offences(path, module)


@pytest.mark.parametrize(
    "module, line",
    [
        ("megatron_m1.config.x", "import megatron_m1.model.build"),
        ("megatron_m1.config.x", "from megatron_m1 import platform"),
        ("megatron_m1.config.x", "from megatron.core import tensor_parallel"),
        ("m1_kernels.x", "from megatron_m1.config import Config"),
        ("megatron_m1.model.x", "from megatron.core import parallel_state"),
        ("megatron_m1.model.x", "def f():\n    from megatron_m1.engine.trainer import Trainer"),
    ],
)
def test_the_test_sees_an_import_that_points_up(module, line, tmp_path):
    (tmp_path / "x.py").write_text(line)
    assert offences(tmp_path / "x.py", module)


def test_cuda_is_known_to_the_platform_module_and_the_kernels_only():
    found = []
    for path in FILES:
        if module_of(path).startswith(("megatron_m1.platform", "m1_kernels")):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            used = ast.unparse(node) if isinstance(node, ast.Attribute) else ""
            if used.startswith("torch.cuda."):
                found.append(f"{path}:{node.lineno} {used}")
    assert not found
