"""CISPO against GRPO and DAPO at equal tokens on a 111M hybrid MoE that sorts digits, on one GPU.

    python -m benchmarks.rl_gpu_study [--size gpu|cpu] [--seeds 3] [--limit-s 220] [--output FILE.json]

A prompt is SORT, digits, EQUALS; a response the digits in rising order, one token each, so that all arms train on equally many tokens.
Each seed has its supervised start, on demonstrations half of which are in a wrong order, ended once it is right often enough;
512 samples a generation batch, 16 updates. Held-out accuracy: 256 prompts that neither stage saw, 4 samples each.
Seeds are the outer loop. The results are written after every run; no run begins that would not end within --limit-s seconds, going by
the slowest so far. The same command goes on from the results that are there.
"""

import argparse
import gc
import json
import statistics
import sys
import time
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.rl_policy import ARMS, fresh_trainer, provenance, sampled
from megatron_m1 import platform
from megatron_m1.config.schema import Config, ModelConfig, MoEConfig, OptimizerConfig, RLConfig, TrainingConfig
from megatron_m1.engine.distributed import init_distributed, shutdown_distributed
from megatron_m1.engine.trainer import Trainer
from megatron_m1.parallel import destroy_groups
from megatron_m1.rl.losses import LossSettings
from megatron_m1.rl.phases import Phases
from megatron_m1.rl.samples import Sample
from megatron_m1.rl.update import PolicyBatch

ROOT = Path(__file__).resolve().parents[1]
SORT, EQUALS, VOCABULARY = 10, 11, 16
PROMPTS, SAMPLES, UPDATES = 32, 16, 16
HELD_OUT = (256, 4)
ORDER = ("GRPO", "DAPO", "CISPO")
KEPT = (
    "capped_share", "ppo_masked_share", "grad_norm", "routing_changed_share", "first_off_policy_share", "k3_kl", "pearson",
    "seconds_rollout", "seconds_scoring", "seconds_update",
)  # fmt: skip
T_QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365)
"""0.975 quantiles of Student's t with 1, 2, ... degrees of freedom; with more than these the last, which is wider."""
BEGAN = time.perf_counter()


@dataclass(frozen=True)
class Size:
    """digits: of a prompt. start_steps: of the supervised start at most; it ends with the first look, every start_look steps, that finds
    a held-out accuracy of start_accuracy."""

    model: ModelConfig
    digits: int
    precision: str
    start_lr: float
    start_steps: int
    start_look: int
    start_accuracy: float = 0.3


