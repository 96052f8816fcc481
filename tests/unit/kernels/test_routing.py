"""Routing of a decoding step against its definition in Python."""

import pytest
import torch
from m1_kernels import route
from m1_kernels.routing import MAX_TOKENS, ROUTE

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("implementation", list(ROUTE))
@pytest.mark.parametrize(("tokens", "experts", "top_k"), [(1, 4, 2), (5, 16, 2), (9, 3, 3), (3, 12, 1), (0, 4, 2)])
def test_pairs_are_sorted_by_expert(implementation, tokens, experts, top_k):
    torch.manual_seed(tokens)
    logits = torch.randn(experts, tokens).t()  # any strides
    routed = [x.cpu() for x in route(logits.to(DEVICE), top_k, implementation=implementation)]
    scores, chosen = logits.topk(top_k, dim=-1)
    shares = scores.softmax(dim=-1).flatten()
    pairs = sorted(range(tokens * top_k), key=chosen.flatten().tolist().__getitem__)
    assert torch.equal(routed[0], chosen)
    assert routed[1].tolist() == [pair // top_k for pair in pairs]
    torch.testing.assert_close(routed[2], shares[pairs], rtol=1e-6, atol=1e-7)
    assert routed[3].tolist() == [pairs.index(pair) for pair in range(len(pairs))]
    assert routed[4].tolist() == [int((chosen <= expert).sum()) for expert in range(experts)]
    assert [x.dtype for x in routed] == [torch.int64, torch.int64, torch.float32, torch.int64, torch.int32]


@pytest.mark.parametrize("implementation", list(ROUTE))
def test_logits_that_are_not_numbers_still_name_experts(implementation):
    """The sampler reports them; a wrong index on the way there would end the process."""
    routed = route(torch.full((2, 3), torch.nan, device=DEVICE), 2, implementation=implementation)
    assert routed.experts.min() >= 0 and routed.experts.max() < 3


def test_what_does_not_fit_is_named():
    logits = torch.zeros(MAX_TOKENS + 1, 2, device=DEVICE)
    with pytest.raises(ValueError, match="at most 1024 tokens"):
        route(logits, 1, implementation="triton")
    with pytest.raises(ValueError, match="top_k=3"):
        route(logits, 3)
