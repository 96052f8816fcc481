"""CISPO against GRPO and DAPO at equal tokens on a 111M hybrid MoE that sorts digits, on one GPU.

    python -m benchmarks.rl_gpu_study [--size gpu|cpu] [--seeds 3] [--limit-s 240]

A prompt is SORT, digits, EQUALS; a response the digits in rising order, one token each, so that all arms train on equally many tokens.
Each seed has its supervised start, on demonstrations half of which are in a wrong order; 512 samples a generation batch, 16 updates.
Held-out accuracy: 256 prompts that neither stage saw, 4 samples each. Seeds are the outer loop; no further run begins after
--limit-s seconds. The results are written after every run.
"""

import argparse
import gc
import json
import sys
import time
import zlib
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.rl_fork_report import difference
from benchmarks.rl_policy import ARMS, fresh_trainer, provenance, sampled
from megatron_m1 import platform
from megatron_m1.config.schema import Config, ModelConfig, MoEConfig, OptimizerConfig, RLConfig, TrainingConfig
from megatron_m1.engine.distributed import init_distributed, shutdown_distributed
from megatron_m1.engine.trainer import Trainer
from megatron_m1.parallel import destroy_groups
from megatron_m1.rl.losses import LossSettings
from megatron_m1.rl.samples import Sample
from megatron_m1.rl.update import PolicyBatch

ROOT = Path(__file__).resolve().parents[1]
SORT, EQUALS, VOCABULARY = 10, 11, 16
PROMPTS, SAMPLES, UPDATES = 32, 16, 16
HELD_OUT = (256, 4)
ORDER = ("GRPO", "DAPO", "CISPO")


@dataclass(frozen=True)
class Size:
    """digits: of a prompt. start_steps, start_lr: of the supervised start."""

    model: ModelConfig
    digits: int
    precision: str
    start_steps: int
    start_lr: float


SIZES = {
    "gpu": Size(
        ModelConfig(
            vocab_size=VOCABULARY, hidden_size=512, num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=4,
            head_dim=64, intermediate_size=1024, num_local_experts=8, attn_type_list=[0, 0, 0, 1] * 2, rotary_dim=32,
        ),
        digits=8, precision="bf16", start_steps=400, start_lr=5e-4,
    ),
    "cpu": Size(
        ModelConfig(
            vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
            head_dim=16, intermediate_size=32, num_local_experts=4, attn_type_list=[0, 1], rotary_dim=8,
        ),
        digits=3, precision="fp32", start_steps=60, start_lr=4e-3,
    ),
}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(SIZES), default="gpu" if platform.is_cuda() else "cpu")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--lrs", type=float, nargs="+", default=[1e-4])
    parser.add_argument("--batches", type=int, default=10, help="generation batches of a run")
    parser.add_argument("--limit-s", type=float, default=240.0)
    parser.add_argument("--output", type=Path, help="benchmarks/results/rl_gpu_study_SIZE.json")
    arguments = parser.parse_args()
    output = arguments.output or ROOT / f"benchmarks/results/rl_gpu_study_{arguments.size}.json"
    size, began = SIZES[arguments.size], time.perf_counter()
    init_distributed(600)
    results: dict[str, Any] = provenance("rl_gpu_study") | {
        "size": asdict(size),
        "settings": {
            "batches": arguments.batches,
            "tokens_of_a_run": arguments.batches * PROMPTS * SAMPLES * size.digits,
        },
        "starts": {},
        "runs": [],
    }
    for seed in range(1, arguments.seeds + 1):
        start: dict[str, Tensor] = {}
        for lr in arguments.lrs:
            for arm in ORDER:
                if time.perf_counter() - began > arguments.limit_s:
                    break
                if not start:
                    start, results["starts"][str(seed)] = supervised_start(size, seed)
                    results["parameters"] = sum(tensor.numel() for tensor in start.values())
                    print(
                        f"seed {seed}: start {results['starts'][str(seed)]:.3f}, {time.perf_counter() - began:.0f} s",
                        flush=True,
                    )
                ran = time.perf_counter()
                history = train(size, start, seed=seed, settings=ARMS[arm], lr=lr, batches=arguments.batches)
                run = {
                    "arm": arm,
                    "lr": lr,
                    "seed": seed,
                    "seconds": round(time.perf_counter() - ran, 1),
                    "history": history,
                }
                results["runs"].append(run)
                results["wall_s"] = round(time.perf_counter() - began, 1)
                output.parent.mkdir(parents=True, exist_ok=True)
                output.write_text(json.dumps(results, indent=1) + "\n")
                print(
                    f"{arm} lr {lr:g} seed {seed}: held-out {history[-1]['held_out']:.3f}, {run['seconds']} s",
                    flush=True,
                )
    shutdown_distributed()
    print(table(results))
    print(f"written: {output}")
    return 0


