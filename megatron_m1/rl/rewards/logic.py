"""Logic reward and tasks: procedural puzzles of reasoning-gym with its verifiers, an allow-list, a threshold of 1."""

from typing import Any

import reasoning_gym

from megatron_m1.rl.rewards.extract import after_thinking, last_tagged
from megatron_m1.rl.rewards.protocol import RewardRequest, Score

__all__ = ["ALLOWED", "LogicReward", "logic_tasks"]

# Tasks of reasoning-gym 0.1.25 whose verifier gives the right answer 1.0 and every kind of junk in the tests less, and runs
# nothing as Python. Not here, among others: binary_matrix, bitwise_arithmetic, countdown, n_queens, number_sorting,
# spiral_matrix, string_insertion (they eval or parse_expr the answer or the task, which hands the worker to whoever wrote
# it), quantum_lock, sokoban, survo, kakurasu, spell_backward, time_intervals (the right answer plus junk gives 1.0),
# game_of_life_halting ("zzz" does), coin_flip and power_function ("0", "1"), knights_knaves (several answers).
ALLOWED = frozenset(
    "ab base_conversion basic_arithmetic calendar_arithmetic chain_sum circuit_logic count_bits cryptarithm "
    "family_relationships gcd isomorphic_strings largest_island lcm leg_counting maze mini_sudoku number_sequence "
    "rotate_matrix rotten_oranges self_reference shortest_path sudoku syllogism tower_of_hanoi zebra_puzzles".split()
)


class LogicReward:
    """1 if the verifier of task["entry"]'s dataset gives the last <answer> after the thinking part 1.0, else 0.

    reasoning-gym's partial scores (0.01 for any answer, more for a near one) are a part of the log, never the reward.
    Raises ValueError (a reward_error) for a dataset that is not allowed.
    """

    def __call__(self, request: RewardRequest) -> Score:
        """The verdict; parts: whether there was an answer, the verifier's own score."""
        entry = request.task["entry"]
        score_answer = reasoning_gym.get_score_answer_fn(_allowed(entry["metadata"]["source_dataset"]))
        text = after_thinking(request.response)
        answer = None if text is None else last_tagged(text, "answer")
        if answer is None:
            return Score(0.0, {"answered": 0.0, "verifier_score": 0.0})
        score = float(score_answer(answer=answer, entry=entry))
        return Score(float(score >= 1.0), {"answered": 1.0, "verifier_score": score})


def logic_tasks(dataset: str, *, size: int, seed: int, options: dict[str, Any] | None = None) -> list[dict[str, Any]]:
    """`size` entries ({"question", "answer", "metadata"}, JSON values) of an allowed dataset; the seed decides them.

    options: the dataset's own difficulty settings. Raises ValueError for a dataset that is not allowed.
    """
    made = reasoning_gym.create_dataset(_allowed(dataset), size=size, seed=seed, **(options or {}))
    return [made[index] for index in range(size)]


def _allowed(dataset: str) -> str:
    if dataset not in ALLOWED:
        raise ValueError(f"dataset {dataset!r} is not on the allow-list; use one of {', '.join(sorted(ALLOWED))}")
    return dataset
