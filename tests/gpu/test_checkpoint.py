"""Checkpoints of a run on one GPU: resume to the bit, with synchronous and asynchronous saves."""

import pytest
import torch

from tests.distributed.checkpoint_runs import tiny_config, train

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("background", [False, True], ids=["at once", "asynchronous"])
@pytest.mark.parametrize("distributed_optimizer", [True, False], ids=["distributed optimizer", "plain optimizer"])
def test_a_gpu_resumes_bit_identically(ranks, tmp_path, distributed_optimizer, background):
    config = tiny_config(tmp_path, precision="bf16", distributed_optimizer=distributed_optimizer)
    config.checkpoint.async_save = background
    before = ranks(1, train, config, 5, (3,), True)[0]
    load = tiny_config(None, tmp_path, precision="bf16", distributed_optimizer=distributed_optimizer)
    after = ranks(1, train, load, 5, (), True)[0]
    assert after.start == 3 and after.steps == before.steps[3:]
    assert [name for name in before.state if not torch.equal(before.state[name], after.state[name])] == []
