"""Token files, tokenizer, preprocessing, and samples as a pure function of (seed, index).

Nothing is imported here: preprocessing workers start without torch.
"""
