"""Context parallelism on CPU (gloo): bytes sent against their formulas, time and memory against the sequence and the ranks.

    python -m benchmarks.context_parallel [--parts bytes time memory] [--output FILE.json]

bytes   sent per rank and layer, counted while M1's lightning states and softmax layers' keys and values travel between real
        processes, against formulas of the shapes alone. Exit 1 where a counter, what was handed to torch.distributed, or a formula
        differ. Megatron-Core's all-to-all over heads is counted likewise; core has no counter of its own.
time    one layer's attention, forward and backward, against N at fixed N/W and against W at fixed N. The ranks share the cores
        of this machine: CPU seconds per rank tell more than wall seconds.
memory  one step of a tiny model through the pretraining loop: peak resident memory of a rank over its imports.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from m1_kernels import slopes

from benchmarks.context_formulas import Method, Shape, all_to_all_bytes, lightning_bytes, softmax_bytes
from benchmarks.train_step_cpu import git, hardware
from megatron_m1 import platform
from megatron_m1.config import ConfigError, ModelConfig, load_config
from megatron_m1.config.schema import Config
from megatron_m1.platform.rank_pool import RankPool

platform.setup()

from benchmarks.context_ranks import (  # noqa: E402
    Memory,
    Sent,
    all_to_all_sent,
    exchange_bytes,
    layer_seconds,
    softmax_attention_bytes,
    training_memory,
)

ROOT = Path(__file__).resolve().parents[1]
M1 = ModelConfig()
HEADS = {"heads": M1.num_attention_heads, "key_value_heads": M1.num_key_value_heads, "head_dim": M1.head_dim}
LAYERS = (0, 40, 78)
METHODS: tuple[Method, ...] = ("ring", "all_gather")
MILLION = 1 << 20
TIMED = {"heads": 4, "key_value_heads": 2, "head_dim": 64, "item": 4}
"""fp32: bf16 is slow on most CPUs."""
MEMORY_CASES = ((1, 4), (2, 2), (4, 4), (4, 2), (4, 1))
"""Ranks, and what divides the largest N."""
TINY = (
    *("--config", "examples/configs/tiny_cpu.yaml", "--config", "examples/configs/tiny_cpu_1m.yaml"),
    *("--model.vocab_size", "512", "--model.hidden_size", "64", "--model.num_hidden_layers", "4"),
    *("--model.attn_type_list", "[0,0,0,1]", "--model.num_attention_heads", "2", "--model.num_key_value_heads", "1"),
    *("--model.head_dim", "16", "--model.intermediate_size", "64", "--model.num_local_experts", "4"),
    *("--parallel.pipeline", "1", "--parallel.last_stage_layers", "null", "--parallel.expert", "1"),
    *("--training.steps", "1", "--training.global_batch", "1", "--training.recompute", "none"),
    *("--data.document_boundaries", "ignore", "--data.valid", "[]", "--data.num_workers", "0"),
    *("--checkpoint.save", "null", "--checkpoint.every_steps", "0", "--logging.layer_stats_every_steps", "0"),
)
"""The CPU twin of the million-token preset, made small enough for one softmax layer over the whole sequence to be affordable, cut
over context-parallel ranks alone, without recomputation (which would repeat that layer)."""


def main() -> int:
    parts: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
        "bytes": bytes_part, "time": time_part, "memory": memory_part,
    }  # fmt: skip
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=list(parts), default=list(parts))
    parser.add_argument("--worlds", type=int, nargs="+", default=[2, 4], help="ranks of bytes")
    parser.add_argument(
        "--tokens", type=int, nargs="+", default=[1 << 15, MILLION], help="N of bytes, lightning layers"
    )
    parser.add_argument("--rounds", type=int, default=3, help="of time")
    parser.add_argument("--lightning-tokens", type=int, default=1 << 14, help="N of time on 4 ranks, lightning layer")
    parser.add_argument("--softmax-tokens", type=int, default=1 << 13, help="N of time on 4 ranks, softmax layer")
    parser.add_argument("--memory-tokens", type=int, default=1 << 17, help="N of memory on 4 ranks, the largest")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/context_parallel.json")
    arguments = parser.parse_args()
    if platform.is_cuda():
        raise ConfigError("this benchmark runs on CPU; hide the GPUs: CUDA_VISIBLE_DEVICES= python -m ...")
    results: dict[str, Any] = {
        "command": "python -m benchmarks.context_parallel " + " ".join(sys.argv[1:]),
        "commit": git("rev-parse", "--short", "HEAD"),
        "uncommitted_changes": bool(git("status", "--porcelain", "--untracked-files=no")),
        "date": time.strftime("%Y-%m-%d"),
        "hardware": {**hardware(1), "threads_per_rank": 1, "cores": os.cpu_count(), "load_before": os.getloadavg()[0]},
    }
    for part in arguments.parts:
        started = time.perf_counter()
        results[part] = parts[part](arguments)
        results[part]["seconds"] = round(time.perf_counter() - started, 1)
        print(f"({results[part]['seconds']} s)", flush=True)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(results, indent=1) + "\n")
    print(f"written: {arguments.output}")
    wrong = [line for part in arguments.parts for line in results[part].get("mismatches", [])]
    for line in wrong:
        print(line, file=sys.stderr)
    return 1 if wrong else 0


@dataclass
class Case:
    """One exchange, and the bytes that each rank should send for it."""

    layer: str
    shape: Shape
    method: Literal["ring", "all_gather", "all_to_all"]
    left_out: int | None
    """Heads that the horizon leaves out; None: no horizon."""
    forward: list[int]
    backward: list[int]

    @property
    def name(self) -> str:
        return self.method + (", horizon" if self.left_out is not None else "")

    def mismatches(self, sent: list[Sent]) -> list[str]:
        """What is wrong with what the ranks sent, a line for each rank and direction."""
        wrong, case = [], f"{self.layer}, W={self.shape.world}, N={self.shape.tokens}, {self.name}"
        for rank, counted in enumerate(sent):
            for direction, counter, wired, formula in (
                ("forward", counted.forward, counted.wire_forward, self.forward[rank]),
                ("backward", counted.backward, counted.wire_backward, self.backward[rank]),
            ):
                if not counter == wired == formula:
                    wrong.append(
                        f"{case}, rank {rank}, {direction}: "
                        f"counter {counter}, handed to torch.distributed {wired}, formula {formula}"
                    )
            if self.method == "all_gather" and counted.neighbour_heads != (self.left_out or 0):
                wrong.append(f"{case}, rank {rank}: {counted.neighbour_heads} heads left out, not {self.left_out}")
        return wrong


def bytes_part(arguments: argparse.Namespace) -> dict[str, Any]:
    rows: list[dict[str, Any]] = []
    wrong: list[str] = []
    print("\nMiB sent per rank and layer of M1: counted (the busiest rank), and by formula; gloo")
    print(
        f"{'layer':15} {'W':>2} {'N':>9} {'method':>19} {'left out':>8} {'forward':>8} {'backward':>8} {'formula':>17}"
    )
    with RankPool(max(arguments.worlds)) as pool:
        for world in arguments.worlds:
            for case, sent in _counted(pool, world, arguments.tokens):
                wrong += case.mismatches(sent)
                rows.append(asdict(case) | {"sent": [asdict(of_rank) for of_rank in sent]})
                forward, backward = max(s.forward for s in sent), max(s.backward for s in sent)
                formula = f"{max(case.forward) / MILLION:.3f} / {max(case.backward) / MILLION:.3f}"
                left_out = "-" if case.left_out is None else f"{case.left_out} of {case.shape.heads}"
                print(
                    f"{case.layer:15} {world:2} {case.shape.tokens:9,} {case.name:>19} {left_out:>8} "
                    f"{forward / MILLION:8.3f} {backward / MILLION:8.3f} {formula:>17}"
                )
    print(f"{len(wrong)} mismatches in {len(rows)} cases, each on every rank, forward and backward")
    return {"rows": rows, "mismatches": wrong, "formulas": formula_table()}


def _counted(pool: RankPool, world: int, lengths: list[int]) -> Iterator[tuple[Case, list[Sent]]]:
    """Each case with what the ranks sent. The states do not depend on the layer without horizon, nor on the length."""
    for tokens in lengths:
        shape = Shape(world, tokens, **HEADS)
        for method in METHODS:
            for layer, limited in ((LAYERS[0], False), *((layer, True) for layer in LAYERS)):
                rates = slopes(M1.num_attention_heads, layer, M1.num_hidden_layers).tolist()
                left_out = shape.left_out(rates) if limited else None
                each = [lightning_bytes(shape, rank=r, method=method, left_out=left_out or 0) for r in range(world)]
                case = Case(f"lightning {layer}", shape, method, left_out, each, each)
                yield case, pool.run(exchange_bytes, (shape, rates, method, limited), world=world)
    shape = Shape(world, 128 * world, **HEADS)
    for method in METHODS:
        forward, backward = (softmax_bytes(shape, direction=direction) for direction in ("forward", "backward"))
        case = Case("softmax, bf16", shape, method, None, [forward] * world, [backward] * world)
        yield case, pool.run(softmax_attention_bytes, (shape, method), world=world)
    for layer, key_value_heads in (("lightning", shape.heads), ("softmax", shape.key_value_heads)):
        for tokens in (128 * world, 256 * world):
            swapped = replace(shape, tokens=tokens, key_value_heads=key_value_heads)
            each = [all_to_all_bytes(swapped)] * world
            yield (
                Case(f"{layer}, bf16", swapped, "all_to_all", None, each, each),
                pool.run(all_to_all_sent, (swapped,), world=world),
            )


def formula_table() -> list[dict[str, Any]]:
    """M1's layers in bf16 at 1,048,576 tokens, forward, the busiest rank; printed and returned. Nothing of it is measured."""
    rows: list[dict[str, Any]] = []
    print("\nby formula only: M1 at 1,048,576 tokens, bf16, MiB sent per rank and layer, forward")
    print(f"{'':16} {'W':>2} {'ring':>10} {'all-gather':>10} {'with horizon':>12} {'all-to-all':>10}")
    for world in (4, 8, 16, 32):
        shape = Shape(world, MILLION, **HEADS)
        for layer in LAYERS:
            left_out = shape.left_out(slopes(M1.num_attention_heads, layer, M1.num_hidden_layers).tolist())
            row: dict[str, Any] = {
                "layer": f"lightning {layer}",
                "world": world,
                "ring": lightning_bytes(shape, rank=1, method="ring"),
                "all_gather": lightning_bytes(shape, rank=1, method="all_gather"),
                "all_gather_horizon": lightning_bytes(shape, rank=1, method="all_gather", left_out=left_out),
                "all_to_all": all_to_all_bytes(replace(shape, key_value_heads=shape.heads)),
            }
            rows.append(row)
        both = softmax_bytes(shape, direction="forward")
        swap = all_to_all_bytes(shape) if world <= M1.num_key_value_heads else None
        rows.append({"layer": "softmax", "world": world, "ring": both, "all_gather": both, "all_to_all": swap})
    for row in rows:
        cells = [row.get(key) for key in ("ring", "all_gather", "all_gather_horizon", "all_to_all")]
        texts = ["-" if cell is None else f"{cell / MILLION:,.1f}" for cell in cells]
        print(f"{row['layer']:16} {row['world']:2} {texts[0]:>10} {texts[1]:>10} {texts[2]:>12} {texts[3]:>10}")
    return rows


