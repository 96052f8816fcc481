"""A pool of reward workers: processes made once and reused, killed and replaced when they hang or die."""

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Container, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from megatron_m1.config.errors import ConfigError
from megatron_m1.rl.rewards.protocol import RewardRequest, RewardResult, RewardSpec, Score

__all__ = ["RewardPool", "TooManyRewardErrors"]

WORKER = "megatron_m1.rl.rewards.worker"


class TooManyRewardErrors(RuntimeError):
    """The verifiers fail more often than the run allows."""


class RewardPool:
    """Judges samples in `workers` processes; use it as a context manager. One that was killed is made anew while the others work.

    rewards: name -> where it is found.  timeout_s: wall time of one sample, after which its worker is killed.
    memory_bytes: address space of a worker.  start_timeout_s: time to import the rewards.
    max_error_share: the run is stopped (TooManyRewardErrors) when more than this share of the last `error_window`
        results (of at least 10) are a reward_error.
    Raises ConfigError if a reward cannot be made.
    """

    def __init__(
        self,
        rewards: Mapping[str, RewardSpec],
        *,
        workers: int = 2,
        timeout_s: float = 10.0,
        memory_bytes: int = 4 << 30,
        start_timeout_s: float = 60.0,
        max_error_share: float = 0.05,
        error_window: int = 200,
    ) -> None:
        if workers < 1 or not rewards:
            raise ConfigError(f"workers={workers} must be at least 1, and at least one reward must be given.")
        self.timeout_s = timeout_s
        self._rewards = dict(rewards)
        self._memory_bytes = memory_bytes
        self._start_timeout_s = start_timeout_s
        self._max_error_share = max_error_share
        self._recent: deque[str | None] = deque(maxlen=error_window)
        self.replaced = 0
        self._workers: list[_Worker] = []
        try:
            self._workers = [self._start() for _ in range(workers)]
            for worker in self._workers:
                worker.wait_until_ready()
        except BaseException:
            self.close()
            raise

    def score(self, requests: Sequence[RewardRequest]) -> list[RewardResult]:
        """One result per request, in order; blocks until all are there. Raises TooManyRewardErrors (see the class)."""
        unknown = {request.reward for request in requests} - set(self._rewards)
        if unknown:
            raise ConfigError(f"reward={sorted(unknown)} is not among {sorted(self._rewards)}; add it to the pool.")
        results: list[RewardResult | None] = [None] * len(requests)
        waiting = deque(range(len(requests)))
        busy: dict[_Worker, int] = {}
        try:
            while waiting or busy:
                for worker in self._workers:
                    if waiting and worker.ready and worker not in busy:
                        busy[worker] = index = waiting.popleft()
                        worker.send(requests[index], self.timeout_s)
                self._wait(busy)
                for worker in list(busy):
                    # Before the clock: what was answered in time counts, however long this process was elsewhere.
                    result = worker.receive()
                    if result is None and time.monotonic() >= worker.started + self.timeout_s:
                        result = worker.fault(f"killed after {self.timeout_s:g} s")
                    if result is None:
                        continue
                    results[busy.pop(worker)] = result
                    if worker.broken:
                        self._replace(worker)
        finally:
            # After an exception: what these workers still answer belongs to no later request.
            for worker in list(busy):
                self._replace(worker)
        done = [result for result in results if result is not None]
        assert len(done) == len(requests), "every request gets a result"
        self._count_errors(done)
        return done

    def close(self) -> None:
        """Kill the workers and all they started."""
        for worker in self._workers:
            worker.kill()
        self._workers = []

    def __enter__(self) -> "RewardPool":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _start(self) -> "_Worker":
        rewards = {name: asdict(spec) for name, spec in self._rewards.items()}
        setup = {"rewards": rewards, "memory_bytes": self._memory_bytes, "timeout_s": self.timeout_s}
        return _Worker(setup, start_timeout_s=self._start_timeout_s)

    def _wait(self, busy: Container["_Worker"]) -> None:
        """Until a busy or a starting worker has said something, or one's time is over."""
        pending = [worker for worker in self._workers if worker in busy or not worker.ready]
        deadline = min(
            worker.started + (self.timeout_s if worker.ready else self._start_timeout_s) for worker in pending
        )
        with selectors.DefaultSelector() as selector:
            for worker in pending:
                selector.register(worker.output, selectors.EVENT_READ)
            selector.select(max(deadline - time.monotonic(), 0.0))
        for worker in pending:
            worker.check_start()

    def _replace(self, worker: "_Worker") -> None:
        """Another in its place, which is ready in its own time."""
        worker.kill()
        self.replaced += 1
        self._workers[self._workers.index(worker)] = self._start()

    def _count_errors(self, results: Sequence[RewardResult]) -> None:
        self._recent.extend(result.reward_error for result in results)
        errors = [error for error in self._recent if error is not None]
        if len(self._recent) >= 10 and len(errors) > self._max_error_share * len(self._recent):
            shown = "\n".join(f"  {error.splitlines()[0]}" for error in errors[-3:])
            raise TooManyRewardErrors(
                f"{len(errors)} of the last {len(self._recent)} rewards are errors (max_error_share={self._max_error_share:g}); "
                f"mend the verifier or its task data, or raise the limit. The last ones:\n{shown}"
            )


