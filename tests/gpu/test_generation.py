"""On a GPU: decoding passes as graphs, kernel by kernel and in training's forward pass give the same. Run by `bash tests/gpu/run.sh`."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from megatron_m1 import platform
from megatron_m1.config import Config, ModelConfig
from megatron_m1.config.schema import MoEConfig, ParallelConfig, TrainingConfig
from megatron_m1.generation.engine import Engine
from megatron_m1.generation.requests import Request, Result, Sampling
from megatron_m1.model.build import build_model
from megatron_m1.parallel import init_groups

pytestmark = pytest.mark.gpu

MODEL = ModelConfig(
    vocab_size=256, hidden_size=128, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=32,
    intermediate_size=64, num_local_experts=4, attn_type_list=[0, 1, 0, 1], rotary_dim=16,
)  # fmt: skip
DRAWN = Sampling(max_new_tokens=24, repetition_tokens=0)


def requests_of(lengths: list[int]) -> list[Request]:
    """Prompts of up to 130 tokens; from the sixth on they are one."""
    starts = [min(i, 5) for i in range(len(lengths))]
    prompts = [tuple((7 * i + j) % 256 for j in range(5 + 25 * i)) for i in starts]
    return [
        Request(prompt, i, replace(DRAWN, max_new_tokens=length))
        for i, (prompt, length) in enumerate(zip(prompts, lengths, strict=True))
    ]


def generate(
    rank: int, world: int, precision: Any, requests: list[Request], modes: list[str]
) -> tuple[list[list[Result]], list[torch.Tensor]]:
    """Results in each mode, and training's log-probabilities of those of the first."""
    config = Config(
        model=MODEL,
        moe=MoEConfig(aux_loss="none"),
        parallel=ParallelConfig(sequence=False),
        training=TrainingConfig(precision=precision, seq_length=64, seed=3),
    )
    groups = init_groups(config.parallel, seed=1)
    [model] = build_model(config, groups)
    results = [Engine(model, groups, slots=8, decode=mode, record_routing=True).generate(requests) for mode in modes]
    scores = []
    for request, result in zip(requests, results[0], strict=True):
        tokens = torch.tensor([[*request.prompt, *result.tokens]], device=platform.device())
        positions = torch.arange(tokens.shape[1] - 1, device=tokens.device)[None]
        with torch.no_grad():
            nll = model(tokens[:, :-1], positions, labels=tokens[:, 1:])
        scores.append(-nll[0, len(request.prompt) - 1 :].float().cpu())
    return results, scores


def test_a_graph_has_the_bits_of_its_kernels(ranks):
    [([graph, device], scores)] = ranks(1, generate, "bf16", requests_of([24] * 8), ["graph", "device"], timeout_s=300)
    distances = []
    for a, b, score in zip(graph, device, scores, strict=True):
        assert a.tokens == b.tokens and a.logprobs == b.logprobs and torch.equal(a.routing, b.routing)
        distances.append((torch.tensor(a.logprobs) - score).abs())
    print(
        f"mean distance from training {torch.cat(distances).mean():.2e} nats, largest {torch.cat(distances).max():.2e}"
    )
    assert torch.cat(distances).mean() <= 0.02


def test_sequences_that_leave_one_by_one(ranks):
    """Numbers of rows with and without padding, whose products may round otherwise."""
    requests = requests_of([24, 3, 17, 9, 20, 5, 12, 7])
    [([graph, device], scores)] = ranks(1, generate, "bf16", requests, ["graph", "device"], timeout_s=300)
    for results in (graph, device):
        assert [len(result.tokens) for result in results] == [r.sampling.max_new_tokens for r in requests]
    distances = [(torch.tensor(r.logprobs) - score).abs() for r, score in zip(graph, scores, strict=True)]
    assert torch.cat(distances).mean() <= 0.02


def test_fp32_whose_experts_cannot_be_recorded(ranks):
    """What a refused recording would leave behind, generators among it, is not risked."""
    with pytest.raises(RuntimeError, match="grouped products wait for the host"):
        ranks(1, generate, "fp32", requests_of([2]), ["graph"], timeout_s=300)
    [([auto, device], scores)] = ranks(1, generate, "fp32", requests_of([24] * 8), ["auto", "device"], timeout_s=300)
    for a, b, score in zip(auto, device, scores, strict=True):
        assert a.tokens == b.tokens
        assert (torch.tensor(a.logprobs) - score).abs().max() <= 1e-4


def test_host_tables_are_refused(ranks):
    with pytest.raises(RuntimeError, match="runs on CPU"):
        ranks(1, generate, "bf16", requests_of([2]), ["host"], timeout_s=300)
