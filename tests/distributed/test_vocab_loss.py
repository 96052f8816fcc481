"""Training and scoring with a head that sees a few tokens at a time equal those of one rank and all tokens, in fp32 and in bf16 parts;
generation follows."""

from unittest.mock import patch

import pytest
import torch

from megatron_m1.engine.equality import RankResult, compare, equality_batches, equality_config, run_layout
from megatron_m1.engine.trainer import Trainer
from megatron_m1.generation.engine import Engine
from megatron_m1.generation.reference import ReferenceEngine
from megatron_m1.generation.requests import Request, Sampling, request_seed
from megatron_m1.model import vocab_loss
from megatron_m1.model.build import build_model
from megatron_m1.model.experts import exact_experts
from megatron_m1.parallel import destroy_groups, init_groups

STEPS = 2
CHUNK_TOKENS = 20  # micro-batches of 64 tokens: 4 chunks of 16, or with two sequence shards of packed tokens 4 of 2 x 8


@pytest.fixture(scope="module")
def reference(rank_pool) -> RankResult:
    return rank_pool.run(run_layout, (equality_config({}, {}), STEPS), world=1)[0]


@pytest.mark.parametrize(
    ("world", "parallel"),
    [
        (1, {}),
        (2, {"tensor": 2}),
        (2, {"pipeline": 2, "virtual_pipeline": 2}),
        (2, {"overlap_grad_reduce": True, "overlap_param_gather": True}),
    ],
    ids=["one rank", "TP2+SP", "PP2, VPP2", "DP2, overlapped"],
)
def test_chunks_in_every_layout_equal_one_rank(world, parallel, ranks, reference):
    config = equality_config(parallel, {"head_chunk_tokens": CHUNK_TOKENS})
    d = compare(reference, ranks(world, run_layout, config, STEPS))
    # Not of the weights and the balance loss: Adam's first step turns the rounding of near-zero gradients into whole updates.
    assert max(d.loss, d.grad_norm, d.gradient) <= 1e-5, d


def _score(rank, world, config) -> tuple[list[torch.Tensor], float, list[int]]:
    """(scores, masked mean of their negatives less the loss, tokens with logits at a time) of the equality batches, before training."""
    at_a_time = []

    def buffer(*arguments):
        made = plain(*arguments)
        at_a_time.append(len(made))
        return made

    plain = vocab_loss._buffer
    groups = init_groups(config.parallel, seed=config.training.seed)
    trainer = Trainer(config, groups, train=False)
    batches = equality_batches(config, 0)[groups.dp.rank() :: groups.dp.size()]
    with patch.object(vocab_loss, "_buffer", buffer):
        scores = trainer.score(batches)
    loss, tokens = trainer.evaluate(batches)
    mean = -sum(float((s * batch["loss_mask"]).sum()) for s, batch in zip(scores, batches)) / tokens
    destroy_groups()
    return scores, mean - loss, at_a_time


