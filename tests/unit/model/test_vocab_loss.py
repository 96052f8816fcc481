"""The chunked loss of the head against the logits written out, on one rank and over tensor-parallel ranks."""

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_m1.config.schema import ParallelConfig
from megatron_m1.model import vocab_loss
from megatron_m1.model.vocab_loss import vocab_parallel_nll
from megatron_m1.parallel import init_groups

LENGTH, BATCH, HIDDEN, VOCAB = 10, 3, 8, 24


def example(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    hidden, weight = normal(LENGTH, BATCH, HIDDEN) * 3, normal(VOCAB, HIDDEN)
    labels = torch.randint(0, VOCAB, (BATCH, LENGTH), generator=generator)
    return hidden, weight, labels, normal(BATCH, LENGTH)


def plain(hidden, weight, labels, upstream):
    """(losses, gradient of hidden, gradient of weight) with all logits in memory."""
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    logits = (hidden @ weight.t()).transpose(0, 1)
    nll = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view_as(labels)
    return nll.detach(), *torch.autograd.grad(nll, (hidden, weight), upstream)


def chunked(hidden, weight, labels, upstream, chunk_tokens, group=None, sequence_parallel=False):
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    nll = vocab_parallel_nll(
        hidden, weight, labels, group=group, sequence_parallel=sequence_parallel, chunk_tokens=chunk_tokens
    )
    return nll.detach(), *torch.autograd.grad(nll, (hidden, weight), upstream)


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-6), (torch.float64, 1e-13)])
@pytest.mark.parametrize("chunk_tokens", [1, 3, 9, 12, 29, 30, 99])  # 10 rows in spans of 1, 1, 3, 4, 5 and 10
def test_equals_the_loss_with_all_logits(chunk_tokens, dtype, bound):
    inputs = example(dtype)
    for ours, expected in zip(chunked(*inputs, chunk_tokens), plain(*inputs)):
        assert ours.dtype == dtype
        assert (ours - expected).norm() <= bound * expected.norm()


def test_spans_are_even_and_cover_every_row():
    spans = [list(vocab_loss._spans(10, limit)) for limit in (3, 4, 9, 10, 99)]
    assert [[s.stop - s.start for s in spans] for spans in spans] == [[3, 3, 3, 1], [4, 4, 2], [5, 5], [10], [10]]


@pytest.mark.parametrize("chunk_tokens", [9, 30])
def test_masked_tokens_give_exact_zeros_and_scaled_ones_scale(chunk_tokens):
    hidden, weight, labels, upstream = example()
    for gradient in chunked(hidden, weight, labels, torch.zeros_like(upstream), chunk_tokens)[1:]:
        assert torch.count_nonzero(gradient) == 0
    _, grad_hidden, _ = chunked(hidden, weight, labels, upstream * (torch.arange(LENGTH) < 4), chunk_tokens)
    assert torch.count_nonzero(grad_hidden[4:]) == 0 and torch.count_nonzero(grad_hidden[:4]) > 0


def test_logits_far_apart_do_not_overflow():
    hidden, weight, labels, upstream = example()
    for values in chunked(hidden * 1e4, weight, labels, upstream, 9):
        assert values.isfinite().all()


def test_hidden_states_in_bf16_meet_an_fp32_head():
    hidden, weight, labels, upstream = example()
    low = hidden.bfloat16()
    nll, grad_hidden, grad_weight = chunked(low, weight, labels, upstream, 9)
    expected = plain(low.float(), weight, labels, upstream)
    assert (nll.dtype, grad_hidden.dtype, grad_weight.dtype) == (torch.float32, torch.bfloat16, torch.float32)
    assert (nll - expected[0]).norm() <= 1e-6 * expected[0].norm()
    assert (grad_hidden.float() - expected[1]).norm() <= 2**-8 * expected[1].norm()
    assert (grad_weight - expected[2]).norm() <= 1e-6 * expected[2].norm()


