import math

import pytest

from megatron_m1.config.schema import BatchStage, OptimizerConfig, ScheduleConfig, TrainingConfig
from megatron_m1.engine.schedule import consumed_samples, global_batch_at, learning_rate

PEAK, FLOOR = 8e-5, 8e-6


def rates(steps, total, **schedule):
    schedule = ScheduleConfig(min_lr=FLOOR, **schedule)
    return [learning_rate(step, schedule, OptimizerConfig(lr=PEAK), total) for step in steps]


def test_warm_up_rises_to_the_peak_and_never_starts_at_zero():
    assert rates(range(5), 100, kind="constant", warmup_steps=4) == pytest.approx([2e-5, 4e-5, 6e-5, 8e-5, 8e-5])
    assert rates([0], 100, kind="cosine", warmup_steps=1) == [PEAK]


@pytest.mark.parametrize(
    "kind, halfway",
    [("linear", 4.4e-5), ("cosine", 4.4e-5), ("exponential", math.sqrt(PEAK * FLOOR))],
)
def test_plain_decays_end_at_the_floor(kind, halfway):
    got = rates([10, 60, 110, 500], 110, kind=kind, warmup_steps=10)
    assert got == pytest.approx([PEAK, halfway, FLOOR, FLOOR], rel=1e-12)
    assert rates([35], 110, kind=kind, decay_steps=70) == pytest.approx([halfway])


def test_cosine_at_a_quarter():
    assert rates([25], 100, kind="cosine") == pytest.approx([FLOOR + (PEAK - FLOOR) * (1 + math.sqrt(0.5)) / 2])


def test_m1_holds_a_third_then_decays():
    """2.5T tokens at 8e-5, then 5T down to 8e-6 (MiniMax-M1 report, section 2)."""
    schedule = {"kind": "constant_decay", "constant_steps": 2500, "decay_style": "exponential"}
    got = rates([0, 2499, 2500, 5000, 7500], 7500, **schedule)
    assert got == pytest.approx([PEAK, PEAK, PEAK, math.sqrt(PEAK * FLOOR), FLOOR])
    assert rates([3000, 3500], 7500, decay_steps=1000, **schedule) == pytest.approx([math.sqrt(PEAK * FLOOR), FLOOR])


@pytest.mark.parametrize(
    "style, quarter", [("linear", 0.75), ("minus_sqrt", 0.5), ("cosine", (1 + math.sqrt(0.5)) / 2)]
)
def test_warmup_stable_decay(style, quarter):
    got = rates([2, 59, 60, 70, 100], 100, kind="wsd", warmup_steps=2, decay_steps=40, decay_style=style)
    assert got == pytest.approx([PEAK, PEAK, PEAK, FLOOR + (PEAK - FLOOR) * quarter, FLOOR])


def test_a_longer_run_does_not_move_the_stable_part():
    short, long = (rates(range(60), total, kind="wsd", decay_steps=40, decay_style="linear") for total in (100, 1000))
    assert short == long


def test_core_agrees_where_it_has_the_kind():
    from megatron_m1.platform import setup

    setup()
    import torch
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    weight = torch.nn.Parameter(torch.zeros(1))
    for kind, core in (("linear", "linear"), ("cosine", "cosine")):
        group = torch.optim.SGD([weight], lr=PEAK)
        group.param_groups[0].update(max_lr=PEAK, min_lr=FLOOR)
        scheduler = OptimizerParamScheduler(group, 0.0, PEAK, FLOOR, 5, 50, core, 0.1, 0.1, 1, "constant")
        for step in range(5, 60):  # core's position n has taken n steps: its warm-up is ours one step later
            scheduler.num_steps = step
            assert scheduler.get_lr(group.param_groups[0]) == pytest.approx(
                rates([step], 50, kind=kind, warmup_steps=5)[0], rel=1e-12
            )


def test_batch_ramp_and_position_in_the_data():
    training = TrainingConfig(global_batch=4, batch_ramp=[BatchStage(3, 8), BatchStage(5, 16)])
    batches = [global_batch_at(step, training) for step in range(8)]
    assert batches == [4, 4, 4, 8, 8, 16, 16, 16]
    assert [consumed_samples(step, training) for step in range(9)] == [sum(batches[:step]) for step in range(9)]
    assert consumed_samples(7, TrainingConfig(global_batch=4)) == 28
    from_start = TrainingConfig(global_batch=4, batch_ramp=[BatchStage(0, 2)])
    assert global_batch_at(0, from_start) == 2 and consumed_samples(3, from_start) == 6
