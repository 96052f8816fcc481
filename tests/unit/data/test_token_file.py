"""Token files against Megatron-Core's own reader and writer, and what damage to them gives."""

import json
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_m1.config.errors import ConfigError
from megatron_m1.data.token_file import HEADER, TokenFile, TokenFileWriter, token_dtype


def documents(dtype: np.dtype, count: int = 17) -> list[np.ndarray]:
    rng = np.random.default_rng(5)
    top = np.iinfo(dtype).max
    return [rng.integers(0, top, rng.integers(1, 60), endpoint=True).astype(dtype) for _ in range(count)]


def write(prefix: Path, docs: list[np.ndarray], dtype: np.dtype, **metadata: object) -> Path:
    with TokenFileWriter(prefix, dtype, metadata=metadata) as writer:
        for doc in docs:
            writer.add_document(doc)
    return prefix


def write_with_core(prefix: Path, docs: list[np.ndarray], dtype: np.dtype) -> Path:
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype.type)
    for doc in docs:
        builder.add_document(torch.from_numpy(doc.astype(np.int64)), [len(doc)])
    builder.finalize(f"{prefix}.idx")
    return prefix


@pytest.mark.parametrize("dtype", [np.dtype(np.uint16), np.dtype(np.int32)])
def test_same_bytes_as_core_and_read_by_core(tmp_path: Path, dtype: np.dtype) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    docs = documents(dtype)
    ours, core = write(tmp_path / "ours", docs, dtype), write_with_core(tmp_path / "core", docs, dtype)
    for ending in ("bin", "idx"):
        assert Path(f"{ours}.{ending}").read_bytes() == Path(f"{core}.{ending}").read_bytes()
    read = IndexedDataset(str(ours))
    assert len(read) == len(docs) and read.index.dtype == dtype.type
    for got, doc in zip(read, docs, strict=True):
        assert np.array_equal(got, doc)


def test_reads_core_files_with_several_sequences_a_document_and_empty_documents(tmp_path: Path) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(str(tmp_path / "core.bin"), dtype=np.int32)
    builder.add_document(torch.arange(10), [4, 6])
    builder.add_document(torch.tensor([], dtype=torch.int64), [])
    builder.add_document(torch.arange(10, 13), [3])
    builder.finalize(str(tmp_path / "core.idx"))
    file = TokenFile(tmp_path / "core", vocab_size=13)
    assert file.tokens.tolist() == list(range(13))
    assert file.starts_within(0, 13).tolist() == [0, 10]
    assert file.starts_within(1, 12).tolist() == [9]


@pytest.mark.parametrize("vocab_size", [65499, 65500, 65501, 200064, 100])
def test_dtype_rule_is_cores(vocab_size: int) -> None:
    from megatron.core.datasets.indexed_dataset import DType

    assert token_dtype(vocab_size) == np.dtype(DType.optimal_dtype(vocab_size))


def test_starts_within(tmp_path: Path) -> None:
    prefix = write(tmp_path / "p", [np.arange(n) for n in (5, 3, 4)], np.dtype(np.uint16))
    file = TokenFile(prefix)
    assert file.starts_within(0, 12).tolist() == [0, 5, 8]
    assert file.starts_within(0, 5).tolist() == [0]
    assert file.starts_within(0, 6).tolist() == [0, 5]
    assert file.starts_within(5, 3).tolist() == [0]
    assert file.starts_within(6, 2).tolist() == []
    assert file.starts_within(6, 3).tolist() == [2]


