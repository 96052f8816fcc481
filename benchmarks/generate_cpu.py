"""CPU generation: ours against transformers' generate on the same exported model, and what each mechanism of the engine gives.

    python -m benchmarks.generate_cpu [--parts peers prefix ragged context drift] [--rounds 3] [--threads N] [--output FILE.json]

peers    tokens/s (prompts included) at batch 1, 8 and 32 against transformers with its fastest experts, taking turns; both draw
         from the whole softmax; the share of greedy tokens on which the two agree; the time to read the weights once per step.
prefix   8 samples of one prompt of 2,048 tokens against 8 prompts that differ in their first token.
ragged   requests of 64 to 1,024 new tokens: slots refilled as they fall free, against static batches, in which every row runs
         to the end of the longest (as in transformers) or leaves when it is done.
context  time per decoding step against the tokens that stand before it.
drift    4,096 decoding steps of a small model: largest distance of their log-probabilities from those of training's forward pass.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.train_step_cpu import git, hardware
from megatron_m1 import platform
from megatron_m1.config.schema import Config, ModelConfig, MoEConfig, ParallelConfig, TrainingConfig

platform.setup()

from megatron.core.process_groups_config import ProcessGroupCollection  # noqa: E402

from megatron_m1.checkpoint.hf import export_hf  # noqa: E402
from megatron_m1.checkpoint.native import save_checkpoint  # noqa: E402
from megatron_m1.engine.distributed import init_distributed  # noqa: E402
from megatron_m1.engine.trainer import Trainer  # noqa: E402
from megatron_m1.generation.engine import Engine  # noqa: E402
from megatron_m1.generation.requests import Request, Sampling  # noqa: E402
from megatron_m1.model.m1 import M1Model  # noqa: E402
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
GREEDY, DRAWN = Sampling(max_new_tokens=1, temperature=0.0, repetition_tokens=0), Sampling(max_new_tokens=1)


class Ours:
    """One rank of the engine; `run` gives wall and CPU seconds of a call."""

    def __init__(self, model: ModelConfig, groups: ProcessGroupCollection) -> None:
        self.config = Config(
            model=model,
            moe=MoEConfig(aux_loss="none"),
            parallel=ParallelConfig(sequence=False),
            training=TrainingConfig(precision="fp32", seq_length=64),
        )
        self.groups = groups
        self.trainer = Trainer(self.config, self.groups, train=False)
        self.model: M1Model = self.trainer.models[0]

    def requests(self, prompts: list[list[int]], lengths: list[int], sampling: Sampling = DRAWN) -> list[Request]:
        return [
            Request(tuple(prompt), index, replace(sampling, max_new_tokens=length))
            for index, (prompt, length) in enumerate(zip(prompts, lengths, strict=True))
        ]

    def run(self, requests: list[Request], slots: int) -> list[list[int]]:
        return [result.tokens for result in Engine(self.model, self.groups, slots=slots).generate(requests)]


def main() -> None:
    parts: dict[str, Callable[[Ours, argparse.Namespace], dict[str, Any]]] = {
        "peers": peers, "prefix": prefix, "ragged": ragged, "context": context, "drift": drift,
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
    ours = Ours(MODEL, init_groups(ParallelConfig(), seed=1))
    for part in arguments.parts:
        results[part] = parts[part](ours, arguments)
        print(part, json.dumps(results[part], indent=1))
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(results, indent=2) + "\n")
    print(f"written: {arguments.output}")


def seconds(calls: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, dict[str, list[float]]]:
    """Wall and CPU seconds of each call by round; the calls take turns, after one round that does not count."""
    times: dict[str, dict[str, list[float]]] = {name: {"wall_s": [], "cpu_s": []} for name in calls}
    for number in range(rounds + 1):
        for name in list(calls) if number % 2 else list(calls)[::-1]:
            wall, cpu = time.perf_counter(), time.process_time()
            calls[name]()
            if number:
                times[name]["wall_s"].append(time.perf_counter() - wall)
                times[name]["cpu_s"].append(time.process_time() - cpu)
    return times


def ratio(times: dict[str, dict[str, list[float]]], slow: str, fast: str) -> dict[str, float]:
    """Median over the rounds of the time of `slow` over that of `fast`."""
    return {
        f"{slow}_over_{fast}_{clock}": statistics.median(
            a / b for a, b in zip(times[slow][clock], times[fast][clock], strict=True)
        )
        for clock in ("wall_s", "cpu_s")
    }


def random_prompts(count: int, length: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(MODEL.vocab_size, (count, length), generator=generator).tolist()


def peers(ours: Ours, arguments: argparse.Namespace) -> dict[str, Any]:
    theirs = exported(ours)
    new = arguments.new_tokens
    out: dict[str, Any] = {"prompt_tokens": 64, "new_tokens": new, "weights_read_gbyte_per_s": read_rate() / 1e9}
    for batch in arguments.batches:
        prompts = random_prompts(batch, 64)
        ids = torch.tensor(prompts)
        greedy = ours.run(ours.requests(prompts, [new] * batch, GREEDY), batch)
        equal = torch.tensor(greedy) == transformers_generate(theirs, ids, new, sample=False)[:, 64:]
        experts = {}
        for name in ("grouped_mm", "eager"):
            theirs.set_experts_implementation(name)
            calls = {"theirs": partial(transformers_generate, theirs, ids, new, sample=True)}
            experts[name] = min(seconds(calls, 1)["theirs"]["cpu_s"])
        theirs.set_experts_implementation(min(experts, key=experts.__getitem__))
        requests = ours.requests(prompts, [new] * batch)
        times = seconds(
            {
                "ours": partial(ours.run, requests, batch),
                "transformers": partial(transformers_generate, theirs, ids, new, sample=True),
            },
            arguments.rounds,
        )
        floor = step_bytes(batch) / read_rate()
        best = min(times["ours"]["wall_s"])
        out[f"batch_{batch}"] = {
            "tokens_per_s": {side: batch * new / statistics.median(t["wall_s"]) for side, t in times.items()},
            **ratio(times, "transformers", "ours"),
            "transformers_experts": min(experts, key=experts.__getitem__),
            "greedy_tokens_equal": equal.float().mean().item(),
            "step_ms": 1e3 * best / new,
            "weights_once_ms": 1e3 * floor,
        }
    return out


def exported(ours: Ours) -> Any:
    """transformers' model with the weights of ours, through a checkpoint and an export."""
    from transformers import MiniMaxForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        ours.config.checkpoint.save = f"{folder}/native"
        trainer = Trainer(ours.config, ours.groups)
        save_checkpoint(trainer, ours.config, step=1)
        export_hf(Path(folder, "native"), Path(folder, "hf"), "minimax", log=lambda text: None)
        return MiniMaxForCausalLM.from_pretrained(f"{folder}/hf", dtype=torch.float32).eval()