@pytest.mark.parametrize(
    ("world", "parallel"),
    [(2, {"tensor": 2}), (4, {"context": 2, "pipeline": 2})],
    ids=["TP2+SP", "CP2xPP2"],
)
def test_scores_are_those_of_one_rank_on_every_rank(world, parallel, ranks):
    ((expected, rest, whole),) = ranks(1, _score, equality_config({}, {}))
    assert set(whole) == {64}
    assert abs(rest) < 1e-6 and expected[0].shape == (2, 32) and expected[0].dtype == torch.float32
    assert all((scores < 0).all() for scores in expected)
    found = ranks(world, _score, equality_config(parallel, {"head_chunk_tokens": CHUNK_TOKENS}))
    assert {rows for *_, at_a_time in found for rows in at_a_time} == {16}
    for scores, *_ in found:
        for ours, one in zip(scores, expected, strict=True):
            torch.testing.assert_close(ours, one, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def in_parts(rank_pool) -> dict[str, RankResult]:
    return {
        products: rank_pool.run(run_layout, (equality_config({}, {"head_products": products}), STEPS), world=1)[0]
        for products in ("bf16x6", "bf16x3")
    }


def test_products_of_parts_train_as_fp32(in_parts, reference):
    for products, least, most in (("bf16x6", 0, 1e-6), ("bf16x3", 2e-6, 5e-5)):
        d = compare(reference, [in_parts[products]])
        assert d.loss <= 1e-6 and d.grad_norm <= 1e-5 and least <= d.gradient <= most, (products, d)


@pytest.mark.parametrize("products", ["bf16x6", "bf16x3"])
@pytest.mark.parametrize(
    ("world", "parallel"),
    [(1, {}), (2, {"tensor": 2}), (2, {"tensor": 2, "sequence": False}), (4, {"context": 2, "pipeline": 2})],
    ids=["one rank", "TP2+SP", "TP2 without SP", "CP2xPP2"],
)
def test_products_of_parts_in_every_layout_equal_one_rank(world, parallel, products, ranks, in_parts):
    config = equality_config(parallel, {"head_products": products, "head_chunk_tokens": CHUNK_TOKENS})
    d = compare(in_parts[products], ranks(world, run_layout, config, STEPS))
    assert max(d.loss, d.grad_norm, d.gradient) <= 1e-5, d


REQUESTS = [Request(tuple(range(1, n)), request_seed(3, n), Sampling(max_new_tokens=8)) for n in (4, 9)]
PASS_TOKENS = 64


def _generate(rank, world, parallel, products) -> list[tuple[torch.Tensor, ...]]:
    """Log-probabilities of sampled tokens by the reference engine, by training, and by the cached engine and training."""
    config = equality_config(parallel, {"head_products": products})
    groups = init_groups(config.parallel, seed=1)
    models = build_model(config, groups)
    found = []
    engines = (ReferenceEngine(models, groups, tokens=PASS_TOKENS), Engine(models, groups, slots=2))
    for results in zip(*(engine.generate(REQUESTS) for engine in engines), strict=True):
        for result in results:
            request = REQUESTS[len(found) // 2]
            sequence = torch.tensor([[*request.prompt, *result.tokens]])
            padded = torch.nn.functional.pad(sequence, (0, PASS_TOKENS + 1 - sequence.shape[1]))
            with exact_experts(models):
                nll = models[0](padded[:, :-1], torch.arange(PASS_TOKENS)[None], labels=padded[:, 1:])
            trained = -nll[0, len(request.prompt) - 1 : sequence.shape[1] - 1].detach().double()
            found.append((torch.tensor(result.logprobs, dtype=torch.float64), trained))
    destroy_groups()
    return found


@pytest.mark.parametrize("products", ["bf16x6", "bf16x3"])
@pytest.mark.parametrize(("world", "parallel"), [(1, {}), (2, {"tensor": 2})], ids=["one rank", "TP2"])
def test_generation_follows_training(world, parallel, products, ranks):
    """The reference engine bit by bit; decoding steps, which multiply in fp32, to what the parts drop."""
    for found in ranks(world, _generate, parallel, products):
        for place, (generated, trained) in enumerate(found):
            if place % 2 == 0:
                assert torch.equal(generated, trained)
            else:
                assert (generated - trained).abs().max() <= {"bf16x6": 1e-5, "bf16x3": 1e-4}[products]


def _logits(rank, world, parallel) -> list[torch.Tensor]:
    """Logits of all tokens, and the gradients of their squares: of the head's rows here and of the embedding's."""
    config = equality_config(parallel, {"head_products": "bf16x3"})
    [model] = build_model(config, init_groups(config.parallel, seed=1))
    tokens = torch.arange(16)[None]
    logits = model(tokens, tokens)
    logits.square().sum().backward()
    destroy_groups()
    return [logits.detach(), model.output_layer.weight.grad, model.embedding.word_embeddings.weight.grad]


@pytest.mark.parametrize("sequence", [True, False])
def test_logits_of_products_of_parts_over_tensor_parallel_ranks(sequence, ranks):
    [(logits, *gradients)] = ranks(1, _logits, {})
    for rank, (ours, *parts) in enumerate(ranks(2, _logits, {"tensor": 2, "sequence": sequence})):
        for got, expected in zip(
            (ours, *parts), (logits, *(gradient.chunk(2)[rank] for gradient in gradients)), strict=True
        ):
            assert (got - expected).norm() <= 1e-5 * expected.norm()
