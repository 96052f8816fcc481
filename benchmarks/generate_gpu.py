"""GPU generation: a hybrid mixture of experts of 1.3 billion random bf16 weights on one GPU.

    python -m benchmarks.generate_gpu [--parts parity peers context prefix profile ragged] [--time-limit-s 170] [--output FILE.json]

parity   log-probabilities of 8 generated sequences against training's forward pass: distances in nats, beside those of that pass from
         itself in fp32; the share of graph and kernel-by-kernel decoding that is equal bit by bit.
peers    tokens/s (prompts included) at batch 1, 8, 32 and 128: one CUDA graph a pass, kernel by kernel, and transformers' generate on the
         same weights; a pass against the time to read each weight once (of the experts those some token goes to) and the states.
context  time per decoding pass of 4 sequences against the tokens that stand before it.
prefix   8 samples of one prompt of 2,048 tokens against 8 prompts that differ in their first token.
profile  kernels of a decoding pass at batch 1: how many, how long the GPU is busy, which take longest.
ragged   requests of 64 to 1,024 new tokens: slots refilled as they fall free, against static batches.

Written after every part. A part that fails is reported, the others go on, and the exit code is 1; parts not begun within the
time limit are left out, and say so.
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
from functools import partial
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


def main() -> int:
    parts: dict[str, Callable[[Ours, argparse.Namespace], dict[str, Any]]] = {
        "parity": parity, "peers": peers, "context": context, "prefix": shared_prefix, "profile": profile,
        "ragged": ragged_lengths,
    }  # fmt: skip
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=list(parts), default=list(parts))
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32, 128])
    parser.add_argument("--new-tokens", type=int, default=128, help="of parity, peers and prefix")
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
    model = TINY if arguments.tiny else MODEL
    init_distributed(ParallelConfig().timeout_s)
    ours = Ours(model, init_groups(ParallelConfig(), seed=1), precision="bf16")
    results: dict[str, Any] = {
        **environment("generate_gpu", None),
        "transformers": transformers_version(),
        "read_gbyte_per_s": read_rate() / 1e9,
        "model": {
            **{name: getattr(model, name) for name in ("hidden_size", "num_hidden_layers", "num_local_experts", "vocab_size")},
            "parameters": sum(p.numel() for p in ours.model.parameters()),
        },
        "start_s": time.perf_counter() - start,
    }  # fmt: skip
    failed = False
    for part in arguments.parts:
        begun = time.perf_counter()
        if begun - start > arguments.time_limit_s:
            results[part] = {"left_out": f"not begun within --time-limit-s {arguments.time_limit_s}"}
        else:
            try:
                results[part] = parts[part](ours, arguments)
            except Exception as error:
                failed = True
                traceback.print_exc()
                results[part] = {"failed": f"{type(error).__name__}: {error}"}
            results[part]["part_s"] = time.perf_counter() - begun
        print(part, json.dumps(results[part], indent=1), flush=True)
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(results, indent=1) + "\n")
    print(f"written: {arguments.output}")
    shutdown_distributed()
    return int(failed)


def graph_mode() -> str:
    return "graph" if platform.is_cuda() else "device"


def parity(ours: Ours, arguments: argparse.Namespace) -> dict[str, Any]:
    model, new = ours.config.model, arguments.new_tokens
    requests = ours.requests(random_prompts(8, 64, model.vocab_size), [new] * 8)
    out: dict[str, Any] = {"sequences": 8, "new_tokens": new}
    results = ours.engine(8, decode=graph_mode()).generate(requests)
    eager = ours.engine(8, decode="device").generate(requests)
    decoded = torch.tensor([result.logprobs for result in results])
    out["graph_equal_to_kernel_by_kernel"] = {
        "tokens": mean_equal([r.tokens for r in results], [r.tokens for r in eager]),
        "logprob_bits": mean_equal([r.logprobs for r in results], [r.logprobs for r in eager]),
    }
    sequences = torch.tensor([[*q.prompt, *r.tokens] for q, r in zip(requests, results, strict=True)])

    @torch.no_grad()
    def trained(side: Ours) -> torch.Tensor:
        ids = sequences.to(platform.device())
        positions = torch.arange(ids.shape[1] - 1, device=ids.device).expand(8, -1)
        return -side.model(ids[:, :-1], positions, labels=ids[:, 1:])[:, -new:].float().cpu()

    bf16 = trained(ours)
    out["decoding_from_training"] = distance(decoded, bf16)
    exact = Ours(model, ours.groups, precision="fp32", initial_weights=False)
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


def peers(ours: Ours, arguments: argparse.Namespace) -> dict[str, Any]:
    model, new = ours.config.model, arguments.new_tokens
    out: dict[str, Any] = {"prompt_tokens": 64, "new_tokens": new}
    rate = read_rate()
    for batch in arguments.batches:
        requests = ours.requests(random_prompts(batch, 64, model.vocab_size), [new] * batch)
        calls = {mode: partial(ours.run, requests, batch, decode=mode) for mode in (graph_mode(), "device")}
        times = seconds(calls, arguments.rounds)
        steps = {mode: statistics.median(ours.step_seconds(requests, batch, decode=mode)[4:]) for mode in calls}
        weights, states = step_bytes(model, batch, 2) / rate, state_bytes(model, batch) / rate
        out[f"batch_{batch}"] = {
            "tokens_per_s": {mode: batch * new / min(t["wall_s"]) for mode, t in times.items()},
            "step_ms": {mode: 1e3 * step for mode, step in steps.items()},
            "weights_once_ms": 1e3 * weights,
            "states_ms": 1e3 * states,
            "step_over_floor": steps[graph_mode()] / (weights + states),
        }
        print(f"peers, batch {batch}", json.dumps(out[f"batch_{batch}"]), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        theirs = Theirs(ours, Path(folder))
    try:
        theirs.model.set_experts_implementation("grouped_mm")
        out["transformers_experts"] = "grouped_mm"
    except (AttributeError, ValueError, ImportError) as error:
        out["transformers_experts"] = f"as it comes: {error}"
    few = min(new, 64)
    for batch in arguments.batches:
        prompts = random_prompts(batch, 64, model.vocab_size)
        greedy = ours.run(ours.requests(prompts, [few] * batch, GREEDY), batch)
        entry = out[f"batch_{batch}"]
        entry["greedy_tokens_equal"] = mean_equal(greedy, theirs.generate(prompts, few, sample=False))
        calls = {
            "ours": partial(ours.run, ours.requests(prompts, [few] * batch), batch),
            "transformers": partial(theirs.generate, prompts, few, sample=True),
        }
        times = seconds(calls, arguments.rounds, warm_up=False)
        entry["tokens_per_s"]["transformers"] = batch * few / min(times["transformers"]["wall_s"])
        entry |= {"compared_new_tokens": few, **ratio(times, "transformers", "ours")}
        print(f"peers, batch {batch}", json.dumps(entry), flush=True)
    return out


def context(ours: Ours, arguments: argparse.Namespace) -> dict[str, Any]:
    out: dict[str, Any] = {"batch": 4, "step_ms": {}}
    for length in arguments.contexts:
        requests = ours.requests(random_prompts(4, length, ours.config.model.vocab_size), [40] * 4)
        start = time.perf_counter()
        steps = ours.step_seconds(requests, 4, prefill_tokens=max(arguments.contexts), decode=graph_mode())
        out["step_ms"][length] = 1e3 * statistics.median(steps[4:])
        out.setdefault("whole_call_s", {})[length] = time.perf_counter() - start
        print("context", length, out["step_ms"][length], flush=True)
    return out


def shared_prefix(ours: Ours, arguments: argparse.Namespace) -> dict[str, Any]:
    return prefix(ours, new=arguments.new_tokens, rounds=arguments.rounds, tokens=128 if arguments.tiny else 2048)


def profile(ours: Ours, arguments: argparse.Namespace) -> dict[str, Any]:
    """Kernels of two calls that differ by 16 tokens, the longer one's less the shorter one's."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    activity = [ProfilerActivity.CUDA] if platform.is_cuda() else [ProfilerActivity.CPU]
    kind = DeviceType.CUDA if platform.is_cuda() else DeviceType.CPU
    counts: Counter[str] = Counter()
    micros: Counter[str] = Counter()
    for new, sign in ((8, -1), (24, 1)):
        requests = ours.requests(random_prompts(1, 64, ours.config.model.vocab_size), [new])
        ours.run(requests, 1, decode=graph_mode())
        with record(activities=activity) as trace:
            ours.run(requests, 1, decode=graph_mode())
        for event in trace.key_averages():
            if event.device_type == kind:
                counts[event.key] += sign * event.count
                spent = event.self_device_time_total if platform.is_cuda() else event.self_cpu_time_total
                micros[event.key] += sign * spent
    longest = sorted(micros, key=lambda name: -micros[name])[:25]
    return {
        "batch": 1, "kernels": sum(counts.values()) / 16, "busy_ms": sum(micros.values()) / 16e3,
        "longest": {name[:100]: {"a_step": counts[name] / 16, "us_a_step": micros[name] / 16} for name in longest},
    }  # fmt: skip


def ragged_lengths(ours: Ours, arguments: argparse.Namespace) -> dict[str, Any]:
    return ragged(ours, lengths=tuple(arguments.lengths), count=32, slots=8, warm_up=False)


if __name__ == "__main__":
    sys.exit(main())
