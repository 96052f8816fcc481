"""GPU generation: a hybrid mixture of experts of 1.3 billion random bf16 weights on one GPU.

    python -m benchmarks.generate_gpu [--parts transformers context prefix ragged profile floor parity] [--time-limit-s 170]
                                      [--output FILE.json]

transformers  tokens/s (prompts included) against transformers' generate on the same weights, taking turns, at batch 1, 8 and 32; the
              share of greedy tokens on which the two agree.
context       time per decoding pass of 4 sequences against the tokens that stand before it.
prefix        8 samples of one prompt of 2,048 tokens against 8 prompts that differ in their first token: up to the first tokens, and
              with all new tokens.
ragged        requests of 64 to 1,024 new tokens: slots refilled as they fall free, against static batches.
profile       kernels of a decoding pass at batch 1: how many, how long the GPU is busy, which take longest.
floor         a pass as one CUDA graph and kernel by kernel, against the time to read each weight once (of the experts those some
              token goes to) and the states.
parity        log-probabilities of 8 generated sequences against training's forward pass: distances in nats, beside those of that pass
              from itself in fp32; the share of graph and kernel-by-kernel decoding that is equal bit by bit.

Every part consists of points. The file is written after each of them; one that fails says why and the others go on, with exit code 1
at the end; those not begun within the time limit are left out, and say so.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

from megatron_m1 import platform
from megatron_m1.config.schema import ModelConfig, ParallelConfig

platform.setup()

from benchmarks.any_rank import environment  # noqa: E402
from benchmarks.generation_sides import (  # noqa: E402
    GREEDY,
    Ours,
    Theirs,
    prefix,
    ragged,
    random_prompts,
    ratio,
    read_rate,
    seconds,
    state_bytes,
    step_bytes,
)
from benchmarks.train_step_cpu import transformers_version  # noqa: E402
from megatron_m1.engine.distributed import init_distributed, shutdown_distributed  # noqa: E402
from megatron_m1.parallel import init_groups  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
MODEL = ModelConfig(
    vocab_size=32768,
    hidden_size=2048,
    num_hidden_layers=16,
    num_attention_heads=16,
    num_key_value_heads=4,
    head_dim=128,
    intermediate_size=512,
    num_local_experts=16,
    attn_type_list=([0] * 7 + [1]) * 2,
    rotary_dim=128,  # all channels, as transformers rotates
    max_position_embeddings=1 << 17,
)
TINY = ModelConfig(
    vocab_size=256,
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=32,
    intermediate_size=32,
    num_local_experts=4,
    attn_type_list=[0, 1],
    rotary_dim=32,
    max_position_embeddings=1 << 17,
)

Point = tuple[str, Callable[[], dict[str, Any]]]
"""A name and what measures it."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32], help="of transformers and floor")
    parser.add_argument("--new-tokens", type=int, default=64, help="of transformers, prefix, floor and parity")
    parser.add_argument("--contexts", type=int, nargs="+", default=[1024, 4096, 16384, 65536])
    parser.add_argument("--lengths", type=int, nargs=2, default=[64, 1024], help="new tokens of ragged, from and to")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument(
        "--tiny", action="store_true", help="a tiny model, on CPU too, which tries the commands and measures nothing"
    )
    parser.add_argument("--time-limit-s", type=float, default=170.0)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/generate_gpu.json")
    arguments = parser.parse_args()
    start = time.perf_counter()
    if not platform.is_cuda() and not arguments.tiny:
        parser.error("needs a CUDA device; --tiny tries it on CPU")
    init_distributed(ParallelConfig().timeout_s)
    bench = Bench(arguments)
    model = bench.ours.config.model
    results: dict[str, Any] = {
        **environment("generate_gpu", None),
        "transformers_version": transformers_version(),
        "read_gbyte_per_s": bench.read_rate / 1e9,
        "model": {
            **{name: getattr(model, name) for name in ("hidden_size", "num_hidden_layers", "num_local_experts", "vocab_size")},
            "parameters": sum(p.numel() for p in bench.ours.model.parameters()),
        },
        "start_s": time.perf_counter() - start,
    }  # fmt: skip
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    failed = False
    for part in arguments.parts:
        results[part] = {}
        for name, measure in PARTS[part](bench):
            begun = time.perf_counter()
            if begun - start > arguments.time_limit_s:
                entry: dict[str, Any] = {"left_out": f"not begun within --time-limit-s {arguments.time_limit_s}"}
            else:
                try:
                    entry = measure()
                except Exception as error:
                    failed = True
                    traceback.print_exc()
                    entry = {"failed": f"{type(error).__name__}: {error}"}
                entry["point_s"] = time.perf_counter() - begun
            results[part][name] = entry
            print(f"{time.perf_counter() - start:.0f} s, {part}, {name}: {json.dumps(entry)}", flush=True)
            arguments.output.write_text(json.dumps(results, indent=1) + "\n")
    print(f"written: {arguments.output}")
    shutdown_distributed()
    return int(failed)


