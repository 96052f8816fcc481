"""What only the Triton decoding step promises: repeatable bits, offsets beyond 31 bits, any strides of its inputs."""

import torch
from m1_kernels import lightning_attention_step, slopes

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def step(*inputs: torch.Tensor, **options: torch.Tensor) -> torch.Tensor:
    return lightning_attention_step(*inputs, implementation="triton", **options)


def test_repeated_steps_are_bitwise_equal_whatever_else_is_in_the_batch() -> None:
    q, k, v = torch.randn(3, 4, 2, 48, device=DEVICE, dtype=torch.bfloat16)
    state, decay = torch.randn(4, 2, 48, 48, device=DEVICE), slopes(2, 0, 8).to(DEVICE)
    first, second, alone = state.clone(), state.clone(), state[2:3].clone()
    out = step(q, k, v, first, decay)
    assert torch.equal(out, step(q, k, v, second, decay)) and torch.equal(first, second)
    assert torch.equal(out[2:3], step(q[2:3], k[2:3], v[2:3], alone, decay)) and torch.equal(first[2:3], alone)


def test_a_pool_beyond_31_bits_of_offset() -> None:
    """Rows of the pool 2^30 elements apart, in 8 GiB that are never touched elsewhere."""
    pool = torch.empty(2**31 + 512, device=DEVICE).as_strided((3, 2, 16, 16), (2**30, 256, 16, 1))
    states = torch.randn(3, 2, 16, 16, device=DEVICE)
    pool.copy_(states)
    q, k, v = torch.randn(3, 3, 2, 16, device=DEVICE)
    decay = slopes(2, 0, 8).to(DEVICE)
    slots = torch.tensor([2, -1, 1], dtype=torch.int32, device=DEVICE)
    assert torch.equal(step(q, k, v, pool, decay, slots=slots), step(q, k, v, states, decay, slots=slots))
    assert torch.equal(pool, states)
