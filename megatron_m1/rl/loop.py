"""The RL loop: rollouts, rewards, group advantages, old log-probabilities, off-policy updates."""

import itertools
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_m1 import platform
from megatron_m1.config.errors import ConfigError
from megatron_m1.config.load import load_config
from megatron_m1.config.schema import Config, RLConfig
from megatron_m1.config.validate import validate_rl
from megatron_m1.rl.losses import PRESETS, LossSettings
from megatron_m1.rl.samples import Facts

__all__ = ["loss_settings", "main", "train"]

PAGE_PROMPTS, PAGE_TOKENS = 16, 100_000
"""Prompts on the page of a step, and tokens of all their responses (some 130 bytes each), but for the first prompt's."""


def main(argv: list[str]) -> None:
    """`megatron_m1 rl`: options as in config/load.py; run alone or under torchrun."""
    config = load_config(argv)
    validate_rl(config, int(os.environ.get("WORLD_SIZE", "1")))
    if config.checkpoint.load is not None and not Path(config.checkpoint.load).is_dir():
        raise ConfigError(
            f"checkpoint.load={config.checkpoint.load} does not exist; name a checkpoint whose policy is right now and then. "
            "RL_QUICKSTART_STEPS=0 bash examples/rl_quickstart.sh makes the one of examples/configs/rl_tiny_cpu.yaml, with "
            "RL_QUICKSTART_TASK=reasoning_gym that of rl_reasoning_gym_cpu.yaml."
        )
    for cap in {stage.is_weight_cap for stage in config.rl.windows} | {None}:
        loss_settings(config.rl if cap is None else replace(config.rl, is_weight_cap=cap))
    platform.setup()
    from megatron_m1.engine.distributed import init_distributed, shutdown_distributed

    init_distributed(config.parallel.timeout_s, deterministic=config.training.deterministic)
    train(config)
    shutdown_distributed()


def train(config: Config) -> None:
    """Train from `checkpoint.load` to `training.steps` generation batches; torch.distributed is initialised.

    Seeds and learning rate are functions of the step alone, tasks and window of the step and the progress that the checkpoint has;
    finished samples come from the journal: so a resumed run is the same run.
    """
    from megatron_m1.checkpoint.native import Checkpointer, check_save_folder
    from megatron_m1.checkpoint.together import together
    from megatron_m1.engine.metrics import MetricsLog
    from megatron_m1.engine.optimizer import set_gradient_clip
    from megatron_m1.engine.schedule import learning_rate
    from megatron_m1.engine.stop import EarlyStop
    from megatron_m1.engine.trainer import Trainer
    from megatron_m1.parallel import group_sizes, init_groups
    from megatron_m1.rl.phases import Phases
    from megatron_m1.rl.progress import Progress
    from megatron_m1.rl.rollout import Rollouts
    from megatron_m1.rl.update import PolicyBatch

    training, rl = config.training, config.rl
    groups = init_groups(config.parallel, seed=training.seed)
    with together():
        check_save_folder(config.checkpoint)
    trainer = Trainer(config, groups, initial_weights=config.checkpoint.load is None)
    checkpoints = Checkpointer(config, trainer)
    first = checkpoints.load() if config.checkpoint.load else 0
    saved, progress, phases = first, Progress(config), Phases()
    progress.load(checkpoints.stage_state)
    settings = loss_settings(progress.config().rl)
    with together():
        log = MetricsLog(config, rank=dist.get_rank(), headline="reward")

    with (
        log,
        checkpoints,
        EarlyStop(exit_after_s=training.exit_after_s, device=trainer.device) as stop,
        Rollouts(config, trainer) as rollouts,
    ):
        log.event({"event": "start", "from_step": first, "process_groups": group_sizes(groups)})
        log.say(f"{dist.get_world_size()} ranks on {platform.device_name()}; {rl.algorithm}: {settings.describe()}")
        for warning in _warnings(config, settings):
            log.say(f"warning: {warning}")
        step, ended = first, _evaluate(config, first, checkpoints, rollouts, phases, stop, log)
        while step < training.steps and not ended:
            lr, now = learning_rate(step, config.schedule, config.optimizer, training.steps), progress.config()
            set_gradient_clip(trainer.optimizer, now.optimizer.clip_grad)
            batch = rollouts.collect(step, progress, phases, stop)
            if batch.stopped:
                ended = f"in step {step + 1}, whose finished samples are in the journal: {batch.stopped}"
                break
            metrics: dict[str, Any] = {"step": step + 1, "lr": lr, **batch.figures()}
            metrics |= progress.take(batch.facts, batch.tasks)
            policy = None
            if batch.kept:
                policy = PolicyBatch(trainer, now, batch.samples, settings=settings, facts=batch.kept)
                with phases.measure("scoring"):
                    metrics |= policy.score().report()
                with phases.measure("update"):
                    results = [policy.update(number, lr=lr) for number in range(len(policy.updates))]
                metrics |= policy.figures(results)
            if rl.pages and config.logging.dir is not None:
                _page(config, step, batch, policy, rollouts)
            step += 1
            metrics |= phases.report()
            log.step(metrics, show=False)
            if step == training.steps or _every(config.logging.every_steps, step):
                log.say(_line(metrics, training.steps))
            if "next_window" in metrics:
                settings = loss_settings(progress.config().rl)
                log.say(f"window of {metrics['next_window']} tokens from step {step + 1} on; {settings.describe()}")
                for warning in settings.warnings(updates_per_batch=rl.updates_per_batch):
                    log.say(f"warning: {warning}")
            checkpoints.poll()
            reason = stop.reason()
            if config.checkpoint.save and (
                reason or step == training.steps or _every(config.checkpoint.every_steps, step)
            ):
                checkpoints.save(step, stage_state=progress.state())
                rollouts.remove_old_journals()
                saved = step
            if reason:
                ended = f"after step {step}: {reason}"
            else:
                ended = _evaluate(config, step, checkpoints, rollouts, phases, stop, log)
        if ended and config.checkpoint.save and step > saved:
            checkpoints.save(step, stage_state=progress.state())
        if ended:
            log.say(f"stopping {ended}")
        elif first >= training.steps:
            log.say(f"nothing to do: {first} steps are done, training.steps={training.steps}")