class Bench:
    """What the parts share: our side, and theirs once a part asks for it."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments, self.new = arguments, arguments.new_tokens
        self.ours = Ours(TINY if arguments.tiny else MODEL, init_groups(ParallelConfig(), seed=1), precision="bf16")
        self.read_rate = read_rate()
        self.mode = "graph" if platform.is_cuda() else "device"

    @cached_property
    def theirs(self) -> Theirs:
        with tempfile.TemporaryDirectory() as folder:
            return Theirs(self.ours, Path(folder))

    def prompts(self, count: int, length: int = 64) -> list[list[int]]:
        return random_prompts(count, length, self.ours.config.model.vocab_size)


def transformers(bench: Bench) -> list[Point]:
    return [(f"batch_{batch}", partial(against_transformers, bench, batch)) for batch in bench.arguments.batches]


def against_transformers(bench: Bench, batch: int) -> dict[str, Any]:
    ours, theirs, new, prompts = bench.ours, bench.theirs, bench.new, bench.prompts(batch)
    experts = fastest_experts(theirs, prompts)
    greedy = ours.run(ours.requests(prompts, [new] * batch, GREEDY), batch, decode=bench.mode)
    equal = mean_equal(greedy, theirs.generate(prompts, new, sample=False))
    ours.run(ours.requests(prompts, [4] * batch), batch, decode=bench.mode)
    calls = {
        "ours": partial(ours.run, ours.requests(prompts, [new] * batch), batch, decode=bench.mode),
        "transformers": partial(theirs.generate, prompts, new, sample=True),
    }
    times = seconds(calls, bench.arguments.rounds, warm_up=False)
    return {
        "prompt_tokens": 64, "new_tokens": new,
        "tokens_per_s": {side: batch * new / min(t["wall_s"]) for side, t in times.items()},
        **ratio(times, "transformers", "ours"),
        "greedy_tokens_equal": equal,
        "transformers_seconds_of_12_tokens": experts,
    }  # fmt: skip


def fastest_experts(theirs: Theirs, prompts: list[list[int]]) -> dict[str, float]:
    """Seconds with each of transformers' ways to run its experts, the fastest of which it has from here on."""
    found = {}
    for name in ("eager", "batched_mm", "grouped_mm"):
        try:
            theirs.model.set_experts_implementation(name)
            theirs.generate(prompts, 2, sample=True)
            call = partial(theirs.generate, prompts, 12, sample=True)
            [found[name]] = seconds({name: call}, 1, warm_up=False)[name]["wall_s"]
        except (AttributeError, KeyError, ValueError, ImportError, RuntimeError) as error:
            print(f"transformers without {name}: {error}", flush=True)
    if found:
        theirs.model.set_experts_implementation(min(found, key=found.__getitem__))
    return found


def context(bench: Bench) -> list[Point]:
    return [(str(length), partial(step_at_context, bench, length)) for length in bench.arguments.contexts]