@torch.no_grad()
def transformers_generate(model: Any, ids: torch.Tensor, new: int, *, sample: bool) -> torch.Tensor:
    how = {"do_sample": True, "top_k": 0, "top_p": 1.0, "temperature": 1.0} if sample else {"do_sample": False}
    mask = torch.ones_like(ids)
    return model.generate(ids, attention_mask=mask, max_new_tokens=new, min_new_tokens=new, pad_token_id=0, **how)


def step_bytes(batch: int) -> float:
    """Bytes of the weights that a decoding step of `batch` tokens must read: of the experts those that some token goes to."""
    h, D, F = MODEL.hidden_size, MODEL.head_dim, MODEL.intermediate_size
    query, key_value = MODEL.num_attention_heads * D, MODEL.num_key_value_heads * D
    attention = sum(h * (2 * query + 2 * key_value) if kind else h * 5 * query for kind in MODEL.layer_types())
    share = 1 - (1 - MODEL.num_experts_per_tok / MODEL.num_local_experts) ** batch
    experts = MODEL.num_hidden_layers * MODEL.num_local_experts * share * 3 * h * F
    return 4.0 * (attention + experts + h * MODEL.vocab_size)


def read_rate() -> float:
    """Bytes per second of the best of five matrix-vector products with 128 MiB of weights."""
    weight, x = torch.randn(1 << 15, 1 << 10), torch.randn(1, 1 << 10)
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        torch.nn.functional.linear(x, weight)
        best = min(best, time.perf_counter() - start)
    return weight.nbytes / best


