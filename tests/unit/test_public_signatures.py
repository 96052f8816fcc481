"""What a module exports (its __all__; without one, every name without an underscore) is fully typed and takes no **kwargs."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted([*(ROOT / "megatron_m1").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")])


def exported(body: list[ast.stmt]) -> list[ast.stmt]:
    for node in body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            names = ast.literal_eval(node.value)
            return [node for node in body if getattr(node, "name", None) in names]
    return body


def public_functions(body: list[ast.stmt], *, method: bool = False) -> Iterator[tuple[ast.FunctionDef, bool]]:
    for node in body:
        if isinstance(node, ast.FunctionDef) and (not node.name.startswith("_") or node.name == "__init__"):
            yield node, method
        elif isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield from public_functions(node.body, method=True)


def faults(source: str) -> list[str]:
    found = []
    for function, method in public_functions(exported(ast.parse(source).body)):
        arguments = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
        static = any(isinstance(d, ast.Name) and d.id == "staticmethod" for d in function.decorator_list)
        if method and not static:
            arguments = arguments[1:]
        untyped = [argument.arg for argument in arguments if argument.annotation is None]
        if untyped:
            found.append(f"{function.lineno} {function.name}: {', '.join(untyped)} untyped")
        if function.returns is None and function.name != "__init__":
            found.append(f"{function.lineno} {function.name}: no return type")
        if function.args.kwarg is not None:
            found.append(f"{function.lineno} {function.name}: takes **{function.args.kwarg.arg}")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_public_signatures_are_typed(path):
    assert not faults(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "source",
    [
        "def f(x) -> int: ...",
        "def f(x: int): ...",
        "def f(**kwargs: int) -> int: ...",
        "class A:\n def f(self, x): ...",
    ],
)
def test_the_test_sees_a_fault(source):
    assert faults(source)
    assert not faults(source.replace("def f", "def _f"))
    assert not faults("__all__ = ['g']\n" + source)