def step_at_context(bench: Bench, length: int) -> dict[str, Any]:
    requests = bench.ours.requests(bench.prompts(4, length), [40] * 4)
    steps = bench.ours.step_seconds(requests, 4, prefill_tokens=max(length // 64 * 64, 64), decode=bench.mode)
    # The first passes compile, warm up and record.
    return {"batch": 4, "step_ms": 1e3 * statistics.median(steps[4:]), "fastest_step_ms": 1e3 * min(steps[4:])}


def shared_prefix(bench: Bench) -> list[Point]:
    tokens = 128 if bench.arguments.tiny else 2048
    return [
        (name, partial(prefix, bench.ours, new=new, rounds=bench.arguments.rounds, tokens=tokens, decode=bench.mode))
        for name, new in (("first_tokens", 1), (f"{bench.new}_tokens", bench.new))
    ]


def ragged_lengths(bench: Bench) -> list[Point]:
    low, high = bench.arguments.lengths
    measure = partial(ragged, bench.ours, lengths=(low, high), count=32, slots=8, warm_up=False, decode=bench.mode)
    return [("32_requests_8_slots", measure)]


def profile(bench: Bench) -> list[Point]:
    return [("batch_1", partial(kernels_of_a_step, bench))]


def kernels_of_a_step(bench: Bench) -> dict[str, Any]:
    """Kernels of two calls that differ by 16 tokens, the longer one's less the shorter one's."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    activity = [ProfilerActivity.CUDA] if platform.is_cuda() else [ProfilerActivity.CPU]
    kind = DeviceType.CUDA if platform.is_cuda() else DeviceType.CPU
    counts: Counter[str] = Counter()
    micros: Counter[str] = Counter()
    for new, sign in ((8, -1), (24, 1)):
        requests = bench.ours.requests(bench.prompts(1), [new])
        bench.ours.run(requests, 1, decode=bench.mode)
        with record(activities=activity) as trace:
            bench.ours.run(requests, 1, decode=bench.mode)
        for event in trace.key_averages():
            if event.device_type == kind:
                counts[event.key] += sign * event.count
                spent = event.self_device_time_total if platform.is_cuda() else event.self_cpu_time_total
                micros[event.key] += sign * spent
    longest = sorted(micros, key=lambda name: -micros[name])[:25]
    return {
        "kernels": sum(counts.values()) / 16, "busy_ms": sum(micros.values()) / 16e3,
        "longest": {name[:100]: {"a_step": counts[name] / 16, "us_a_step": micros[name] / 16} for name in longest},
    }  # fmt: skip


def floor(bench: Bench) -> list[Point]:
    return [(f"batch_{batch}", partial(over_floor, bench, batch)) for batch in bench.arguments.batches]


def over_floor(bench: Bench, batch: int) -> dict[str, Any]:
    ours, model = bench.ours, bench.ours.config.model
    requests = ours.requests(bench.prompts(batch), [bench.new] * batch)
    steps = {
        mode: statistics.median(ours.step_seconds(requests, batch, decode=mode)[4:]) for mode in {bench.mode, "device"}
    }
    weights, states = step_bytes(model, batch, 2) / bench.read_rate, state_bytes(model, batch) / bench.read_rate
    return {
        "step_ms": {mode: 1e3 * step for mode, step in steps.items()},
        "weights_once_ms": 1e3 * weights,
        "states_ms": 1e3 * states,
        "step_over_floor": steps[bench.mode] / (weights + states),
    }


def parity(bench: Bench) -> list[Point]:
    return [("8_sequences", partial(distance_from_training, bench))]


def distance_from_training(bench: Bench) -> dict[str, Any]:
    ours, new = bench.ours, bench.new
    requests = ours.requests(bench.prompts(8), [new] * 8)
    results = ours.engine(8, decode=bench.mode).generate(requests)
    eager = ours.engine(8, decode="device").generate(requests)
    decoded = torch.tensor([result.logprobs for result in results])
    out: dict[str, Any] = {
        "new_tokens": new,
        "graph_equal_to_kernel_by_kernel": {
            "tokens": mean_equal([r.tokens for r in results], [r.tokens for r in eager]),
            "logprob_bits": mean_equal([r.logprobs for r in results], [r.logprobs for r in eager]),
        },
    }
    sequences = torch.tensor([[*q.prompt, *r.tokens] for q, r in zip(requests, results, strict=True)])

    @torch.no_grad()
    def trained(side: Ours) -> torch.Tensor:
        ids = sequences.to(platform.device())
        positions = torch.arange(ids.shape[1] - 1, device=ids.device).expand(8, -1)
        return -side.model(ids[:, :-1], positions, labels=ids[:, 1:])[:, -new:].float().cpu()

    bf16 = trained(ours)
    out["decoding_from_training"] = distance(decoded, bf16)
    exact = Ours(ours.config.model, ours.groups, precision="fp32", initial_weights=False)
    for target, source in zip(exact.model.parameters(), ours.model.parameters(), strict=True):
        target.data.copy_(source.data)
    try:
        fp32 = trained(exact)
    except RuntimeError as error:
        return out | {"fp32_not_run": str(error)}
    out["training_from_fp32"], out["decoding_from_fp32"] = distance(bf16, fp32), distance(decoded, fp32)
    bound = 2 * out["training_from_fp32"]["mean_nats"]
    out["bound"] = {
        "rule": "mean distance of decoding from training at most twice that of training from fp32",
        "nats": bound,
        "holds": out["decoding_from_training"]["mean_nats"] <= bound,
    }
    return out


def mean_equal(a: list[list[Any]], b: list[list[Any]]) -> float:
    return statistics.mean(x == y for p, q in zip(a, b, strict=True) for x, y in zip(p, q, strict=True))


def distance(a: torch.Tensor, b: torch.Tensor) -> dict[str, float]:
    apart = (a.double() - b.double()).abs().flatten()
    return {
        "mean_nats": apart.mean().item(),
        "p99_nats": apart.quantile(0.99).item(),
        "largest_nats": apart.max().item(),
    }


PARTS: dict[str, Callable[[Bench], list[Point]]] = {
    "transformers": transformers,
    "context": context,
    "prefix": shared_prefix,
    "ragged": ragged_lengths,
    "profile": profile,
    "floor": floor,
    "parity": parity,
}


if __name__ == "__main__":
    sys.exit(main())