def train(
    size: Size, start: dict[str, Tensor], *, seed: int, settings: LossSettings, lr: float, batches: int
) -> list[dict[str, float]]:
    """Figures of every generation batch; `held_out` before the first and after every fifth and the last."""
    run = config(size, seed)
    trainer = fresh_trainer(run, start)
    history = [{"held_out": held_out(trainer, size)}]
    for batch in range(batches):
        numbers = range(batch * PROMPTS, (batch + 1) * PROMPTS)
        samples = sampled(
            trainer,
            [prompt(size, seed, number, apart=False) for number in numbers],
            per_prompt=SAMPLES,
            new_tokens=size.digits,
            seed=seed,
            first=batch * PROMPTS * SAMPLES,
            reward=reward,
        )
        policy = PolicyBatch(trainer, run, samples, settings=settings)
        identity = policy.score().report()
        figures = policy.figures([policy.update(number, lr=lr) for number in range(len(policy.updates))])
        point = {
            key: figures[key] for key in ("capped_share", "ppo_masked_share", "grad_norm", "routing_changed_share")
        }
        point |= {"reward": mean_reward(samples), "k3_kl": identity["k3_kl"], "pearson": identity["pearson"]}
        if (batch + 1) % 5 == 0 or batch + 1 == batches:
            point["held_out"] = held_out(trainer, size)
        history.append(point)
    close(trainer)
    return history


def supervised_start(size: Size, seed: int) -> tuple[dict[str, Tensor], float]:
    """(weights by native name, held-out accuracy)"""
    run = replace(config(size, seed), optimizer=OptimizerConfig(weight_decay=0.0), moe=MoEConfig())
    trainer = fresh_trainer(run)
    generator = torch.Generator().manual_seed(seed)
    for step in range(size.start_steps):
        rate = min(1.0, (step + 1) / 20) * min(1.0, 2 * (size.start_steps - step) / size.start_steps)
        trainer.train_step([demonstrations(size, seed, step, generator)], lr=size.start_lr * rate)
    weights = {name: tensor.detach().clone() for name, tensor in trainer.parameters().items()}
    accuracy = held_out(trainer, size)
    close(trainer)
    return weights, accuracy


def config(size: Size, seed: int) -> Config:
    """Packs of one update each."""
    per_update = PROMPTS * SAMPLES // UPDATES
    return Config(
        model=size.model,
        moe=MoEConfig(aux_loss="none"),
        training=TrainingConfig(
            seed=seed, micro_batch=1, global_batch=per_update, seq_length=per_update * (2 * size.digits + 1),
            precision=size.precision,  # type: ignore[arg-type]
        ),
        optimizer=OptimizerConfig(beta1=0.9, beta2=0.95, eps=1e-15, weight_decay=0.0, clip_grad=1.0),
        rl=RLConfig(samples_per_prompt=SAMPLES, updates_per_batch=UPDATES, max_new_tokens=size.digits),
    )  # fmt: skip


