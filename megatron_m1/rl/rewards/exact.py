"""Exact reward: the response is the answer, letter by letter."""

from megatron_m1.rl.rewards.protocol import RewardRequest, Score

__all__ = ["ExactReward"]


class ExactReward:
    """1 if the response, without white space around it, is task["answer"], else 0. Raises KeyError for a task without one."""

    def __call__(self, request: RewardRequest) -> Score:
        """The verdict; parts: whether the length is right."""
        answer, said = str(request.task["answer"]), request.response.strip()
        return Score(float(said == answer), {"length_right": float(len(said) == len(answer))})
