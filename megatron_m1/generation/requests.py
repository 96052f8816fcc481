"""What is asked of the engine, and what it gives back."""

import hashlib
import math
from dataclasses import dataclass, field

from torch import Tensor

__all__ = ["Request", "Result", "Running", "Sampling", "request_seed"]


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen, and when to stop."""

    max_new_tokens: int
    temperature: float = 1.0
    """0: always the likeliest token."""
    top_p: float = 1.0
    """Share of the probability, after temperature and top_k, to draw from."""
    top_k: int = 0
    """Likeliest tokens to draw from; 0: all."""
    end_tokens: tuple[int, ...] = ()
    repetition_tokens: int = 3000
    """Stop after so many consecutive tokens that each had more than `repetition_probability`; 0: never.
    Source: MiniMax-M1 report, section 4.3 (both defaults)."""
    repetition_probability: float = 0.99


@dataclass(frozen=True)
class Request:
    """One completion asked for. Requests with equal prompts share the work on the prompt."""

    prompt: tuple[int, ...]
    """Token ids, at least one."""
    seed: int
    """With a token's position alone decides its random number."""
    sampling: Sampling


@dataclass
class Result:
    """What was generated after one prompt."""

    tokens: list[int] = field(default_factory=list)
    """The end token included."""
    logprobs: list[float] = field(default_factory=list)
    """Natural log of each token's probability in the whole vocabulary: minus the loss that training has on it."""
    finish_reason: str = ""
    """`eos`, `length` or `stop_repetition`."""
    routing: Tensor | None = None
    """[prompt + tokens - 1, layers, top_k] int16, on CPU: experts of every token that went through the model, the likeliest
    first; only if asked for."""


def request_seed(seed: int, index: int) -> int:
    """Seed of request `index` of a run with `seed`."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{index}".encode()).digest()[:8], "little") >> 1


class Running:
    """One request under way."""

    def __init__(self, index: int, request: Request) -> None:
        self.index, self.request, self.result = index, request, Result()
        self.confident = 0
        self.routing: list[Tensor] = []
        self._ends = frozenset(request.sampling.end_tokens)
        self._confident_above = math.log(request.sampling.repetition_probability)

    @property
    def last_token(self) -> int:
        return self.result.tokens[-1]

    @property
    def length(self) -> int:
        """Tokens so far, the prompt's included; the position of the next one."""
        return len(self.request.prompt) + len(self.result.tokens)

    @property
    def done(self) -> bool:
        return bool(self.result.finish_reason)

    def take(self, token: int, logprob: float) -> None:
        """The next token and its log-probability."""
        result, sampling = self.result, self.request.sampling
        result.tokens.append(token)
        result.logprobs.append(logprob)
        self.confident = self.confident + 1 if logprob > self._confident_above else 0
        if token in self._ends:
            result.finish_reason = "eos"
        elif sampling.repetition_tokens and self.confident >= sampling.repetition_tokens:
            result.finish_reason = "stop_repetition"
        elif len(result.tokens) == sampling.max_new_tokens:
            result.finish_reason = "length"
