"""Checkpoints: native save, load and reshard; Hugging Face in both directions through one name table."""
