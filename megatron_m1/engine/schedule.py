"""Learning rate, batch size and data position as pure functions of the step, which is what makes a resume exact.

Core's OptimizerParamScheduler covers constant, linear, cosine and wsd, but keeps its position as state, starts the
warm-up at a learning rate of 0 (one wasted step) and has neither a constant phase before the decay nor a true
exponential (optimizer_param_scheduler.py:230, :274, megatron-core 0.19.2).
"""

import math

from megatron_m1.config.schema import OptimizerConfig, ScheduleConfig, TrainingConfig

__all__ = ["consumed_samples", "global_batch_at", "learning_rate"]


def learning_rate(step: int, schedule: ScheduleConfig, optimizer: OptimizerConfig, total_steps: int) -> float:
    """Learning rate with which step `step` (0-based) updates the weights.

    With p the fraction of the decay done, from 0 at its first step to 1 one step after its last: linear
    min + (lr - min)(1 - p), cosine min + (lr - min)(1 + cos(pi p))/2, exponential lr (min/lr)^p, minus_sqrt
    min + (lr - min)(1 - sqrt(p)); afterwards min_lr.
    """
    if step < schedule.warmup_steps:
        return optimizer.lr * (step + 1) / schedule.warmup_steps
    if schedule.kind == "constant":
        return optimizer.lr
    start, end = _decay_window(schedule, total_steps)
    if step < start:
        return optimizer.lr
    if step >= end:
        return schedule.min_lr
    style = schedule.decay_style if schedule.kind in ("wsd", "constant_decay") else schedule.kind
    return _decayed(style, (step - start) / (end - start), optimizer.lr, schedule.min_lr)


def global_batch_at(step: int, training: TrainingConfig) -> int:
    """Sequences over all ranks in step `step` (0-based): that of the last ramp-up stage begun, else `global_batch`."""
    batch = training.global_batch
    for stage in training.batch_ramp:
        if stage.from_step <= step:
            batch = stage.global_batch
    return batch


def consumed_samples(step: int, training: TrainingConfig) -> int:
    """Sequences consumed before step `step`: the position in the data at which that step starts."""
    starts = [0, *(stage.from_step for stage in training.batch_ramp)]
    batches = [training.global_batch, *(stage.global_batch for stage in training.batch_ramp)]
    ends = [*starts[1:], step]
    return sum(batch * max(min(end, step) - start, 0) for batch, start, end in zip(batches, starts, ends, strict=True))


def _decay_window(schedule: ScheduleConfig, total_steps: int) -> tuple[int, int]:
    """First step of the decay and the step after its last."""
    if schedule.kind == "wsd":
        assert schedule.decay_steps is not None, "validate() demands schedule.decay_steps for wsd"
        return total_steps - schedule.decay_steps, total_steps
    if schedule.kind == "constant_decay":
        start = schedule.warmup_steps + schedule.constant_steps
        return start, total_steps if schedule.decay_steps is None else start + schedule.decay_steps
    return schedule.warmup_steps, total_steps if schedule.decay_steps is None else schedule.decay_steps


def _decayed(style: str, done: float, peak: float, floor: float) -> float:
    if style == "exponential":
        return peak * (floor / peak) ** done
    left = {"linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2, "minus_sqrt": 1 - math.sqrt(done)}[style]
    return floor + (peak - floor) * left
