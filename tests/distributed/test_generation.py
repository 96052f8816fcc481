"""Generation with the hybrid cache: the same numbers as the training forward pass, in every layout and batch size."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import tokenizers
import torch

from megatron_m1.__main__ import main
from megatron_m1.checkpoint.native import save_checkpoint
from megatron_m1.config import Config, ModelConfig
from megatron_m1.config.schema import MoEConfig, ParallelConfig, TrainingConfig
from megatron_m1.engine.trainer import Trainer
from megatron_m1.generation.engine import Completion, Sampling, generate
from megatron_m1.model.build import build_model
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
DRAWN = Sampling(max_new_tokens=16, temperature=1.3, top_p=0.95, seed=5)

LAYOUTS = {
    "DP2": (2, {}),
    "TP2": (2, {"tensor": 2}),
    "PP2": (2, {"pipeline": 2}),
    "PP4": (4, {"pipeline": 4}),
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


def complete(
    rank: int, world: int, parallel: dict[str, int], prompts: list[list[int]], sampling: Sampling, batch_size: int,
    model: ModelConfig = MODEL,
) -> list[Completion]:  # fmt: skip
    config = config_of(parallel, model)
    groups = init_groups(config.parallel, seed=1)
    [stage] = build_model(config, groups)
    return generate(stage, groups, prompts, sampling, batch_size=batch_size)


def teacher_forced(
    rank: int, world: int, prompts: list[list[int]], completions: list[Completion], model: ModelConfig
) -> list[torch.Tensor]:
    """Log-probabilities that training's loss gives the generated tokens, from one pass over each whole sequence."""
    config = config_of({}, model)
    [whole] = build_model(config, init_groups(config.parallel, seed=1))
    scores = []
    for prompt, completion in zip(prompts, completions, strict=True):
        tokens = torch.tensor([prompt + completion.tokens])
        positions = torch.arange(tokens.shape[1] - 1)[None]
        with torch.no_grad():
            nll = whole(tokens[:, :-1], positions, labels=tokens[:, 1:])
        scores.append(-nll[0, len(prompt) - 1 :])
    return scores


def assert_same(got: list[Completion], want: list[Completion]) -> None:
    assert [c.tokens for c in got] == [c.tokens for c in want]
    assert [c.finish_reason for c in got] == [c.finish_reason for c in want]
    for a, b in zip(got, want, strict=True):
        assert (torch.tensor(a.logprobs) - torch.tensor(b.logprobs)).abs().max() <= BOUND


@pytest.fixture(scope="module")
def alone(rank_pool):
    """Completions of one rank, one prompt at a time: greedy and drawn."""
    return {sampling: rank_pool.run(complete, ({}, PROMPTS, sampling, 1), world=1)[0] for sampling in (GREEDY, DRAWN)}


@pytest.mark.parametrize("sampling", [GREEDY, DRAWN], ids=["greedy", "drawn"])
@pytest.mark.parametrize("model", [MODEL, OTHER_MODEL], ids=["postnorm", "prenorm, shared expert, 6 heads"])
def test_cached_decoding_equals_the_training_forward_pass(ranks, sampling, model):
    [completions] = ranks(1, complete, {}, PROMPTS, sampling, 3, model)
    [scores] = ranks(1, teacher_forced, PROMPTS, completions, model)
    for completion, score in zip(completions, scores, strict=True):
        assert len(completion.tokens) == len(completion.logprobs) == 16
        assert (torch.tensor(completion.logprobs) - score).abs().max() <= BOUND
    # The comparison means something: the past matters, and tokens vary.
    assert len({token for completion in completions for token in completion.tokens}) > 5


@pytest.mark.parametrize("batch_size", [2, 3, 8])
def test_completions_do_not_depend_on_the_batch_size(ranks, alone, batch_size):
    for sampling in (GREEDY, DRAWN):
        assert_same(ranks(1, complete, {}, PROMPTS, sampling, batch_size)[0], alone[sampling])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_completions_do_not_depend_on_the_layout(ranks, alone, layout):
    world, parallel = LAYOUTS[layout]
    for sampling in (GREEDY, DRAWN):
        for completions in ranks(world, complete, parallel, PROMPTS, sampling, 2):
            assert_same(completions, alone[sampling])


def test_a_draw_does_not_depend_on_other_prompts(ranks, alone):
    others = [PROMPTS[0], [3], PROMPTS[2], [4, 4]]
    [completions] = ranks(1, complete, {}, others, DRAWN, 4)
    assert_same([completions[0], completions[2]], [alone[DRAWN][0], alone[DRAWN][2]])
    [twice] = ranks(1, complete, {}, [[1, 2], [1, 2]], DRAWN, 2)
    assert twice[0].tokens != twice[1].tokens
    [reseeded] = ranks(1, complete, {}, others, replace(DRAWN, seed=6), 4)
    assert reseeded[0].tokens != completions[0].tokens


@pytest.mark.parametrize(("world", "parallel"), [(1, {}), (2, {"expert": 2}), (4, {"pipeline": 2, "expert": 2})])
def test_an_end_token_stops_each_sequence_at_its_own_length(ranks, alone, world, parallel):
    """Ranks that share experts run out of sequences at different times and must still keep step."""
    end = alone[DRAWN][1].tokens[4]
    want = []
    for completion in alone[DRAWN]:
        stop = completion.tokens.index(end) + 1 if end in completion.tokens else None
        reason = "length" if stop is None else "stop"
        want.append(Completion(completion.tokens[:stop], completion.logprobs[:stop], reason))
    assert {c.finish_reason for c in want} == {"stop", "length"}
    for completions in ranks(world, complete, parallel, PROMPTS, replace(DRAWN, end_token=end), 2):
        assert_same(completions, want)


def test_fewer_prompts_than_ranks(ranks, alone):
    want = [alone[GREEDY][0]]
    for world, parallel in ((2, {"expert": 2}), (2, {})):
        for completions in ranks(world, complete, parallel, PROMPTS[:1], GREEDY, 4):
            assert_same(completions, want)


def complete_with_a_nan(rank: int, world: int, parallel: dict[str, int]) -> str:
    config = config_of(parallel)
    groups = init_groups(config.parallel, seed=1)
    [stage] = build_model(config, groups)
    if stage.pre_process:
        stage.embedding.word_embeddings.weight.data[33] = torch.nan
    with pytest.raises(FloatingPointError) as error:
        generate(stage, groups, PROMPTS, GREEDY, batch_size=8)
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
        "--temperature", DRAWN.temperature, "--top-p", DRAWN.top_p, "--seed", DRAWN.seed, "--batch-size", 2, *layout,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    records = [json.loads(line) for line in output.read_text().splitlines()]
    assert [record["text"] for record in records] == [None] * len(PROMPTS)
    assert [record["index"] for record in records] == list(range(len(PROMPTS)))
    assert [record["prompt_tokens"] for record in records] == [len(prompt) for prompt in PROMPTS]
    assert_same([Completion(r["token_ids"], r["logprobs"], r["finish_reason"]) for r in records], alone[DRAWN])
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
        assert record["token_ids"] == greedy[:stop] and record["finish_reason"] == "stop"
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
