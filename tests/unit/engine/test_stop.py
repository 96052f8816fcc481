import os
import signal

import pytest

STARTED = "training.exit_after_s"


def stop_reasons(rank, world, signalled, number, exit_after_s):
    """(reason before, reason after rank `signalled` got the signal, whether the handlers are back)."""
    import torch

    from megatron_m1.engine.stop import EarlyStop

    handled = (signal.SIGTERM, signal.SIGUSR1)
    before = [signal.getsignal(item) for item in handled]
    with EarlyStop(exit_after_s=exit_after_s, device=torch.device("cpu")) as stop:
        first = stop.reason()
        if rank == signalled:
            os.kill(os.getpid(), number)
        second = stop.reason()
    return first, second, [signal.getsignal(item) for item in handled] == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_one_rank_is_a_reason_for_all(ranks, number):
    assert ranks(3, stop_reasons, 1, number, None) == [(None, number.name, True)] * 3


def test_without_signal_or_limit_there_is_no_reason(ranks):
    assert ranks(2, stop_reasons, None, None, None) == [(None, None, True)] * 2


def test_the_time_limit_is_a_reason(ranks):
    assert ranks(2, stop_reasons, None, None, 0.0) == [(STARTED, STARTED, True)] * 2


def test_a_signal_comes_before_the_time_limit(ranks):
    assert ranks(2, stop_reasons, 0, signal.SIGTERM, 0.0) == [(STARTED, "SIGTERM", True)] * 2
