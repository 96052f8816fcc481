"""Time lightning attention's torch path on the CPU: `python -m m1_kernels.benchmark_cpu --help`.

Per shape: forward and forward + backward of the chunked path, of a block loop as in transformers' MiniMax (blocks of
256 tokens, plain autograd), and of causal scaled_dot_product_attention. GFLOP/s count what the chunked algorithm needs,
4CD + 4D^2 per token and head forward and 12CD + 10D^2 backward, and are set against a large square matmul in this run.
"""

import argparse
import time
from collections.abc import Callable

import torch
from m1_kernels.chunked import chunk_size
from m1_kernels.dispatch import lightning_attention
from m1_kernels.slopes import slopes as layer_slopes
from m1_kernels.softmax import softmax_attention

BLOCK = 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 1024, 2048, 4096])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)

    rate = matmul_rate(arguments.repeats)
    print(f"torch {torch.__version__}, {arguments.threads} threads, float32, matmul {rate:.0f} GFLOP/s")
    print(f"B={arguments.batch} H={arguments.heads} D={arguments.head_dim}; ms forward / forward + backward")
    print(f"{'T':>6} {'chunked':>15} {'GFLOP/s':>11} {'of matmul':>11} {'block loop':>15} {'SDPA':>15} {'vs loop':>11}")
    for tokens in arguments.tokens:
        print(table_row(arguments.batch, tokens, arguments.heads, arguments.head_dim, rate, arguments.repeats))


def table_row(batch: int, tokens: int, heads: int, dim: int, rate: float, repeats: int) -> str:
    """One line of the table for one shape; rate: GFLOP/s of a large matmul."""
    decay = layer_slopes(heads, 0, 8)
    qkv = torch.randn(batch, tokens, heads, 3 * dim)
    tables = block_tables(decay)
    chunked = time_both(lambda q, k, v: lightning_attention(q, k, v, decay), qkv, repeats)
    loop = time_both(lambda q, k, v: block_loop(q, k, v, tables), qkv, repeats)
    softmax = time_both(lambda q, k, v: softmax_attention(q, k, v, scale=dim**-0.5), qkv, repeats)
    chunk = chunk_size(dim)
    forward = batch * tokens * heads * (4 * chunk * dim + 4 * dim**2) / 1e9
    both = batch * tokens * heads * (16 * chunk * dim + 14 * dim**2) / 1e9
    speed = forward / chunked[0], both / chunked[1]
    cells = [
        "{:.2f} / {:.2f}".format(*(1e3 * t for t in chunked)),
        "{:.0f} / {:.0f}".format(*speed),
        "{:.0%} / {:.0%}".format(*(s / rate for s in speed)),
        "{:.2f} / {:.2f}".format(*(1e3 * t for t in loop)),
        "{:.2f} / {:.2f}".format(*(1e3 * t for t in softmax)),
        "{:.2f} / {:.2f}".format(*(a / b for a, b in zip(loop, chunked, strict=True))),
    ]
    return f"{tokens:>6} " + " ".join(
        f"{cell:>{width}}" for cell, width in zip(cells, (15, 11, 11, 15, 15, 11), strict=True)
    )


def time_both(attention: Callable[..., torch.Tensor], qkv: torch.Tensor, repeats: int) -> tuple[float, float]:
    """Best seconds of (forward without gradients, forward + backward to the packed qkv)."""
    gradient = torch.randn(*qkv.shape[:3], qkv.shape[3] // 3)

    def forward() -> None:
        with torch.no_grad():
            attention(*qkv.split(qkv.shape[3] // 3, dim=-1))

    def both() -> None:
        leaf = qkv.detach().requires_grad_()
        attention(*leaf.split(leaf.shape[3] // 3, dim=-1)).backward(gradient)

    return best_time(forward, repeats), best_time(both, repeats)


def best_time(run: Callable[[], None], repeats: int) -> float:
    """Least wall time in seconds of `repeats` runs after two warm-up runs."""
    times = []
    for _ in range(repeats + 2):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times[2:])


def matmul_rate(repeats: int, size: int = 1024) -> float:
    """GFLOP/s of one float32 [size, size] product."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    return 2 * size**3 / best_time(lambda: torch.mm(a, b), repeats) / 1e9


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
    main()
