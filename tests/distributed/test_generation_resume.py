"""Results that do not depend by a bit on what runs beside them, so that an interrupted call goes on where it was; lock-step."""

import os
import random
import signal
from collections import deque
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from megatron_m1.generation.engine import Engine
from megatron_m1.generation.reference import ReferenceEngine
from megatron_m1.generation.requests import Request, Result, Sampling
from megatron_m1.generation.schedule import PromptGroup, prompt_parts
from megatron_m1.model.build import build_model
from megatron_m1.parallel import init_groups
from megatron_m1.rl.journal import Journal, read_journal
from tests.distributed.test_generation import DRAWN, GREEDY, GROUP_PROMPT, MODEL, PROMPTS, config_of

SAMPLINGS = [DRAWN, GREEDY, Sampling(max_new_tokens=16), replace(DRAWN, top_k=9)]


def ragged_requests(vocabulary: int = 64) -> list[Request]:
    """Prompts of 1 to 150 tokens, some of them asked several times, with 1 to 29 new tokens."""
    prompts = [*PROMPTS, GROUP_PROMPT, GROUP_PROMPT, GROUP_PROMPT[:64], GROUP_PROMPT[::-1], PROMPTS[1], PROMPTS[1]]
    return [
        Request(
            tuple(token % vocabulary for token in prompt),
            100 + index,
            replace(SAMPLINGS[index % 4], max_new_tokens=1 + 13 * index % 29),
        )
        for index, prompt in enumerate(prompts * 2)
    ]


Bits = tuple[list[int], list[float], str, list[int]]
"""Tokens, log-probabilities (JSON keeps their bits), why it ended, experts."""


def bits(result: Result) -> Bits:
    assert result.routing is not None
    return result.tokens, result.logprobs, result.finish_reason, result.routing.flatten().tolist()


def interrupted(
    rank: int, world: int, parallel: dict[str, int], vocabulary: int, invariant: bool
) -> tuple[list[Bits], list[Bits]]:
    """Of the requests of a seeded draw: their results among all others, and on their own with fewer slots."""
    # Rotary tables so wide that passes are padded to 8 rows, not to more.
    config = config_of(parallel, replace(MODEL, vocab_size=vocabulary, rotary_dim=8))
    groups = init_groups(config.parallel, seed=1)
    models = build_model(config, groups)
    requests = ragged_requests(vocabulary)
    options = {"prefill_tokens": 64, "record_routing": True, "batch_invariant": invariant}
    whole = Engine(models, groups, slots=20, **options).generate(requests)
    left = sorted(random.Random(5).sample(range(len(requests)), 8))
    again = Engine(models, groups, slots=3, **options).generate([requests[index] for index in left])
    return [bits(whole[index]) for index in left], [bits(result) for result in again]


@pytest.mark.parametrize(
    ("world", "parallel", "vocabulary"),
    [(1, {}, 64), (1, {}, 61), (2, {"expert": 2}, 64), (2, {"tensor": 2}, 64), (2, {"pipeline": 2}, 64)],
    ids=["alone", "alone, vocabulary of 61", "EP2", "TP2", "PP2"],
)
def test_a_result_has_the_same_bits_beside_any_others(ranks, world, parallel, vocabulary):
    for whole, again in ranks(world, interrupted, parallel, vocabulary, True):
        assert whole == again


def test_what_it_takes(ranks):
    """Without batch_invariant some bits differ: the test above can fail."""
    [(whole, again)] = ranks(1, interrupted, {}, 64, False)
    assert [tokens for tokens, *_ in whole] == [tokens for tokens, *_ in again] and whole != again


def test_where_a_prompt_is_cut_does_not_depend_on_the_others():
    """(tokens of a prompt in a pass of 128) by pass, for prompts of 100, 300, 20 and 30 tokens; as many as fit otherwise."""

    def cuts(*, alike: bool) -> list[list[int]]:
        groups = [PromptGroup(tuple(range(length)), deque()) for length in (100, 300, 20, 30)]
        passes = []
        while left := [group for group in groups if group.prefilled < len(group.prompt)]:
            parts = prompt_parts(left, 128, alike=alike)
            for group, count in parts:
                group.prefilled += count
            passes.append([count for _, count in parts])
        return passes

    assert cuts(alike=True) == [[100], [128], [128], [44], [20, 30]]
    assert cuts(alike=False) == [[100], [128], [128], [44, 20, 30]]


