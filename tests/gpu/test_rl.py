"""On a GPU: two steps of the RL loop in bf16, whose training finds its rollouts' log-probabilities. Run by `bash tests/gpu/run.sh`."""

import math
from pathlib import Path

import pytest

from megatron_m1 import platform
from megatron_m1.config.schema import ModelConfig
from megatron_m1.rl.journal import read_journal
from tests.e2e.test_rl import held_out, metrics, options, rl_rank, supervised_start

pytestmark = pytest.mark.gpu

MODEL = ModelConfig(
    vocab_size=264, hidden_size=128, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=32,
    intermediate_size=64, num_local_experts=4, attn_type_list=[0, 0, 0, 1], rotary_dim=16,
)  # fmt: skip


def test_two_steps_on_a_supervised_start(ranks, tmp_path: Path):
    ranks(1, supervised_start, tmp_path, MODEL, "bf16", timeout_s=300)
    ranks(1, rl_rank, options(tmp_path, "gpu", training__steps=2), timeout_s=300)
    steps = metrics(tmp_path, "gpu")
    assert steps.keys() == {1, 2} and held_out(tmp_path, "gpu").keys() == {0, 2}
    for step in steps.values():
        numbers = {key: value for key, value in step.items() if isinstance(value, float)}
        assert all(math.isfinite(value) for value in numbers.values()), numbers
        assert step["updates"] == 4 and step["kept"] > 0 and step["grad_norm"] > 0
        # bf16: the engine's passes and training's round at other places.
        assert step["pearson"] > 0.99 and step["max_abs_diff"] < 0.5 and 0 <= step["k3_kl"] < 1e-2
        assert step["routing_replayed"] > 0 and step["routing_changed_share"] < 0.1
        assert step["first_is_weight"] == pytest.approx(1.0, abs=1e-2)
    records = list(read_journal(tmp_path / "gpu/journal/step_00000002.replica_00000.jsonl"))
    assert len(records) == 2 * steps[2]["sampled"]  # a sample and its verdict
    assert platform.is_cuda()
