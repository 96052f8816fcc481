"""Both sides of the generation benchmarks: our engine, and transformers' generate on the same weights; clocks, prompts, floors."""

import heapq
import itertools
import json
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_m1 import platform
from megatron_m1.checkpoint.hf_config import to_hf_config
from megatron_m1.checkpoint.hf_export import decay_buffer
from megatron_m1.checkpoint.names import hf_buffers, native_layout, split
from megatron_m1.config.schema import Config, ModelConfig, MoEConfig, ParallelConfig, TrainingConfig
from megatron_m1.engine.trainer import Trainer
from megatron_m1.generation.engine import Engine
from megatron_m1.generation.requests import Request, Sampling
from megatron_m1.model.build import sharded_parameters
from megatron_m1.model.m1 import M1Model

__all__ = [
    "DRAWN",
    "GREEDY",
    "Ours",
    "Theirs",
    "multiply_rate",
    "prefix",
    "ragged",
    "random_prompts",
    "ratio",
    "read_rate",
    "seconds",
    "state_bytes",
    "step_bytes",
    "step_flops",
]

Times = dict[str, dict[str, list[float]]]
GREEDY = Sampling(max_new_tokens=1, temperature=0.0, repetition_tokens=0)
DRAWN = Sampling(max_new_tokens=1, repetition_tokens=0)


class Ours:
    """A model with random weights on one rank, and the engine over it."""

    def __init__(
        self,
        model: ModelConfig,
        groups: ProcessGroupCollection,
        *,
        precision: Literal["fp32", "bf16"],
        initial_weights: bool = True,
    ) -> None:
        self.config = Config(
            model=model,
            moe=MoEConfig(aux_loss="none"),
            parallel=ParallelConfig(sequence=False),
            training=TrainingConfig(precision=precision, seq_length=64),
        )
        self.groups = groups
        trainer = Trainer(self.config, groups, train=False, initial_weights=initial_weights)
        self.model: M1Model = trainer.models[0]

    def requests(self, prompts: list[list[int]], lengths: list[int], sampling: Sampling = DRAWN) -> list[Request]:
        return [
            Request(tuple(prompt), index, replace(sampling, max_new_tokens=length))
            for index, (prompt, length) in enumerate(zip(prompts, lengths, strict=True))
        ]

    def engine(self, slots: int, **options: Any) -> Engine:
        return Engine(self.model, self.groups, slots=slots, **options)

    def run(self, requests: list[Request], slots: int, **options: Any) -> list[list[int]]:
        return [result.tokens for result in self.engine(slots, **options).generate(requests)]

    def step_seconds(
        self, requests: list[Request], slots: int, *, clock: Callable[[], float] = time.perf_counter, **options: Any
    ) -> list[float]:
        """Seconds of every decoding pass by `clock`; the choice of tokens, which ends it, waits for the device."""
        engine, ends = self.engine(slots, **options), []
        choose = engine.stages.choose

        def timed(*arguments: Any, **named: Any) -> None:
            choose(*arguments, **named)
            ends.append(clock())

        engine.stages.choose = timed  # type: ignore[method-assign]
        engine.generate(requests)
        return [end - start for start, end in itertools.pairwise(ends)]


class Theirs:
    """transformers' MiniMax with the weights of `ours`."""

    def __init__(self, ours: Ours, folder: Path) -> None:
        """folder: takes an export of the weights."""
        from safetensors.torch import save_file
        from transformers import MiniMaxForCausalLM

        model, live = ours.config.model, sharded_parameters([ours.model])
        dtype = next(ours.model.parameters()).dtype
        tensors = {name: decay_buffer(name, model) for name in hf_buffers(model)}
        for native in native_layout(model):
            for piece, part in split(native, live[native.name].data, model):
                tensors[piece.name] = part.to(dtype).cpu().clone()
        config = to_hf_config(model, "minimax", dtype=str(dtype).removeprefix("torch."))
        (folder / "config.json").write_text(json.dumps(config))
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        self.model = MiniMaxForCausalLM.from_pretrained(folder, dtype=dtype).to(platform.device()).eval()

    @torch.no_grad()
    def generate(self, prompts: list[list[int]], new: int, *, sample: bool) -> list[list[int]]:
        """The new tokens of each prompt; all prompts have one length."""
        how = {"do_sample": True, "top_k": 0, "top_p": 1.0, "temperature": 1.0} if sample else {"do_sample": False}
        ids = torch.tensor(prompts, device=platform.device())
        out = self.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new, pad_token_id=0, **how
        )
        return out[:, ids.shape[1] :].tolist()


def seconds(calls: Mapping[str, Callable[[], object]], rounds: int, *, warm_up: bool = True) -> Times:
    """Wall and CPU seconds of each call by round; the calls take turns, after one round that does not count."""
    times: Times = {name: {"wall_s": [], "cpu_s": []} for name in calls}
    for number in range(rounds + warm_up):
        for name in list(calls) if number % 2 else list(calls)[::-1]:
            wall, cpu = time.perf_counter(), time.process_time()
            calls[name]()
            platform.synchronize()
            if number >= warm_up:
                times[name]["wall_s"].append(time.perf_counter() - wall)
                times[name]["cpu_s"].append(time.process_time() - cpu)
    return times


def ratio(times: Times, slow: str, fast: str) -> dict[str, float]:
    """Time of `slow` over that of `fast`: median over the rounds, and that of the best rounds."""
    out = {}
    for clock in ("wall_s", "cpu_s"):
        pairs = list(zip(times[slow][clock], times[fast][clock], strict=True))
        out[f"{slow}_over_{fast}_{clock}"] = statistics.median(a / b for a, b in pairs)
        out[f"{slow}_over_{fast}_best_{clock}"] = min(a for a, _ in pairs) / min(b for _, b in pairs)
    return out