def test_the_index_is_not_copied(tmp_path: Path) -> None:
    count = 200_000
    with TokenFileWriter(tmp_path / "p", np.dtype(np.uint16)) as writer:
        (tmp_path / "shard").write_bytes(bytes(2 * count))
        writer.add_shard(tmp_path / "shard", np.ones(count, np.int32), 0)
    TokenFile(tmp_path / "p")  # what the first use imports
    tracemalloc.start()
    file = TokenFile(tmp_path / "p")
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.reset_peak()
    assert file.starts_within(count // 2, 3).tolist() == [0, 1, 2]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert kept < count and peak - kept < count, "bytes, of 8 for each document"


def truncate(path: str, size: int) -> None:
    with open(path, "r+b") as stream:
        stream.truncate(size)


def patch(path: str, offset: int, data: bytes) -> None:
    with open(path, "r+b") as stream:
        stream.seek(offset)
        stream.write(data)


def patch_documents(path: str) -> None:
    """Documents 3 and 4 change places in an index of 17."""
    at = HEADER.size + 12 * 17 + 3 * 8
    patch(path, at, struct.pack("<qq", 4, 3))


DAMAGE = {
    "missing bin": (lambda p: Path(f"{p}.bin").unlink(), r"p\.bin does not exist; make it with"),
    "missing idx": (lambda p: Path(f"{p}.idx").unlink(), r"p\.idx does not exist"),
    "truncated bin": (lambda p: truncate(f"{p}.bin", 20), r"p\.bin has 20 bytes, .*p\.idx describes \d+"),
    "longer bin": (lambda p: patch(f"{p}.bin", 10_000, b"xx"), r"p\.bin has 10002 bytes"),
    "empty bin": (lambda p: truncate(f"{p}.bin", 0), r"p\.bin has 0 bytes"),
    "wrong magic": (lambda p: patch(f"{p}.idx", 0, b"GIF89a"), r"p\.idx does not start with MMIDIDX"),
    "empty idx": (lambda p: truncate(f"{p}.idx", 0), r"p\.idx does not start with MMIDIDX"),
    "header only": (lambda p: truncate(f"{p}.idx", 20), r"p\.idx has 20 bytes, its header asks for"),
    "truncated idx": (lambda p: truncate(f"{p}.idx", HEADER.size + 30), r"p\.idx has \d+ bytes, its header asks for"),
    "dtype code": (lambda p: patch(f"{p}.idx", 17, b"\x09"), r"dtype code 9"),
    "version": (lambda p: patch(f"{p}.idx", 9, b"\x02"), r"version 2"),
    "lengths": (lambda p: patch(f"{p}.idx", HEADER.size, b"\x01\0\0\0"), r"offsets that do not follow"),
    "documents": (lambda p: patch_documents(f"{p}.idx"), r"document entries that do not run"),
    "foreign meta": (lambda p: Path(f"{p}.meta.json").write_text('{"tokens": 1}'), r"meta\.json does not describe"),
    "broken meta": (lambda p: Path(f"{p}.meta.json").write_text("{"), r"meta\.json is not valid JSON"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_names_the_file(tmp_path: Path, damage: str) -> None:
    prefix = write(tmp_path / "p", documents(np.dtype(np.uint16)), np.dtype(np.uint16))
    TokenFile(prefix)
    harm, message = DAMAGE[damage]
    harm(prefix)
    with pytest.raises(ConfigError, match=message):
        TokenFile(prefix)


def test_prefix_with_ending_is_explained(tmp_path: Path) -> None:
    prefix = write(tmp_path / "p", [np.arange(3)], np.dtype(np.uint16))
    with pytest.raises(ConfigError, match="give the prefix without"):
        TokenFile(f"{prefix}.bin")


@pytest.mark.parametrize("with_metadata", [True, False])
def test_ids_outside_the_vocabulary(tmp_path: Path, with_metadata: bool) -> None:
    prefix = write(tmp_path / "p", [np.array([1, 2, 300]), np.array([4])], np.dtype(np.int32))
    if not with_metadata:
        Path(f"{prefix}.meta.json").unlink()
    TokenFile(prefix, vocab_size=301)
    with pytest.raises(ConfigError, match=r"p\.bin holds token id 300, outside \[0, model.vocab_size=300\)"):
        TokenFile(prefix, vocab_size=300)


def test_ids_are_checked_when_read(tmp_path: Path) -> None:
    """A .meta.json that states a smaller largest id than the file holds does not let the id through."""
    prefix = write(tmp_path / "p", [np.array([1, 2, 300])], np.dtype(np.int32))
    meta = Path(f"{prefix}.meta.json")
    meta.write_text(json.dumps(json.loads(meta.read_text()) | {"max_token_id": 2}))
    file = TokenFile(prefix, vocab_size=300)
    assert file.read(0, 2).tolist() == [1, 2]
    with pytest.raises(ConfigError, match="token id 300"):
        file.read(1, 2)
    patch(f"{prefix}.bin", 0, np.int32(-1).tobytes())
    with pytest.raises(ConfigError, match="token id -1"):
        TokenFile(prefix, vocab_size=300).read(0, 2)


def test_writer_refuses_overwriting_and_leaves_nothing_on_error(tmp_path: Path) -> None:
    prefix = write(tmp_path / "p", [np.arange(3)], np.dtype(np.uint16))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ConfigError, match="exists; choose another"):
        TokenFileWriter(prefix, np.dtype(np.uint16))
    with (
        pytest.raises(ConfigError, match="do not fit uint16"),
        TokenFileWriter(prefix, np.dtype(np.uint16), overwrite=True) as writer,
    ):
        writer.add_document([1, 2])
        writer.add_document([70_000])
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    with TokenFileWriter(prefix, np.dtype(np.uint16), overwrite=True) as writer:
        writer.add_document([9])
    assert TokenFile(prefix).tokens.tolist() == [9]
