"""What README.md names is in the tree: files, modules to run, commands, configuration keys."""

import dataclasses
import importlib.util
import itertools
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

import megatron_m1.__main__ as command_line
from megatron_m1.config import Config

ROOT = Path(__file__).parents[2]
# Folders that a table or a sentence of README.md speaks of when it names a file without its folder.
BASES = [ROOT / base for base in ("", "megatron_m1", "megatron_m1/rl", "examples/configs", "kernels")]
WRITTEN_BY_RUNS = ("runs/", ".venv")
SECTIONS = {field.name: field.default_factory for field in dataclasses.fields(Config)}
FENCED, INLINE = re.compile(r"^```bash\n(.*?)^```", re.M | re.S), re.compile(r"`([^`\n]+)`")


def faults(text: str) -> list[str]:
    found = re.findall(r"\b(?:TODO|TBD|FIXME|XXX)\b", text)
    found += [target for target in re.findall(r"\]\(([^)#:]+)\)", text) if not exists(target)]
    inline = INLINE.findall(re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))
    lines = [line for block in FENCED.findall(text) for line in block.splitlines()]
    for command in [*lines, *(code for code in inline if code.startswith(("bash ", "python ")))]:
        found += [f"{what} in: {command}" for what in command_faults(shlex.split(command, comments=True))]
    for code in inline:
        if re.fullmatch(r"[\w./{},*]+(\.(py|sh|yaml|sbatch|md|json)|/)", code) and not code.startswith(WRITTEN_BY_RUNS):
            found += [path for path in braces_expanded(code) if not exists(path)]
            continue
        key = re.match(r"(\w+)\.(\w+)(?=$|[: ])", code)
        if key and key[1] in SECTIONS and not hasattr(SECTIONS[key[1]](), key[2]):
            found.append(code)
    return found


def command_faults(words: list[str]) -> Iterator[str]:
    for before, word in itertools.pairwise(words):
        if word.isupper():  # stands for what the reader puts in
            continue
        if before in ("bash", "source", "python", "--config") and not word.startswith("-") and not exists(word):
            yield word
        if before == "-m" and importlib.util.find_spec(word) is None:
            yield word
        if before == "megatron_m1" and f"\n  {word} " not in command_line.__doc__:
            yield word


def exists(path: str) -> bool:
    return path.startswith(WRITTEN_BY_RUNS) or any(next(base.glob(path), None) for base in BASES)


def braces_expanded(path: str) -> list[str]:
    braces = re.search(r"\{([^}]*)\}", path)
    if not braces:
        return [path]
    parts = [path[: braces.start()] + part + path[braces.end() :] for part in braces[1].split(",")]
    return [full for part in parts for full in braces_expanded(part)]


@pytest.mark.parametrize("name", ["README.md", "kernels/README.md"])
def test_what_it_names_exists(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    assert len(INLINE.findall(text)) > 5
    assert not faults(text)


@pytest.mark.parametrize(
    "text",
    [
        "figures: TBD",
        "[log](kernels/NO_LOG.md)",
        "`tools/no_tool.py`",
        "`examples/slurm/{pretrain,no_stage}_456b.sbatch`",
        "`parallel.contexts: 2`",
        "`python -m benchmarks.no_benchmark`",
        "```bash\npython tools/no_tool.py --input FILE\n```",
        "```bash\npython -m megatron_m1 no_command --key 1\n```",
        "```bash\ntorchrun -m megatron_m1 pretrain --config examples/configs/no.yaml   # a comment\n```",
    ],
)
def test_the_test_sees_what_does_not_exist(text):
    assert faults(text)
