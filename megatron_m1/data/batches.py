"""Micro-batches of one data-parallel rank."""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import torch

from megatron_m1.config.errors import ConfigError
from megatron_m1.data.dataset import Sample

__all__ = ["Batch", "MicroBatches", "collate", "evaluation_steps"]

Batch = dict[str, torch.Tensor | int]


class Dataset(Protocol):
    @property
    def windows(self) -> int | None: ...

    def __getitem__(self, index: int) -> Sample: ...


def collate(samples: Sequence[Sample], *, document_boundaries: str) -> Batch:
    """One micro-batch of b samples.

    tokens, labels, position_ids: int64 [b, T].  loss_mask: float32 [b, T].
    With document_boundaries "reset" also cu_seqlens: int32 [documents + 1], the boundaries of the documents in the
    b * T tokens laid end to end (0 first, b * T last, every sample start among them), and max_seqlen: int, the longest.
    """
    batch: Batch = {
        key: torch.stack([sample[key] for sample in samples])
        for key in ("tokens", "labels", "loss_mask", "position_ids")
    }
    if document_boundaries == "reset":
        length = samples[0]["tokens"].numel()
        parts = [sample["document_starts"] + row * length for row, sample in enumerate(samples)]
        cu_seqlens = torch.cat([*parts, torch.tensor([len(samples) * length])]).to(torch.int32)
        batch["cu_seqlens"] = cu_seqlens
        batch["max_seqlen"] = int(cu_seqlens.diff().max())
    return batch


class MicroBatches:
    """step(position, global_batch, micro_batch, dp_rank, dp_size): this rank's share of one optimizer step.

    The step trains on the samples [position, position + global_batch); micro-batch m of rank r holds the micro_batch
    samples from position + (m * dp_size + r) * micro_batch on.  So the step's samples do not depend on dp_size, and the
    m-th micro-batches of all ranks are neighbours.
    num_workers: background threads that prepare the step expected next (same sizes, position + global_batch); they
    change the time it takes, nothing else.  Close it, or use it in a `with` block, when num_workers > 0.
    """

    def __init__(self, dataset: Dataset, *, document_boundaries: str, num_workers: int = 0) -> None:
        self.dataset, self.document_boundaries = dataset, document_boundaries
        self._threads = ThreadPoolExecutor(num_workers, "data") if num_workers else None
        self._expected: dict[tuple[int, ...], list[Future[Batch]]] = {}

    def step(
        self, position: int, global_batch: int, micro_batch: int, dp_rank: int = 0, dp_size: int = 1
    ) -> list[Batch]:
        """The micro-batches of rank dp_rank, in order; see `collate`.

        position: samples consumed before this step.  Raises ConfigError if global_batch does not divide.
        """
        if global_batch < 1 or global_batch % (micro_batch * dp_size):
            raise ConfigError(
                f"training.global_batch={global_batch} must be a multiple of training.micro_batch="
                f"{micro_batch} times the {dp_size} data-parallel ranks; change one of them."
            )
        sizes = (global_batch, micro_batch, dp_rank, dp_size)
        starts = self._starts(position, *sizes)
        if self._threads is None:
            return [self._load(start, micro_batch) for start in starts]
        futures = self._expected.pop((position, *sizes), None) or self._submit(starts, micro_batch)
        for left_over in self._expected.values():
            for future in left_over:
                future.cancel()
        following = position + global_batch
        self._expected = {(following, *sizes): self._submit(self._starts(following, *sizes), micro_batch)}
        return [future.result() for future in futures]

    def close(self) -> None:
        """End the background threads."""
        if self._threads is not None:
            self._threads.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> "MicroBatches":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @staticmethod
    def _starts(position: int, global_batch: int, micro_batch: int, dp_rank: int, dp_size: int) -> range:
        return range(position + dp_rank * micro_batch, position + global_batch, micro_batch * dp_size)

    def _submit(self, starts: range, micro_batch: int) -> list[Future[Batch]]:
        assert self._threads is not None
        return [self._threads.submit(self._load, start, micro_batch) for start in starts]

    def _load(self, start: int, micro_batch: int) -> Batch:
        return collate(
            [self.dataset[index] for index in range(start, start + micro_batch)],
            document_boundaries=self.document_boundaries,
        )


def evaluation_steps(dataset: Dataset, batches: int, global_batch: int) -> int:
    """Global batches of one evaluation: `batches`, or fewer so that no held-out window is read twice.

    Evaluation k of them is always `step(k * global_batch, ...)`: the same samples every time, in file order.
    Raises ConfigError if the windows do not fill one global batch.
    """
    if dataset.windows is None:
        return batches
    if dataset.windows < global_batch:
        raise ConfigError(
            f"data.valid holds {dataset.windows} windows of training.seq_length, fewer than training.global_batch="
            f"{global_batch}; add held-out text, lower training.global_batch or training.seq_length, or set data.valid=[]."
        )
    return min(batches, dataset.windows // global_batch)
