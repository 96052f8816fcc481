"""How far generation is from training on a hybrid MoE, and which fix holds them together: Figure 3 of the M1 report.

    python -m benchmarks.rl_identity_study [--size cpu|gpu] [--rounds 2] [--limit-s 80] [--output FILE.json]
    python -m benchmarks.rl_identity_study --plot         the plot of the results that are there

A model learns Python's standard library word by word for a few seconds, then samples from it with the fast engine in bf16; the
training forward pass scores the same tokens. The fixes are taken away one by one, by switches of this benchmark alone
(megatron_m1 has none for the first two):
  fp32 head       weights and logits of the head rounded to bf16, in both (a bf16 product with fp32 sums)
  fp32 state      lightning states rounded to bf16 before every decoding step, as the released code does
  routing replay  rl.routing_replay=false: training routes anew
Pearson: correlation of the sampled tokens' probabilities. Rounds have other prompts and seeds.
Then for the fast engine, and for a few samples of the reference engine, which takes a whole training pass for every token: tokens whose
ratio in a first update is not exactly 1, and what rollout, scoring and the gradients of the update cost.
The results are written after every part; no round begins after --limit-s seconds.
"""

import argparse
import contextlib
import json
import re
import sys
import sysconfig
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks.rl_identity_plot import draw
from benchmarks.rl_policy import fresh_trainer, provenance, sampled
from megatron_m1 import platform
from megatron_m1.config.schema import Config, ModelConfig, OptimizerConfig, RLConfig, TrainingConfig

platform.setup()

from megatron_m1.engine.distributed import init_distributed, shutdown_distributed  # noqa: E402
from megatron_m1.engine.trainer import Trainer  # noqa: E402
from megatron_m1.generation.cache import HybridCache  # noqa: E402
from megatron_m1.generation.requests import request_seed  # noqa: E402
from megatron_m1.model import vocab_loss  # noqa: E402
from megatron_m1.rl.losses import PRESETS  # noqa: E402
from megatron_m1.rl.phases import Phases  # noqa: E402
from megatron_m1.rl.samples import Sample  # noqa: E402
from megatron_m1.rl.update import PolicyBatch  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
POINTS = 3000
"""Tokens of each variant that are kept for the plot."""


@dataclass(frozen=True)
class Size:
    """model: the policy. text_bytes, steps, lr: of its training. requests, prompt_tokens, new_tokens: of a round. exact: requests and new
    tokens of the reference engine."""

    model: ModelConfig
    text_bytes: int
    steps: int
    lr: float
    micro_batch: int
    seq_length: int
    requests: int
    prompt_tokens: int
    new_tokens: int
    exact: tuple[int, int]


SIZES = {
    "cpu": Size(
        ModelConfig(
            vocab_size=1024, hidden_size=64, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
            head_dim=16, intermediate_size=128, num_local_experts=8, attn_type_list=[0, 0, 0, 1], rotary_dim=8,
        ),
        text_bytes=400_000, steps=120, lr=2e-3, micro_batch=8, seq_length=64, requests=64, prompt_tokens=16, new_tokens=48,
        exact=(4, 24),
    ),
    "gpu": Size(
        ModelConfig(
            vocab_size=16384, hidden_size=768, num_hidden_layers=8, num_attention_heads=12, num_key_value_heads=4,
            head_dim=64, intermediate_size=1024, num_local_experts=8, attn_type_list=[0, 0, 0, 1] * 2, rotary_dim=32,
        ),
        text_bytes=8_000_000, steps=200, lr=6e-4, micro_batch=32, seq_length=512, requests=128, prompt_tokens=64, new_tokens=384,
        exact=(4, 48),
    ),
}  # fmt: skip
VARIANTS = {
    "all fixes": (),
    "without fp32 head": ("head",),
    "without fp32 state": ("state",),
    "without routing replay": ("replay",),
    "none of them": ("head", "state", "replay"),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(SIZES), default="gpu" if platform.is_cuda() else "cpu")
    parser.add_argument("--precision", choices=["bf16", "fp32"], default="bf16")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, help="of training")
    parser.add_argument("--limit-s", type=float, default=80.0)
    parser.add_argument("--output", type=Path, help="benchmarks/results/rl_identity_study_SIZE.json")
    parser.add_argument("--plot", action="store_true", help="run nothing")
    arguments = parser.parse_args()
    output = arguments.output or ROOT / f"benchmarks/results/rl_identity_study_{arguments.size}.json"
    if not arguments.plot:
        size = SIZES[arguments.size]
        size = size if arguments.steps is None else replace(size, steps=arguments.steps)
        study(size, arguments, output)
    results = json.loads(output.read_text())
    print(table(results))
    print(f"written: {output} and {draw(results, output.with_suffix('.png'))}")
    return 0


