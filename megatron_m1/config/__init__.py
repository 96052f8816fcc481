"""Configuration: dataclasses, presets, validation. Imports no Megatron."""

from megatron_m1.config.errors import ConfigError
from megatron_m1.config.schema import Config, ModelConfig

__all__ = ["Config", "ConfigError", "ModelConfig"]
