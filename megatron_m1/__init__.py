"""Training of MiniMax-M1-class models on Megatron-Core."""

__version__ = "0.1.0"
