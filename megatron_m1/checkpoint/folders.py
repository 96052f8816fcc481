"""The save folder: step_XXXXXXXX/ folders and the pointer `latest`.

A step folder is filled under the name step_XXXXXXXX.partial and renamed when it is complete; `latest` is written after that.
So whatever bears a final name is complete, and what `latest` names exists. All of this is work for one rank.
"""

import os
import re
import shutil
from pathlib import Path

from megatron_m1.config.errors import ConfigError

__all__ = ["new_partial", "publish", "remove_old", "resolve", "step_name"]

LATEST = "latest"
PARTIAL = ".partial"
REPLACED = ".replaced"
STEP_FOLDER = re.compile(r"step_(\d{8,})")


def step_name(step: int) -> str:
    return f"step_{step:08d}"


def resolve(path: Path, *, option: str = "checkpoint.load") -> Path:
    """The step folder that `path` is, or that the `latest` in it names.

    option: where the user gave the path, for messages. Raises ConfigError for a missing folder or pointer, and for a pointer that
    names no folder.
    """
    if not path.is_dir():
        raise ConfigError(f"{option}={path} does not exist; name a save folder or a step_XXXXXXXX folder.")
    if (path / ".metadata").is_file() or STEP_FOLDER.fullmatch(path.name):
        return path
    pointer = path / LATEST
    if not pointer.is_file():
        if (path / "config.json").is_file():
            raise ConfigError(
                f"{option}={path} is a Hugging Face directory; make a checkpoint of it with tools/convert_checkpoint.py import."
            )
        raise ConfigError(f"{option}={path} holds no file `latest`; name a save folder or a step_XXXXXXXX folder.")
    name = pointer.read_text(encoding="utf-8").strip()
    for folder in (path / name, path / f"{name}{REPLACED}"):  # the latter: killed while a step was saved anew
        if STEP_FOLDER.match(name) and folder.is_dir():
            return folder
    raise ConfigError(
        f"{pointer} names {name!r}, which is no folder there; set {option} to one of {_steps_text(path)}."
    )


def new_partial(save: Path, step: int) -> Path:
    """An empty folder step_XXXXXXXX.partial in `save` (made if need be); leftovers of killed saves are removed."""
    save.mkdir(parents=True, exist_ok=True)
    for folder in save.glob(f"step_*{PARTIAL}"):
        shutil.rmtree(folder)
    for folder in save.glob(f"step_*{REPLACED}"):
        final = folder.with_name(folder.name.removesuffix(REPLACED))
        if final.exists():
            shutil.rmtree(folder)
        else:
            os.rename(folder, final)
    partial = save / f"{step_name(step)}{PARTIAL}"
    partial.mkdir()
    return partial


def publish(partial: Path) -> Path:
    """Give the complete folder its final name, then point `latest` at it; returns the final path.

    A folder that bore the name before is removed at the end; until the new one is in place it stays loadable.
    """
    final = partial.with_name(partial.name.removesuffix(PARTIAL))
    replaced = final.with_name(f"{final.name}{REPLACED}")
    for entry in partial.iterdir():
        sync(entry)
    sync(partial)
    if final.exists():
        os.rename(final, replaced)
    os.rename(partial, final)
    sync(final.parent)
    write_latest(final)
    shutil.rmtree(replaced, ignore_errors=True)
    return final


def write_latest(final: Path) -> None:
    pointer = final.with_name(LATEST)
    temporary = pointer.with_name(f".{LATEST}.{os.getpid()}.tmp")
    temporary.write_text(f"{final.name}\n", encoding="utf-8")
    sync(temporary)
    os.replace(temporary, pointer)
    sync(final.parent)


def remove_old(final: Path, keep: int) -> None:
    """Remove all but the newest `keep` (0: all stay) steps up to `final`, the newest. Later steps of another run stay."""
    if keep == 0:
        return
    newest = _number(final)
    older = sorted(number for number in _steps(final.parent) if number <= newest)
    for number in older[:-keep]:
        doomed = final.with_name(f"{step_name(number)}{PARTIAL}")  # never half a checkpoint under a final name
        os.rename(final.with_name(step_name(number)), doomed)
        shutil.rmtree(doomed)


def sync(path: Path) -> None:
    """Return when `path` (file or folder) is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _number(folder: Path) -> int:
    match = STEP_FOLDER.fullmatch(folder.name)
    assert match is not None, folder
    return int(match[1])


def _steps(save: Path) -> list[int]:
    return [
        int(match[1]) for entry in save.iterdir() if entry.is_dir() and (match := STEP_FOLDER.fullmatch(entry.name))
    ]


def _steps_text(save: Path) -> str:
    return ", ".join(str(save / step_name(number)) for number in sorted(_steps(save))) or "another save folder"
