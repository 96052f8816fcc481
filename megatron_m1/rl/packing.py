"""Samples as micro-batches of the trainer, and per-token values on their way in and out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_m1.rl.samples import Sample

__all__ = ["Pack", "assign", "pack_samples"]


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


def assign(tokens: Sequence[int], *, rows: int, length: int, packed: bool = True) -> list[list[int]]:
    """Positions in `tokens`, samples by their number of tokens, that go into each micro-batch of `pack_samples`."""
    capacity = rows * length if packed else length
    bins: list[list[int]] = []
    room = 0
    for position, count in enumerate(tokens):
        assert count <= length, f"sample of {count} tokens, at most {length} fit"
        if not bins or not packed or count > room:
            bins.append([])
            room = capacity
        bins[-1].append(position)
        room -= count
    return bins


def pack_samples(
    samples: Sequence[Sample] | Mapping[int, Sample],
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
    which is how the reference engine sees it. Positions start at 0 in every document. With samples whose routing was recorded the
    batch has `routing`, [rows, length, layers, top_k] int16, -1 on padding.
    """
    # The last token of a sample is only a label.
    tokens = [len(samples[index].prompt) + len(samples[index].response) - 1 for index in indices]
    bins = assign(tokens, rows=rows, length=length, packed=packed)
    if packs is not None:
        assert len(bins) <= packs
        bins += [[]] * (packs - len(bins))
    shape = (rows if packed else 1, length)
    return [_pack(samples, [indices[position] for position in chosen], shape, packed) for chosen in bins]


def _pack(
    samples: Sequence[Sample] | Mapping[int, Sample], chosen: list[int], shape: tuple[int, int], packed: bool
) -> Pack:
    total = shape[0] * shape[1]
    tokens, labels, positions = (torch.zeros(total, dtype=torch.int64) for _ in range(3))
    mask, padding = torch.zeros(total), torch.ones(total, dtype=torch.bool)
    cuts, places, at = [0], [], 0
    recorded = next((samples[index].routing for index in chosen if samples[index].routing is not None), None)
    routing = None if recorded is None else torch.full((total, *recorded.shape[1:]), -1, dtype=torch.int16)
    for index in chosen:
        sample = samples[index]
        ids = torch.tensor([*sample.prompt, *sample.response])
        end = at + len(ids) - 1
        tokens[at:end], labels[at:end] = ids[:-1], ids[1:]
        positions[at:end] = torch.arange(len(ids) - 1)
        padding[at:end] = False
        if routing is not None and sample.routing is not None:
            routing[at:end] = torch.from_numpy(sample.routing)
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
    if routing is not None:
        batch["routing"] = routing.view(*shape, *routing.shape[1:])
    if packed:
        cu_seqlens = torch.tensor(cuts, dtype=torch.int32)
        batch |= {"cu_seqlens": cu_seqlens, "max_seqlen": int(cu_seqlens.diff().max())}
    return Pack(batch, places)
