"""Generation with the hybrid cache: the same numbers as the training forward pass, in every layout and batch size."""

import json
import math
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import tokenizers
import torch

from megatron_m1 import platform
from megatron_m1.__main__ import main
from megatron_m1.checkpoint.native import save_checkpoint
from megatron_m1.config import Config, ModelConfig
from megatron_m1.config.schema import MoEConfig, ParallelConfig, TrainingConfig
from megatron_m1.engine.trainer import Trainer
from megatron_m1.generation import device_decode
from megatron_m1.generation.engine import Engine
from megatron_m1.generation.reference import ReferenceEngine
from megatron_m1.generation.requests import Request, Result, Sampling, request_seed
from megatron_m1.model import experts
from megatron_m1.model.build import build_model, routers
from megatron_m1.parallel import init_groups

BOUND = 1e-5
"""On |difference of log-probabilities| in nats, fp32: cached against whole-prefix, and one layout against another."""

MODEL = ModelConfig(
    vocab_size=64,
    hidden_size=32,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    intermediate_size=32,
    num_local_experts=4,
    attn_type_list=[0, 1, 0, 1],
    rotary_dim=4,
    rope_theta=100.0,
    layernorm_linear_attention_alpha=0.8,
    layernorm_full_attention_alpha=0.7,
    layernorm_mlp_alpha=0.9,
    layernorm_linear_attention_beta=1.2,
)
OTHER_MODEL = replace(
    MODEL,
    num_attention_heads=6,
    num_key_value_heads=2,
    shared_intermediate_size=16,
    postnorm=False,
    attn_type_list=[1, 0, 0, 0],
)
PROMPTS = [[1, 2, 3], [5] * 17, [7], [9, 8, 7, 6, 5, 4, 3, 2, 1, 0], [11, 60, 33, 2]]
GREEDY = Sampling(max_new_tokens=16, temperature=0.0)
DRAWN = Sampling(max_new_tokens=16, temperature=1.3, top_p=0.95)
SEED = 5

LAYOUTS = {
    "DP2": (2, {}),
    "TP2": (2, {"tensor": 2}),
    "PP2": (2, {"pipeline": 2}),
    "PP4": (4, {"pipeline": 4}),
    "PP3, last stage of 2 layers": (3, {"pipeline": 3, "last_stage_layers": 2}),
    "EP2": (2, {"expert": 2}),
    "TP2 ETP1": (2, {"tensor": 2, "expert_tensor": 1}),
    "TP2 EP2 ETP1": (2, {"tensor": 2, "expert": 2, "expert_tensor": 1}),
    "ETP2": (2, {"expert_tensor": 2}),
    "TP2 EP2": (4, {"tensor": 2, "expert": 2}),
    "TP2 PP2": (4, {"tensor": 2, "pipeline": 2}),
    "PP2 EP2": (4, {"pipeline": 2, "expert": 2}),
    "DP2 EP2": (4, {"expert": 2}),
}


def config_of(parallel: dict[str, int], model: ModelConfig = MODEL) -> Config:
    return Config(
        model=model,
        moe=MoEConfig(aux_loss="none"),
        parallel=ParallelConfig(**parallel, sequence=False),
        training=TrainingConfig(precision="fp32", seq_length=32, seed=11),
    )


def requests_of(prompts: list[list[int]], sampling: Sampling, seed: int = SEED) -> list[Request]:
    return [Request(tuple(prompt), request_seed(seed, index), sampling) for index, prompt in enumerate(prompts)]


def complete(
    rank: int, world: int, parallel: dict[str, Any], requests: list[Request], options: dict[str, Any],
    model: ModelConfig = MODEL,
) -> list[Result]:  # fmt: skip
    config = config_of(parallel, model)
    groups = init_groups(config.parallel, seed=1)
    return Engine(build_model(config, groups), groups, **options).generate(requests)


