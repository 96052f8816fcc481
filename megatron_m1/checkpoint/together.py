"""One verdict for all ranks, so that an error on one of them never leaves the others in a collective."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import CheckpointException

from megatron_m1 import platform
from megatron_m1.config.errors import ConfigError

__all__ = ["all_ranks", "from_rank_0", "together"]


@contextmanager
def together() -> Iterator[None]:
    """If the block fails on any rank, every rank raises: ConfigError with the message of the first rank that failed.

    Collective over the world at its end; the block itself must hold no collective. An error that is neither ConfigError nor
    OSError is a bug: its own rank raises it as it is, the others a ConfigError that names the rank.
    """
    own: BaseException | None = None
    try:
        yield
    except (Exception, CheckpointException) as error:  # the latter is a BaseException
        own = error
    reports: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(reports, None if own is None else _report(own))
    first = next((report for report in reports if report is not None), None)
    if first is None:
        return
    if own is not None and not isinstance(own, ConfigError | OSError | CheckpointException):
        raise own
    raise ConfigError(first) from own


def _report(error: BaseException) -> str:
    if isinstance(error, ConfigError):
        return str(error)
    kind = "" if isinstance(error, OSError) else f"{type(error).__name__}: "
    return f"rank {dist.get_rank()}: {kind}{error}"


def all_ranks(flag: bool) -> bool:
    """Whether `flag` holds on every rank. Collective over the world."""
    count = torch.tensor([int(flag)], device=platform.device())
    dist.all_reduce(count, op=dist.ReduceOp.MIN)
    return bool(count.item())


def from_rank_0(value: Any) -> Any:
    """Rank 0's `value` (picklable). Collective over the world."""
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]
