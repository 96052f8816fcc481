"""Work whose length a response decides, in a forked copy of the process that is killed in time."""

import json
import os
import select
import signal
import time
from collections.abc import Callable
from typing import Any

__all__ = ["limited"]


def limited(work: Callable[[], Any], *, seconds: float) -> Any:
    """The JSON value that `work` returns; None if it does not end in time, or its process dies of memory, stack or a signal.

    Not a thread or an alarm: neither stops a long operation on big integers. Raises RuntimeError with what `work` raised.
    """
    result, inside = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.close(result)
            with os.fdopen(inside, "w") as file:
                json.dump(_outcome(work), file)
            status = 0
        finally:
            os._exit(status)
    os.close(inside)
    try:
        said = _read(result, until=time.monotonic() + seconds)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(result)
    try:
        outcome = json.loads(said)
    except ValueError:
        return None
    if "error" in outcome:
        raise RuntimeError(outcome["error"])
    return outcome["value"]


def _outcome(work: Callable[[], Any]) -> dict[str, Any]:
    try:
        return {"value": work()}
    except (MemoryError, RecursionError, OverflowError):
        return {"value": None}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"[:2000]}


def _read(fd: int, *, until: float) -> bytes:
    """All that comes, or what has come by then."""
    said = b""
    while select.select([fd], [], [], max(until - time.monotonic(), 0.0))[0]:
        chunk = os.read(fd, 1 << 16)
        if not chunk:
            break
        said += chunk
    return said
