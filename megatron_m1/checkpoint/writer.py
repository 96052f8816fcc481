"""Writing one checkpoint: core plans it, this rank writes its file (at once or in a thread), rank 0 publishes the folder.

Core's own asynchronous callers start processes: by fork, which CUDA and gloo's threads do not survive, or by spawn, which shares the
live CPU tensors with the training that goes on changing them (strategies/filesystem_async.py:139 says so). A thread has neither
problem: torch writes without holding the interpreter lock, and the tensors are copied beforehand.
"""

import queue
import shutil
import threading
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies import torch as core_torch

from megatron_m1 import platform
from megatron_m1.checkpoint import folders, manifest
from megatron_m1.checkpoint.together import all_ranks, together
from megatron_m1.config.errors import ConfigError
from megatron_m1.config.load import to_yaml
from megatron_m1.config.schema import Config

__all__ = ["Writing"]


class Writing:
    """A checkpoint on its way to the disk. All methods but `_write` are collective over the world.

    state: sharded state dict whose non-sharded part is the same on every rank.
    background: return when the tensors are copied to the host; a thread writes them while the training goes on.
    """

    def __init__(self, state: dict[str, Any], config: Config, *, step: int, background: bool) -> None:
        assert config.checkpoint.save is not None
        save = Path(config.checkpoint.save)
        with together():
            if dist.get_rank() == 0:
                folders.new_partial(save, step)
        self.config = config
        self.partial = save / f"{folders.step_name(step)}{folders.PARTIAL}"
        self.files: manifest.Files = {}
        self.error: Exception | None = None
        # Core hands the results through a queue that it would get from a manager process of its own.
        self.results: queue.SimpleQueue[Any] = queue.SimpleQueue()
        filesystem_async._results_queue = self.results
        # Core announces the end of its own asynchronous callers, which are not used here.
        core_torch._logged_mcore_async_deprecation = True
        self.request = dist_checkpointing.save(
            state, str(self.partial), async_sharded_save=True, async_strategy="mcore", validate_access_integrity=True
        )
        buckets = self._staged(copy=background)
        self.thread = threading.Thread(
            target=self._write, args=(buckets,), name=f"write {self.partial.name}", daemon=True
        )
        if background:
            self.thread.start()
        else:
            self._write(buckets)

    def is_written(self) -> bool:
        """Whether every rank has written its files, well or not."""
        return all_ranks(not self.thread.is_alive())

    def publish(self) -> Path:
        """Wait for the files, complete the folder, rename it, point `latest` at it; returns the final path.

        Raises ConfigError on every rank if one of them could not write; the previous checkpoint is then untouched.
        """
        if self.thread.ident is not None:
            self.thread.join()
        with together():
            if self.error is not None:
                free = shutil.disk_usage(self.partial).free  # torch's error does not say that the disk is full
                raise ConfigError(
                    f"checkpoint.save: {self.partial} could not be written by rank {dist.get_rank()} ({self.error}; {free:,} bytes are "
                    "free there); the previous checkpoint is untouched."
                ) from self.error
        with together():
            self._write_metadata()
        gathered: list[Any] = [None] * dist.get_world_size()
        dist.gather_object(self.files, gathered if dist.get_rank() == 0 else None)
        with together():
            if dist.get_rank() == 0:
                self._complete({name: entry for files in gathered for name, entry in files.items()})
        return self.partial.with_name(self.partial.name.removesuffix(folders.PARTIAL))

    def _staged(self, *, copy: bool) -> list[Any]:
        """What this rank writes, in host memory; copy: as copies that nobody changes."""
        if self.request.preload_fn is None:
            return []
        buckets = self.request.preload_fn()
        if copy and not platform.is_cuda():
            for _, _, (_, tensors) in buckets:
                for position, (item, tensor) in enumerate(tensors):
                    tensors[position] = (item, tensor.clone())
        return buckets

    def _write(self, buckets: list[Any]) -> None:
        """Write the files of this rank and take their checksums. Errors are kept for `publish`."""
        try:
            results = {}
            for number, bucket in enumerate(buckets):
                results[number] = write_file(self.request.async_fn.args[0], number, bucket)
                lengths = [result.storage_data.length for result in results[number]]
                self.files[bucket[1]] = manifest.checksums(Path(bucket[0]), lengths)
            if buckets:
                self.results.put(results)
        except Exception as error:
            self.error = error

    def _write_metadata(self) -> None:
        """Core's finalisation, which gathers the results and has rank 0 write `.metadata`."""
        try:
            self.request.finalize_fns[0]()
        except OSError:
            # Rank 0 failed; the others wait for its verdict (strategies/state_dict_saver.py:266).
            dist.broadcast(torch.ones(1, dtype=torch.int, device=platform.device()), src=0)
            raise

    def _complete(self, files: manifest.Files) -> None:
        to_yaml(self.config, self.partial / "config.yaml")
        save_config(CheckpointingConfig("torch_dist", 1), str(self.partial))
        manifest.write_manifest(self.partial, files)
        final = folders.publish(self.partial)
        folders.remove_old(final, self.config.checkpoint.keep)


def write_file(transforms: list[Any], number: int, bucket: Any) -> list[Any]:
    """PyTorch's WriteResults of one .distcp file, in the order of the chunks in it; the file is synced to the disk."""
    _, outcome = filesystem_async.FileSystemWriterAsync.write_preloaded_data(
        transforms, number, bucket, None, None, True
    )
    if isinstance(outcome, Exception):
        raise outcome
    return outcome