def teacher_forced(
    rank: int, world: int, prompts: list[list[int]], results: list[Result], model: ModelConfig
) -> list[torch.Tensor]:
    """Log-probabilities that training's loss gives the generated tokens, from one pass over each whole sequence."""
    config = config_of({}, model)
    [whole] = build_model(config, init_groups(config.parallel, seed=1))
    scores = []
    for prompt, result in zip(prompts, results, strict=True):
        tokens = torch.tensor([prompt + result.tokens])
        positions = torch.arange(tokens.shape[1] - 1)[None]
        with torch.no_grad():
            nll = whole(tokens[:, :-1], positions, labels=tokens[:, 1:])
        scores.append(-nll[0, len(prompt) - 1 :])
    return scores


def assert_same(got: list[Result], want: list[Result]) -> None:
    assert [c.tokens for c in got] == [c.tokens for c in want]
    assert [c.finish_reason for c in got] == [c.finish_reason for c in want]
    for a, b in zip(got, want, strict=True):
        assert (torch.tensor(a.logprobs) - torch.tensor(b.logprobs)).abs().max() <= BOUND


@pytest.fixture(scope="module")
def alone(rank_pool):
    """Completions of one rank, one sequence at a time: greedy and drawn."""
    return {
        sampling: rank_pool.run(complete, ({}, requests_of(PROMPTS, sampling), {"slots": 1}), world=1)[0]
        for sampling in (GREEDY, DRAWN)
    }


@pytest.mark.parametrize("sampling", [GREEDY, DRAWN], ids=["greedy", "drawn"])
@pytest.mark.parametrize("model", [MODEL, OTHER_MODEL], ids=["postnorm", "prenorm, shared expert, 6 heads"])
def test_cached_decoding_equals_the_training_forward_pass(ranks, sampling, model):
    [results] = ranks(1, complete, {}, requests_of(PROMPTS, sampling), {"slots": 3}, model)
    [scores] = ranks(1, teacher_forced, PROMPTS, results, model)
    for result, score in zip(results, scores, strict=True):
        assert len(result.tokens) == len(result.logprobs) == 16
        assert (torch.tensor(result.logprobs) - score).abs().max() <= BOUND
    # The comparison means something: the past matters, and tokens vary.
    assert len({token for result in results for token in result.tokens}) > 5


@pytest.mark.parametrize("slots", [2, 3, 8])
def test_results_do_not_depend_on_the_batch_size(ranks, alone, slots):
    for sampling in (GREEDY, DRAWN):
        assert_same(ranks(1, complete, {}, requests_of(PROMPTS, sampling), {"slots": slots})[0], alone[sampling])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_results_do_not_depend_on_the_layout(ranks, alone, layout):
    """Greedy and drawn in one batch, so that both kinds of rows meet."""
    world, parallel = LAYOUTS[layout]
    requests = requests_of(PROMPTS, GREEDY) + requests_of(PROMPTS, DRAWN)
    for results in ranks(world, complete, parallel, requests, {"slots": 3}):
        assert_same(results, alone[GREEDY] + alone[DRAWN])


class RepeatedCall:
    """Stands in for a CUDA graph on CPU: nothing runs when it is made, everything when it is replayed."""

    def __init__(self, call, pool):
        self.replay = call


def complete_on_device(rank: int, world: int, parallel: dict[str, int], requests: list[Request]) -> list[Result]:
    """Decoding from the device's tables; on one rank through recorded passes too."""
    config = config_of(parallel)
    groups = init_groups(config.parallel, seed=1)
    engine = Engine(build_model(config, groups), groups, slots=7, decode="device", record_routing=True)
    if world > 1:
        return engine.generate(requests)
    engine.graphs = "always"
    with patch.multiple(device_decode, GraphPool=object, DeviceGraph=RepeatedCall):
        return engine.generate(requests)


