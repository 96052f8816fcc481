"""The fork-token problem: sums modulo 10 that a tiny hybrid MoE gets right only after a token it hardly ever says.

A prompt is `a + b =`, a response two tokens: FORK or DIRECT, then a digit. The supervised start says FORK in about 2% of its
responses; after FORK it knows the sum, after DIRECT it guesses. Rollouts, advantages, losses and updates are those of
megatron_m1; only the problem and its exact evaluation are written here.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.rl_policy import ARMS, fresh_trainer, sampled
from megatron_m1.config.schema import Config, ModelConfig, MoEConfig, OptimizerConfig, RLConfig, TrainingConfig
from megatron_m1.engine.trainer import Trainer
from megatron_m1.generation.requests import request_seed
from megatron_m1.parallel import destroy_groups
from megatron_m1.rl.losses import LossSettings
from megatron_m1.rl.samples import Sample
from megatron_m1.rl.update import PolicyBatch

__all__ = ["ARMS", "Figures", "supervised_start", "train"]

PLUS, EQUALS, FORK, DIRECT, VOCABULARY = 10, 11, 12, 13, 16
PROMPT_TOKENS, RESPONSE_TOKENS = 4, 2
TOKENS = PROMPT_TOKENS + RESPONSE_TOKENS - 1
PROMPTS, SAMPLES = 32, 16
FORK_SHARE = 0.02
ALL_PROMPTS = [(a, PLUS, b, EQUALS) for a in range(10) for b in range(10)]
Figures = dict[str, float]


def config(*, updates: int, seed: int) -> Config:
    """Three layers (lightning, softmax, lightning), top-2 of 4 experts, post-norm, fp32; `updates` per 512 samples."""
    per_update = PROMPTS * SAMPLES // updates
    return Config(
        model=ModelConfig(
            vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=1,
            head_dim=16, intermediate_size=32, num_local_experts=4, attn_type_list=[0, 1, 0], rotary_dim=8,
        ),
        moe=MoEConfig(aux_loss="none"),
        training=TrainingConfig(
            seed=seed, micro_batch=1, global_batch=per_update, seq_length=per_update * TOKENS, precision="fp32"
        ),
        optimizer=OptimizerConfig(beta1=0.9, beta2=0.95, eps=1e-15, weight_decay=0.0, clip_grad=1.0),
        rl=RLConfig(samples_per_prompt=SAMPLES, updates_per_batch=updates, max_new_tokens=RESPONSE_TOKENS),
    )  # fmt: skip


def supervised_start(seed: int, *, steps: int, lr: float = 4e-3) -> tuple[dict[str, Tensor], Figures]:
    """(weights by native name, `evaluate`) of the policy that all arms of `seed` start from."""
    run = replace(config(updates=16, seed=seed), optimizer=OptimizerConfig(eps=1e-8, weight_decay=0.0))
    trainer = fresh_trainer(run)
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        warmup, decay = min(1.0, (step + 1) / 20), min(1.0, 2 * (steps - step) / steps)
        trainer.train_step([_demonstrations(generator)], lr=lr * warmup * decay)
    weights = {name: tensor.detach().clone() for name, tensor in trainer.parameters().items()}
    figures = evaluate(trainer)
    destroy_groups()
    return weights, figures


def train(
    start: dict[str, Tensor],
    *,
    seed: int,
    settings: LossSettings,
    lr: float,
    batches: int,
    updates: int,
) -> list[Figures]:
    """`evaluate` before the first and, with the loop's own figures, after every generation batch.

    Prompts and random numbers depend on seed, batch and sample alone: they are the same for all arms.
    """
    run = config(updates=updates, seed=seed)
    trainer = fresh_trainer(run, start)
    history = [evaluate(trainer)]
    for batch in range(batches):
        samples = _rollouts(trainer, seed, batch)
        policy = PolicyBatch(trainer, run, samples, settings=settings)
        identity = policy.score().report()
        results = [policy.update(number, lr=lr) for number in range(len(policy.updates))]
        reward = sum(sample.reward or 0.0 for sample in samples) / len(samples)
        figures = policy.figures(results)
        kept = {key: figures[key] for key in ("capped_share", "ppo_masked_share", "grad_norm", "first_is_weight")}
        history.append(evaluate(trainer) | kept | {"reward": reward, "max_abs_diff": identity["max_abs_diff"]})
    destroy_groups()
    return history


@torch.no_grad()
def evaluate(trainer: Trainer) -> Figures:
    """Exact over all 100 prompts, without sampling: probability of FORK, of a right digit (after whatever token), of a right digit
    after FORK, and the entropy of a response in nats per token."""
    prompts = torch.tensor(ALL_PROMPTS, device=trainer.device)
    tokens = torch.cat(
        [
            prompts.repeat_interleave(VOCABULARY, dim=0),
            torch.arange(VOCABULARY, device=trainer.device).repeat(len(prompts)).unsqueeze(1),
        ],
        dim=1,
    )
    positions = torch.arange(tokens.shape[1], device=trainer.device).expand_as(tokens)
    model = trainer.models[0].eval()
    logp = model(tokens, positions).double().log_softmax(dim=-1).view(len(prompts), VOCABULARY, -1, VOCABULARY)
    first, second = logp[:, 0, PROMPT_TOKENS - 1], logp[:, :, PROMPT_TOKENS]
    sums = (prompts[:, 0] + prompts[:, 2]) % 10
    right = second.exp().gather(2, sums.view(-1, 1, 1).expand(-1, VOCABULARY, 1)).squeeze(2)
    entropy = _entropy(first) + (first.exp() * _entropy(second)).sum(dim=1)
    return {
        "fork": first.exp()[:, FORK].mean().item(),
        "accuracy": (first.exp() * right).sum(dim=1).mean().item(),
        "right_after_fork": right[:, FORK].mean().item(),
        "entropy": entropy.mean().item() / RESPONSE_TOKENS,
    }


def _entropy(logp: Tensor) -> Tensor:
    return -(logp.exp() * logp).sum(dim=-1)


def _rollouts(trainer: Trainer, seed: int, batch: int) -> list[Sample]:
    generator = torch.Generator().manual_seed(request_seed(seed, batch))
    chosen = torch.randperm(len(ALL_PROMPTS), generator=generator)[:PROMPTS].tolist()
    return sampled(
        trainer,
        [ALL_PROMPTS[prompt] for prompt in chosen],
        per_prompt=SAMPLES,
        new_tokens=RESPONSE_TOKENS,
        seed=seed,
        first=batch * PROMPTS * SAMPLES,
        reward=lambda prompt, response: float(response[-1] == (prompt[0] + prompt[2]) % 10),
    )


def _demonstrations(generator: torch.Generator, rows: int = 64) -> dict[str, Any]:
    """A micro-batch. Half of the rows begin as the policy shall, FORK in FORK_SHARE of them; the other half begin with FORK, which
    has no loss there, so that the sum after it is learned in spite of its rarity."""
    a, b = torch.randint(10, (2, rows), generator=generator)
    natural = torch.arange(rows) % 2 == 0
    fork = ~natural | (torch.rand(rows, generator=generator) < FORK_SHARE)
    digit = torch.where(fork, (a + b) % 10, torch.randint(10, (rows,), generator=generator))
    plus, equals = torch.full_like(a, PLUS), torch.full_like(a, EQUALS)
    sequence = torch.stack([a, plus, b, equals, torch.where(fork, FORK, DIRECT), digit], dim=1)
    mask = torch.zeros(rows, TOKENS)
    mask[:, PROMPT_TOKENS - 1] = natural.float()
    mask[:, PROMPT_TOKENS] = 1.0
    return {
        "tokens": sequence[:, :-1].contiguous(),
        "labels": sequence[:, 1:].contiguous(),
        "loss_mask": mask,
        "position_ids": torch.arange(TOKENS).expand(rows, -1).contiguous(),
    }
