"""A process of its own for one side of a benchmark, so that its peak memory is its own and the sides can take turns."""

import multiprocessing
import resource
import time
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import torch

from megatron_m1.config.schema import Config

__all__ = ["Worker", "random_batches"]


@dataclass
class Report:
    """What some training steps cost. Memory in bytes; base_rss is what the imports alone took."""

    wall_s: list[float]
    """Per step."""
    cpu_s: list[float]
    """Per step, user and system time of all threads: tells more than wall time while others use the machine."""
    loss: float
    """Of the last step, nats per token."""
    peak_rss: int
    base_rss: int


class Worker:
    """A spawned process that builds one side and takes steps when told to; the rest of the time it waits.

    Every method raises EOFError if the process died.
    """

    def __init__(self, side: str, config: Config, *, threads: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, side, config, threads), daemon=True)
        self.process.start()
        theirs.close()

    def build(self, options: dict[str, object]) -> dict[str, object]:
        """The settings of a newly built side; the one before is dropped."""
        return self._ask("build", options)

    def run(self, steps: int) -> Report:
        """Report of `steps` further training steps."""
        return self._ask("run", steps)

    def stages(self) -> dict[str, dict[str, float]]:
        """Seconds by stage of one profiled step."""
        return self._ask("stages", None)

    def close(self) -> None:
        self._ask("close", None)
        self.process.join()

    def _ask(self, command: str, argument: object) -> Any:
        self.connection.send((command, argument))
        return self.connection.recv()


def serve(connection: Connection, name: str, config: Config, threads: int) -> None:
    from benchmarks.sides import SIDES
    from benchmarks.stages import stage_seconds

    torch.set_num_threads(threads)
    SIDES[name].prepare()
    base_rss = current_rss()
    batches = random_batches(config)
    side: Any = None
    while True:
        command, argument = connection.recv()
        answer: Any = None
        if command == "build":
            side = None
            side = SIDES[name](config, **argument)
            answer = side.settings()
        elif command == "run":
            answer = run_steps(side, batches, argument, base_rss)
        elif command == "stages":
            with side.labelled():
                answer = stage_seconds(partial(side.step, batches[0]))
        connection.send(answer)
        if command == "close":
            return


def run_steps(side: Any, batches: list[Any], steps: int, base_rss: int) -> Report:
    wall, cpu, loss = [], [], 0.0
    for index in range(steps):
        wall_start, cpu_start = time.perf_counter(), time.process_time()
        loss = side.step(batches[index % len(batches)])
        wall.append(time.perf_counter() - wall_start)
        cpu.append(time.process_time() - cpu_start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return Report(wall_s=wall, cpu_s=cpu, loss=loss, peak_rss=peak, base_rss=base_rss)


def random_batches(config: Config, count: int = 2) -> list[list[tuple[torch.Tensor, torch.Tensor]]]:
    """`count` optimizer steps of random tokens.

    One step: per micro-batch token_ids and labels, int64 [micro_batch, seq_length].
    """
    training = config.training
    generator = torch.Generator().manual_seed(training.seed)
    shape = (training.micro_batch, training.seq_length + 1)
    steps = []
    for _ in range(count):
        micro_batches = [
            torch.randint(config.model.vocab_size, shape, generator=generator)
            for _ in range(training.global_batch // training.micro_batch)
        ]
        steps.append([(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()) for tokens in micro_batches])
    return steps


def current_rss() -> int:
    with open("/proc/self/statm", encoding="ascii") as stream:
        return int(stream.read().split()[1]) * resource.getpagesize()
