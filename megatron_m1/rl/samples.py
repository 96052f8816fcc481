"""One rollout from request to verdict, and its record in the journal."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from megatron_m1.generation.requests import Result
from megatron_m1.rl.journal import decode_array, encode_array
from megatron_m1.rl.rewards.protocol import RewardResult
from megatron_m1.rl.tasks import Task

__all__ = ["Sample", "from_record", "sample_of", "to_record"]


@dataclass(frozen=True)
class Sample:
    """A response and what is known about it.

    number: of the request within its run, the same after a resume.  group: number of its prompt.  weights: version of the
    weights that it was drawn from.  logprobs: float32 [response tokens], nats, as the engine reported them.
    reward: None where reward_error says why there is none.
    """

    number: int
    group: int
    weights: str
    task: Task
    prompt: tuple[int, ...]
    response: tuple[int, ...]
    logprobs: np.ndarray
    finish_reason: str
    text: str
    reward: float | None = None
    reward_error: str | None = None
    parts: dict[str, float] = field(default_factory=dict)

    @property
    def truncated(self) -> bool:
        return self.finish_reason == "length"

    def judged(self, result: RewardResult) -> "Sample":
        """With the verdict."""
        if result.score is None:
            return replace(self, reward_error=result.reward_error)
        return replace(self, reward=result.score.value, parts=dict(result.score.parts))


def sample_of(
    result: Result, *, number: int, group: int, weights: str, task: Task, prompt: Sequence[int], text: str
) -> Sample:
    """The sample of what the engine gave back; `text` is the decoded response."""
    logprobs = np.array(result.logprobs, dtype=np.float32)
    return Sample(
        number, group, weights, task, tuple(prompt), tuple(result.tokens), logprobs, result.finish_reason, text
    )


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
    }


def from_record(record: dict[str, Any]) -> Sample:
    """The sample of `to_record`, not judged yet."""
    return Sample(
        record["number"],
        record["group"],
        record["weights"],
        Task(**record["task"]),
        tuple(record["prompt"]),
        tuple(record["response"]),
        decode_array(record["logprobs"]),
        record["finish_reason"],
        record["text"],
    )
