"""Reinforcement learning as MiniMax-M1 did it. Import the modules: this file stays empty so that reward workers start fast."""
