"""CPU generation: ours against transformers' generate on the same weights, and what each mechanism of the engine gives.

    python -m benchmarks.generate_cpu [--parts peers prefix ragged context invariant drift] [--rounds 3] [--threads N] [--output FILE.json]

peers    tokens/s (prompts included) at batch 1, 8 and 32 against transformers with its fastest experts, taking turns; both draw
         from the whole softmax; the share of greedy tokens on which the two agree; a decoding pass against its floor: the time to read
         every weight once (of the experts those some token goes to), to read and write the states, and the arithmetic of its
         products at the rate of a large one.
prefix   8 samples of one prompt of 2,048 tokens against 8 prompts that differ in their first token.
ragged   requests of 64 to 1,024 new tokens: slots refilled as they fall free, against static batches, in which every row runs
         to the end of the longest (as in transformers) or leaves when it is done.
context  time per decoding pass against the tokens that stand before it.
invariant  a decoding pass whose rows do not depend on one another by a bit, against the usual one.
drift    4,096 decoding steps of a small model: largest distance of their log-probabilities from those of training's forward pass.

Times of passes are CPU time. Written after every part, with the load of the machine around it.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megatron_m1 import platform
from megatron_m1.config.schema import ModelConfig, ParallelConfig

platform.setup()

from benchmarks.generation_sides import (  # noqa: E402
    DRAWN,
    GREEDY,
    Ours,
    Theirs,
    multiply_rate,
    prefix,
    ragged,
    random_prompts,
    ratio,
    read_rate,
    seconds,
    state_bytes,
    step_bytes,
    step_flops,
)
from benchmarks.train_step_cpu import git, hardware  # noqa: E402
from megatron_m1.engine.distributed import init_distributed  # noqa: E402
from megatron_m1.parallel import init_groups  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
MODEL = ModelConfig(
    vocab_size=4096,
    hidden_size=256,
    num_hidden_layers=8,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    intermediate_size=512,
    num_local_experts=8,
    attn_type_list=[0] * 7 + [1],
    rotary_dim=64,  # all channels, as transformers rotates
    max_position_embeddings=16384,
)
DRIFT_MODEL = replace(
    MODEL, vocab_size=64, hidden_size=32, num_hidden_layers=4, head_dim=8, intermediate_size=32, num_local_experts=4,
    attn_type_list=[0, 1, 0, 0], rotary_dim=4,
)  # fmt: skip


def main() -> None:
    parts: dict[str, Callable[[Ours, argparse.Namespace], dict[str, Any]]] = {
        "peers": peers, "prefix": shared_prefix, "ragged": ragged_lengths, "context": context, "invariant": invariant, "drift": drift,
    }  # fmt: skip
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=list(parts), default=list(parts))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--new-tokens", type=int, default=64, help="of peers and prefix")
    parser.add_argument("--lengths", type=int, nargs=2, default=[64, 1024], help="new tokens of ragged, from and to")
    parser.add_argument("--contexts", type=int, nargs="+", default=[256, 1024, 4096, 8192])
    parser.add_argument("--drift-steps", type=int, default=4096)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/generate_cpu.json")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    results: dict[str, Any] = {
        "command": "python -m benchmarks.generate_cpu " + " ".join(sys.argv[1:]),
        "commit": git("rev-parse", "--short", "HEAD"),
        "date": time.strftime("%Y-%m-%d"),
        "hardware": hardware(arguments.threads),
    }
    init_distributed(ParallelConfig().timeout_s)
    ours = Ours(MODEL, init_groups(ParallelConfig(), seed=1), precision="fp32")
    for part in arguments.parts:
        load, start = os.getloadavg()[0], time.perf_counter()
        results[part] = parts[part](ours, arguments)
        results[part] |= {"load_average": [load, os.getloadavg()[0]], "part_s": time.perf_counter() - start}
        print(part, json.dumps(results[part], indent=1), flush=True)
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(results, indent=2) + "\n")
    print(f"written: {arguments.output}")


def peers(ours: Ours, arguments: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        theirs = Theirs(ours, Path(folder))
    new, rate, arithmetic = arguments.new_tokens, read_rate(), multiply_rate()
    out: dict[str, Any] = {
        "prompt_tokens": 64, "new_tokens": new,
        "weights_read_gbyte_per_s": rate / 1e9, "products_gflop_per_s": arithmetic / 1e9,
    }  # fmt: skip
    for batch in arguments.batches:
        prompts = random_prompts(batch, 64, MODEL.vocab_size)
        greedy = ours.run(ours.requests(prompts, [new] * batch, GREEDY), batch)
        pairs = zip(greedy, theirs.generate(prompts, new, sample=False), strict=True)
        equal = [a == b for mine, other in pairs for a, b in zip(mine, other, strict=True)]
        experts = {}
        for name in ("grouped_mm", "eager"):
            theirs.model.set_experts_implementation(name)
            calls: dict[str, Callable[[], object]] = {"theirs": partial(theirs.generate, prompts, new, sample=True)}
            experts[name] = min(seconds(calls, 1)["theirs"]["cpu_s"])
        theirs.model.set_experts_implementation(min(experts, key=experts.__getitem__))
        requests = ours.requests(prompts, [new] * batch)
        calls = {
            "ours": partial(ours.run, requests, batch),
            "transformers": partial(theirs.generate, prompts, new, sample=True),
        }
        times = seconds(calls, arguments.rounds)
        steps = sorted(ours.step_seconds(requests, batch, clock=time.process_time))
        floor = {
            "weights_once": step_bytes(MODEL, batch, 4) / rate,
            "states": state_bytes(MODEL, batch) / rate,
            "arithmetic": step_flops(MODEL, batch) / arithmetic,
        }
        out[f"batch_{batch}"] = {
            "tokens_per_s": {side: batch * new / min(t["wall_s"]) for side, t in times.items()},
            "tokens_per_cpu_s": {side: batch * new / min(t["cpu_s"]) for side, t in times.items()},
            **ratio(times, "transformers", "ours"),
            "transformers_experts": min(experts, key=experts.__getitem__),
            "greedy_tokens_equal": statistics.mean(equal),
            "step_ms": {"fastest": 1e3 * steps[0], "median": 1e3 * statistics.median(steps)},
            "floor_ms": {name: 1e3 * seconds for name, seconds in floor.items()},
            "fastest_step_over_floor": steps[0] / sum(floor.values()),
        }
    return out


def shared_prefix(ours: Ours, arguments: argparse.Namespace) -> dict[str, Any]:
    return prefix(ours, new=arguments.new_tokens, rounds=arguments.rounds)


def ragged_lengths(ours: Ours, arguments: argparse.Namespace) -> dict[str, Any]:
    return ragged(ours, lengths=tuple(arguments.lengths), count=16, slots=4, warm_up=False)


def context(ours: Ours, arguments: argparse.Namespace) -> dict[str, Any]:
    """Of 4 sequences; medians over 48 passes."""
    out: dict[str, Any] = {"batch": 4, "step_ms": {}}
    for length in arguments.contexts:
        requests = ours.requests(random_prompts(4, length, MODEL.vocab_size), [49] * 4)
        steps = ours.step_seconds(requests, 4, clock=time.process_time)
        out["step_ms"][length] = {"fastest": 1e3 * min(steps), "median": 1e3 * statistics.median(steps)}
    return out


def invariant(ours: Ours, arguments: argparse.Namespace) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for batch in arguments.batches:
        requests = ours.requests(random_prompts(batch, 64, MODEL.vocab_size), [24] * batch)
        steps: dict[bool, list[float]] = {False: [], True: []}
        for number in range(2 * arguments.rounds):
            kind = bool(number % 2)
            steps[kind] += ours.step_seconds(requests, batch, clock=time.process_time, batch_invariant=kind)
        usual, alike = (1e3 * statistics.median(steps[kind]) for kind in (False, True))
        out[f"batch_{batch}"] = {"step_ms": usual, "invariant_step_ms": alike, "cost": alike / usual}
    return out


def drift(ours: Ours, arguments: argparse.Namespace) -> dict[str, Any]:
    small = Ours(DRIFT_MODEL, ours.groups, precision="fp32")
    [request] = small.requests([[1, 2, 3]], [arguments.drift_steps], DRAWN)
    [result] = small.engine(1).generate([request])
    sequence = torch.tensor([[*request.prompt, *result.tokens]])
    positions = torch.arange(sequence.shape[1] - 1)[None]
    with torch.no_grad():
        nll = small.model(sequence[:, :-1], positions, labels=sequence[:, 1:])
    distance = (torch.tensor(result.logprobs) + nll[0, len(request.prompt) - 1 :]).abs()
    quarters = [part.max().item() for part in distance.chunk(4)]
    return {"steps": arguments.drift_steps, "largest_by_quarter_nats": quarters, "mean_nats": distance.mean().item()}


if __name__ == "__main__":
    main()
