import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest

from megatron_m1.rl.journal import Journal, JournalCorrupt, decode_array, encode_array, read_journal

RECORDS = [{"id": i, "text": "ü\n" * i, "logp": [-0.1 * i, -1e-300]} for i in range(4)]

WRITER = textwrap.dedent(
    """
    import sys
    from megatron_m1.rl.journal import Journal
    journal = Journal(sys.argv[1], sync_every=int(sys.argv[2]))
    while True:
        journal.append({"id": journal.records, "text": "x" * (journal.records * 997 % 200_000)})
        print(journal.records, flush=True)
    """
)


def written(path):
    with Journal(path, sync_every=0) as journal:
        for record in RECORDS:
            journal.append(record)
    return path.read_bytes()


def test_records_come_back_and_lines_are_json(tmp_path):
    path = tmp_path / "j.jsonl"
    content = written(path)
    assert list(read_journal(path)) == RECORDS
    assert [json.loads(line)["record"] for line in content.splitlines()] == RECORDS
    with Journal(path) as journal:
        assert (journal.records, journal.dropped_bytes) == (4, 0)
        journal.append({"id": 4})
    assert [record["id"] for record in read_journal(path)] == [0, 1, 2, 3, 4]


def test_a_file_cut_at_any_byte_reopens_with_the_whole_records_before_the_cut(tmp_path):
    path = tmp_path / "j.jsonl"
    content = written(path)
    ends = [0, *(i + 1 for i, byte in enumerate(content) if byte == ord("\n"))]
    for cut in range(len(content) + 1):
        path.write_bytes(content[:cut])
        whole = sum(end <= cut for end in ends) - 1
        assert list(read_journal(path)) == RECORDS[:whole]
        with Journal(path, sync_every=0) as journal:
            assert (journal.records, journal.dropped_bytes) == (whole, cut - ends[whole])
            journal.append({"id": "next"})
        assert list(read_journal(path)) == [*RECORDS[:whole], {"id": "next"}]


def test_any_flipped_byte_is_seen_and_damage_before_the_end_is_never_dropped(tmp_path):
    path = tmp_path / "j.jsonl"
    content = written(path)
    last = content.rstrip(b"\n").rfind(b"\n") + 1
    for at in range(0, len(content), 3):
        path.write_bytes(content[:at] + bytes([content[at] ^ 0x10]) + content[at + 1 :])
        if at < last:
            with pytest.raises(JournalCorrupt, match="damaged"):
                list(read_journal(path))
            with pytest.raises(JournalCorrupt):
                Journal(path)
            assert path.stat().st_size == len(content)
        else:
            assert list(read_journal(path)) == RECORDS[:-1]


def test_zeros_after_a_power_loss_are_a_torn_tail(tmp_path):
    path = tmp_path / "j.jsonl"
    content = written(path)
    path.write_bytes(content + bytes(4096))
    with Journal(path) as journal:
        assert (journal.records, journal.dropped_bytes) == (4, 4096)


@pytest.mark.parametrize("sync_every", [0, 1])
def test_a_killed_writer_loses_nothing_it_was_told_is_written(tmp_path, sync_every):
    path = tmp_path / "j.jsonl"
    dice = random.Random(sync_every)
    acknowledged = 0
    for _ in range(3):
        command = [sys.executable, "-c", WRITER, str(path), str(sync_every)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
            acknowledged = int(writer.stdout.readline())
            time.sleep(dice.uniform(0, 0.15))
            os.kill(writer.pid, signal.SIGKILL)
            acknowledged = int(([acknowledged, *writer.stdout.read().split()])[-1])
        with Journal(path) as journal:
            assert acknowledged <= journal.records <= acknowledged + 1
        assert [record["id"] for record in read_journal(path)] == list(range(journal.records))


def test_one_writer_only(tmp_path):
    with Journal(tmp_path / "j.jsonl"), pytest.raises(BlockingIOError):
        Journal(tmp_path / "j.jsonl")
    Journal(tmp_path / "j.jsonl").close()


def test_a_failed_write_leaves_no_trace(tmp_path, monkeypatch):
    path = tmp_path / "j.jsonl"
    with Journal(path) as journal:
        journal.append({"id": 0})
        real = os.write
        calls = []

        def full_disk(fd, data):
            calls.append(len(data))
            if len(calls) > 1:
                raise OSError(28, "No space left on device")
            return real(fd, data[:20])

        monkeypatch.setattr(os, "write", full_disk)
        with pytest.raises(OSError, match="No space"):
            journal.append({"id": 1})
        monkeypatch.undo()
        with pytest.raises(ValueError):
            journal.append({"id": float("nan")})
        journal.append({"id": 2})
    assert [record["id"] for record in read_journal(path)] == [0, 2]


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "int64", "bool", ">f8"])
def test_arrays_come_back_bit_for_bit(dtype, compress):
    array = (np.random.default_rng(0).normal(size=(3, 5)) * 100).astype(dtype)
    if dtype == "float32":
        array[0, :2] = [np.nan, -0.0]
    back = decode_array(json.loads(json.dumps(encode_array(array, compress=compress))))
    assert back.dtype == array.dtype.newbyteorder("<") and back.shape == array.shape
    assert back.tobytes() == array.astype(array.dtype.newbyteorder("<")).tobytes()


def test_compressed_arrays_are_small_and_old_ones_are_read():
    experts = np.random.default_rng(0).integers(0, 4, (500, 4, 2)).astype(np.uint8)
    small, plain = encode_array(experts, compress=True), encode_array(experts)
    assert len(small["zlib"]) < 0.4 * len(plain["base64"]) and "base64" not in small
    old = {"dtype": "|u1", "shape": [3], "base64": "AQID"}
    assert decode_array(old).tolist() == [1, 2, 3] and encode_array(np.array([1, 2, 3], np.uint8)) == old


def test_slow_records_are_synchronised_one_by_one_and_fast_ones_now_and_then(tmp_path, monkeypatch):
    now, synced = [100.0], []

    def fsync(fd):
        synced.append(now[0])
        now[0] += 1.0

    monkeypatch.setattr("time.monotonic", lambda: now[0])
    with Journal(tmp_path / "j.jsonl", sync_every=None) as journal:
        monkeypatch.setattr(os, "fsync", fsync)
        for wait in (60.0, 60.0, 1.0, 10.0, 10.0, 10.0):
            now[0] += wait
            journal.append({"id": 0})
    # A second each: the next one not before 19 others have passed; the last one on closing.
    assert synced == [160.0, 221.0, 243.0, 254.0]
