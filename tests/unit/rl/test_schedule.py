import itertools
import json
import math
import random

import pytest

from megatron_m1.config.errors import ConfigError
from megatron_m1.config.schema import CurriculumPoint, WindowStage
from megatron_m1.rl.schedule import PassRates, WindowController, curriculum_weights, length_quantile

WINDOWS = [40_000, 48_000, 56_000, 64_000, 72_000, 80_000]
STAGES = [WindowStage(w, 5.0 - 0.5 * i, 1.0 / (i + 1)) for i, w in enumerate(WINDOWS)]


def controller() -> WindowController:
    return WindowController(STAGES, patience=10, tolerance=0.01, near_share=0.95)


def test_m1_trace_moves_through_all_windows():
    """Each extension raises the perplexity, which then decays; lengths grow towards the window."""
    control, dice = controller(), random.Random(0)
    moves, since = [], 0
    for step in range(400):
        perplexity = (1.5 + 0.4 * math.exp(-since / 8)) * (1 + 0.002 * dice.uniform(-1, 1))
        p99 = round(control.stage.max_new_tokens * min(1.0, 0.8 + since / 100))
        since += 1
        if control.update(perplexity=perplexity, p99_length=p99):
            moves.append((step, control.stage.max_new_tokens))
            since = 0
    assert [window for _, window in moves] == WINDOWS[1:]
    steps = [0, *(step for step, _ in moves)]
    assert all(20 <= later - earlier <= 40 for earlier, later in itertools.pairwise(steps))
    assert control.stage == STAGES[-1]


@pytest.mark.parametrize(
    "perplexity, p99, moved_at",
    [
        (lambda t: 1.5, lambda t: 40_000, 9),
        (lambda t: 1.5, lambda t: 30_000, None),  # converged, short: the window is no limit
        (lambda t: 3.0 * 0.98**t, lambda t: 40_000, None),  # long, still falling
        (lambda t: 3.0 * 1.02**t, lambda t: 40_000, None),  # long, rising
        (lambda t: 1.5, lambda t: 40_000 if t != 5 else 10_000, 15),  # near in each of the last steps
        (lambda t: 2.0 if t < 12 else 1.5, lambda t: 40_000 if t >= 8 else 0, 21),
        (lambda t: 1.5, lambda t: 38_000, 9),
        (lambda t: 1.5, lambda t: 37_999, None),
    ],
)
def test_both_signals_are_needed(perplexity, p99, moved_at):
    control = controller()
    moves = [t for t in range(30) if control.index == 0 and control.update(perplexity=perplexity(t), p99_length=p99(t))]
    assert moves == ([] if moved_at is None else [moved_at])


def test_history_starts_anew_and_the_last_window_stays():
    control = controller()
    moves = [t for t in range(80) if control.update(perplexity=1.5, p99_length=80_000)]
    assert moves == [9, 19, 29, 39, 49]
    assert control.stage.is_weight_cap == 2.5 and control.stage.clip_grad == 1 / 6


def test_a_resumed_controller_moves_at_the_same_step():
    whole, first = controller(), controller()
    trace = [(1.5 + 1 / (t + 1), 40_000) for t in range(60)]
    expected = [whole.update(perplexity=p, p99_length=n) for p, n in trace]
    seen = [first.update(perplexity=p, p99_length=n) for p, n in trace[:17]]
    second = controller()
    second.load(json.loads(json.dumps(first.state())))
    seen += [second.update(perplexity=p, p99_length=n) for p, n in trace[17:]]
    assert seen == expected and any(expected)
    with pytest.raises(ConfigError, match="saved window"):
        WindowController(STAGES[:1]).load({"window": 48_000, "perplexities": [], "near": []})


def test_a_perplexity_that_is_not_finite_is_refused():
    with pytest.raises(ValueError, match="finite"):
        controller().update(perplexity=float("nan"), p99_length=1)


def test_length_quantile_is_nearest_rank():
    assert length_quantile(range(1, 101), 0.99) == 99
    assert length_quantile(range(1, 102), 0.99) == 100
    assert length_quantile([5], 0.99) == 5
    with pytest.raises(ValueError):
        length_quantile([], 0.99)


def test_curriculum_is_linear_between_points():
    points = [CurriculumPoint(10, [3, 1, 0]), CurriculumPoint(20, [1, 0, 1])]
    assert curriculum_weights(0, points) == curriculum_weights(10, points) == [0.75, 0.25, 0.0]
    assert curriculum_weights(15, points) == pytest.approx([0.625, 0.125, 0.25])
    assert curriculum_weights(20, points) == curriculum_weights(99, points) == [0.5, 0.0, 0.5]


def test_easy_and_hard_prompts_are_skipped_once_known():
    rates = PassRates(easy_above=0.75, hard_below=0.1, min_attempts=8)
    assert rates.wanted("new") and rates.rate("new") is None
    rates.record("easy", right=4, attempts=4)
    assert rates.wanted("easy")
    rates.record("easy", right=4, attempts=4)
    rates.record("hard", right=0, attempts=8)
    rates.record("edge", right=6, attempts=8)
    assert [rates.wanted(name) for name in ("easy", "hard", "edge")] == [False, False, True]
    assert rates.rate("edge") == 0.75
    restored = PassRates(easy_above=0.75, hard_below=0.1, min_attempts=8)
    restored.load(json.loads(json.dumps(rates.state())))
    assert restored == rates
    with pytest.raises(ValueError):
        rates.record("x", right=3, attempts=2)


def test_pass_rates_forget():
    rates = PassRates(window=32, min_attempts=8)
    for _ in range(4):
        rates.record("p", right=8, attempts=8)
    for _ in range(8):
        rates.record("p", right=0, attempts=8)
    assert rates.rate("p") < 0.1
    assert rates.counts["p"][1] < 32
