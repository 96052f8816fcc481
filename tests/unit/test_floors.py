"""The house rules of imports: they point down only, and only platform/ and kernels/ know CUDA from CPU."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# A package may import from itself and from lower floors; packages of one floor do not know each other.
FLOORS = {
    "m1_kernels": 0,
    "config": 1,
    "platform": 2,
    "parallel": 3,
    "model": 4,
    "data": 5,
    "checkpoint": 5,
    "engine": 6,
    "generation": 7,
    "pretrain": 8,
    "sft": 8,
    "rl": 8,
    "__main__": 9,
}


def imported_modules(source: str) -> set[str]:
    """Absolute names of all modules that the source imports, at any depth."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in line {node.lineno}: write the full name"
            if node.module in ("megatron_m1", "megatron.core"):
                names |= {f"{node.module}.{alias.name}" for alias in node.names}
            else:
                names.add(node.module)
    return names


def package_of(module: str) -> str | None:
    """Our package that a module belongs to; None for modules that are not ours."""
    parts = module.split(".")
    if parts[0] == "m1_kernels":
        return "m1_kernels"
    return parts[1] if parts[0] == "megatron_m1" and len(parts) > 1 else None


def wrong_imports(package: str, source: str) -> list[str]:
    found = {module: package_of(module) for module in imported_modules(source)}
    wrong = [
        module
        for module, other in found.items()
        if other is not None and other != package and FLOORS[other] >= FLOORS[package]
    ]
    forbidden_roots = {"m1_kernels": {"megatron"}, "config": {"megatron", "torch"}}.get(package, set())
    wrong += [module for module in found if module.split(".")[0] in forbidden_roots]
    if package not in ("platform", "parallel"):
        wrong += [module for module in found if module == "megatron.core.parallel_state"]
    return sorted(wrong)


def mentions_torch_cuda(source: str) -> bool:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and node.attr == "cuda" and isinstance(node.value, ast.Name):
            if node.value.id == "torch":
                return True
        elif isinstance(node, ast.Import):
            if any(alias.name.startswith("torch.cuda") for alias in node.names):
                return True
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            if node.module.startswith("torch.cuda"):
                return True
            if node.module == "torch" and any(alias.name == "cuda" for alias in node.names):
                return True
    return False


def our_files() -> list[tuple[str, Path]]:
    files = [("m1_kernels", path) for path in sorted((ROOT / "kernels").rglob("*.py"))]
    for path in sorted((ROOT / "megatron_m1").rglob("*.py")):
        parts = path.relative_to(ROOT / "megatron_m1").with_suffix("").parts
        if parts != ("__init__",):
            files.append((parts[0], path))
    return files


def test_every_package_has_a_floor():
    assert {package for package, _ in our_files()} <= set(FLOORS)


@pytest.mark.parametrize(("package", "path"), our_files(), ids=lambda value: str(value).removeprefix(f"{ROOT}/"))
def test_imports_point_down(package, path):
    assert wrong_imports(package, path.read_text()) == []


def test_only_platform_and_kernels_know_cuda():
    files = [path for package, path in our_files() if package not in ("m1_kernels", "platform")]
    files += sorted((ROOT / "tools").rglob("*.py")) + sorted((ROOT / "examples").rglob("*.py"))
    assert [str(path.relative_to(ROOT)) for path in files if mentions_torch_cuda(path.read_text())] == []


@pytest.mark.parametrize(
    ("package", "source"),
    [
        ("config", "import torch"),
        ("config", "from megatron_m1 import platform"),
        ("m1_kernels", "import megatron.core"),
        ("model", "from megatron_m1.engine.adam import AdamW"),
        ("model", "def late():\n    import megatron_m1.engine"),
        ("data", "from megatron_m1.checkpoint import native"),
        ("sft", "from megatron_m1.pretrain import loop"),
        ("model", "from megatron.core.parallel_state import get_tensor_model_parallel_rank"),
        ("model", "from megatron.core import parallel_state"),
    ],
)
def test_a_wrong_import_is_seen(package, source):
    assert wrong_imports(package, source)


@pytest.mark.parametrize(
    "source", ["import torch\ntorch.cuda.synchronize()", "from torch import cuda", "from torch.cuda import Stream"]
)
def test_a_mention_of_cuda_is_seen(source):
    assert mentions_torch_cuda(source)
