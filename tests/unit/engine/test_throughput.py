import pytest

from megatron_m1 import platform
from megatron_m1.config.schema import Config, LoggingConfig, ModelConfig, TrainingConfig
from megatron_m1.engine.flops import training_flops_per_token
from megatron_m1.engine.throughput import Throughput

MODEL = ModelConfig(num_hidden_layers=8)


def config(peak=None):
    return Config(model=MODEL, training=TrainingConfig(seq_length=1000), logging=LoggingConfig(peak_tflops=peak))


def test_figures_are_those_of_one_device():
    figures = Throughput(config(peak=100.0), world_size=4).figures(8, seconds=2.0)
    per_token = training_flops_per_token(MODEL, 1000)
    assert figures["step_time_s"] == 2.0 and figures["tokens_per_s"] == 4000.0
    assert figures["tflops"] == pytest.approx(1000.0 * per_token / 1e12, rel=1e-12)
    assert figures["mfu"] == pytest.approx(figures["tflops"] / 100.0, rel=1e-12)


def test_mfu_is_left_out_where_the_peak_is_unknown(monkeypatch):
    monkeypatch.setattr(platform, "device_name", lambda: "cpu")
    assert "mfu" not in Throughput(config(), world_size=1).figures(8, seconds=1.0)
    monkeypatch.setattr(platform, "device_name", lambda: "NVIDIA H100 80GB HBM3")
    figures = Throughput(config(), world_size=1).figures(8, seconds=1.0)
    assert figures["mfu"] == pytest.approx(figures["tflops"] / 989, rel=0.01)
