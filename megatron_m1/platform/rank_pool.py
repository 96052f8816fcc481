"""Ranks on this machine that start once and then run one function after another, each in a fresh process group."""

import atexit
import contextlib
import faulthandler
import gc
import importlib
import multiprocessing
import multiprocessing.connection
import os
import pickle
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from megatron_m1.config.errors import ConfigError
from megatron_m1.platform import device, distributed_backend, is_cuda, select_device

__all__ = ["RankError", "RankPool"]

START_S = 240.0  # for the imports, on a busy machine
CLOSE_S = 5.0  # for a rank to end by itself
THREADS = 24
"""A worker that has more after a call is replaced: core's data-parallel wrapper is a cycle through autograd's nodes which no garbage
collector breaks, so its process groups live on, and gloo's threads of groups whose peers are gone keep a core busy. (NCCL's end with
`destroy_process_group`, and CUDA has many of its own.)"""
GATHER_S = 0.5  # after a first failure, for the reports of the other ranks
LEAVE = b"leave"
"""All ranks have answered: their groups may go. A rank that left before would close its sockets on those that are still connecting
to it, and gloo's `connectFullMesh` fails there."""
PRELOAD = "megatron_m1.platform.rank_preload"


class RankError(RuntimeError):
    """A rank raised, died or did not finish; the message names the rank and carries its traceback."""


@dataclass
class _Worker:
    process: multiprocessing.process.BaseProcess
    pipe: multiprocessing.connection.Connection
    stacks: Path

    def alive(self) -> bool:
        return self.process.is_alive()


class RankPool:
    """Up to `size` persistent processes; torch and megatron-core are imported once (CPU: forked from one server).

    pool.run(fn, args) calls fn(rank, world, *args) on every rank inside an initialised torch.distributed (gloo, or nccl
    on CUDA) with one torch thread per rank; once all have returned, process groups and megatron's parallel state go.
    A rank that fails in any way ends the call with RankError; the processes of that call are then killed and replaced,
    so the next call starts clean. `fn` must be a module-level function; arguments and results travel by pickle.
    Scripts need the usual `if __name__ == "__main__":` guard.
    preload: names of modules that the functions will use; on the CPU each is imported once, not by every new process.
    """

    def __init__(self, size: int, *, preload: Sequence[str] = ()):
        if size < 1:
            raise ConfigError(f"size={size} of a RankPool must be at least 1")
        self.size = size
        self._workers: list[_Worker | None] = [None] * size
        self._folder = Path(tempfile.mkdtemp(prefix="ranks_"))
        self._calls = 0
        # A forked process cannot use a CUDA driver that its parent has touched.
        self._context = multiprocessing.get_context("spawn" if is_cuda() else "forkserver")
        if not is_cuda():
            self._context.set_forkserver_preload([PRELOAD, *preload])
        atexit.register(self.close)

    def __enter__(self) -> "RankPool":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def run(self, fn: Callable, args: tuple = (), *, world: int | None = None, timeout_s: float = 120.0) -> list[Any]:
        """[fn(rank, world, *args) for each rank] from `world` concurrent ranks (all of the pool by default).

        Raises RankError with the remote tracebacks of the ranks that failed (a rank that died comes first), or with the
        stacks of all threads of the ranks that did not finish within timeout_s seconds.
        """
        world = self.size if world is None else world
        if not 1 <= world <= self.size:
            raise ConfigError(f"world={world} must lie between 1 and the pool's size={self.size}")
        gpus = torch.cuda.device_count()
        if is_cuda() and world > gpus:
            raise ConfigError(
                f"world={world} needs as many GPUs, found {gpus}; set CUDA_VISIBLE_DEVICES= (empty) to run all on CPU"
            )
        self._calls += 1
        rendezvous = self._folder / f"store_{self._calls}"
        workers = self._ready_workers(world)
        for rank, worker in enumerate(workers):
            task = (list(sys.path), str(rendezvous), rank, world, timeout_s)
            worker.pipe.send_bytes(pickle.dumps(task))
            worker.pipe.send_bytes(pickle.dumps((fn, args)))
        results, failures = self._collect(workers, timeout_s)
        if not failures:
            for worker in workers:
                with contextlib.suppress(ConnectionError):  # it died since; _collect will tell
                    worker.pipe.send_bytes(LEAVE)
            _, failures = self._collect(workers, timeout_s)
        if failures:
            for rank in range(world):
                self._discard(rank)
            raise RankError("\n".join(failures))
        for rank, worker in enumerate(workers):
            if not is_cuda() and _threads(worker) > THREADS:
                self._discard(rank)
        return [results[rank] for rank in range(world)]

    def close(self) -> None:
        """End all processes of the pool. Idempotent."""
        for worker in self._workers:
            if worker is not None:
                worker.pipe.close()
        for rank, worker in enumerate(self._workers):
            if worker is not None:
                worker.process.join(CLOSE_S)
                self._discard(rank)
        shutil.rmtree(self._folder, ignore_errors=True)
        atexit.unregister(self.close)

    def _ready_workers(self, world: int) -> list[_Worker]:
        """The first `world` workers; those that are missing are started, which does not count as time of the call."""
        missing = [rank for rank in range(world) if (worker := self._workers[rank]) is None or not worker.alive()]
        for rank in missing:
            self._workers[rank] = self._start(rank)
        workers = [worker for worker in self._workers[:world] if worker is not None]
        for rank in missing:
            try:
                started = workers[rank].pipe.poll(START_S) and workers[rank].pipe.recv_bytes()
            except (EOFError, ConnectionError):
                started = None
            if not started:
                for failed in missing:
                    self._discard(failed)
                raise RankError(f"rank {rank} did not start within {START_S} s; its standard error may say why")
        return workers

    def _start(self, rank: int) -> _Worker:
        pipe, remote = self._context.Pipe()
        stacks = self._folder / f"stacks_{rank}"
        process = self._context.Process(target=_serve, args=(remote, str(stacks)), name=f"rank {rank}")
        process.start()
        remote.close()
        return _Worker(process, pipe, stacks)

    def _collect(self, workers: list[_Worker], timeout_s: float) -> tuple[dict[int, Any], list[str]]:
        """Results by rank, and what went wrong."""
        waiting = {worker.pipe: rank for rank, worker in enumerate(workers)}
        results: dict[int, Any] = {}
        died: list[str] = []
        raised: list[str] = []
        deadline = time.monotonic() + timeout_s
        while waiting and (remaining_s := deadline - time.monotonic()) > 0:
            ready = multiprocessing.connection.wait(list(waiting), timeout=remaining_s)
            for pipe in [pipe for pipe in waiting if pipe in ready]:
                rank = waiting.pop(pipe)
                try:
                    ok, payload = pickle.loads(pipe.recv_bytes())
                except (EOFError, ConnectionError):
                    workers[rank].process.join(CLOSE_S)
                    died.append(f"rank {rank} of {len(workers)} died with exit code {workers[rank].process.exitcode}")
                else:
                    if ok:
                        results[rank] = payload
                    else:
                        raised.append(f"rank {rank} of {len(workers)} raised\n{payload}")
                if died or raised:
                    deadline = min(deadline, time.monotonic() + GATHER_S)
        if waiting and not died and not raised:
            ranks = sorted(waiting.values())
            stacks = "\n".join(f"--- rank {rank}\n{_stacks(workers[rank])}" for rank in ranks)
            return results, [f"ranks {ranks} of {len(workers)} did not finish in {timeout_s} s\n{stacks}"]
        return results, died + raised

    def _discard(self, rank: int) -> None:
        worker = self._workers[rank]
        self._workers[rank] = None
        if worker is not None:
            worker.pipe.close()
            worker.process.kill()
            worker.process.join()