def study(size: Size, arguments: argparse.Namespace, output: Path) -> None:
    """Train, then measure every variant; the results are written after every part."""
    began = time.perf_counter()

    def write() -> None:
        results["wall_s"] = round(time.perf_counter() - began, 1)
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(results) + "\n")
        print(f"written after {results['wall_s']} s: {output}", flush=True)

    init_distributed(600)
    config = configuration(size, arguments.precision)
    trainer = fresh_trainer(config)
    words = text(size)
    loss = learn(trainer, words, size)
    results: dict[str, Any] = provenance("rl_identity_study") | {
        "precision": arguments.precision,
        "size": asdict(size),
        "parameters": sum(tensor.numel() for tensor in trainer.parameters().values()),
        "training_loss": loss,
        "variants": {name: {"removed": list(removed), "rounds": []} for name, removed in VARIANTS.items()},
        "updates": {},
    }
    print(
        f"{results['parameters']:,} parameters, loss {loss:.3f} after {time.perf_counter() - began:.0f} s", flush=True
    )
    for number in range(arguments.rounds):
        if number and time.perf_counter() - began > arguments.limit_s:
            print(f"left out for the time limit: rounds from {number + 1} on", flush=True)
            break
        samples: dict[tuple[str, ...], list[Sample]] = {}
        for name, removed in VARIANTS.items():
            in_rollout = tuple(fix for fix in removed if fix != "replay")
            with without(trainer, removed):
                if in_rollout not in samples:
                    samples[in_rollout] = rollouts(trainer, words, size, number)
                figures, points = measure(trainer, config, samples[in_rollout], replay="replay" not in removed)
            variant = results["variants"][name]
            variant["rounds"].append(figures)
            variant["points"] = points
        write()
        if not number:
            for engine in ("fast", "reference"):
                results["updates"][engine] = first_update(trainer, config, words, size, engine)
                write()
    shutdown_distributed()


