"""Time lightning attention's torch path on the CPU: `python -m m1_kernels.benchmark_cpu --help`.

Against a block loop as in transformers' MiniMax (blocks of 256 tokens, plain autograd) and, for scale, causal
scaled_dot_product_attention up to 4096 tokens; float32, from a packed qkv, without and with its SiLU, forward without
gradients and forward + backward. Medians of `--repeats` (two, of calls that take seconds), the least beside them, the
implementations taking turns, so that their ratio bears other load on the machine; `--clock cpu --threads 1` bears more of it.
The floor is the matrix products of the chunked algorithm,
4CD + 4D^2 flops per token and head forward and 10CD + 10D^2 backward, at the rate of a large square product in this run.
Writes kernels/results/lightning_cpu.json.
"""

import argparse
import datetime
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from m1_kernels import benchmark_report as reports
from m1_kernels.benchmark_peers import versions
from m1_kernels.benchmark_report import OURS, Report, Row
from m1_kernels.chunked import chunk_size
from m1_kernels.dispatch import lightning_attention_packed
from m1_kernels.slopes import slopes as layer_slopes
from m1_kernels.softmax import softmax_attention

__all__ = ["block_loop", "block_tables", "main"]

BLOCK = 256
FLASH_MOST_TOKENS = 4096
ENOUGH_S = 15.0  # after which the repeats of one row end
Attention = Callable[[torch.Tensor], torch.Tensor]
Clock = Callable[[], float]
CLOCKS: dict[str, Clock] = {"wall": time.perf_counter, "cpu": time.process_time}
MEASURES = ("forward", "forward+backward")


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    parser = argparse.ArgumentParser(prog="python -m m1_kernels.benchmark_cpu", description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 2048, 4096, 8192, 16384])
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, nargs="+", default=[128, 64])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--clock", choices=list(CLOCKS), default="wall", help="cpu: of the process, for a machine with other load"
    )
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--output", type=Path, default=reports.default_path("lightning", "cpu"))
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    report = Report(
        command=reports.command("m1_kernels.benchmark_cpu", arguments),
        commit=reports.commit(),
        hardware=reports.hardware("cpu"),
        versions=versions("torch"),
        started=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        ceilings={"matmul_flop_per_s": matmul_rate(options.repeats, CLOCKS[options.clock])},
    )
    for dim in options.head_dim:
        for tokens in options.tokens:
            report.rows += rows(tokens, options.heads, dim, options.repeats, report.ceilings, CLOCKS[options.clock])
            report.save(options.output)
    report.hardware["load at end"] = round(os.getloadavg()[0], 1)
    report.save(options.output)
    print(reports.tables(report))
    print(f"\nsaved to {options.output}")
    return 0


def rows(tokens: int, heads: int, dim: int, repeats: int, ceilings: dict[str, float], clock: Clock) -> list[Row]:
    """Forward, and forward + backward, of every implementation at one shape."""
    torch.manual_seed(0)
    decay = layer_slopes(heads, 0, 8)
    tables = block_tables(decay)
    qkv = torch.randn(1, tokens, heads, 3 * dim)
    gradient = torch.randn(1, tokens, heads, dim)

    def flash(qkv: torch.Tensor) -> torch.Tensor:
        return softmax_attention(*parts(qkv), scale=dim**-0.5)

    sections: dict[str, dict[str, Attention]] = {
        "attention": {
            OURS: lambda qkv: lightning_attention_packed(qkv, decay, activation=None),
            "block loop": lambda qkv: block_loop(*parts(qkv), tables),
            **({"torch flash": flash} if tokens <= FLASH_MOST_TOKENS else {}),
        },
        "SiLU and attention": {
            OURS: lambda qkv: lightning_attention_packed(qkv, decay),
            "block loop": lambda qkv: block_loop(*parts(torch.nn.functional.silu(qkv)), tables),
        },
    }
    found = []
    for section, implementations in sections.items():
        for measure in MEASURES:
            calls = {name: call(measure, attention, qkv, gradient) for name, attention in implementations.items()}
            floor = floor_flops(measure, tokens, heads, dim) / ceilings["matmul_flop_per_s"]
            for name, seconds in times(calls, repeats, clock).items():
                row = Row(section, measure, name, tokens, heads, dim, repeats=len(seconds))
                row = replace(row, ms=1e3 * statistics.median(seconds), least_ms=1e3 * min(seconds))
                found.append(row if name == "torch flash" else replace(row, floor_ms=1e3 * floor))
    return found


def parts(qkv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k, v of the packed qkv."""
    q, k, v = qkv.split(qkv.shape[-1] // 3, dim=-1)
    return q, k, v


def call(measure: str, attention: Attention, qkv: torch.Tensor, gradient: torch.Tensor) -> Callable[[], None]:
    """What is timed: from the packed qkv to o, or on to the gradient of qkv."""

    def forward() -> None:
        with torch.no_grad():
            attention(qkv)

    def both() -> None:
        attention(qkv.detach().requires_grad_()).backward(gradient)

    return forward if measure == "forward" else both


def floor_flops(measure: str, tokens: int, heads: int, dim: int) -> int:
    """Flops of the chunked algorithm's matrix products."""
    chunk = chunk_size(dim)
    inside, across = (4, 4) if measure == "forward" else (4 + 10, 4 + 10)
    return tokens * heads * (inside * chunk * dim + across * dim**2)


def times(calls: dict[str, Callable[[], None]], repeats: int, clock: Clock) -> dict[str, list[float]]:
    """Seconds of each call, in turns: after one to warm up `repeats`, or two if those take ENOUGH_S together."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(repeats + 1):
        if turn > 2 and sum(map(sum, taken.values())) > ENOUGH_S:
            break
        for name, run in calls.items():
            start = clock()
            run()
            taken[name].append(clock() - start)
    return {name: measured[1:] for name, measured in taken.items()}


def matmul_rate(repeats: int, clock: Clock, size: int = 1024) -> float:
    """Flops per second of one float32 [size, size] product."""
    a, b, c = torch.randn(size, size), torch.randn(size, size), torch.empty(size, size)
    return 2 * size**3 / min(times({"": lambda: torch.mm(a, b, out=c)}, 4 * repeats, clock)[""])


def block_tables(decay: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Decays of query rows, key rows, pairs and whole blocks for `block_loop`."""
    position = torch.arange(1, BLOCK + 1)
    rate = decay[:, None, None]
    distance = (position[:, None] - position[None, :]).float()
    pairs = torch.exp(-rate * distance.clamp(min=0)).tril()
    return torch.exp(-rate * position[:, None]), torch.exp(-rate * (BLOCK - position[:, None])), pairs, rate


def block_loop(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, tables: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """The peer: a Python loop over blocks of 256 tokens in plain autograd, o [B, T, H, D]; tables: `block_tables`."""
    query_decay, key_decay, pair_decay, rate = tables
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    state = q.new_zeros(*q.shape[:2], q.shape[-1], q.shape[-1])
    outputs = []
    for start in range(0, q.shape[2], BLOCK):
        qb, kb, vb = (x[:, :, start : start + BLOCK] for x in (q, k, v))
        size = qb.shape[2]
        inside = torch.matmul(torch.matmul(qb, kb.transpose(-1, -2)) * pair_decay[:, :size, :size], vb)
        outputs.append(inside + torch.matmul(qb * query_decay[:, :size], state))
        added = torch.matmul((kb * key_decay[:, -size:]).transpose(-1, -2), vb)
        state = state * torch.exp(-rate * size) + added
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous()


if __name__ == "__main__":
    sys.exit(main())
