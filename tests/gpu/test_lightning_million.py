"""1,048,576 tokens of 64 heads on one GPU: memory, and errors against float64. Needs the GPU to itself."""

import gc

import pytest
import torch
from m1_kernels import lightning_attention, lightning_attention_packed, slopes

from tests.gpu.lightning_checks import DEVICE, error_per_head

pytestmark = pytest.mark.gpu

TOKENS, HEADS, D = 1_048_576, 64, 128
SAMPLED = (0, 31, 63)
BOUND = 2.6e-3
"""1.5 times the rounding of a result to bfloat16."""


def test_a_million_tokens() -> None:
    """q, k, v, o and their gradients fill 128 GiB; under both strategies at most 3 GiB come on top."""
    gc.collect()
    torch.cuda.empty_cache()
    tensors = 8 * TOKENS * HEADS * D * 2
    if torch.cuda.mem_get_info()[0] < tensors + 7 * 2**30:
        pytest.skip(f"needs {tensors / 2**30 + 7:.0f} GiB of free GPU memory")
    decay = slopes(HEADS, 40, 80).to(DEVICE)
    generator = torch.Generator(DEVICE).manual_seed(0)

    def normal(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(shape, device=DEVICE, generator=generator, dtype=dtype)

    qkv = normal(1, TOKENS, HEADS, 3 * D, dtype=torch.bfloat16).requires_grad_()
    do = normal(1, TOKENS, HEADS, D, dtype=torch.bfloat16)
    initial, dfinal = normal(1, HEADS, D, D).requires_grad_(), normal(1, HEADS, D, D)
    found = []
    for strategy in ("fused", "segmented"):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        kept = torch.cuda.memory_allocated() - qkv.nbytes - do.nbytes
        o, final = lightning_attention_packed(
            qkv, decay, initial_state=initial, return_final_state=True, activation=None, implementation="triton",
            strategy=strategy,
        )  # fmt: skip
        dqkv, dinitial = torch.autograd.grad([o, final], [qkv, initial], [do, dfinal])
        assert torch.cuda.max_memory_allocated() - kept <= tensors + 3 * 2**30
        sampled = {"o": o.detach()[:, :, SAMPLED].clone(), "last": o.detach()[:, -256:].clone()}
        del o
        sampled |= {"dqkv": dqkv[:, :, SAMPLED].clone(), "final_state": final.detach(), "dinitial_state": dinitial}
        del dqkv, final
        found.append(sampled)
    for head in range(HEADS):
        one = slice(head, head + 1)
        part = qkv.detach()[:, :, one].double()
        if head not in SAMPLED:
            last, final = lightning_attention(
                *part.split(D, dim=-1), decay[one], initial_state=initial.detach()[:, one].double(),
                return_final_state=True, implementation="torch",
            )  # fmt: skip
            for ours in found:
                assert error_per_head(ours["last"][:, :, one], last[:, -256:], "o").max() <= BOUND, head
                assert error_per_head(ours["final_state"][:, one], final, "state").max() <= 1e-4, head
            continue
        index = slice(SAMPLED.index(head), SAMPLED.index(head) + 1)
        part, state = part.requires_grad_(), initial.detach()[:, one].double().requires_grad_()
        o, final = lightning_attention(
            *part.split(D, dim=-1), decay[one], initial_state=state, return_final_state=True, implementation="torch"
        )
        torch.autograd.backward([o, final], [do[:, :, one].double(), dfinal[:, one].double()])
        for ours in found:
            for tokens in (
                slice(0, 4096),
                slice(TOKENS // 2, TOKENS // 2 + 4096),
                slice(TOKENS - 4096, None),
                slice(None),
            ):
                assert error_per_head(ours["o"][:, tokens, index], o.detach()[:, tokens], "o").max() <= BOUND
                for actual, exact in zip(
                    ours["dqkv"][:, tokens, index].split(D, dim=-1), part.grad[:, tokens].split(D, dim=-1)
                ):
                    assert error_per_head(actual, exact, "dq").max() <= BOUND
            assert error_per_head(ours["final_state"][:, one], final.detach(), "state").max() <= 1e-4
            assert error_per_head(ours["dinitial_state"][:, one], state.grad, "state").max() <= 1e-4
        del o, final, part, state