SIZES = {
    "gpu": Size(
        ModelConfig(
            vocab_size=VOCABULARY, hidden_size=512, num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=4,
            head_dim=64, intermediate_size=1024, num_local_experts=8, attn_type_list=[0, 0, 0, 1] * 2, rotary_dim=32,
        ),
        digits=8, precision="bf16", start_lr=5e-4, start_steps=600, start_look=50,
    ),
    "cpu": Size(
        ModelConfig(
            vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
            head_dim=16, intermediate_size=32, num_local_experts=4, attn_type_list=[0, 1], rotary_dim=8,
        ),
        digits=3, precision="fp32", start_lr=4e-3, start_steps=80, start_look=20,
    ),
}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(SIZES), default="gpu" if platform.is_cuda() else "cpu")
    parser.add_argument("--precision", choices=["bf16", "fp32"], help="bf16 for --size gpu, else fp32")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--lrs", type=float, nargs="+", default=[1e-4])
    parser.add_argument("--batches", type=int, default=10, help="generation batches of a run")
    parser.add_argument("--limit-s", type=float, default=220.0, help="imports, some 15 s, not counted")
    parser.add_argument("--output", type=Path, help="benchmarks/results/rl_gpu_study_SIZE.json")
    arguments = parser.parse_args()
    output = arguments.output or ROOT / f"benchmarks/results/rl_gpu_study_{arguments.size}.json"
    size = SIZES[arguments.size]
    size = replace(size, precision=arguments.precision or size.precision)
    results = earlier(output, size, arguments.batches)
    print(f"{len(results['runs'])} runs are in {output}", flush=True)
    init_distributed(600)
    for seed in range(1, arguments.seeds + 1):
        done = {(run["lr"], run["arm"]) for run in results["runs"] if run["seed"] == seed}
        wanted = [(lr, arm) for lr in arguments.lrs for arm in ORDER if (lr, arm) not in done]
        start: dict[str, Tensor] = {}
        for lr, arm in wanted:
            slowest = max([run["seconds"] for run in results["runs"]], default=0.0)
            if time.perf_counter() - BEGAN + slowest * (1 if start else 2) > arguments.limit_s:
                print(f"left out for the time limit: {arm} lr {lr:g} seed {seed}", flush=True)
                continue
            if not start:
                start, accuracy = supervised_start(size, seed)
                results["parameters"] = sum(tensor.numel() for tensor in start.values())
            ran = time.perf_counter()
            history = train(size, start, accuracy, seed=seed, settings=ARMS[arm], lr=lr, batches=arguments.batches)
            run = {"arm": arm, "lr": lr, "seed": seed, "seconds": round(time.perf_counter() - ran, 1)}
            results["runs"].append(run | {"commit": results["commit"], "history": history})
            results["peak_memory_gib"] = round(platform.peak_memory_bytes() / 2**30, 2)
            write(results, output)
            print(f"{arm} lr {lr:g} seed {seed}: held-out {history[-1]['held_out']:.3f}, {clock()}", flush=True)
    shutdown_distributed()
    print(table(results) if results["runs"] else "no run ended within the time limit")
    return 0


def earlier(output: Path, size: Size, batches: int) -> dict[str, Any]:
    """The results to go on from: those in `output`, or none. Raises SystemExit where they are of another experiment."""
    settings = {
        "size": asdict(size),
        "batches": batches,
        "tokens_of_a_run": batches * PROMPTS * SAMPLES * size.digits,
        "held_out_samples": HELD_OUT[0] * HELD_OUT[1],
    }
    results: dict[str, Any] = provenance("rl_gpu_study") | {"settings": settings, "runs": []}
    if output.exists():
        found = json.loads(output.read_text())
        here = [json.loads(json.dumps(results["settings"])), results["hardware"]["device"]]
        if [found["settings"], found["hardware"]["device"]] != here:
            raise SystemExit(f"{output} has results of other settings or another device; name another --output")
        results["runs"], results["parameters"] = found["runs"], found["parameters"]
    return results


def write(results: dict[str, Any], output: Path) -> None:
    """Under another name first, so that an end in the middle loses nothing."""
    output.parent.mkdir(parents=True, exist_ok=True)
    unfinished = output.with_suffix(".part")
    unfinished.write_text(json.dumps(results, indent=1) + "\n")
    unfinished.replace(output)


def clock() -> str:
    return f"{time.perf_counter() - BEGAN:.0f} s since the start"


def train(
    size: Size,
    start: dict[str, Tensor],
    accuracy: float,
    *,
    seed: int,
    settings: LossSettings,
    lr: float,
    batches: int,
) -> list[dict[str, float]]:
    """Figures of every generation batch, `held_out` in those of every fifth and the last; first of all that of the start."""
    run = config(size, seed)
    trainer = fresh_trainer(run, start)
    history, phases = [{"held_out": accuracy}], Phases()
    for batch in range(batches):
        numbers = range(batch * PROMPTS, (batch + 1) * PROMPTS)
        with phases.measure("rollout"):
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
        with phases.measure("scoring"):
            identity = policy.score().report()
        with phases.measure("update"):
            results = [policy.update(number, lr=lr) for number in range(len(policy.updates))]
        figures = policy.figures(results) | identity | phases.report()
        history.append({key: figures[key] for key in KEPT} | {"reward": mean_reward(samples)})
        if (batch + 1) % 5 == 0 or batch + 1 == batches:
            history[-1]["held_out"] = held_out(trainer, size)
    close(trainer)
    return history