class _Worker:
    """One process, its pipes, and the request it is at."""

    def __init__(self, setup: dict[str, Any], *, start_timeout_s: float) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        # A session of its own: killing the group takes what the reward started with it.
        self.process = subprocess.Popen(
            [sys.executable, "-m", WORKER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            start_new_session=True,
        )
        assert self.process.stdin is not None and self.process.stdout is not None
        self.output = self.process.stdout
        os.set_blocking(self.output.fileno(), False)
        self.ready = False
        self.broken = False
        self.started = time.monotonic()
        self._start_timeout_s = start_timeout_s
        self._buffer = b""
        self._write(setup)

    def wait_until_ready(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self.output, selectors.EVENT_READ)
            while not self.ready:
                selector.select(max(self.started + self._start_timeout_s - time.monotonic(), 0.0))
                self.check_start()

    def check_start(self) -> None:
        """Notice that the rewards are made. Raises ConfigError if they cannot be, or not in time."""
        if self.ready:
            return
        line = self._line()
        if line is not None and "failed" in line:
            raise ConfigError(f"A reward cannot be made: {line['failed']}")
        self.ready = line is not None
        if not self.ready and (self.broken or time.monotonic() >= self.started + self._start_timeout_s):
            raise ConfigError(
                f"A reward worker did not start within {self._start_timeout_s:g} s; its messages are above."
            )

    def send(self, request: RewardRequest, timeout_s: float) -> None:
        self.started = time.monotonic()
        self._write({**asdict(request), "timeout_s": timeout_s})

    def receive(self) -> RewardResult | None:
        """The result if it is there; a fault if the process is gone."""
        line = self._line()
        if line is None:
            return self.fault(self._last_words()) if self.broken else None
        wall_s = time.monotonic() - self.started
        if "error" in line:
            return RewardResult(None, line["error"], wall_s)
        return RewardResult(Score(line["value"], line["parts"]), None, wall_s)

    def fault(self, why: str) -> RewardResult:
        self.broken = True
        return RewardResult(None, f"worker {why}", time.monotonic() - self.started)

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for pipe in (self.process.stdin, self.output):
            with contextlib.suppress(BrokenPipeError):
                pipe.close()

    def _last_words(self) -> str:
        try:
            return f"died with exit code {self.process.wait(timeout=1.0)}"
        except subprocess.TimeoutExpired:
            return "closed its output"

    def _write(self, message: dict) -> None:
        try:
            self.process.stdin.write(json.dumps(message).encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            self.broken = True

    def _line(self) -> dict | None:
        while b"\n" not in self._buffer:
            chunk = self.output.read(1 << 16)
            if chunk is None:
                return None
            if chunk == b"":
                self.broken = True
                return None
            self._buffer += chunk
        line, _, self._buffer = self._buffer.partition(b"\n")
        return json.loads(line)