def prefix(ours: Ours, arguments: argparse.Namespace) -> dict[str, Any]:
    [prompt] = random_prompts(1, 2048)
    lengths = [arguments.new_tokens] * 8
    shared = ours.requests([prompt] * 8, lengths)
    apart = ours.requests([[token, *prompt[1:]] for token in range(8)], lengths)
    times = seconds({"shared": lambda: ours.run(shared, 8), "apart": lambda: ours.run(apart, 8)}, arguments.rounds)
    return {"samples": 8, "prompt_tokens": 2048, "new_tokens": arguments.new_tokens, **ratio(times, "apart", "shared")}


def ragged(ours: Ours, arguments: argparse.Namespace) -> dict[str, Any]:
    """Lengths are spread evenly on a logarithmic scale, in random order."""
    slots, count = 8, 32
    low, high = arguments.lengths
    lengths = [round(low * (high / low) ** (index / (count - 1))) for index in range(count)]
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0)).tolist()
    lengths = [lengths[index] for index in order]
    prompts = random_prompts(count, 64)
    batches = [slice(first, first + slots) for first in range(0, count, slots)]

    def static(whole: bool) -> None:
        for batch in batches:
            wanted = [max(lengths[batch])] * slots if whole else lengths[batch]
            ours.run(ours.requests(prompts[batch], wanted), slots)

    times = seconds(
        {
            "continuous": lambda: ours.run(ours.requests(prompts, lengths), slots),
            "static": lambda: static(True),
            "static_leaving": lambda: static(False),
        },
        1,
    )
    return {
        "requests": count, "slots": slots, "new_tokens": [low, high], "useful_tokens": sum(lengths),
        "steps": {
            "static": sum(max(lengths[batch]) for batch in batches), "continuous_at_least": -(-sum(lengths) // slots),
        },
        **ratio(times, "static", "continuous"), **ratio(times, "static_leaving", "continuous"),
    }  # fmt: skip


def context(ours: Ours, arguments: argparse.Namespace) -> dict[str, Any]:
    """Of 4 sequences; a call's time less that of one which stops at the first token, per further token."""
    out: dict[str, Any] = {"batch": 4, "step_ms": {}}
    further = 32
    for length in arguments.contexts:
        prompts = random_prompts(4, length)
        calls = {str(new): partial(ours.run, ours.requests(prompts, [new] * 4), 4) for new in (1, 1 + further)}
        times = seconds(calls, arguments.rounds)
        best = [min(times[name]["cpu_s"]) for name in calls]
        out["step_ms"][length] = 1e3 * (best[1] - best[0]) / further
    return out


def drift(ours: Ours, arguments: argparse.Namespace) -> dict[str, Any]:
    small = Ours(DRIFT_MODEL, ours.groups)
    [request] = small.requests([[1, 2, 3]], [arguments.drift_steps], replace(DRAWN, repetition_tokens=0))
    [result] = Engine(small.model, small.groups, slots=1).generate([request])
    sequence = torch.tensor([[*request.prompt, *result.tokens]])
    positions = torch.arange(sequence.shape[1] - 1)[None]
    with torch.no_grad():
        nll = small.model(sequence[:, :-1], positions, labels=sequence[:, 1:])
    distance = (torch.tensor(result.logprobs) + nll[0, len(request.prompt) - 1 :]).abs()
    quarters = [part.max().item() for part in distance.chunk(4)]
    return {"steps": arguments.drift_steps, "largest_by_quarter_nats": quarters, "mean_nats": distance.mean().item()}


if __name__ == "__main__":
    main()
