"""Samples as micro-batches of the trainer, and per-token values on their way in and out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_m1.rl.samples import Sample

__all__ = ["Pack", "pack_samples"]


@dataclass(frozen=True)
class Pack:
    """A micro-batch and where its samples lie in it.

    batch: the trainer's dict, [rows, length].  places: (index of the sample, first position of its loss tokens, their number),
    positions counted over all rows laid end to end.
    """

    batch: dict[str, Any]
    places: list[tuple[int, int, int]]

    def with_values(self, values: Mapping[str, Mapping[int, Tensor]]) -> dict[str, Any]:
        """The batch with per-token values: name -> index of the sample -> [response tokens]; 0 on all other tokens."""
        shape = self.batch["tokens"].shape
        per_token = {}
        for name, rows in values.items():
            flat = torch.zeros(shape.numel(), dtype=torch.float32)
            for index, start, count in self.places:
                flat[start : start + count] = rows[index]
            per_token[name] = flat.view(shape)
        return self.batch | {"per_token": per_token}

    def take(self, scores: Tensor) -> dict[int, Tensor]:
        """Index of the sample -> [response tokens] of a tensor shaped like the batch."""
        flat = scores.flatten()
        return {index: flat[start : start + count].cpu() for index, start, count in self.places}


def pack_samples(
    samples: Sequence[Sample],
    indices: Sequence[int],
    *,
    rows: int,
    length: int,
    packs: int | None = None,
    packed: bool = True,
) -> list[Pack]:
    """The samples at `indices` in as few micro-batches of [rows, length] as fit in order; `packs`: exactly so many, some of them
    padding alone.

    packed: documents end to end, the rest of the pack a document of padding; else one sample in a row [1, length] of its own,
    which is how the reference engine sees it. Positions start at 0 in every document.
    """
    capacity = rows * length if packed else length
    bins: list[list[int]] = []
    room = 0
    for index in indices:
        tokens = _tokens(samples[index])
        assert tokens <= length, f"sample of {tokens} tokens, at most {length} fit"
        if not bins or not packed or tokens > room:
            bins.append([])
            room = capacity
        bins[-1].append(index)
        room -= tokens
    if packs is not None:
        assert len(bins) <= packs
        bins += [[]] * (packs - len(bins))
    return [_pack(samples, chosen, (rows if packed else 1, length), packed) for chosen in bins]


def _tokens(sample: Sample) -> int:
    """Tokens that go through the model: the last one is only a label."""
    return len(sample.prompt) + len(sample.response) - 1


def _pack(samples: Sequence[Sample], chosen: list[int], shape: tuple[int, int], packed: bool) -> Pack:
    total = shape[0] * shape[1]
    tokens, labels, positions = (torch.zeros(total, dtype=torch.int64) for _ in range(3))
    mask, padding = torch.zeros(total), torch.ones(total, dtype=torch.bool)
    cuts, places, at = [0], [], 0
    for index in chosen:
        sample = samples[index]
        ids = torch.tensor([*sample.prompt, *sample.response])
        end = at + len(ids) - 1
        tokens[at:end], labels[at:end] = ids[:-1], ids[1:]
        positions[at:end] = torch.arange(len(ids) - 1)
        padding[at:end] = False
        first = at + len(sample.prompt) - 1
        mask[first:end] = 1.0
        places.append((index, first, end - first))
        cuts.append(end)
        at = end
    if at < total:
        cuts.append(total)
        positions[at:] = torch.arange(total - at)
    batch: dict[str, Any] = {
        "tokens": tokens, "labels": labels, "loss_mask": mask, "position_ids": positions, "padding_mask": padding,
    }  # fmt: skip
    if not packed:
        batch["position_ids"] = torch.arange(total)
    batch = {key: value.view(shape) for key, value in batch.items()}
    if packed:
        cu_seqlens = torch.tensor(cuts, dtype=torch.int32)
        batch |= {"cu_seqlens": cu_seqlens, "max_seqlen": int(cu_seqlens.diff().max())}
    return Pack(batch, places)
