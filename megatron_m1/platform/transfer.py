"""Small tensors from the host to the device, without waiting for it."""

from collections.abc import Sequence
from typing import Any

import torch

__all__ = ["upload"]


def upload(
    data: Sequence[Any] | torch.Tensor, device: torch.device, *, dtype: torch.dtype = torch.int64
) -> torch.Tensor:
    """`data`, of the host, as a tensor on `device`; on CUDA the copy is queued, from pinned memory, and the host goes on."""
    tensor = torch.as_tensor(data, dtype=dtype)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
