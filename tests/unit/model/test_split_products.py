"""Products of bf16 parts against fp64, and what their parts are."""

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_m1.model import split_products
from megatron_m1.model.split_products import parts, product_, split_linear
from megatron_m1.model.vocab_loss import vocab_parallel_nll

TOKENS, HIDDEN, VOCAB, BATCH = 48, 80, 136, 2
BOUNDS = {2: 2**-17, 3: 2**-21}
"""Relative RMS of a result by parts; seen 2^-17.5 and 2^-21.3, the latter that of fp32."""
BOTH = pytest.mark.parametrize("count", [2, 3])
HIDDEN_TYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def example(dtype):
    hidden, weight = normal(TOKENS // BATCH, BATCH, HIDDEN).to(dtype), normal(VOCAB, HIDDEN, seed=1) / 3
    labels = torch.randint(0, VOCAB, (BATCH, TOKENS // BATCH), generator=torch.Generator().manual_seed(2))
    return hidden, weight, labels, normal(BATCH, TOKENS // BATCH, seed=3)


def off(ours, exact):
    return float((ours.double() - exact).norm() / exact.norm())


def exact_loss(hidden, weight, labels, upstream):
    """(losses, gradient of hidden, gradient of weight) in fp64."""
    hidden, weight = hidden.double().requires_grad_(), weight.double().requires_grad_()
    logits = (hidden @ weight.t()).transpose(0, 1)
    nll = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view_as(labels)
    return nll.detach(), *torch.autograd.grad(nll, (hidden, weight), upstream.double())


def split_loss(hidden, weight, labels, upstream, count, chunk_tokens, group=None, sequence_parallel=False):
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    nll = vocab_parallel_nll(
        hidden,
        weight,
        labels,
        group=group,
        sequence_parallel=sequence_parallel,
        chunk_tokens=chunk_tokens,
        weight_parts=count,
    )
    return nll.detach(), *torch.autograd.grad(nll, (hidden, weight), upstream)


def test_parts_add_up():
    x = normal(1000) * torch.exp2(torch.arange(1000.0) / 5 - 100)  # from 2^-100 to 2^100
    for count, bound in ((2, 2**-17), (3, 0.0)):
        found = list(parts(x, count))
        assert [part.dtype for part in found] == [torch.bfloat16] * count
        assert ((sum(part.double() for part in found) - x.double()).abs() <= bound * x.double().abs()).all()
        for ours, same in zip(parts(x.clone(), count, consume=True), found, strict=True):
            assert torch.equal(ours, same)


@BOTH
def test_numbers_that_bf16_holds_are_their_only_part(count):
    x = normal(5).bfloat16()
    assert [part is x for part in parts(x, count)] == [True]


@BOTH
def test_numbers_at_the_ends(count):
    largest = torch.finfo(torch.float32).max
    x = torch.tensor([largest, -largest, 1e-39, float("nan"), float("inf"), -float("inf"), 1.0])
    out = split_linear(x.unsqueeze(1), torch.tensor([[0.5]]), count).squeeze(1)
    torch.testing.assert_close(out[:3].double(), x[:3].double() / 2, rtol=2**-16, atol=2**-133)
    assert out[3].isnan() and not out[4:6].isfinite().any() and out[6] == 0.5
    out = split_linear(torch.tensor([[0.5]]), torch.tensor([[largest]]), count)
    torch.testing.assert_close(out, torch.tensor([[largest / 2]]), rtol=2**-16, atol=0)


@pytest.fixture
def products(monkeypatch):
    """Whether each product of bf16 parts so far was added to what stood there."""
    seen, multiply = [], split_products._multiply_

    def recorded(out, a, b, add):
        seen.append(add)
        assert a.dtype == b.dtype == torch.bfloat16
        multiply(out, a, b, add)

    monkeypatch.setattr(split_products, "_multiply_", recorded)
    return seen


@pytest.mark.parametrize("dtype, needed", [(torch.float32, {2: 3, 3: 6}), (torch.bfloat16, {2: 2, 3: 3})])
@BOTH
def test_products_that_are_needed(count, dtype, needed, products):
    split_linear(normal(4, HIDDEN).to(dtype), normal(VOCAB, HIDDEN), count)
    assert products == [False] + [True] * (needed[count] - 1)


@pytest.mark.parametrize("length", [1, 15, 16, 17, 40])
def test_long_sums_are_cut_into_chains(length, monkeypatch):
    monkeypatch.setattr(split_products, "_CHAIN", 16)
    a, b = normal(3, length), normal(length, 4, seed=1)
    out, more = torch.full((3, 4), float("nan")), torch.ones(3, 4)
    lengths, multiply = [], split_products._multiply_

    def recorded(out, a, b, add):
        lengths.append(a.shape[1])
        multiply(out, a, b, add)

    monkeypatch.setattr(split_products, "_multiply_", recorded)
    product_(out, list(parts(a, 3)), list(parts(b, 3)), 3)
    assert sum(lengths) == 6 * length and max(lengths[:-5]) <= 16
    torch.testing.assert_close(out, a @ b, rtol=1e-5, atol=1e-6)
    product_(more, list(parts(a, 3)), list(parts(b, 3)), 3, add=True)
    torch.testing.assert_close(more, 1 + out, rtol=1e-5, atol=1e-6)


@HIDDEN_TYPES
@BOTH
@pytest.mark.parametrize("chunk_tokens", [TOKENS, 10])
def test_the_loss_and_its_gradients(chunk_tokens, count, dtype, products):
    inputs = example(dtype)
    exact = exact_loss(*inputs)
    ours = split_loss(*inputs, count, chunk_tokens)
    assert [x.dtype for x in ours] == [torch.float32, dtype, torch.float32]
    logits = {2: 3, 3: 6}[count] if dtype == torch.float32 else count  # and the gradient of the weight
    one = logits + {2: 3, 3: 6}[count] + logits
    assert len(products) == (one if chunk_tokens == TOKENS else 5 * (one + logits))
    bounds = [BOUNDS[count]] * 3
    if dtype == torch.bfloat16:
        bounds[1] = 2**-9
        assert torch.count_nonzero(ours[1] != exact[1].to(dtype)) < 0.02 * exact[1].numel()
    for got, expected, bound in zip(ours, exact, bounds, strict=True):
        assert off(got, expected) <= bound


@BOTH
@pytest.mark.parametrize("chunk_tokens", [TOKENS, 10])
def test_logits_become_parts_where_they_are(chunk_tokens, count, monkeypatch):
    """No second fp32 tensor of the size of a chunk's logits in either pass; products on a CPU, which need fp32, left out."""
    monkeypatch.setattr(split_products, "_multiply_", lambda out, a, b, add: out.zero_())

    class Places(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **kwargs or {})
            for tensor in (leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)):
                if tensor.dtype == torch.float32 and tensor.numel() == chunk_tokens * vocab:
                    places.add(tensor.untyped_storage().data_ptr())
            return out

    vocab, places = 1024, set()
    hidden, labels = normal(TOKENS // BATCH, BATCH, HIDDEN), torch.zeros(BATCH, TOKENS // BATCH, dtype=torch.int64)
    with Places():
        split_loss(hidden, normal(vocab, HIDDEN), labels, normal(BATCH, TOKENS // BATCH), count, chunk_tokens)
    assert 1 <= len(places) <= (1 if chunk_tokens == TOKENS else 2)


@HIDDEN_TYPES
@BOTH
def test_logits_and_their_gradients(count, dtype):
    hidden, weight, _, _ = example(dtype)
    upstream = normal(*hidden.shape[:2], VOCAB, seed=4)
    kept = upstream.clone()
    x, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    logits = split_linear(x, w, count)
    grad_x, grad_w = torch.autograd.grad(logits, (x, w), upstream)
    assert torch.equal(upstream, kept) and grad_x.dtype == dtype
    flat, rows = upstream.double().flatten(0, 1), hidden.double().flatten(0, 1)
    assert off(logits.detach(), hidden.double() @ weight.double().t()) <= BOUNDS[count]
    assert off(grad_w, flat.t() @ rows) <= BOUNDS[count]
    assert off(grad_x, (flat @ weight.double()).view_as(hidden)) <= (
        2**-9 if dtype == torch.bfloat16 else BOUNDS[count]
    )


@pytest.mark.parametrize("frozen", [0, 1])
def test_a_frozen_input_takes_no_gradient(frozen):
    inputs = list(example(torch.float32)[:2])
    leaf = inputs[1 - frozen].requires_grad_()
    split_linear(*inputs, 2).sum().backward()
    assert leaf.grad is not None and inputs[frozen].grad is None


def _on_a_rank(rank, world, count, sequence_parallel):
    hidden, weight, labels, upstream = example(torch.float32)
    hidden = hidden.chunk(world)[rank] if sequence_parallel else hidden
    group = dist.group.WORLD
    return split_loss(hidden, weight.chunk(world)[rank], labels, upstream, count, 16, group, sequence_parallel)


@BOTH
@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_two_ranks_equal_one(sequence_parallel, count, ranks):
    nll, grad_hidden, grad_weight = split_loss(*example(torch.float32), count, TOKENS)
    for rank, ours in enumerate(ranks(2, _on_a_rank, count, sequence_parallel)):
        shard = grad_hidden.chunk(2)[rank] if sequence_parallel else grad_hidden
        for got, expected in zip(ours, (nll, shard, grad_weight.chunk(2)[rank]), strict=True):
            assert off(got, expected.double()) <= 1e-6
