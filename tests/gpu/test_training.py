"""On a GPU: the numbers of the CPU, bf16 near fp32, checkpoints and generation. Run by `bash tests/gpu/run.sh`."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_m1 import platform
from megatron_m1.checkpoint.native import Checkpointer
from megatron_m1.engine.equality import RankResult, compare, equality_batches, equality_config, run_layout
from megatron_m1.engine.trainer import Trainer
from megatron_m1.parallel import destroy_groups, init_groups
from tests.distributed.test_triton_model import LAYER, train

pytestmark = pytest.mark.gpu

CPU_REFERENCE = """
import sys, torch
from megatron_m1.platform.rank_pool import RankPool
from megatron_m1 import platform
platform.setup()
from megatron_m1.engine.equality import equality_config, run_layout
if __name__ == "__main__":
    with RankPool(1) as pool:
        torch.save(pool.run(run_layout, (equality_config({}, {}),), timeout_s=300)[0], sys.argv[1])
"""


@pytest.fixture(scope="module")
def cpu(tmp_path_factory) -> RankResult:
    """The five steps of the equality table on this machine's CPU, from a process that sees no GPU."""
    folder: Path = tmp_path_factory.mktemp("cpu")
    script = folder / "reference.py"
    script.write_text(CPU_REFERENCE)
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    subprocess.run(
        [sys.executable, str(script), str(folder / "reference.pt")], check=True, env=environment, timeout=600
    )
    return torch.load(folder / "reference.pt", weights_only=False)


def test_this_is_a_gpu():
    assert platform.is_cuda()


def test_fp32_equals_the_cpu(ranks, cpu):
    d = compare(cpu, ranks(1, run_layout, equality_config({}, {}), timeout_s=300))
    print(d)
    assert max(d.loss, d.grad_norm, d.aux_loss, d.gradient) <= 1e-5, d
    assert d.weight <= 1e-4, d  # Adam divides rounding of near-zero gradients by their own size


@pytest.mark.parametrize(
    "training", [{"recompute": "full"}, {"recompute": "selective", "recompute_modules": ["core_attn", "moe"]}]
)
def test_recompute_changes_nothing(training, ranks):
    plain = ranks(1, run_layout, equality_config({}, {}), timeout_s=300)[0]
    d = compare(plain, ranks(1, run_layout, equality_config({}, training), timeout_s=300))
    assert max(d.loss, d.grad_norm, d.gradient) <= 1e-5, d


def test_bf16_stays_near_fp32(ranks, cpu):
    losses = ranks(1, run_layout, equality_config({}, {}, precision="bf16"), timeout_s=300)[0].losses
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(cpu.losses), rtol=5e-3, atol=0)


@pytest.mark.parametrize(
    ("precision", "head_dim", "bound"), [("fp32", 16, 5e-5), ("fp32", 128, 5e-5), ("bf16", 128, 0.1)]
)
def test_a_step_on_the_triton_kernels(precision, head_dim, bound, ranks):
    """Heads of the equality table's 12 take the torch paths. In bf16 the torch paths' own worst gradient is 0.04 from fp32."""
    [(_, _, reference)] = ranks(1, train, {}, "torch", "auto", precision, head_dim, timeout_s=300)
    [(ran, _, result)] = ranks(1, train, {}, "triton", "auto", precision, head_dim, timeout_s=300)
    assert ran == LAYER | {"lightning_attention_packed"}
    d = compare(reference, [result])
    assert max(d.loss, d.grad_norm, d.gradient) <= bound, d


def _resume(rank: int, world: int, folder: str) -> tuple[list[float], list[float]]:
    """Losses of steps 4 and 5 without and with a save and load before them."""
    config = equality_config({}, {}, precision="bf16")
    config.checkpoint = replace(config.checkpoint, save=folder, load=folder)
    runs = []
    for resumed in (False, True):
        groups = init_groups(config.parallel, seed=1)
        trainer = Trainer(config, groups)
        checkpoints = Checkpointer(config, trainer)
        first = checkpoints.load() if resumed else 0
        losses = []
        for step in range(first, 5):
            losses.append(trainer.train_step(equality_batches(config, step), lr=1e-3).loss)
            if step == 2 and not resumed:
                checkpoints.save(3)
        runs.append(losses[-2:])
        destroy_groups()
    return runs[0], runs[1]


def test_resume_continues(ranks, tmp_path):
    straight, resumed = ranks(1, _resume, str(tmp_path), timeout_s=300)[0]
    torch.testing.assert_close(torch.tensor(resumed), torch.tensor(straight), rtol=1e-4, atol=0)