def random_prompts(count: int, length: int, vocabulary: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocabulary, (count, length), generator=generator).tolist()


def step_bytes(model: ModelConfig, batch: int, item: int) -> float:
    """Bytes of the weights that a decoding step of `batch` tokens must read: of the experts those that some token goes to.

    item: bytes of a weight; the head and the routers have 4.
    """
    h, D, F = model.hidden_size, model.head_dim, model.intermediate_size
    query, key_value = model.num_attention_heads * D, model.num_key_value_heads * D
    attention = sum(h * (2 * query + 2 * key_value) if kind else h * 5 * query for kind in model.layer_types())
    share = 1 - (1 - model.num_experts_per_tok / model.num_local_experts) ** batch
    experts = model.num_hidden_layers * model.num_local_experts * share * 3 * h * F
    fp32 = h * model.vocab_size + model.num_hidden_layers * h * model.num_local_experts
    return item * (attention + experts) + 4.0 * fp32


def step_flops(model: ModelConfig, batch: int) -> float:
    """Floating-point operations of the products of a decoding step of `batch` tokens."""
    h, D, F = model.hidden_size, model.head_dim, model.intermediate_size
    query, key_value = model.num_attention_heads * D, model.num_key_value_heads * D
    attention = sum(h * (2 * query + 2 * key_value) if kind else h * 5 * query for kind in model.layer_types())
    experts = model.num_hidden_layers * (model.num_experts_per_tok * 3 * F + model.num_local_experts) * h
    return 2.0 * batch * (attention + experts + h * model.vocab_size)


def state_bytes(model: ModelConfig, batch: int) -> float:
    """Bytes of lightning states that a decoding step reads and writes."""
    layers = model.layer_types().count(0)
    return 2.0 * 4 * layers * batch * model.num_attention_heads * model.head_dim**2


def read_rate() -> float:
    """Bytes per second of reading memory, the best of five: a matrix-vector product with 128 MiB of weights, on a GPU the sum of 4 GiB."""
    if platform.is_cuda():
        data = torch.ones(1 << 30, device=platform.device())
        read: Callable[[], object] = data.sum
    else:
        data, x = torch.randn(1 << 15, 1 << 10), torch.randn(1, 1 << 10)
        read = lambda: torch.nn.functional.linear(x, data)  # noqa: E731
    best = float("inf")
    for _ in range(5):
        platform.synchronize()
        start = time.perf_counter()
        read()
        platform.synchronize()
        best = min(best, time.perf_counter() - start)
    return data.nbytes / best


def multiply_rate() -> float:
    """Floating-point operations per second of a product of matrices of 1,024 rows and columns in fp32, the best of five."""
    x = torch.randn(1024, 1024, device=platform.device())
    best = float("inf")
    for _ in range(5):
        platform.synchronize()
        start = time.perf_counter()
        torch.mm(x, x)
        platform.synchronize()
        best = min(best, time.perf_counter() - start)
    return 2.0 * 1024**3 / best


def prefix(ours: Ours, *, new: int, rounds: int, tokens: int = 2048, decode: str = "auto") -> dict[str, Any]:
    """8 samples of one prompt against 8 prompts that differ in their first token."""
    [prompt] = random_prompts(1, tokens, ours.config.model.vocab_size)
    shared = ours.requests([prompt] * 8, [new] * 8)
    apart = ours.requests([[token, *prompt[1:]] for token in range(8)], [new] * 8)
    calls = {name: partial(ours.run, asked, 8, decode=decode) for name, asked in (("shared", shared), ("apart", apart))}
    times = seconds(calls, rounds)
    return {
        "samples": 8, "prompt_tokens": tokens, "new_tokens": new,
        "seconds": {name: min(t["wall_s"]) for name, t in times.items()}, **ratio(times, "apart", "shared"),
    }  # fmt: skip


def ragged(
    ours: Ours, *, lengths: tuple[int, int], count: int, slots: int, warm_up: bool, decode: str = "auto"
) -> dict[str, Any]:
    """Slots refilled as they fall free against static batches; lengths spread evenly on a logarithmic scale, in random order.

    static: every row runs to the end of its batch's longest, as in transformers; static_leaving: rows leave when they are done.
    """
    low, high = lengths
    spread = [round(low * (high / low) ** (index / (count - 1))) for index in range(count)]
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0)).tolist()
    spread = [spread[index] for index in order]
    prompts = random_prompts(count, 64, ours.config.model.vocab_size)
    batches = [slice(first, first + slots) for first in range(0, count, slots)]

    def static(whole: bool) -> None:
        for batch in batches:
            wanted = [max(spread[batch])] * slots if whole else spread[batch]
            ours.run(ours.requests(prompts[batch], wanted), slots, decode=decode)

    times = seconds(
        {
            "continuous": lambda: ours.run(ours.requests(prompts, spread), slots, decode=decode),
            "static": lambda: static(True),
            "static_leaving": lambda: static(False),
        },
        1,
        warm_up=warm_up,
    )
    return {
        "requests": count, "slots": slots, "new_tokens": list(lengths), "useful_tokens": sum(spread),
        "passes": {
            "static": sum(max(spread[batch]) for batch in batches), "continuous": continuous_passes(spread, slots),
            "of_full_slots": -(-sum(spread) // slots),
        },
        "seconds": {name: min(t["wall_s"]) for name, t in times.items()},
        **ratio(times, "static", "continuous"), **ratio(times, "static_leaving", "continuous"),
    }  # fmt: skip


def continuous_passes(lengths: list[int], slots: int) -> int:
    """Passes until the last of the requests is done that start in order as slots fall free."""
    ends = [0] * slots
    for length in lengths:
        heapq.heapreplace(ends, ends[0] + length)
    return max(ends)
