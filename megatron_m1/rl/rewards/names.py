"""Rewards by name: the built-in ones, and what `rl.rewards` adds."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from megatron_m1.config.errors import ConfigError
from megatron_m1.config.schema import RewardConfig
from megatron_m1.rl.rewards.protocol import RewardSpec

__all__ = ["BUILT_IN", "needed_keys", "reward_specs"]

BUILT_IN = {
    name: RewardSpec(f"megatron_m1.rl.rewards.{name}:{name.capitalize()}Reward")
    for name in ("exact", "format", "math", "logic", "code")
}
COMBINED = "megatron_m1.rl.rewards.combined:CombinedReward"
NEEDED_KEYS = {"exact": {"answer"}, "math": {"answer"}, "logic": {"entry"}, "code": {"tests"}}


def reward_specs(own: Mapping[str, RewardConfig]) -> dict[str, RewardSpec]:
    """Every reward that a task may name. Raises ConfigError for one that is not described as the schema says."""
    specs = dict(BUILT_IN)
    for name in own:
        specs[name] = _spec(name, own, above=())
    return specs


def needed_keys(spec: RewardSpec) -> set[str]:
    """What a task of this reward must hold, as far as the built-in rewards in it tell."""
    if spec.target == COMBINED:
        return set().union(*(needed_keys(RewardSpec(**part)) for part in spec.options["parts"].values()))
    return next(
        (NEEDED_KEYS.get(name, set()) for name, known in BUILT_IN.items() if known.target == spec.target), set()
    )


def _spec(name: str, own: Mapping[str, RewardConfig], *, above: tuple[str, ...]) -> RewardSpec:
    """above: the rewards that this one is a part of."""
    if name not in own and name in BUILT_IN:
        return BUILT_IN[name]
    if name not in own:
        known = ", ".join([*BUILT_IN, *own])
        raise ConfigError(f"rl.rewards.{above[-1]} names the reward {name!r}, which is unknown; use one of {known}.")
    where, reward = f"rl.rewards.{name}", own[name]
    if name in above:
        raise ConfigError(f"{where} is a part of itself ({' > '.join([*above, name])}); give one of them another name.")
    parts = list(reward.product or reward.weights)
    if sum(map(bool, (reward.target, reward.product, reward.weights))) != 1:
        raise ConfigError(f"{where} must have one of target, product and weights; give it one.")
    if parts and reward.options:
        raise ConfigError(
            f"{where}.options={reward.options} belong to a target; give them to one of {', '.join(parts)}."
        )
    if len(parts) != len(set(parts)):
        raise ConfigError(f"{where}.product={parts} names a reward twice; name each once.")
    if reward.target is not None:
        if ":" not in reward.target and reward.target not in BUILT_IN:
            raise ConfigError(
                f"{where}.target={reward.target} must be package.module:Class or one of {', '.join(BUILT_IN)}; correct it."
            )
        target = BUILT_IN[reward.target].target if reward.target in BUILT_IN else reward.target
        return RewardSpec(target, reward.options)
    specs = {part: asdict(_spec(part, own, above=(*above, name))) for part in parts}
    options: dict[str, Any] = {"parts": specs, "weights": reward.weights or None}
    return RewardSpec(COMBINED, options)
