"""Our reader and writer of the native format against megatron-core's dist_checkpointing, in one gloo process."""

import os
import queue
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import distributed

from megatron_m1.checkpoint.dcp import NativeReader, NativeWriter
from megatron_m1.checkpoint.hf import import_hf, verify_hf
from megatron_m1.checkpoint.names import join, native_layout
from megatron_m1.checkpoint.native import load_checkpoint
from megatron_m1.config.errors import ConfigError
from megatron_m1.config.schema import Config, ParallelConfig, TrainingConfig
from megatron_m1.engine.trainer import Trainer
from megatron_m1.model.build import sharded_parameters
from megatron_m1.parallel import destroy_groups, init_groups
from tests.model_cases import CASES, random_weights

MODEL = CASES["gqa_8"]


@pytest.fixture
def core(tmp_path: Path) -> Iterator:
    """megatron.core.dist_checkpointing inside a process group of one."""
    from megatron.core import dist_checkpointing

    if not distributed.is_initialized():
        distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1)
        yield dist_checkpointing
        distributed.destroy_process_group()
    else:
        yield dist_checkpointing


@pytest.fixture
def native_weights() -> dict[str, torch.Tensor]:
    weights = random_weights(MODEL, seed=0, dtype=torch.bfloat16)
    return {
        native.name: join(
            native, lambda piece: weights[piece.name], MODEL, start=0, stop=native.shape[0],
            dtype=torch.float32 if native.fp32 else torch.bfloat16,
        )
        for native in native_layout(MODEL)
    }  # fmt: skip


def sharded(core, name: str, shape: tuple[int, ...], dtype: torch.dtype, *offsets: tuple[int, int, int]):
    return core.ShardedTensor.from_rank_offsets(name, torch.zeros(shape, dtype=dtype), *offsets)


def test_core_loads_an_import_whole_and_in_slices(core, write_hf, tmp_path, native_weights):
    step = import_hf(write_hf(MODEL), tmp_path / "native", "minimax_m1", log=lambda _: None)
    state = {name: sharded(core, name, tuple(w.shape), w.dtype) for name, w in native_weights.items()}
    loaded = core.load(state, str(step))
    for name, weight in native_weights.items():
        assert torch.equal(loaded[name], weight), name
    fc1, qkv, out = (
        "decoder.layers.0.mlp.experts.fc1",
        "decoder.layers.3.self_attention.qkv_proj.weight",
        "decoder.layers.0.self_attention.out_proj.weight",
    )
    E, two, F, h = native_weights[fc1].shape
    part = core.load(
        {
            "experts": sharded(core, fc1, (E // 2, two, F // 2, h), torch.bfloat16, (0, 1, 2), (2, 1, 2)),
            "column": sharded(core, qkv, (native_weights[qkv].shape[0] // 2, h), torch.float32, (0, 1, 2)),
            "row": sharded(core, out, (h, native_weights[out].shape[1] // 2), torch.bfloat16, (1, 1, 2)),
        },
        str(step),
        validate_access_integrity=False,
    )
    assert torch.equal(part["experts"], native_weights[fc1][E // 2 :, :, F // 2 :])
    assert torch.equal(part["column"], native_weights[qkv].chunk(2)[1].float())
    assert torch.equal(part["row"], native_weights[out].chunk(2, dim=1)[1])


def test_imported_weights_load_into_the_model(core, write_hf, tmp_path, native_weights):
    step = import_hf(write_hf(MODEL), tmp_path / "native", "minimax_m1", log=lambda _: None)
    config = Config(model=MODEL, training=TrainingConfig(precision="fp32"))
    trainer = Trainer(config, init_groups(ParallelConfig(), seed=0), train=False)
    assert load_checkpoint(trainer, config, path=step, weights_only=True) == 0
    loaded = sharded_parameters(trainer.models)
    assert loaded.keys() == native_weights.keys()
    for name, weight in native_weights.items():
        assert torch.equal(loaded[name].data, weight.float()), name
    file = step / "__0_2.distcp"
    damaged = bytearray(file.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    file.write_bytes(damaged)
    with pytest.raises(ConfigError, match=r"__0_2.distcp is damaged: the checksum of decoder.layers.1"):
        load_checkpoint(trainer, config, path=step, weights_only=True)
    destroy_groups()


def test_we_read_what_core_saves_in_chunks(core, write_hf, tmp_path, native_weights, monkeypatch):
    """Chunks as EP2 x ETP2, column- and row-parallel ranks write them, beside optimizer state and objects."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    monkeypatch.setattr(filesystem_async, "get_write_results_queue", queue.Queue)  # upstream: a spawned manager process
    step = tmp_path / "save" / "step_00000003"
    step.mkdir(parents=True)
    cuts = {"fc1": (0, 2), "fc2": (0, 2), "qkv_proj.weight": (0,), "out_proj.weight": (1,), "o_proj.weight": (1,)}
    state: dict = {"step": 3, "optimizer": {"lr": 0.1}}
    for name, weight in native_weights.items():
        chunks = [((), weight)]
        for axis in next((axes for suffix, axes in cuts.items() if name.endswith(suffix)), ()):
            chunks = [
                ((*offsets, (axis, index, 2)), half.contiguous())
                for offsets, chunk in chunks
                for index, half in enumerate(chunk.chunk(2, dim=axis))
            ]
        for number, (offsets, chunk) in enumerate(chunks):
            state[f"{name}/{number}"] = core.ShardedTensor.from_rank_offsets(name, chunk, *offsets)
    moment = "optimizer.state.exp_avg.output_layer.weight"
    state[moment] = core.ShardedTensor.from_rank_offsets(moment, torch.zeros(67, 96))
    core.save(state, str(step), validate_access_integrity=False)
    reader = NativeReader(step)
    for name, weight in native_weights.items():
        assert reader.shapes[name] == tuple(weight.shape) and reader.dtypes[name] == weight.dtype
        assert torch.equal(reader.read(name, 0, len(weight)), weight), name
    experts = MODEL.num_local_experts
    assert reader.cuts("decoder.layers.0.mlp.experts.fc1") == [(0, experts // 2), (experts // 2, experts)]
    source = write_hf(MODEL)
    imported = import_hf(source, tmp_path / "native", "minimax_m1", log=lambda _: None)
    os.link(imported / "config.yaml", step / "config.yaml")
    result = verify_hf(step, source, "minimax_m1", log=lambda _: None)
    assert result.mismatches == [] and result.rounded == []


def test_writer_and_reader_agree_on_parts(tmp_path):
    data = torch.arange(48.0).reshape(6, 4, 2)
    with NativeWriter(tmp_path) as writer:
        writer.start_file()
        writer.write("a", (6, 4, 2), 0, data[:2].clone())
        writer.start_file()
        writer.write("a", (6, 4, 2), 2, data[2:].clone())
        writer.finish({})
    reader = NativeReader(tmp_path)
    assert reader.cuts("a") == [(0, 2), (2, 6)]
    assert torch.equal(reader.read("a", 0, 6), data)
    assert torch.equal(reader.read("a", 1, 4), data[1:4])
    assert reader.largest_chunk_bytes("a") == 4 * 32


def test_incomplete_tensor_is_named(tmp_path):
    with NativeWriter(tmp_path) as writer:
        writer.start_file()
        writer.write("a", (6, 2), 0, torch.zeros(4, 2))
        writer.finish({})
    with pytest.raises(ConfigError, match=r"a in .* holds 8 of 12 elements"):
        NativeReader(tmp_path).read("a", 0, 6)


def test_folder_without_metadata_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"\.metadata cannot be read"):
        NativeReader(tmp_path)