@pytest.mark.parametrize("frozen", [0, 1])
def test_a_frozen_input_takes_no_gradient(frozen):
    hidden, weight, labels, upstream = example()
    leaf = (hidden, weight)[1 - frozen].requires_grad_()
    vocab_parallel_nll(hidden, weight, labels, group=None, sequence_parallel=False, chunk_tokens=9).backward(upstream)
    expected = plain(hidden.detach(), weight.detach(), labels, upstream)[2 - frozen]
    assert (leaf.grad - expected).norm() <= 1e-6 * expected.norm()
    assert (hidden, weight)[frozen].grad is None


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation returned, and how many pieces of memory held one of that size."""

    def __init__(self):
        super().__init__()
        self.elements, self.storages = 0, set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **kwargs or {})
        for tensor in (leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)):
            if tensor.numel() > self.elements:
                self.elements, self.storages = tensor.numel(), set()
            if tensor.numel() == self.elements:
                self.storages.add(tensor.untyped_storage().data_ptr())
        return out


def test_no_tensor_holds_the_logits_of_more_than_a_chunk():
    length, vocab, chunk_tokens = 96, 512, 16
    hidden = torch.randn(length, 1, HIDDEN, requires_grad=True)
    weight = torch.randn(vocab, HIDDEN, requires_grad=True)
    labels = torch.zeros(1, length, dtype=torch.int64)
    sizes, places = {}, {}
    for name, tokens in (("chunks", chunk_tokens), ("whole", length)):
        with Largest() as largest:
            vocab_parallel_nll(
                hidden, weight, labels, group=None, sequence_parallel=False, chunk_tokens=tokens
            ).sum().backward()
        sizes[name], places[name] = largest.elements, len(largest.storages)
    assert places["chunks"] <= 2 and places["whole"] == 1  # one in each pass; the single chunk is kept between them
    assert sizes == {"chunks": chunk_tokens * vocab, "whole": length * vocab}
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        vocab_parallel_nll(hidden, weight, labels, group=None, sequence_parallel=False, chunk_tokens=chunk_tokens)
    assert max(saved) == weight.numel()  # for the backward pass: its inputs and a logarithm for each token, no logits
    with Largest() as largest, torch.no_grad():
        scores = -vocab_parallel_nll(
            hidden, weight, labels, group=None, sequence_parallel=False, chunk_tokens=chunk_tokens
        )
    assert (largest.elements, len(largest.storages)) == (chunk_tokens * vocab, 1)
    expected = torch.log_softmax(hidden @ weight.t(), dim=-1).transpose(0, 1)[:, :, 0]
    assert torch.allclose(scores, expected, atol=1e-5)


def _on_a_rank(rank, world, chunk_tokens, sequence_parallel):
    hidden, weight, labels, upstream = example()
    mine = hidden.chunk(world)[rank] if sequence_parallel else hidden
    weight = weight.chunk(world)[rank]
    return chunked(mine, weight, labels, upstream, chunk_tokens, dist.group.WORLD, sequence_parallel)


def _core_on_a_rank(rank, world, sequence_parallel):
    """As `_on_a_rank`, by Megatron-Core's linear layer and cross-entropy."""
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy
    from megatron.core.tensor_parallel.layers import linear_with_grad_accumulation_and_async_allreduce as linear

    group = init_groups(ParallelConfig(tensor=world), seed=1).tp
    hidden, weight, labels, upstream = example()
    mine = (hidden.chunk(world)[rank] if sequence_parallel else hidden).clone().requires_grad_()
    weight = weight.chunk(world)[rank].clone().requires_grad_()
    logits = linear(mine, weight, None, False, not sequence_parallel, sequence_parallel, tp_group=group)
    nll = vocab_parallel_cross_entropy(logits, labels.t().contiguous(), tp_group=group).t()
    return nll.detach(), *torch.autograd.grad(nll, (mine, weight), upstream)


@pytest.mark.parametrize("chunk_tokens", [6, 12, 30])  # with sequence shards of 5 rows: spans of 1, 2 and 5
@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_two_ranks_equal_one(sequence_parallel, chunk_tokens, ranks):
    results = ranks(2, _on_a_rank, chunk_tokens, sequence_parallel)
    nll, grad_hidden, grad_weight = plain(*example())
    for rank, (ours, ours_hidden, ours_weight) in enumerate(results):
        shard = grad_hidden.chunk(2)[rank] if sequence_parallel else grad_hidden
        for got, expected in ((ours, nll), (ours_hidden, shard), (ours_weight, grad_weight.chunk(2)[rank])):
            assert (got - expected).norm() <= 1e-6 * expected.norm()


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_one_chunk_is_bit_equal_to_megatron_core(sequence_parallel, ranks):
    for ours, core in zip(ranks(2, _on_a_rank, 30, sequence_parallel), ranks(2, _core_on_a_rank, sequence_parallel)):
        assert all(torch.equal(a, b) for a, b in zip(ours, core))
