"""Who runs when: requests with equal prompts form a group, whose prompt goes through the model once."""

from collections import deque
from dataclasses import dataclass, field

import torch.distributed as dist
from torch import Tensor

from megatron_m1.generation.blocks import BLOCK_TOKENS
from megatron_m1.generation.cache import Prefix
from megatron_m1.generation.requests import Request, Result, Running

__all__ = ["PromptGroup", "group_requests", "prompt_parts", "results_of_all", "share_of_replica"]


@dataclass
class PromptGroup:
    """Requests with one prompt, of which those in `waiting` have not started."""

    prompt: tuple[int, ...]
    waiting: deque[Running]
    prefix: Prefix | None = None
    """What the model made of the prompt, while requests wait for it."""
    logits: Tensor | None = None
    """[V / TP] after the prompt, where the head is."""
    prefilled: int = 0
    """Tokens of the prompt that have gone through the model."""
    starting: int = 0
    """Requests that have been given a slot and start when the prompt is through the model."""
    routing: list[Tensor] = field(default_factory=list)

    def start(self) -> Running:
        """The next request, off `waiting`."""
        request = self.waiting.popleft()
        request.routing = list(self.routing)
        return request


def group_requests(requests: list[tuple[int, Request]]) -> list[PromptGroup]:
    """(index, request) pairs by prompt, in order of first appearance."""
    groups: dict[tuple[int, ...], PromptGroup] = {}
    for index, request in requests:
        group = groups.setdefault(request.prompt, PromptGroup(request.prompt, deque()))
        group.waiting.append(Running(index, request))
    return list(groups.values())


def prompt_parts(groups: list[PromptGroup], tokens: int, *, alike: bool) -> list[tuple[PromptGroup, int]]:
    """(group, tokens of its prompt) of the next pass over at most `tokens`, in order.

    alike: where a prompt is cut does not depend on the others, and prompts of which a part has gone through the model go alone.
    """
    parts: list[tuple[PromptGroup, int]] = []
    left = tokens
    for group in groups:
        count = len(group.prompt) - group.prefilled
        if count > left:
            if alike and parts:
                break
            count = left // BLOCK_TOKENS * BLOCK_TOKENS
        if count == 0 or (alike and parts and group.prefilled):
            break
        parts.append((group, count))
        left -= count
        if alike and group.prefilled:
            break
    return parts


def share_of_replica(requests: list[Request], replica: int, replicas: int) -> list[tuple[int, Request]]:
    """(index, request) pairs of the prompts that fall to `replica`: whole prompt groups, dealt out in turn."""
    turn: dict[tuple[int, ...], int] = {}
    for request in requests:
        turn.setdefault(request.prompt, len(turn) % replicas)
    return [(index, request) for index, request in enumerate(requests) if turn[request.prompt] == replica]


def results_of_all(own: dict[int, Result], replicas: dist.ProcessGroup) -> list[Result]:
    """The results of all requests, in order, on every rank, from each replica's own by index."""
    shares: list[dict[int, Result]] = [{} for _ in range(replicas.size())]
    dist.all_gather_object(shares, own, group=replicas)
    results = {index: result for share in shares for index, result in share.items()}
    return [results[index] for index in sorted(results)]
