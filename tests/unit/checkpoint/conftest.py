"""Tiny Hugging Face directories with distinct values in every tensor."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from megatron_m1.checkpoint.hf_config import to_hf_config
from megatron_m1.checkpoint.names import HfFormat
from megatron_m1.config.schema import ModelConfig
from tests.model_cases import random_weights


@pytest.fixture
def write_hf(tmp_path: Path) -> Callable[..., Path]:
    """write_hf(model, format, dtype, files) -> directory `source` of random weights over `files` shards."""

    def write(
        model: ModelConfig, format: HfFormat = "minimax_m1", dtype: torch.dtype = torch.bfloat16, files: int = 3
    ) -> Path:
        folder = tmp_path / "source"
        folder.mkdir()
        weights = random_weights(model, seed=0, dtype=dtype)
        for name in weights:
            if name.endswith("moe.gate.weight"):
                weights[name] = weights[name].float()
        shards: list[dict[str, Tensor]] = [{} for _ in range(files)]
        for position, (name, tensor) in enumerate(weights.items()):
            shards[position % files][name] = tensor.contiguous()
        names = [f"model-{number:05d}-of-{files:05d}.safetensors" for number in range(1, files + 1)]
        for name, shard in zip(names, shards, strict=True):
            save_file(shard, folder / name, metadata={"format": "pt"})
        weight_map = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        config = to_hf_config(model, format, dtype=str(dtype).removeprefix("torch."))
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return write