def _threads(worker: _Worker) -> int:
    """Threads of the process; 0 where the system does not tell."""
    tasks = Path(f"/proc/{worker.process.pid}/task")
    return len(list(tasks.iterdir())) if tasks.is_dir() else 0


def _stacks(worker: _Worker) -> str:
    """Python stacks of all threads of a worker that is still alive."""
    assert worker.process.pid is not None, "the process has been started"
    os.kill(worker.process.pid, signal.SIGUSR1)
    deadline = time.monotonic() + 1.0
    while time.monotonic() < deadline and not worker.stacks.read_text():
        time.sleep(0.02)
    return worker.stacks.read_text() or "(no stack: the process did not answer)"


def _serve(pipe: multiprocessing.connection.Connection, stacks: str) -> None:
    """Body of one rank: run tasks until the pool closes its end of the pipe."""
    with open(stacks, "w") as file:
        faulthandler.register(signal.SIGUSR1, file=file, all_threads=True)
        importlib.import_module(PRELOAD)
        gc.freeze()  # half a million objects that no collection needs to look at (0.2 s each time)
        torch.set_num_threads(1)
        pipe.send_bytes(b"ready")
        while True:
            try:
                path, rendezvous, rank, world, timeout_s = pickle.loads(pipe.recv_bytes())
                payload = pipe.recv_bytes()
            except (EOFError, ConnectionError):
                return
            sys.path.extend(entry for entry in path if entry not in sys.path)
            pipe.send_bytes(_answer(_run_task, payload, rendezvous, rank, world, timeout_s))
            try:
                pipe.recv_bytes()  # LEAVE; after a failure the process is killed instead
            except (EOFError, ConnectionError):
                return
            pipe.send_bytes(_answer(_leave_groups))


def _answer(fn: Callable, *args: Any) -> bytes:
    """(True, result) or (False, traceback), pickled."""
    try:
        return pickle.dumps((True, fn(*args)))
    except BaseException:
        return pickle.dumps((False, traceback.format_exc()))


def _run_task(payload: bytes, rendezvous: str, rank: int, world: int, timeout_s: float) -> Any:
    import torch.distributed as dist

    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world))
    if "lo" in (name for _, name in socket.if_nameindex()):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    fn, args = pickle.loads(payload)
    select_device()
    dist.init_process_group(
        distributed_backend(),
        init_method=f"file://{rendezvous}",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=timeout_s + CLOSE_S),
    )
    if is_cuda():
        # NCCL makes the communicator with the first operation, in which all ranks must take part; that of `fn` may be a message.
        dist.all_reduce(torch.zeros(1, device=device()))
    return fn(rank, world, *args)


def _leave_groups() -> None:
    import torch.distributed as dist
    from megatron.core import num_microbatches_calculator, parallel_state
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    parallel_state.destroy_model_parallel()
    num_microbatches_calculator.unset_num_microbatches_calculator()
    get_cuda_rng_tracker().reset()
    if dist.is_initialized():
        dist.destroy_process_group()
    gc.collect()
