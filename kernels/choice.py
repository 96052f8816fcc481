"""Which implementation of an operator runs, and why."""

import functools
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["Implementation", "choose"]

logger = logging.getLogger("m1_kernels")


@dataclass(frozen=True)
class Implementation:
    """One way to compute an operator.

    run: the computation, called as the operator's own module documents.
    obstacle: for the input that decides returns why it cannot run here, with the remedy, or None when it can.
    why: the reason to log when "auto" picks it.
    auto_on: device types on which "auto" may pick it.
    """

    run: Callable[..., Any]
    obstacle: Callable[[torch.Tensor], str | None]
    why: str
    auto_on: tuple[str, ...] = ("cpu", "cuda")


def choose(
    operator: str, implementations: Mapping[str, Implementation], implementation: str, x: torch.Tensor
) -> Implementation:
    """The named implementation, or for "auto" the first that may and can run x; raises ValueError when there is none.

    implementations: by name, in the order in which "auto" tries them.  Every new choice is logged once.
    """
    if implementation == "auto":
        reasons = []
        for name, candidate in implementations.items():
            if x.device.type not in candidate.auto_on:
                continue
            obstacle = candidate.obstacle(x)
            if obstacle is None:
                _log_once(operator, x.device.type, name, candidate.why)
                return candidate
            reasons.append(f"{name}: {obstacle}")
        names = "; ".join(reasons) or "name one of " + ", ".join(implementations)
        raise ValueError(f"{operator}: implementation='auto' found none for {x.dtype} on {x.device}: {names}")
    if implementation not in implementations:
        names = ", ".join(["auto", *implementations])
        raise ValueError(f"{operator}: implementation={implementation!r} is not available; use one of {names}")
    chosen = implementations[implementation]
    obstacle = chosen.obstacle(x)
    if obstacle is not None:
        raise ValueError(
            f"{operator}: implementation={implementation!r} cannot run: {obstacle}; implementation='auto' picks another"
        )
    _log_once(operator, x.device.type, implementation, "asked for")
    return chosen


@functools.cache
def _log_once(operator: str, device: str, name: str, why: str) -> None:
    logger.info("%s on %s: %s (%s)", operator, device, name, why)
