"""The save folder: names, pointer, leftovers, retention."""

import os
from pathlib import Path

import pytest

from megatron_m1.checkpoint import folders
from megatron_m1.checkpoint.native import check_save_folder
from megatron_m1.config.errors import ConfigError
from megatron_m1.config.schema import CheckpointConfig


def save(root: Path, step: int, keep: int = 0) -> Path:
    partial = folders.new_partial(root, step)
    (partial / ".metadata").write_text(str(step))
    final = folders.publish(partial)
    folders.remove_old(final, keep)
    return final


def names(root: Path) -> list[str]:
    return sorted(entry.name for entry in root.iterdir())


def test_a_published_folder_is_what_latest_names(tmp_path):
    final = save(tmp_path / "deep" / "save", 10)
    assert final.name == "step_00000010" and names(final.parent) == ["latest", "step_00000010"]
    assert (final.parent / "latest").read_text() == "step_00000010\n"
    assert folders.resolve(final.parent) == final
    assert folders.resolve(final) == final


def test_an_older_step_can_be_named(tmp_path):
    first = save(tmp_path, 1)
    save(tmp_path, 2)
    assert folders.resolve(first) == first
    assert folders.resolve(tmp_path).name == "step_00000002"


def test_leftovers_of_killed_saves_are_removed(tmp_path):
    save(tmp_path, 1)
    (tmp_path / "step_00000002.partial").mkdir()
    (tmp_path / "step_00000002.partial" / "__0_0.distcp").write_text("half")
    assert folders.resolve(tmp_path).name == "step_00000001"
    save(tmp_path, 3)
    assert names(tmp_path) == ["latest", "step_00000001", "step_00000003"]


def test_a_step_saved_anew_replaces_the_old_one(tmp_path):
    save(tmp_path, 1)
    partial = folders.new_partial(tmp_path, 1)
    (partial / ".metadata").write_text("new")
    assert (folders.resolve(tmp_path) / ".metadata").read_text() == "1"
    folders.publish(partial)
    assert (folders.resolve(tmp_path) / ".metadata").read_text() == "new"
    assert names(tmp_path) == ["latest", "step_00000001"]


def test_killed_between_the_two_renames(tmp_path):
    final = save(tmp_path, 1)
    os.rename(final, tmp_path / "step_00000001.replaced")
    assert (folders.resolve(tmp_path) / ".metadata").read_text() == "1"
    save(tmp_path, 2)
    assert names(tmp_path) == ["latest", "step_00000001", "step_00000002"]


@pytest.mark.parametrize(
    ("keep", "left"), [(0, [1, 2, 3, 4]), (1, [4]), (3, [2, 3, 4]), (9, [1, 2, 3, 4])], ids=lambda value: str(value)
)
def test_retention(tmp_path, keep, left):
    for step in (1, 2, 3, 4):
        save(tmp_path, step, keep)
    assert names(tmp_path) == ["latest", *map(folders.step_name, left)]


def test_retention_spares_what_latest_names_and_later_steps_of_another_run(tmp_path):
    for step in (5, 6, 7):
        save(tmp_path, step)
    save(tmp_path, 2, keep=1)  # a run that went back to step 1
    assert names(tmp_path) == ["latest", *map(folders.step_name, (2, 5, 6, 7))]
    assert folders.resolve(tmp_path).name == "step_00000002"


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda root: root / "nowhere", "nowhere does not exist"),
        (lambda root: root / "step_00000003", "step_00000003 does not exist"),
        (lambda root: root, "holds no file `latest`"),
        (lambda root: point(root, "step_00000003"), "names 'step_00000003', which is no folder there.*step_00000001"),
        (lambda root: point(root, "../step_00000001"), "which is no folder there"),
        (lambda root: point(root, ""), "which is no folder there"),
    ],
)
def test_what_cannot_be_resolved(tmp_path, prepare, message):
    (tmp_path / "step_00000001").mkdir()
    with pytest.raises(ConfigError, match=message):
        folders.resolve(prepare(tmp_path))


def test_a_hugging_face_directory_is_named_as_such(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(
        ConfigError, match=r"--checkpoint=.* is a Hugging Face directory; .*convert_checkpoint.py import"
    ):
        folders.resolve(tmp_path, option="--checkpoint")


def test_a_save_folder_that_cannot_be_written_to_is_found_at_the_start(tmp_path):
    check_save_folder(CheckpointConfig(save=str(tmp_path / "new" / "run")))
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    for load in (None, str(tmp_path)):
        with pytest.raises(
            ConfigError, match=r"checkpoint.save=.*/file/run cannot be written to: Not a directory; name"
        ):
            check_save_folder(CheckpointConfig(save=str(tmp_path / "file" / "run"), load=load))


def point(root: Path, name: str) -> Path:
    (root / "latest").write_text(name)
    return root


def test_a_run_from_step_0_never_replaces_steps_and_says_how_to_continue(tmp_path):
    save(tmp_path / "run", 3)
    ours, start = str(tmp_path / "run"), str(tmp_path / "start")
    with pytest.raises(ConfigError, match=r"newest: step_00000003.* to continue that run, or checkpoint\.save to"):
        check_save_folder(CheckpointConfig(save=ours))
    with pytest.raises(ConfigError, match=r"to continue that run, with checkpoint\.weights_only=false, or"):
        check_save_folder(CheckpointConfig(save=ours, load=start, weights_only=True))
    check_save_folder(CheckpointConfig(save=ours, load=ours))
