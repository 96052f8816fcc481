"""The one error for what a user can mend."""


class ConfigError(ValueError):
    """Bad input of a user: path, value, rule and remedy in one message, e.g.
    `parallel.tensor=3 must divide model.num_attention_heads=64; use 1, 2, 4 or 8.`
    """
