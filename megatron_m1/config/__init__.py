"""Configuration: dataclasses, presets, validation. Imports no Megatron."""

from megatron_m1.config.errors import ConfigError
from megatron_m1.config.layout import Derived, derived, rank_groups
from megatron_m1.config.load import from_yaml, load_config, to_yaml
from megatron_m1.config.schema import Config, ModelConfig
from megatron_m1.config.validate import validate, validate_layout

__all__ = [
    "Config",
    "ConfigError",
    "Derived",
    "ModelConfig",
    "derived",
    "from_yaml",
    "load_config",
    "rank_groups",
    "to_yaml",
    "validate",
    "validate_layout",
]
