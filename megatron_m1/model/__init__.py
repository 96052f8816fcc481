"""MiniMax-M1 from Megatron-Core's parts."""