def time_part(arguments: argparse.Namespace) -> dict[str, Any]:
    rates = slopes(TIMED["heads"], M1.num_hidden_layers // 2, M1.num_hidden_layers).tolist()
    rows: list[dict[str, Any]] = []
    wrong: list[str] = []
    with RankPool(4) as pool:
        for kind, most in (("lightning", arguments.lightning_tokens), ("softmax", arguments.softmax_tokens)):
            for world, tokens in ((1, most // 4), (2, most // 2), (1, most), (2, most), (4, most)):
                shape = Shape(world, tokens, **TIMED)
                for method in METHODS if world > 1 else METHODS[:1]:
                    task = (shape, kind, method, rates, arguments.rounds)
                    ranks = pool.run(layer_seconds, task, world=world, timeout_s=300)
                    row = {
                        "layer": kind, "world": world, "tokens": tokens, "of": most,
                        "method": method if world > 1 else "one rank",
                        # barriers on both sides: the ranks' wall times are one
                        "wall_s": statistics.median(ranks[0]["wall_s"]),
                        "cpu_s_per_rank": statistics.mean(statistics.median(rank["cpu_s"]) for rank in ranks),
                        "ranks": ranks,
                    }  # fmt: skip
                    rows.append(row)
                    sent = [rank["sent_bytes"] for rank in ranks]
                    formula = [_both_ways(kind, shape, rank, method, shape.left_out(rates)) for rank in range(world)]
                    if sent != formula:
                        wrong.append(
                            f"time, {kind}, W={world}, N={tokens}, {method}: counters {sent}, formula {formula}"
                        )
    for title, chosen in (
        ("time against N at fixed N/W", [row for row in rows if row["tokens"] * 4 == row["of"] * row["world"]]),
        ("time against W at fixed N", [row for row in rows if row["tokens"] == row["of"]]),
    ):
        print(f"\n{title}: CPU, gloo, {os.cpu_count()} cores for all ranks, a thread each; forward + backward, fp32")
        print(f"{'layer':10} {'W':>2} {'N':>8} {'N/W':>8} {'method':>11} {'wall s':>8} {'CPU s per rank':>14}")
        for row in chosen:
            print(
                f"{row['layer']:10} {row['world']:2} {row['tokens']:8,} {row['tokens'] // row['world']:8,} "
                f"{row['method']:>11} {row['wall_s']:8.3f} {row['cpu_s_per_rank']:14.3f}"
            )
    return {"shape": TIMED, "rounds": arguments.rounds, "rows": rows, "mismatches": wrong}


def _both_ways(kind: str, shape: Shape, rank: int, method: Method, left_out: int) -> int:
    """Bytes of a forward and a backward pass."""
    if shape.world == 1:
        return 0
    if kind == "lightning":
        return 2 * lightning_bytes(shape, rank=rank, method=method, left_out=left_out)
    return softmax_bytes(shape, direction="forward") + softmax_bytes(shape, direction="backward")


def memory_part(arguments: argparse.Namespace) -> dict[str, Any]:
    most = arguments.memory_tokens
    rows: list[dict[str, Any]] = []
    for world, tokens in ((world, most // divisor) for world, divisor in MEMORY_CASES):
        with tempfile.TemporaryDirectory() as folder:
            config = tiny_config(world, tokens, folder)
            with RankPool(world) as pool:  # new processes, whose peak is this run's
                ranks: list[Memory] = pool.run(training_memory, (config,), world=world, timeout_s=900)
            lines = [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]
        [step] = [line for line in lines if "loss" in line]
        rows.append(
            {
                "world": world, "tokens": tokens, "loss": step["loss"], "loss_tokens": step["loss_tokens"],
                "over_imports_mib": [(rank.peak - rank.imports) / MILLION for rank in ranks],
                "imports_mib": [rank.imports / MILLION for rank in ranks],
                "seconds": max(rank.seconds for rank in ranks),
            }
        )  # fmt: skip
    for title, chosen in (
        ("peak memory against N at W = 4", [row for row in rows if row["world"] == 4]),
        ("peak memory against N at fixed N/W", [row for row in rows if row["tokens"] * 4 == most * row["world"]]),
    ):
        print(f"\n{title}: one step of a tiny model through the pretraining loop, CPU, gloo")
        print(f"{'W':>2} {'N':>8} {'N/W':>8} {'MiB over imports, by rank':>32} {'seconds':>8} {'loss':>7}")
        for row in chosen:
            peaks = " ".join(f"{mib:.0f}" for mib in row["over_imports_mib"])
            print(
                f"{row['world']:2} {row['tokens']:8,} {row['tokens'] // row['world']:8,} {peaks:>32} "
                f"{row['seconds']:8.1f} {row['loss']:7.4f}"
            )
    return {"options": list(TINY), "rows": rows}


def tiny_config(world: int, tokens: int, folder: str) -> Config:
    """One step over one sequence of `tokens` tokens on `world` context-parallel ranks, logged in `folder`."""
    options = [str(ROOT / option) if option.endswith(".yaml") else option for option in TINY]
    return load_config(
        [
            *options,
            *("--parallel.context", str(world), "--training.seq_length", str(tokens), "--logging.dir", folder),
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