class Passes:
    """Counts the passes of an engine; in the pass `kill_at` the process gets SIGKILL, with its tokens drawn and nothing else done."""

    def __init__(self, engine: Engine, kill_at: int | None = None) -> None:
        self.count, self.kill_at, self.choose = 0, kill_at, engine.stages.choose
        engine.stages.choose = self  # type: ignore[method-assign, assignment]

    def __call__(self, *arguments: Any, **named: Any) -> None:
        self.choose(*arguments, **named)
        self.count += 1
        if self.count == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)


def resumed_after_kill(rank: int, world: int, path: Path) -> tuple[dict[int, Bits], dict[int, Bits], int, str]:
    """Results of an uninterrupted call; those in the journal of one that was killed in a pass drawn at random and of a second one for
    what was missing; how many the journal had; what was drawn."""
    config = config_of({})
    groups = init_groups(config.parallel, seed=1)
    models = build_model(config, groups)
    requests = ragged_requests()

    def engine() -> Engine:
        return Engine(models, groups, slots=6, record_routing=True, batch_invariant=True)

    whole = engine()
    passes = Passes(whole)
    want = {index: bits(result) for index, result in whole.stream(requests)}
    kill_at = random.SystemRandom().randrange(1, passes.count)
    child = os.fork()
    if not child:
        killed = engine()
        Passes(killed, kill_at)
        with Journal(path, sync_every=0) as journal:
            for index, result in killed.stream(requests):
                journal.append({"index": index, "bits": bits(result)})
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    found = {record["index"]: tuple(record["bits"]) for record in read_journal(path)}
    finished = len(found)
    missing = [index for index in range(len(requests)) if index not in found]
    for place, result in engine().stream([requests[index] for index in missing]):
        found[missing[place]] = bits(result)
    return want, found, finished, f"killed in pass {kill_at} of {passes.count}"


def test_kill_9_at_a_random_point_changes_no_bit(ranks, tmp_path):
    """Finished results come from the journal; the others are asked for again and run beside fewer."""
    [(want, found, finished, drawn)] = ranks(1, resumed_after_kill, tmp_path / "journal.jsonl")
    assert finished < len(want) and found == want, drawn


@dataclass
class Work:
    """What a replica did."""

    tokens: int = 0
    """That its layers took in, idle passes apart."""
    passes: int = 0
    """In step with others."""
    expert_rows: list[int] = field(default_factory=list)
    """Of its first layer, by pass."""


def work_in_lock_step(
    rank: int, world: int, parallel: dict[str, int], requests: list[Request], reference: bool
) -> tuple[list[Result], Work]:
    config, work = config_of(parallel), Work()
    groups = init_groups(config.parallel, seed=1)
    models = build_model(config, groups)
    layer = models[0].decoder.layers[0]
    models[0].embedding.word_embeddings.register_forward_pre_hook(
        lambda module, inputs: setattr(work, "tokens", work.tokens + inputs[0].numel())
    )
    layer.mlp.register_forward_pre_hook(lambda module, inputs: work.expert_rows.append(inputs[0].shape[0]))
    kind = ReferenceEngine(models, groups, tokens=64) if reference else Engine(models, groups, slots=4)
    results = kind.generate(requests)
    work.passes = len(work.expert_rows)
    return results, work


@pytest.mark.parametrize("reference", [False, True], ids=["fast", "reference"])
def test_a_replica_without_prompts_goes_through_the_experts_alone(ranks, reference):
    [(want, _)] = ranks(1, work_in_lock_step, {}, [Request((3, 4), 1, GREEDY)], reference)
    (busy, first), (idle, second) = ranks(2, work_in_lock_step, {"expert": 2}, [Request((3, 4), 1, GREEDY)], reference)
    assert [r.tokens for r in busy] == [r.tokens for r in idle] == [r.tokens for r in want]
    assert first.tokens > 0 and second.tokens == 0 and second.expert_rows == [1] * first.passes
    assert first.passes == 16  # one for each new token


def test_replicas_that_share_no_experts_do_not_wait(ranks):
    """Four replicas, experts over the first and over the last two: the second pair is done after 3 tokens."""
    lengths = [12, 3, 2, 3]
    requests = [Request((7, index), index, replace(GREEDY, max_new_tokens=n)) for index, n in enumerate(lengths)]
    done = ranks(4, work_in_lock_step, {"expert": 2}, requests, False)
    assert [work.passes for _, work in done] == [12, 12, 3, 3]
    assert all([len(result.tokens) for result in results] == lengths for results, _ in done)


def test_nothing_to_do(ranks):
    assert [(results, work.passes) for results, work in ranks(2, work_in_lock_step, {"expert": 2}, [], False)] == [
        ([], 0)
    ] * 2