def supervised_start(size: Size, seed: int) -> tuple[dict[str, Tensor], float]:
    """(weights by native name, held-out accuracy)"""
    run = replace(config(size, seed), optimizer=OptimizerConfig(weight_decay=0.0), moe=MoEConfig())
    trainer = fresh_trainer(run)
    generator, accuracy = torch.Generator().manual_seed(seed), 0.0
    for step in range(size.start_steps):
        warmup = min(1.0, (step + 1) / 20)
        loss = trainer.train_step([demonstrations(size, seed, step, generator)], lr=size.start_lr * warmup).loss
        if (step + 1) % size.start_look == 0:
            accuracy = held_out(trainer, size)
            print(f"seed {seed}: start, step {step + 1}, loss {loss:.3f}, {accuracy:.3f}, {clock()}", flush=True)
            if accuracy >= size.start_accuracy:
                break
    weights = {name: tensor.detach().clone() for name, tensor in trainer.parameters().items()}
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
    """Markdown; differences to GRPO are paired by seed, see `paired`."""
    settings, runs = results["settings"], results["runs"]
    lines = [
        f"{results['parameters']:,} parameters, {settings['size']['precision']}, {results['hardware']['device']}, "
        f"{settings['tokens_of_a_run']:,} sampled tokens a run, commit {', '.join(sorted({run['commit'] for run in runs}))}. "
        "Reward while training: of all samples of all batches.",
        "",
        "| lr | arm | seeds | held-out before | after | against GRPO, 95% interval | reward while training | against GRPO |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for lr in sorted({run["lr"] for run in runs}):
        of = {
            arm: {run["seed"]: run["history"] for run in runs if (run["lr"], run["arm"]) == (lr, arm)} for arm in ORDER
        }
        for arm, histories in of.items():
            seeds = sorted(histories.keys() & of["GRPO"].keys())
            if not seeds:
                continue
            cells = [f"{lr:g}", arm, str(len(seeds)), _span([histories[seed][0]["held_out"] for seed in seeds])]
            for measure in (lambda history: history[-1]["held_out"], _training_reward):
                cells.append(_span([measure(histories[seed]) for seed in seeds]))
                differences = [measure(histories[seed]) - measure(of["GRPO"][seed]) for seed in seeds]
                cells.append("" if arm == "GRPO" else paired(differences))
            lines.append("| " + " | ".join(cells) + " |")
    points = [point for run in runs for point in run["history"][1:]]
    seconds = ", ".join(
        f"{name} {statistics.median(point['seconds_' + name] for point in points):.2f}"
        for name in ("rollout", "scoring", "update")
    )
    exact = sum(point["first_off_policy_share"] == 0.0 for point in points)
    return "\n".join(
        [
            *lines,
            "",
            f"Median seconds of a batch: {seconds}. All ratios of the first update are 1: {exact} of {len(points)} batches.",
        ]
    )


def paired(differences: Sequence[float]) -> str:
    """Mean and 95% interval of Student's t distribution over the seeds, `tie` if 0 lies in it."""
    mean, count = statistics.fmean(differences), len(differences)
    if count == 1:
        return f"{mean:+.3f} (one seed: no interval)"
    half = T_QUANTILES[min(count - 2, len(T_QUANTILES) - 1)] * statistics.stdev(differences) / count**0.5
    return f"{mean:+.3f} [{mean - half:+.3f}, {mean + half:+.3f}]{' tie' if abs(mean) <= half else ''}"


def _training_reward(history: list[dict[str, float]]) -> float:
    return statistics.fmean(point["reward"] for point in history[1:])


def _span(values: list[float]) -> str:
    return f"{sum(values) / len(values):.3f} [{min(values):.3f}, {max(values):.3f}]"


if __name__ == "__main__":
    sys.exit(main())