@pytest.mark.parametrize(("world", "parallel"), [(1, {}), (2, {"tensor": 2, "expert": 2, "expert_tensor": 1})])
def test_decoding_from_tables_of_the_device(ranks, alone, world, parallel):
    """Sequences leave one by one, so that the passes of the single rank have 8, 4 and fewer rows, some of them padding."""
    lengths = [16, 3, 9, 5, 12]
    requests = [
        Request(
            tuple(PROMPTS[i % 5]), request_seed(SEED, i % 5), replace(DRAWN, max_new_tokens=lengths[i % 5] - i // 5)
        )
        for i in range(7)
    ]
    for results in ranks(world, complete_on_device, parallel, requests):
        for i, result in enumerate(results):
            want, length = alone[DRAWN][i % 5], lengths[i % 5] - i // 5
            assert_same([result], [Result(want.tokens[:length], want.logprobs[:length], "length")])
            assert result.routing.shape == (len(requests[i].prompt) + length - 1, 4, 2)


def refuse(rank: int, world: int) -> str:
    groups = init_groups(config_of({}).parallel, seed=1)
    with pytest.raises(ValueError) as error:
        Engine(build_model(config_of({}), groups), groups, slots=1, decode="graph")
    return str(error.value)


@pytest.mark.skipif(platform.is_cuda(), reason="there are graphs on CUDA")
def test_graphs_that_were_asked_for_are_not_replaced_in_silence(ranks):
    assert "graphs need a CUDA device" in ranks(1, refuse)[0]


def test_a_draw_depends_on_seed_and_position_only(ranks, alone):
    others = [PROMPTS[0], [3], PROMPTS[2], [4, 4]]
    [results] = ranks(1, complete, {}, requests_of(others, DRAWN), {"slots": 4})
    assert_same([results[0], results[2]], [alone[DRAWN][0], alone[DRAWN][2]])
    same = Request((1, 2), 7, DRAWN)
    [twice] = ranks(1, complete, {}, [same, replace(same, seed=8), same], {"slots": 2})
    assert twice[0].tokens == twice[2].tokens != twice[1].tokens


GROUP_PROMPT = [(7 * i) % 64 for i in range(150)]
"""Two full blocks and a part of a third."""


@pytest.mark.parametrize(
    ("world", "parallel", "options"),
    [
        (1, {}, {"slots": 7}),
        (1, {}, {"slots": 3, "prefill_tokens": 64}),
        (1, {}, {"slots": 4, "cache_tokens": 384}),
        (2, {"expert": 2}, {"slots": 2, "prefill_tokens": 64}),
        (2, {"tensor": 2}, {"slots": 3, "prefill_tokens": 128}),
    ],
    ids=["all at once", "3 slots, chunks", "few blocks", "EP2", "TP2"],
)
def test_samples_of_one_prompt_share_its_prefill(ranks, groups_alone, world, parallel, options):
    """The samples start from a copied state and shared blocks, some at once and some when a slot is free again."""
    requests, want = groups_alone
    for results in ranks(world, complete, parallel, requests, options):
        assert_same(results, want)


@pytest.fixture(scope="module")
def groups_alone(rank_pool):
    lengths = [9, 3, 16, 1, 12]
    requests = [
        Request(tuple(GROUP_PROMPT), seed, replace(DRAWN, max_new_tokens=length)) for seed, length in enumerate(lengths)
    ] + [Request(tuple(GROUP_PROMPT[:64]), seed, replace(DRAWN, max_new_tokens=5)) for seed in range(2)]
    want = [rank_pool.run(complete, ({}, [request], {"slots": 1}), world=1)[0][0] for request in requests]
    assert len({tuple(result.tokens[:3]) for result in want}) > 4
    return requests, want


def count_prefilled(rank: int, world: int, requests: list[Request]) -> list[int]:
    config = config_of({})
    groups = init_groups(config.parallel, seed=1)
    models = build_model(config, groups)
    lengths: list[int] = []
    models[0].register_forward_pre_hook(lambda module, inputs: lengths.append(inputs[0].shape[1]))
    Engine(models, groups, slots=4, prefill_tokens=64).generate(requests)
    return lengths


def test_a_shared_prompt_is_prefilled_once_in_whole_chunks(ranks, groups_alone):
    [lengths] = ranks(1, count_prefilled, groups_alone[0])
    assert lengths == [64, 64, 22, 64]


@pytest.mark.parametrize(("world", "parallel"), [(1, {}), (2, {"expert": 2}), (4, {"pipeline": 2, "expert": 2})])
def test_an_end_token_stops_each_sequence_at_its_own_length(ranks, alone, world, parallel):
    """Ranks that share experts run out of sequences at different times and must still keep step."""
    end = alone[DRAWN][1].tokens[4]
    want = []
    for result in alone[DRAWN]:
        stop = result.tokens.index(end) + 1 if end in result.tokens else None
        want.append(Result(result.tokens[:stop], result.logprobs[:stop], "length" if stop is None else "eos"))
    assert {result.finish_reason for result in want} == {"eos", "length"}
    unseen = next(token for token in range(64) if all(token not in result.tokens for result in alone[DRAWN]))
    requests = requests_of(PROMPTS, replace(DRAWN, end_tokens=(unseen, end)))
    for results in ranks(world, complete, parallel, requests, {"slots": 2}):
        assert_same(results, want)


def test_confident_repetition_stops(ranks, alone):
    logprobs = alone[GREEDY][0].logprobs
    threshold = math.exp(min(logprobs[3:7])) * 0.999
    confident = [logprob > math.log(threshold) for logprob in logprobs]
    stop = next(i for i in range(4, 17) if all(confident[i - 4 : i]))
    sampling = replace(GREEDY, repetition_tokens=4, repetition_probability=threshold)
    [[result]] = ranks(1, complete, {}, requests_of(PROMPTS[:1], sampling), {"slots": 1})
    assert (result.finish_reason, len(result.tokens)) == ("stop_repetition", stop)


def test_fewer_prompts_than_ranks(ranks, alone):
    want = [alone[GREEDY][0]]
    for parallel in ({"expert": 2}, {}):
        for results in ranks(2, complete, parallel, requests_of(PROMPTS[:1], GREEDY), {"slots": 4}):
            assert_same(results, want)


def complete_in_the_training_layout(rank: int, world: int, requests: list[Request]) -> tuple[list[Result], bool]:
    """Sequence parallelism on and two chunks per rank as training has them, and whether all is as it was afterwards."""
    config = config_of({"tensor": 2, "pipeline": 2, "virtual_pipeline": 2})
    config.parallel.sequence = True
    groups = init_groups(config.parallel, seed=1)
    models = build_model(config, groups)

    def settings() -> list:
        return [
            (vars(module).get("sequence_parallel"), vars(module).get("scatter_for_experts"), module.training)
            for model in models
            for module in model.modules()
        ] + [config.parallel.sequence, models[0].config.sequence_parallel]

    before = settings()
    results = Engine(models, groups, slots=3).generate(requests)
    return results, before == settings() and models[0].config.sequence_parallel


def test_the_training_layout_with_sequence_parallelism(ranks, alone):
    for results, restored in ranks(4, complete_in_the_training_layout, requests_of(PROMPTS, DRAWN)):
        assert restored
        assert_same(results, alone[DRAWN])


def routing_of_training(rank: int, world: int, requests: list[Request], results: list[Result]) -> list[torch.Tensor]:
    """Experts [tokens, layers, top_k], sorted, in one pass over each whole sequence."""
    config = config_of({})
    [whole] = build_model(config, init_groups(config.parallel, seed=1))
    chosen: list[torch.Tensor] = []
    for router in routers([whole]):
        router.register_forward_hook(lambda module, inputs, output: chosen.append(output[1]))
    out = []
    for request, result in zip(requests, results, strict=True):
        chosen.clear()
        tokens = torch.tensor([[*request.prompt, *result.tokens[:-1]]])
        with torch.no_grad():
            whole(tokens, torch.arange(tokens.shape[1])[None])
        out.append(torch.stack([mask.nonzero()[:, 1].view(-1, 2) for mask in chosen], dim=1))
    return out


@pytest.mark.parametrize(
    ("world", "parallel"),
    [(1, {}), (2, {"pipeline": 2, "last_stage_layers": 3}), (2, {"tensor": 2, "expert": 2, "expert_tensor": 1})],
)
def test_routing_is_that_of_training(ranks, groups_alone, world, parallel):
    requests = groups_alone[0][:3] + requests_of(PROMPTS, DRAWN)
    options = {"slots": 3, "prefill_tokens": 64, "record_routing": True}
    results = ranks(world, complete, parallel, requests, options)[0]
    [want] = ranks(1, routing_of_training, requests, results)
    for result, chosen in zip(results, want, strict=True):
        assert result.routing.dtype == torch.int16
        assert torch.equal(result.routing.sort(dim=-1).values.long(), chosen)


REFERENCE_TOKENS = 64


def generate_reference(
    rank: int, world: int, parallel: dict[str, int], requests: list[Request], exact: bool
) -> tuple[list[Result], list[torch.Tensor]]:
    """Reference results, and what training's forward pass with gradients gives their tokens, in the same layout."""
    config = config_of(parallel)
    groups = init_groups(config.parallel, seed=1)
    models = build_model(config, groups)
    if not exact:
        experts.EXACT_ROWS = 1
    results = ReferenceEngine(models, groups, tokens=REFERENCE_TOKENS, record_routing=True).generate(requests)
    scores = []
    models[0].train()
    with experts.exact_experts(models):
        for request, result in zip(requests, results, strict=True):
            sequence = torch.tensor([[*request.prompt, *result.tokens]])
            padded = torch.nn.functional.pad(sequence, (0, REFERENCE_TOKENS + 1 - sequence.shape[1]), value=9)
            positions = torch.arange(REFERENCE_TOKENS)[None]
            nll = models[0](padded[:, :-1], positions, labels=padded[:, 1:])
            assert nll.requires_grad
            scores.append(-nll[0, len(request.prompt) - 1 : sequence.shape[1] - 1].detach())
    experts.EXACT_ROWS = 8
    return results, scores


@pytest.mark.parametrize(("world", "parallel"), [(1, {}), (2, {"tensor": 2}), (2, {"expert": 2})])
def test_reference_generation_has_the_bits_of_training(ranks, alone, world, parallel):
    """What follows a token in training (its own continuation, other padding) and the gradients change no bit."""
    requests = requests_of(PROMPTS[:3], replace(DRAWN, max_new_tokens=8))
    for results, scores in ranks(world, generate_reference, parallel, requests, True):
        for result, score, want in zip(results, scores, alone[DRAWN], strict=False):
            assert torch.equal(torch.tensor(result.logprobs, dtype=torch.float64), score.double())
            assert result.tokens == want.tokens[:8]
            assert (score - torch.tensor(want.logprobs[:8])).abs().max() <= BOUND


def test_reference_generation_needs_the_padded_experts(ranks):
    requests = requests_of(PROMPTS[:3], replace(DRAWN, max_new_tokens=8))
    [(results, scores)] = ranks(1, generate_reference, {}, requests, False)
    pairs = zip(results, scores, strict=True)
    assert any(torch.tensor(r.logprobs, dtype=torch.float64).ne(s.double()).any() for r, s in pairs)


def drift(rank: int, world: int, steps: int) -> list[float]:
    """Largest distance [nats] of the log-probabilities of each half of `steps` decoding steps from those of training."""
    config = config_of({}, replace(MODEL, num_hidden_layers=2, attn_type_list=[0, 1]))
    groups = init_groups(config.parallel, seed=1)
    [model] = build_model(config, groups)
    request = Request((1, 2, 3), 0, replace(DRAWN, max_new_tokens=steps, repetition_tokens=0))
    [result] = Engine(model, groups, slots=1).generate([request])
    tokens = torch.tensor([[*request.prompt, *result.tokens]])
    with torch.no_grad():
        nll = model(tokens[:, :-1], torch.arange(tokens.shape[1] - 1)[None], labels=tokens[:, 1:])
    distance = (torch.tensor(result.logprobs) + nll[0, len(request.prompt) - 1 :]).abs()
    return [half.max().item() for half in distance.chunk(2)]


@pytest.mark.parametrize("steps", [512, pytest.param(4096, marks=pytest.mark.slow)])
def test_many_steps_do_not_drift_apart_from_training(ranks, steps):
    """One layer of each kind keeps a step near 2 ms; `python -m benchmarks.generate_cpu --parts drift` has four layers."""
    [halves] = ranks(1, drift, steps)
    assert max(halves) <= BOUND


def complete_with_a_nan(rank: int, world: int, parallel: dict[str, int]) -> str:
    config = config_of(parallel)
    groups = init_groups(config.parallel, seed=1)
    [stage] = build_model(config, groups)
    if stage.pre_process:
        stage.embedding.word_embeddings.weight.data[33] = torch.nan
    with pytest.raises(FloatingPointError) as error:
        Engine(stage, groups, slots=8).generate(requests_of(PROMPTS, GREEDY))
    return str(error.value)


@pytest.mark.parametrize(("world", "parallel"), [(1, {}), (2, {"pipeline": 2})])
def test_logits_that_are_not_finite_end_every_rank(ranks, world, parallel):
    for message in ranks(world, complete_with_a_nan, parallel):
        assert message.startswith("prompt 4 (counted from 0)")


# --- the command -----------------------------------------------------------------------------------------------------


def save(rank: int, world: int, folder: str, parallel: dict[str, int]) -> None:
    config = config_of(parallel)
    config.checkpoint.save = folder
    save_checkpoint(Trainer(config, init_groups(config.parallel, seed=1)), config, step=7)


@pytest.fixture(scope="module")
def checkpoint(rank_pool, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    rank_pool.run(save, (str(folder), {"expert": 2}), world=2)
    return folder


def command(world: int, *options: object) -> subprocess.CompletedProcess[str]:
    launcher = (
        ["-m"] if world == 1 else ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}", "-m"]
    )
    environment = {
        k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    }
    return subprocess.run(
        [sys.executable, *launcher, "megatron_m1", "generate", *map(str, options)],
        capture_output=True, text=True, timeout=280, env=environment | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def write_prompts(path: Path, records: list[dict]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.mark.parametrize(("world", "layout"), [(1, ()), (2, ()), (2, ("--parallel.tensor", 2))])
def test_command(checkpoint, tmp_path, alone, world, layout):
    prompts = write_prompts(tmp_path / "in.jsonl", [{"token_ids": prompt} for prompt in PROMPTS])
    output = tmp_path / "out.jsonl"
    result = command(
        world, "--checkpoint", checkpoint, "--prompts", prompts, "--output", output, "--max-new-tokens", 16,
        "--temperature", DRAWN.temperature, "--top-p", DRAWN.top_p, "--seed", SEED, "--batch-size", 2, *layout,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    records = [json.loads(line) for line in output.read_text().splitlines()]
    assert [record["text"] for record in records] == [None] * len(PROMPTS)
    assert [record["index"] for record in records] == list(range(len(PROMPTS)))
    assert [record["prompt_tokens"] for record in records] == [len(prompt) for prompt in PROMPTS]
    assert_same([Result(r["token_ids"], r["logprobs"], r["finish_reason"]) for r in records], alone[DRAWN])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]


def test_command_with_text(checkpoint, tmp_path, alone):
    """Prompts as text through the tokenizer given, whose end token stops; the step folder named directly."""
    end = alone[GREEDY][0].tokens[3]
    words = {f"w{token}": token for token in range(64) if token != end} | {"<eod>": end}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<eod>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(["<eod>"])
    (tmp_path / "tokenizer").mkdir()
    backend.save(str(tmp_path / "tokenizer" / "tokenizer.json"))
    prompts = write_prompts(tmp_path / "in.jsonl", [{"text": "w1 w2 w3"}, {"token_ids": [1, 2, 3]}])
    options = (
        "--checkpoint",
        checkpoint / "step_00000007",
        "--prompts",
        prompts,
        "--max-new-tokens",
        16,
        "--temperature",
        0,
    )
    result = command(1, *options, "--output", tmp_path / "out.jsonl", "--tokenizer", tmp_path / "tokenizer")
    assert result.returncode == 0, result.stderr
    greedy = alone[GREEDY][0].tokens
    stop = greedy.index(end) + 1
    records = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    for record in records:
        assert record["token_ids"] == greedy[:stop] and record["finish_reason"] == "eos"
        assert record["text"] == " ".join(f"w{token}" for token in greedy[: stop - 1])


def test_command_says_what_is_wrong_once(checkpoint, tmp_path, capsys):
    good = write_prompts(tmp_path / "good.jsonl", [{"token_ids": [1]}])
    bad = write_prompts(tmp_path / "bad.jsonl", [{"token_ids": [1]}, {"token_ids": [64]}])
    text = write_prompts(tmp_path / "text.jsonl", [{"text": "w1"}])
    output = tmp_path / "out.jsonl"
    output.write_text("before")
    damaged = tmp_path / "step_00000008"
    shutil.copytree(checkpoint / "step_00000007", damaged)
    weights = next(damaged.glob("*.distcp"))
    weights.write_bytes(weights.read_bytes()[:-1000])
    usual = {"--checkpoint": checkpoint, "--prompts": good, "--output": output}
    cases = [
        ({"--prompts": text}, "text.jsonl:1: `text` needs a tokenizer"),
        ({"--checkpoint": tmp_path / "none"}, f"--checkpoint={tmp_path / 'none'} does not exist"),
        ({"--checkpoint": tmp_path}, "holds no file `latest`"),
        ({"--tokenizer": tmp_path / "none"}, "tokenizer.json does not exist"),
        ({"--output": tmp_path}, "is a folder"),
        ({"--top-p": 0}, "must lie above 0"),
        ({"--temperature": -1}, "must be 0 or more"),
        ({"--max-new-tokens": 0}, "must be 1 or more"),
        ({"--end-token": 64}, "must be below model.vocab_size=64"),
        ({"--parallel.tensor": 2}, "parallel.tensor*pipeline*context=2*1*1=2"),
        ({"--parallel.tensr": 2}, "did you mean parallel.tensor"),
        ({"--parallel.virtual_pipeline": 2}, "has no use in generation"),
        ({"--parallel.context": 2}, "parallel.context=2 has no use in generation"),
        ({"--training.seed": 2}, "--training.seed is not an option"),
    ]
    for changed, said in cases:
        code = main(["generate", *(str(x) for pair in (usual | changed).items() for x in pair)])
        errors = capsys.readouterr().err
        assert code == 2 and errors.count(said) == errors.count("error: ") == 1, (changed, errors)
    # These two under torchrun: found before the ranks meet, and on one rank alone while both load.
    for changed, said in [
        ({"--prompts": bad}, "bad.jsonl:2: token id 64 must lie in 0..63"),
        ({"--checkpoint": damaged}, f"{weights} has "),
    ]:
        result = command(2, *(x for pair in (usual | changed).items() for x in pair))
        assert result.returncode != 0 and result.stderr.count(said) == 1, (changed, result.stderr)
        assert "Traceback" not in result.stderr.split(said)[0]
    assert output.read_text() == "before"
