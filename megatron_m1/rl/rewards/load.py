"""Makes a reward from its target and options."""

import importlib
import math
from collections.abc import Mapping
from typing import Any

from megatron_m1.config.errors import ConfigError
from megatron_m1.rl.rewards.protocol import Reward

__all__ = ["load_reward"]


def load_reward(name: str, target: str, options: Mapping[str, Any], *, timeout_s: float = math.inf) -> Reward:
    """The reward that is made by `target` (module:Class) with `options`. Raises ConfigError with the name if it cannot be."""
    where = f"{name}: target={target}"
    module, _, attribute = target.partition(":")
    if not module or not attribute:
        raise ConfigError(f"{where} must be module:Class, e.g. my_package.rewards:MyReward.")
    try:
        made_in = importlib.import_module(module)
    except Exception as error:
        raise ConfigError(
            f"{where} cannot be imported ({type(error).__name__}: {error}); mend it or add its folder to PYTHONPATH."
        ) from None
    found = getattr(made_in, attribute, None)
    if found is None:
        raise ConfigError(f"{where}: the module has no {attribute}; name one of its classes.")
    try:
        reward = found(**options)
    except Exception as error:
        raise ConfigError(f"{where} with options={dict(options)}: {type(error).__name__}: {error}") from None
    if not callable(reward):
        raise ConfigError(f"{where} makes no reward: its instances need __call__(request) -> Score.")
    least = getattr(reward, "least_timeout_s", 0.0)
    if least >= timeout_s:
        raise ConfigError(
            f"{where} with options={dict(options)} may take {least:g} s, and its worker is killed after rl.reward_timeout_s="
            f"{timeout_s:g}; raise that or lower the option."
        )
    return reward
