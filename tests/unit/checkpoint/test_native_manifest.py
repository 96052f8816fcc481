"""Damage to any file of a checkpoint is found and named."""

import os
from pathlib import Path

import pytest
import torch

from megatron_m1.checkpoint import manifest
from megatron_m1.checkpoint.dcp import NativeWriter
from megatron_m1.config.errors import ConfigError

FIRST, SECOND, MOMENT = "decoder.first.weight", "decoder.second.weight", "optimizer.state.exp_avg.decoder.first.weight"


@pytest.fixture
def folder(tmp_path) -> Path:
    """Two files: __0_0.distcp with two tensors, __0_1.distcp with the third (and __0_2.distcp with the plain state)."""
    with NativeWriter(tmp_path) as writer:
        writer.start_file()
        writer.write(FIRST, (4, 3), 0, torch.randn(4, 3))
        writer.write(SECOND, (5,), 0, torch.randn(5))
        writer.start_file()
        writer.write(MOMENT, (4, 3), 0, torch.randn(4, 3))
        writer.finish({})
    (tmp_path / manifest.MANIFEST).unlink(missing_ok=True)
    metadata = manifest.read_metadata(tmp_path)
    files = {
        name: manifest.checksums(tmp_path / name, [chunk.length for chunk in chunks])
        for name, chunks in manifest.chunks_by_file(metadata).items()
    }
    manifest.write_manifest(tmp_path, files)
    return tmp_path


def check(folder: Path, **options) -> None:
    manifest.verify(folder, manifest.read_metadata(folder), **options)


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def test_a_sound_checkpoint(folder):
    check(folder)
    check(folder, contents=False)


def test_every_byte_counts(folder):
    """A bit flipped anywhere names the file and exactly the tensor that holds it."""
    chunks = manifest.chunks_by_file(manifest.read_metadata(folder))["__0_0.distcp"]
    assert [chunk.tensor for chunk in chunks] == [FIRST, SECOND]
    path = folder / "__0_0.distcp"
    for chunk in chunks:
        for position in (chunk.offset, chunk.offset + chunk.length // 2, chunk.offset + chunk.length - 1):
            flip(path, position)
            with pytest.raises(ConfigError, match=rf"__0_0\.distcp is damaged: the checksum of {chunk.tensor} is not"):
                check(folder)
            check(folder, contents=False)
            flip(path, position)
    check(folder)


def test_a_cut_file(folder):
    path = folder / "__0_0.distcp"
    second = manifest.chunks_by_file(manifest.read_metadata(folder))["__0_0.distcp"][1]
    os.truncate(path, second.offset + 1)
    with pytest.raises(ConfigError, match=rf"__0_0\.distcp has .* bytes; it lacks \(part of\) {SECOND};"):
        check(folder, contents=False)
    os.truncate(path, 1)
    with pytest.raises(ConfigError, match=rf"it lacks \(part of\) {FIRST} and 1 other tensors;"):
        check(folder, contents=False)


def test_a_missing_file(folder):
    (folder / "__0_1.distcp").unlink()
    with pytest.raises(ConfigError, match=rf"__0_1\.distcp, which holds {MOMENT}, is missing"):
        check(folder)


def test_each_share_looks_at_its_files_only(folder):
    flip(folder / "__0_1.distcp", 100)
    check(folder, share=0, shares=2)
    with pytest.raises(ConfigError, match="__0_1"):
        check(folder, share=1, shares=2)


@pytest.mark.parametrize("name", [".metadata", "metadata.json"])
def test_core_s_own_files(folder, name):
    flip(folder / name, 10)
    with pytest.raises(ConfigError, match=rf"{name} is damaged"):
        check(folder)


def test_a_training_checkpoint_must_have_its_manifest(folder):
    (folder / manifest.MANIFEST).unlink()
    with pytest.raises(ConfigError, match=r"manifest\.json is missing"):
        check(folder)