def first_update(
    trainer: Trainer, config: Config, words: torch.Tensor, size: Size, engine: str
) -> dict[str, float | int]:
    """Of samples of `engine`: how far scoring is from them, tokens whose ratio in the first update is not exactly 1, seconds."""
    phases = Phases()
    if engine == "reference":
        requests, new = size.exact
        size = replace(size, requests=requests, new_tokens=new)
        tokens = -(-(size.prompt_tokens + new) // 64) * 64
        training = replace(config.training, micro_batch=1, seq_length=tokens)
        config = replace(config, training=training, rl=replace(config.rl, engine="reference"))
        with phases.measure("rollout"):
            samples = rollouts(trainer, words, size, 0, reference_tokens=tokens)
    else:
        with phases.measure("rollout"):
            samples = rollouts(trainer, words, size, 0)
    policy = PolicyBatch(trainer, config, samples, settings=PRESETS["cispo"])
    with phases.measure("scoring"):
        figures = policy.score().report()
    with phases.measure("update"):
        _, stats = policy.gradients(0)
    figures["tokens"] = sum(len(sample.response) for sample in samples)
    return figures | {"off_policy_share": stats.means()["off_policy_share"]} | phases.report()


def configuration(size: Size, precision: str) -> Config:
    """Packs of size.micro_batch * size.seq_length tokens."""
    return Config(
        model=size.model,
        training=TrainingConfig(
            seed=1, micro_batch=size.micro_batch, global_batch=size.micro_batch, seq_length=size.seq_length,
            precision=precision,  # type: ignore[arg-type]
        ),
        optimizer=OptimizerConfig(weight_decay=0.0),
        rl=RLConfig(updates_per_batch=1, samples_per_prompt=2),
    )  # fmt: skip


@contextlib.contextmanager
def without(trainer: Trainer, removed: Sequence[str]) -> Iterator[None]:
    """The fixes named `head` and `state` taken away while the context is open; `replay` is `measure`'s."""
    with contextlib.ExitStack() as stack:
        if "head" in removed:
            stack.enter_context(bf16_head(trainer))
        if "state" in removed:
            stack.enter_context(bf16_state())
        yield


@contextlib.contextmanager
def bf16_head(trainer: Trainer) -> Iterator[None]:
    """The head as a bf16 product: weights and logits rounded, for generation's and for training's log-probabilities."""
    weight = trainer.parameters()["output_layer.weight"].data
    exact, statistics = weight.clone(), vocab_loss._softmax_statistics_

    def rounded(logits: torch.Tensor, *rest: Any) -> Any:
        return statistics(logits.copy_(logits.bfloat16()), *rest)

    weight.copy_(weight.bfloat16())
    with mock.patch.object(vocab_loss, "_softmax_statistics_", rounded):
        yield
    weight.copy_(exact)


@contextlib.contextmanager
def bf16_state() -> Iterator[None]:
    """Lightning states that bf16 holds, whenever a decoding step reads them."""
    step = HybridCache.lightning_step

    def rounded(self: HybridCache, layer_number: int, qkv: torch.Tensor, slopes: torch.Tensor) -> torch.Tensor:
        state = self._states[layer_number]
        state.copy_(state.bfloat16())
        return step(self, layer_number, qkv, slopes)

    with mock.patch.object(HybridCache, "lightning_step", rounded):
        yield


def text(size: Size) -> torch.Tensor:
    """Word numbers int64 of the standard library's sources; the last number is for all rare words."""
    library, read = Path(sysconfig.get_path("stdlib")), ""
    for path in sorted(library.glob("*.py")) + sorted(library.glob("[a-z]*/*.py")):
        if "packages" not in path.parent.name and not path.parent.name.startswith(("test", "idlelib")):
            read += path.read_text(encoding="utf-8", errors="replace")
        if len(read) > size.text_bytes:
            break
    words = re.findall(r"\w+|\s+|[^\w\s]", read[: size.text_bytes])
    rare = size.model.vocab_size - 1
    number_of = {word: number for number, (word, _) in enumerate(Counter(words).most_common(rare))}
    return torch.tensor([number_of.get(word, rare) for word in words])


def learn(trainer: Trainer, words: torch.Tensor, size: Size) -> float:
    """Loss of the last of size.steps steps."""
    generator, loss = torch.Generator().manual_seed(0), float("nan")
    length = size.seq_length
    for step in range(size.steps):
        starts = torch.randint(len(words) - length - 1, (size.micro_batch, 1), generator=generator)
        rows = words[starts + torch.arange(length + 1)]
        batch = {
            "tokens": rows[:, :-1].contiguous(),
            "labels": rows[:, 1:].contiguous(),
            "loss_mask": torch.ones(size.micro_batch, length),
            "position_ids": torch.arange(length).expand(size.micro_batch, -1).contiguous(),
        }
        rate = size.lr * min(1.0, (step + 1) / 20) * min(1.0, 2 * (size.steps - step) / size.steps)
        loss = trainer.train_step([batch], lr=rate).loss
    return loss


def rollouts(
    trainer: Trainer, words: torch.Tensor, size: Size, number: int, *, reference_tokens: int | None = None
) -> list[Sample]:
    """size.requests samples with their routing; reference_tokens: see `sampled`."""
    generator = torch.Generator().manual_seed(request_seed(2, number))
    starts = torch.randint(len(words) - size.prompt_tokens, (size.requests,), generator=generator).tolist()
    return sampled(
        trainer,
        [tuple(words[start : start + size.prompt_tokens].tolist()) for start in starts],
        per_prompt=1,
        new_tokens=size.new_tokens,
        seed=3,
        first=number * size.requests,
        reward=lambda prompt, response: 0.0,
        reference_tokens=reference_tokens,
    )


def measure(
    trainer: Trainer, config: Config, samples: list[Sample], *, replay: bool
) -> tuple[dict[str, float], list[list[float]]]:
    """(figures of the round, [log-probability in rollout, training's minus that] of some tokens)"""
    seen = samples if replay else [replace(sample, routing=None) for sample in samples]
    policy = PolicyBatch(trainer, config, seen, settings=PRESETS["cispo"])
    figures = policy.score().report()
    figures["tokens"] = sum(len(sample.response) for sample in samples)
    if replay:
        figures["routing_changed_share"] = policy.routing_changed_share
    ours = torch.cat([torch.from_numpy(sample.logprobs) for sample in samples])
    theirs = torch.cat([policy.old[index] for index in range(len(samples))])
    chosen = torch.randperm(len(ours), generator=torch.Generator().manual_seed(0))[:POINTS]
    pairs = torch.stack([ours, theirs - ours], dim=1)[chosen].tolist()
    return figures, [[float(f"{value:.4g}") for value in pair] for pair in pairs]


def table(results: dict[str, Any]) -> str:
    """Markdown: means over the rounds and ranges."""
    lines = [
        f"{results['parameters']:,} parameters, {results['precision']}, {results['hardware']['device']}, commit {results['commit']}",
        "",
        "| variant | tokens | 1 - Pearson | max abs difference | k3 | not bit-equal | choices of experts that training would change |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, variant in results["variants"].items():
        rounds = variant["rounds"]
        cells = [name, str(sum(figures["tokens"] for figures in rounds))]
        cells.append(_span([1 - figures["pearson"] for figures in rounds]))
        cells += [
            _span([figures[key] for figures in rounds]) for key in ("max_abs_diff", "k3_kl", "not_bit_equal_share")
        ]
        changed = [figures["routing_changed_share"] for figures in rounds if "routing_changed_share" in figures]
        lines.append("| " + " | ".join([*cells, _span(changed) if changed else "replays none"]) + " |")
    lines += [
        "",
        "| engine | tokens | largest difference of scoring | not bit-equal | ratios of a first update not exactly 1 | seconds |",
    ]
    lines.append("|---|---|---|---|---|---|")
    for engine, figures in results.get("updates", {}).items():
        seconds = ", ".join(f"{name} {figures['seconds_' + name]:.2f}" for name in ("rollout", "scoring", "update"))
        shares = f"{figures['not_bit_equal_share']:.2e} | {figures['off_policy_share']:.2e}"
        lines.append(f"| {engine} | {figures['tokens']} | {figures['max_abs_diff']:.2e} | {shares} | {seconds} |")
    return "\n".join([*lines, ""])


def _span(values: list[float]) -> str:
    mean = sum(values) / len(values)
    return f"{mean:.2e} [{min(values):.1e}, {max(values):.1e}]"


if __name__ == "__main__":
    sys.exit(main())
