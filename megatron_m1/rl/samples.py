"""One rollout from request to verdict, its record in the journal, and the little of it that every rank knows."""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from megatron_m1.config.schema import RLConfig
from megatron_m1.generation.requests import Result
from megatron_m1.rl.journal import decode_array, encode_array
from megatron_m1.rl.rewards.protocol import RewardResult
from megatron_m1.rl.tasks import Task

__all__ = [
    "Facts",
    "Sample",
    "counted_reward",
    "facts_of",
    "from_record",
    "sample_of",
    "to_record",
    "verdict_record",
    "with_verdict",
]


@dataclass(frozen=True)
class Sample:
    """A response and what is known about it.

    number: of the request within its run, the same after a resume.  group: number of its prompt.  weights: version of the
    weights that it was drawn from.  logprobs: float32 [response tokens], nats, as the engine reported them.
    routing: [prompt + response - 1, layers, top_k] unsigned, the experts of every token that went through the model; None where they
    were not recorded.  reward: None where reward_error says why there is none.
    """

    number: int
    group: int
    weights: str
    task: Task
    prompt: Sequence[int]
    response: Sequence[int]
    logprobs: np.ndarray
    finish_reason: str
    text: str
    routing: np.ndarray | None = None
    reward: float | None = None
    reward_error: str | None = None
    parts: dict[str, float] = field(default_factory=dict)

    @property
    def truncated(self) -> bool:
        return self.finish_reason == "length"

    @property
    def has_verdict(self) -> bool:
        return self.reward is not None or self.reward_error is not None

    def judged(self, result: RewardResult) -> "Sample":
        """With the verdict."""
        if result.score is None:
            return replace(self, reward_error=result.reward_error)
        return replace(self, reward=result.score.value, parts=dict(result.score.parts))


@dataclass(frozen=True)
class Facts:
    """What every rank knows of a sample, whoever generated it.

    prompt_length, length: tokens of prompt and response.  logprob_sum: of the response, nats.  reward: None where there is none.
    """

    number: int
    group: int
    prompt_length: int
    length: int
    logprob_sum: float
    finish_reason: str
    reward: float | None

    @property
    def truncated(self) -> bool:
        return self.finish_reason == "length"

    @property
    def repetitive(self) -> bool:
        return self.finish_reason == "stop_repetition"


def counted_reward(facts: Facts, rl: RLConfig) -> float | None:
    """What `rl.truncated` and `rl.repetitive` make of the reward; None: the sample is left out."""
    rules = {"length": rl.truncated, "stop_repetition": rl.repetitive}
    rule = rules.get(facts.finish_reason, "score")
    if facts.reward is None or rule == "drop":
        return None
    return 0.0 if rule == "zero" else facts.reward


def facts_of(sample: Sample) -> Facts:
    """The facts of a sample that this rank has."""
    return Facts(
        sample.number,
        sample.group,
        len(sample.prompt),
        len(sample.response),
        float(sample.logprobs.sum(dtype=np.float64)),
        sample.finish_reason,
        sample.reward,
    )


def sample_of(
    result: Result, *, number: int, group: int, weights: str, task: Task, prompt: Sequence[int], text: str
) -> Sample:
    """The sample of what the engine gave back; `text` is the decoded response."""
    logprobs = np.array(result.logprobs, dtype=np.float32)
    routing = None if result.routing is None else result.routing.numpy()
    if routing is not None:
        routing = routing.astype(np.min_scalar_type(routing.max()))
    response = array("i", result.tokens)
    return Sample(number, group, weights, task, prompt, response, logprobs, result.finish_reason, text, routing)


def to_record(sample: Sample) -> dict[str, Any]:
    """JSON values; log-probabilities bit for bit."""
    return {
        "number": sample.number,
        "group": sample.group,
        "weights": sample.weights,
        "task": {"prompt": sample.task.prompt, "reward": sample.task.reward, "task": sample.task.task},
        "prompt": list(sample.prompt),
        "response": list(sample.response),
        "logprobs": encode_array(sample.logprobs),
        "finish_reason": sample.finish_reason,
        "text": sample.text,
        "routing": None if sample.routing is None else encode_array(sample.routing, compress=True),
    }


def from_record(record: dict[str, Any]) -> Sample:
    """The sample of `to_record`, not judged yet."""
    return Sample(
        record["number"],
        record["group"],
        record["weights"],
        Task(**record["task"]),
        tuple(record["prompt"]),
        array("i", record["response"]),
        decode_array(record["logprobs"]),
        record["finish_reason"],
        record["text"],
        None if record.get("routing") is None else decode_array(record["routing"]),
    )


def verdict_record(sample: Sample) -> dict[str, Any]:
    """JSON values of the verdict on a sample whose record is in the journal already."""
    return {
        "verdict": sample.number,
        "weights": sample.weights,
        "reward": sample.reward,
        "reward_error": sample.reward_error,
        "parts": sample.parts,
    }


def with_verdict(sample: Sample, record: dict[str, Any]) -> Sample:
    """The sample with the verdict of `verdict_record`."""
    return replace(sample, reward=record["reward"], reward_error=record["reward_error"], parts=record["parts"])
