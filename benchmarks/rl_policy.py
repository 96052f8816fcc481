"""What the RL studies share: a policy back at its start, and judged samples of the project's generation engine."""

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_m1 import platform
from megatron_m1.config.schema import Config
from megatron_m1.rl.losses import PRESETS, LossSettings

platform.setup()

from megatron_m1.engine.trainer import Trainer  # noqa: E402
from megatron_m1.generation.engine import Engine  # noqa: E402
from megatron_m1.generation.reference import ReferenceEngine  # noqa: E402
from megatron_m1.generation.requests import Request, Sampling, request_seed  # noqa: E402
from megatron_m1.parallel import init_groups  # noqa: E402
from megatron_m1.rl.samples import Sample, sample_of  # noqa: E402
from megatron_m1.rl.tasks import Task  # noqa: E402

__all__ = ["ARMS", "fresh_trainer", "provenance", "sampled"]

ROOT = Path(__file__).resolve().parents[1]
ARMS: dict[str, LossSettings] = {
    "GRPO": PRESETS["grpo"],
    "DAPO": PRESETS["dapo"],
    "CISPO": PRESETS["cispo"],
    "CISPO + mask": replace(PRESETS["cispo"], mask_eps_low=0.2, mask_eps_high=0.2),
}
"""CISPO's cap is 5; the mask is GRPO's. The studies' responses are of one length, so that all normalisations are one."""


def provenance(module: str) -> dict[str, Any]:
    """Command, commit, date and hardware of a result."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return {
        "command": shlex.join(["python", "-m", f"benchmarks.{module}", *sys.argv[1:]]),
        "commit": os.environ.get("M1_COMMIT") or _commit(),
        "date": time.strftime("%Y-%m-%d"),
        "hardware": {
            "device": platform.device_name(),
            "cpu": next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown"),
            "cores": os.cpu_count(),
            "torch": torch.__version__,
        },
    }


def _commit() -> str:
    """Of the checkout, `-dirty` with changes; `unknown` in a copy without history, for which M1_COMMIT says it."""
    found = []
    for command in (["rev-parse", "--short", "HEAD"], ["status", "--porcelain", "--untracked-files=no"]):
        try:
            done = subprocess.run(["git", *command], cwd=ROOT, capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            return "unknown"
        found.append(done.stdout.strip())
    return found[0] + ("-dirty" if found[1] else "")


def fresh_trainer(config: Config, start: dict[str, Tensor] | None = None) -> Trainer:
    """A trainer with an empty optimizer; start: its weights by native name. Close it with `destroy_groups`."""
    trainer = Trainer(config, init_groups(config.parallel, seed=config.training.seed))
    if start is not None:
        for name, tensor in trainer.parameters().items():
            tensor.data.copy_(start[name])
        trainer.optimizer.reload_model_params()
    return trainer


def sampled(
    trainer: Trainer,
    prompts: Sequence[tuple[int, ...]],
    *,
    per_prompt: int,
    new_tokens: int,
    seed: int,
    first: int,
    reward: Callable[[tuple[int, ...], list[int]], float],
    reference_tokens: int | None = None,
) -> list[Sample]:
    """`per_prompt` judged samples of `new_tokens` tokens of each prompt, at temperature 1, with their routing.

    first: number of the first sample; what is drawn depends on seed, number, prompt and weights alone. reward(prompt, response).
    reference_tokens: by the reference engine, in passes over so many tokens; None: by the fast one.
    """
    sampling = Sampling(max_new_tokens=new_tokens, repetition_tokens=0)
    numbers = range(first, first + len(prompts) * per_prompt)
    requests = [
        Request(prompts[index // per_prompt], request_seed(seed, number), sampling)
        for index, number in enumerate(numbers)
    ]
    trainer.complete_parameters()
    engine: Engine | ReferenceEngine
    if reference_tokens is None:
        engine = Engine(trainer.models, trainer.groups, slots=len(requests), record_routing=True)
    else:
        engine = ReferenceEngine(trainer.models, trainer.groups, tokens=reference_tokens, record_routing=True)
    results = engine.generate(requests)
    samples = []
    for number, request, result in zip(numbers, requests, results, strict=True):
        sample = sample_of(
            result,
            number=number,
            group=number // per_prompt,
            weights="",
            task=Task("", "exact"),
            prompt=request.prompt,
            text="",
        )
        samples.append(replace(sample, reward=reward(request.prompt, result.tokens)))
    return samples