def prompt(size: Size, seed: int, number: int, *, apart: bool) -> tuple[int, ...]:
    """Prompt `number` of the training or, if `apart`, of the held-out sequence; no prompt is in both."""
    generator = torch.Generator().manual_seed(1_000_003 * seed + 2 * number + apart)
    while True:
        digits = torch.randint(10, (size.digits,), generator=generator).tolist()
        if (zlib.crc32(bytes(digits)) % 10 == 0) == apart:
            return (SORT, *digits, EQUALS)


def reward(asked: tuple[int, ...], response: list[int]) -> float:
    """1 for the digits in rising order, else 0."""
    return float(response == sorted(asked[1:-1]))


def mean_reward(samples: list[Sample]) -> float:
    return sum(sample.reward or 0.0 for sample in samples) / len(samples)


def held_out(trainer: Trainer, size: Size) -> float:
    """Mean reward of the held-out prompts, the same ones with the same random numbers at every call."""
    prompts, per_prompt = HELD_OUT
    asked = [prompt(size, 0, number, apart=True) for number in range(prompts)]
    return mean_reward(
        sampled(trainer, asked, per_prompt=per_prompt, new_tokens=size.digits, seed=0, first=0, reward=reward)
    )


def demonstrations(size: Size, seed: int, step: int, generator: torch.Generator, rows: int = 256) -> dict[str, Any]:
    """A micro-batch; every other answer has its digits in a random order."""
    sequences = []
    for row in range(rows):
        asked = prompt(size, seed, (step + 1_000_000) * rows + row, apart=False)
        answer = sorted(asked[1:-1])
        if row % 2:
            order = torch.randperm(size.digits, generator=generator).tolist()
            answer = [answer[place] for place in order]
        sequences.append([*asked, *answer])
    ids = torch.tensor(sequences)
    mask = torch.zeros(rows, ids.shape[1] - 1)
    mask[:, size.digits + 1 :] = 1.0
    return {
        "tokens": ids[:, :-1].contiguous(),
        "labels": ids[:, 1:].contiguous(),
        "loss_mask": mask,
        "position_ids": torch.arange(ids.shape[1] - 1).expand(rows, -1).contiguous(),
    }


def close(trainer: Trainer) -> None:
    """Give its groups and its memory back."""
    trainer.models.clear()
    del trainer.optimizer
    destroy_groups()
    gc.collect()


def table(results: dict[str, Any]) -> str:
    """Markdown: held-out accuracy before and after, and the difference to GRPO paired by seed; a tie: its interval has 0 in it."""
    lines = [
        f"{results['parameters']:,} parameters, {results['hardware']['device']}, {results['settings']['tokens_of_a_run']:,} sampled "
        f"tokens a run, commit {results['commit']}",
        "",
        "| lr | arm | seeds | held-out before | after | against GRPO, 95% interval |",
        "|---|---|---|---|---|---|",
    ]
    for lr in sorted({run["lr"] for run in results["runs"]}):
        after: dict[str, dict[int, float]] = {arm: {} for arm in ORDER}
        for run in results["runs"]:
            if run["lr"] == lr:
                after[run["arm"]][run["seed"]] = run["history"][-1]["held_out"]
        for arm in ORDER:
            seeds = sorted(after[arm].keys() & after["GRPO"].keys())
            if not seeds:
                continue
            paired = difference([after[arm][seed] - after["GRPO"][seed] for seed in seeds], 3)
            against = "" if arm == "GRPO" else paired
            before = [results["starts"][str(seed)] for seed in seeds]
            cells = [
                f"{lr:g}",
                arm,
                str(len(seeds)),
                _span(before),
                _span([after[arm][seed] for seed in seeds]),
                against,
            ]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, ""])


def _span(values: list[float]) -> str:
    return f"{sum(values) / len(values):.3f} [{min(values):.3f}, {max(values):.3f}]"


if __name__ == "__main__":
    sys.exit(main())
