"""Where the time of a step goes: work is not waiting."""

import time

import pytest
import torch

from megatron_m1.engine.trainer import Trainer
from megatron_m1.generation.lock_step import LockStep
from megatron_m1.parallel import destroy_groups, init_groups
from megatron_m1.rl.phases import Phases
from tests.unit.rl.loop_cases import tiny_config

LATE_S = 1.0


def measured(rank: int, world: int) -> tuple[dict[str, float], dict[str, float]]:
    """Figures of a phase in which rank 1 works and rank 0 waits, and of one in which rank 0 says so itself."""
    init_groups(tiny_config().parallel, seed=1)
    phases = Phases()
    with phases.measure("reward"):
        time.sleep(LATE_S * rank)
    first = phases.report()
    with phases.measure("rollout"):
        time.sleep(LATE_S)
    phases.waited("rollout", 0.0 if rank else LATE_S)
    second = phases.report()
    destroy_groups()
    return first, second


def test_waiting_for_a_late_rank_is_idle(ranks):
    (first, second), again = ranks(2, measured)
    assert (first, second) == again
    for figures, name in ((first, "reward"), (second, "rollout")):
        assert list(figures) == [f"seconds_{name}", "seconds_idle", "idle_share"]
        assert figures[f"seconds_{name}"] == pytest.approx(LATE_S / 2, abs=0.3)
        assert figures["seconds_idle"] == pytest.approx(LATE_S / 2, abs=0.3)
        assert figures["idle_share"] == pytest.approx(0.5, abs=0.2)


def idle_in_lock_step(rank: int, world: int) -> list[float]:
    """Seconds that the rank was idle, after each of two rounds in which the other works longer."""
    config = tiny_config({"expert": 2})
    groups = init_groups(config.parallel, seed=1)
    lock_step, found = LockStep(Trainer(config, groups).models, groups), []
    for late in (1, 0):
        passes = 4 if rank == late else 1
        while lock_step.any(passes > 0):
            time.sleep(LATE_S / 4 if passes > 0 and rank == late else 0.0)
            passes -= 1
        found.append(lock_step.idle_s)
    destroy_groups()
    return found


def test_replicas_in_lock_step_know_how_long_they_had_nothing_to_do(ranks):
    first, second = torch.tensor(ranks(2, idle_in_lock_step)).T
    # Of four passes of the late replica the other one works in the first.
    assert first[1] < 0.3 * LATE_S and 0.5 * LATE_S < first[0] < 1.3 * LATE_S
    assert second[0] - first[0] < 0.3 * LATE_S and 0.5 * LATE_S < second[1] < 1.5 * LATE_S
