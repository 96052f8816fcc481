"""What a model is not built with."""

import pytest
import torch

from megatron_m1.config import ConfigError
from megatron_m1.engine.equality import equality_config
from megatron_m1.model.build import build_model


def test_a_strategy_of_the_triton_kernels_is_refused_on_a_cpu(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    config = equality_config({}, {"lightning_strategy": "fused"})
    with pytest.raises(
        ConfigError, match=r"training\.lightning_strategy=fused is one of the Triton kernels, which do not run"
    ):
        build_model(config, None, device=torch.device("cpu"))