def _evaluate(
    config: Config, step: int, checkpoints: Any, rollouts: Any, phases: Any, stop: Any, log: Any
) -> str | None:
    """Log the held-out rewards if they are wanted after `step` steps. Where and why the run is to end, if it is asked to meanwhile.

    It follows the checkpoint: it takes long, and a run that dies in it has lost no update and finishes it after the resume.
    """
    rl = config.rl
    due = step == 0 or step >= config.training.steps or _every(rl.held_out_every_steps, step)
    if not (rl.held_out_prompts and due):
        return None
    checkpoints.finish()
    found = rollouts.held_out(step, phases, stop)
    if found is None:
        return f"in the evaluation after step {step}: {stop.reason()}"
    values = {"event": "evaluation", "after_step": step, **found.figures(), **phases.report()}
    log.event(values, at_step=step)
    log.say(f"held-out {found} after step {step}")
    return None


def loss_settings(rl: RLConfig) -> LossSettings:
    """The preset of `rl.algorithm` with the keys that are not null in its place. Raises ConfigError for bounds that contradict."""
    names = "is_weight_cap is_weight_floor mask_eps_low mask_eps_high correction_cap normalization sample_share".split()
    given = {name: getattr(rl, name) for name in names if getattr(rl, name) is not None}
    return replace(PRESETS[rl.algorithm], **given)


def _page(config: Config, step: int, batch: Any, policy: Any, rollouts: Any) -> None:
    """The page of the first prompts, written by rank 0."""
    from megatron_m1.checkpoint.together import together
    from megatron_m1.rl.exchange import gathered
    from megatron_m1.rl.page import write_page

    shown = _shown(batch.facts)
    shares = gathered([sample for sample in batch.samples if rollouts.judges and sample.number in shown])
    capped = policy.capped(shown) if policy is not None else {}
    with together():
        if dist.get_rank() == 0:
            write_page(
                Path(config.logging.dir or "") / "rollouts" / f"step_{step + 1:08d}.html",
                title=f"Rollouts of step {step + 1}",
                samples=sorted((sample for share in shares for sample in share), key=lambda sample: sample.number),
                capped=capped,
                tokenizer=rollouts.tokenizer,
                prompts=batch.groups,
            )


def _shown(facts: Sequence[Facts]) -> set[int]:
    """Numbers of the samples on the page: those of the first prompts, as many as fit."""
    shown: set[int] = set()
    tokens, groups = 0, itertools.groupby(facts, lambda sample: sample.group)
    for _, samples in itertools.islice(groups, PAGE_PROMPTS):
        members = list(samples)
        tokens += sum(sample.length for sample in members)
        if shown and tokens > PAGE_TOKENS:
            break
        shown |= {sample.number for sample in members}
    return shown


def _warnings(config: Config, settings: LossSettings) -> list[str]:
    found = settings.warnings(updates_per_batch=config.rl.updates_per_batch)
    if config.optimizer.eps > 1e-12:
        found.append(
            f"optimizer.eps={config.optimizer.eps:g} is large beside RL's gradients (1e-18 to 1e-5 in M1, which used 1e-15)."
        )
    if config.checkpoint.load is None:
        found.append("checkpoint.load=null: the policy starts from random weights.")
    if config.rl.journal and config.rl.engine == "fast" and not platform.is_cuda():
        threads, tensor = torch.get_num_threads(), config.parallel.tensor
        if threads > 1 or tensor > 2:
            found.append(
                f"with {threads} threads and parallel.tensor={tensor} a run that goes on from rl.journal may end with other bits, the fast "
                "engine's rounding then depending on what runs at the same time; OMP_NUM_THREADS=1 and parallel.tensor up to 2 prevent it."
            )
    return found


def _line(metrics: dict[str, Any], steps: int) -> str:
    parts = [f"step {metrics['step']}/{steps}  reward {metrics['reward']:.4f}"]
    parts.append(f"tokens {metrics['response_tokens_mean']:.1f}  discarded {metrics['discard_rate']:.0%}")
    if "grad_norm" in metrics:
        parts.append(
            f"grad_norm {metrics['grad_norm']:.3g}  capped {metrics['capped_share']:.2%}  k3 {metrics['k3_kl']:.1e}"
        )
    else:
        parts.append("no prompt with rewards that differ: no update")
    parts.append(
        "  ".join(
            f"{name[8:]} {metrics[name]:.1f} s" for name in metrics if name.startswith("seconds_") and metrics[name]
        )
    )
    parts.append(f"idle share {metrics['idle_share']:.0%}")
    return "  ".join(parts)


def _every(period: int, step: int) -> bool:
    return period > 0 and step % period == 0
