"""Does every parallel layout give the numbers of one rank? `run_layout` on each rank, `compare` on what they return."""

import copy
import itertools
import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from megatron_m1.config.schema import (
    Config,
    DataConfig,
    ModelConfig,
    MoEConfig,
    OptimizerConfig,
    ParallelConfig,
    TrainingConfig,
)
from megatron_m1.engine.trainer import Trainer
from megatron_m1.model.build import sharded_parameters
from megatron_m1.parallel import destroy_groups, init_groups

__all__ = ["LAYOUTS", "Difference", "RankResult", "compare", "equality_batches", "equality_config", "run_layout"]

STEPS = 5
RING = {"context_lightning": "ring", "context_softmax": "ring"}
ALL_GATHER = {"context_lightning": "all_gather", "context_softmax": "all_gather"}

# name -> (ranks, parallel settings, training settings)
LAYOUTS: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "TP2+SP": (2, {"tensor": 2}, {}),
    "TP2 without SP": (2, {"tensor": 2, "sequence": False}, {}),
    "TP2, EP1, ETP1": (2, {"tensor": 2, "expert_tensor": 1}, {}),
    "TP2 without SP, EP1, ETP1": (2, {"tensor": 2, "expert_tensor": 1, "sequence": False}, {}),
    "PP2": (2, {"pipeline": 2}, {}),
    "PP2, VPP2": (2, {"pipeline": 2, "virtual_pipeline": 2}, {}),
    "PP2, last stage of 1 layer": (2, {"pipeline": 2, "last_stage_layers": 1}, {}),
    "PP3, last stage of 2 layers": (3, {"pipeline": 3, "last_stage_layers": 2}, {}),
    "EP2": (2, {"expert": 2}, {}),
    "EP2, all-gather dispatcher": (2, {"expert": 2}, {"dispatcher": "allgather"}),
    "ETP2": (2, {"expert_tensor": 2}, {}),
    "DP2": (2, {}, {}),
    "DP2, overlapped": (2, {"overlap_grad_reduce": True, "overlap_param_gather": True}, {}),
    "DP2, plain optimizer": (2, {"distributed_optimizer": False}, {}),
    "DP2xEP2": (4, {"expert": 2}, {}),
    "DP2xEP2, plain optimizer": (4, {"expert": 2, "distributed_optimizer": False}, {}),
    "TP2xPP2": (4, {"tensor": 2, "pipeline": 2}, {}),
    "TP2xEP2": (4, {"tensor": 2, "expert": 2}, {}),
    "TP2xEP2, ETP1": (4, {"tensor": 2, "expert": 2, "expert_tensor": 1}, {}),
    "PP2xEP2": (4, {"pipeline": 2, "expert": 2}, {}),
    "PP2, VPP2, EP2, DP2": (4, {"pipeline": 2, "virtual_pipeline": 2, "expert": 2}, {}),
    "recompute full": (1, {}, {"recompute": "full"}),
    "recompute selective": (1, {}, {"recompute": "selective", "recompute_modules": ["core_attn", "moe"]}),
    "TP2xPP2, recompute full": (4, {"tensor": 2, "pipeline": 2}, {"recompute": "full"}),
    "CP2, ring": (2, {"context": 2, **RING}, {}),
    "CP2, all-gather": (2, {"context": 2, **ALL_GATHER}, {}),
    "CP2, ring, dense": (2, {"context": 2, **RING}, {"dense": True}),
    "CP2, all-gather, dense": (2, {"context": 2, **ALL_GATHER}, {"dense": True}),
    "CP4, ring": (4, {"context": 4, **RING}, {}),
    "CP4, all-gather": (4, {"context": 4, **ALL_GATHER}, {}),
    "CP4, ring, dense": (4, {"context": 4, **RING}, {"dense": True}),
    "CP4, all-gather, dense": (4, {"context": 4, **ALL_GATHER}, {"dense": True}),
    "CP2xTP2": (4, {"context": 2, "tensor": 2, **RING}, {}),
    "CP2xTP2, all-gather": (4, {"context": 2, "tensor": 2, **ALL_GATHER}, {}),
    "CP2xTP2, ring, dense": (4, {"context": 2, "tensor": 2, **RING}, {"dense": True}),
    "CP2xTP2 without SP, dense": (4, {"context": 2, "tensor": 2, "sequence": False, **ALL_GATHER}, {"dense": True}),
    "CP2xPP2, VPP2": (4, {"context": 2, "pipeline": 2, "virtual_pipeline": 2, **RING}, {}),
    "CP2xPP2, all-gather": (4, {"context": 2, "pipeline": 2, **ALL_GATHER}, {}),
    "CP2xPP2, ring, dense": (4, {"context": 2, "pipeline": 2, **RING}, {"dense": True}),
    "CP2xPP2, all-gather, dense": (4, {"context": 2, "pipeline": 2, **ALL_GATHER}, {"dense": True}),
    "CP2xEP2": (2, {"context": 2, "expert": 2, **ALL_GATHER}, {}),
    "CP2xEP2, ring": (2, {"context": 2, "expert": 2, **RING}, {}),
    "CP2xEP2, all-gather, dense": (2, {"context": 2, "expert": 2, **ALL_GATHER}, {"dense": True}),
    "CP2xEP2, ring, dense": (2, {"context": 2, "expert": 2, **RING}, {"dense": True}),
    "CP2xDP2, EP4, ring": (4, {"context": 2, "expert": 4, **RING}, {}),
    "CP2, ring, recompute full": (2, {"context": 2, **RING}, {"recompute": "full"}),
    "CP2, recompute selective": (
        2,
        {"context": 2, **ALL_GATHER},
        {"recompute": "selective", "recompute_modules": ["core_attn", "moe"]},
    ),
    "CP2, by document": (2, {"context": 2, "context_layout": "document", **RING}, {}),
    "CP2xTP2, by document": (4, {"context": 2, "tensor": 2, "context_layout": "document", **ALL_GATHER}, {}),
    "CP2xPP2, by document": (4, {"context": 2, "pipeline": 2, "context_layout": "document", **RING}, {}),
    "CP2xDP2, EP4, by document": (4, {"context": 2, "expert": 4, "context_layout": "document"}, {}),
    "CP8": (8, {"context": 8, **RING}, {}),
    "CP8, EP4, all-gather": (8, {"context": 8, "expert": 4, **ALL_GATHER}, {}),
    "CP4xTP2, EP4": (8, {"context": 4, "tensor": 2, "expert": 4, **RING}, {}),
    "CP4xPP2, VPP2, EP4": (8, {"context": 4, "pipeline": 2, "virtual_pipeline": 2, "expert": 4, **ALL_GATHER}, {}),
    "CP2xTP2xPP2": (8, {"context": 2, "tensor": 2, "pipeline": 2}, {}),
    "CP2xTP2xDP2, EP2, ETP2": (8, {"context": 2, "tensor": 2, "expert": 2}, {}),
    "CP4xDP2, EP4, dense": (8, {"context": 4, "expert": 4, **RING}, {"dense": True}),
}


@dataclass
class RankResult:
    """What one rank saw: losses and gradient norms of all steps, its shards of the gradients of the first step and of the
    final weights, each as (local tensor, global offset, global shape)."""

    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    aux_losses: list[float] = field(default_factory=list)
    gradients: dict[str, tuple[Tensor, tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)
    weights: dict[str, tuple[Tensor, tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)


@dataclass
class Difference:
    """Worst relative differences of a layout from one rank; per tensor ||a - b|| / ||b||."""

    loss: float
    grad_norm: float
    aux_loss: float
    gradient: float
    worst_gradient: str
    weight: float
    worst_weight: str


def equality_config(parallel: dict[str, Any], training: dict[str, Any], *, precision: str = "fp32") -> Config:
    """A small M1 with every feature: both layer kinds on every pipeline chunk, GQA, a shared expert, distinct alphas and betas,
    balance and z loss. `training` may hold `dispatcher`, an option of the experts, and `dense`: rows without documents.

    Its seed keeps every routing decision of the 5 steps clear of a tie, which layouts' rounding would break either way (a test).
    """
    training = dict(training)
    dense = training.pop("dense", False)
    dispatcher = training.pop("dispatcher", "alltoall")
    return Config(
        model=ModelConfig(
            vocab_size=96,
            hidden_size=48,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=12,
            intermediate_size=48,
            num_local_experts=4,
            shared_intermediate_size=24,
            attn_type_list=[0, 1, 0, 1],
            rotary_dim=8,
            layernorm_linear_attention_alpha=1.6,
            layernorm_full_attention_alpha=1.4,
            layernorm_mlp_alpha=1.8,
            layernorm_linear_attention_beta=0.9,
            layernorm_full_attention_beta=1.1,
            layernorm_mlp_beta=0.8,
        ),
        moe=MoEConfig(
            aux_loss="micro_batch", aux_loss_coefficient=0.02, z_loss_coefficient=1e-3, dispatcher=dispatcher
        ),
        parallel=ParallelConfig(**parallel),
        training=replace(
            TrainingConfig(steps=STEPS, seed=6, micro_batch=2, global_batch=8, seq_length=32, precision=precision),  # type: ignore[arg-type]
            **training,
        ),
        optimizer=OptimizerConfig(lr=1e-3, clip_grad=0.5),
        data=DataConfig(document_boundaries="ignore" if dense else "reset"),
    )


def equality_batches(config: Config, step: int) -> list[dict[str, Any]]:
    """The micro-batches of a global batch: packed documents of ragged lengths, one pack with documents of one token and one that
    is longer than half of it, ragged loss masks, one without any loss token, one whose middle half (all that the second of two
    context-parallel ranks holds) has none, one with padding.

    With data.document_boundaries "ignore" rows without documents.
    """
    training, vocab = config.training, config.model.vocab_size
    rows, length = training.micro_batch, training.seq_length
    dense = config.data.document_boundaries == "ignore"
    batches = []
    for index in range(training.global_batch // rows):
        generator = torch.Generator().manual_seed(1000 * step + index)
        ids = torch.randint(0, vocab, (rows, length + 1), generator=generator)
        cuts = [
            0,
            *sorted({int(c) for c in torch.randint(1, rows * length, (3,), generator=generator)} | {length}),
            rows * length,
        ]
        if index == 3:
            cuts = [0, 1, 3, rows * length - 20, rows * length - 19, rows * length]
        positions = torch.cat([torch.arange(end - start) for start, end in itertools.pairwise(cuts)])
        mask = (torch.rand(rows, length, generator=generator) < 0.3 + 0.2 * index).float()
        padding = torch.zeros(rows, length, dtype=torch.bool)
        if index == 0:
            whole = mask if dense else mask.view(1, -1)
            whole[:, whole.shape[1] // 4 : 3 * whole.shape[1] // 4] = 0.0
        if index == 1:
            mask.zero_()
        if index == 2:
            padding[-1, length - 5 :] = True
            mask[padding] = 0.0
        batch = {
            "tokens": ids[:, :-1],
            "labels": ids[:, 1:],
            "loss_mask": mask,
            "position_ids": torch.arange(length).expand(rows, length),
            "padding_mask": padding,
        }
        if not dense:
            batch |= {
                "position_ids": positions.view(rows, length),
                "cu_seqlens": torch.tensor(cuts, dtype=torch.int32),
                "max_seqlen": max(b - a for a, b in itertools.pairwise(cuts)),
            }
        batches.append(batch)
    return batches


def run_layout(rank: int, world: int, config: Config, steps: int = STEPS) -> RankResult:
    """Train `steps` steps of `equality_batches` in the layout of `config`; call on every rank, torch.distributed initialised."""
    groups = init_groups(config.parallel, seed=config.training.seed)
    trainer = Trainer(copy.deepcopy(config), groups)
    trainer.force_all_reduce = True  # whole gradients on every rank, also under the distributed optimizer
    result = RankResult()
    for step in range(steps):
        share = equality_batches(config, step)[groups.dp.rank() :: groups.dp.size()]
        if step == 0:
            trainer.forward_backward(share)
            result.gradients = _shards(trainer, "main_grad")
        figures = trainer.train_step(share, lr=config.optimizer.lr)
        result.losses.append(figures.loss)
        result.grad_norms.append(figures.grad_norm)
        result.aux_losses.append(figures.aux_loss)
    result.weights = _shards(trainer, None)
    destroy_groups()
    return result


def compare(reference: RankResult, ranks: list[RankResult]) -> Difference:
    """Worst difference of any rank, replica and tensor from the one-rank `reference`.

    Raises AssertionError if the ranks together do not hold every element of every tensor.
    """
    gradient, worst_gradient = _worst([r.gradients for r in ranks], reference.gradients)
    weight, worst_weight = _worst([r.weights for r in ranks], reference.weights)
    return Difference(
        loss=max(_relative(r.losses, reference.losses) for r in ranks),
        grad_norm=max(_relative(r.grad_norms, reference.grad_norms) for r in ranks),
        aux_loss=max(_relative(r.aux_losses, reference.aux_losses) for r in ranks),
        gradient=gradient,
        worst_gradient=worst_gradient,
        weight=weight,
        worst_weight=worst_weight,
    )


def _shards(trainer: Trainer, attribute: str | None) -> dict[str, tuple[Tensor, tuple[int, ...], tuple[int, ...]]]:
    shards = {}
    trainer.complete_parameters()
    for name, sharded in sharded_parameters(trainer.models).items():
        local = sharded.data if attribute is None else getattr(sharded.data, attribute)
        local = local.detach().float().cpu().clone().view(sharded.local_shape)
        shards[name] = (local, tuple(sharded.global_offset), tuple(sharded.global_shape))
    return shards


def _worst(ranks: list[dict], reference: dict) -> tuple[float, str]:
    worst, worst_name = 0.0, ""
    for name, (full, _, shape) in reference.items():
        copies, square = torch.zeros(shape), 0.0
        for shards in ranks:
            if name not in shards:
                continue
            local, offset, _ = shards[name]
            window = tuple(slice(o, o + n) for o, n in zip(offset, local.shape, strict=True))
            copies[window] += 1
            square += float((local.double() - full[window].double()).square().sum())
        assert copies.min() > 0, f"{name}: the ranks hold only a part of it"
        difference = math.sqrt(square / float(copies.mean())) / max(float(full.double().norm()), 1e-30)
        if not difference <= worst:  # NaN is the worst
            worst, worst_name = difference, name
    return worst, worst_name


def _relative(ours: list[float], reference: list[float]) -> float:
    return max(abs(a - b) / max(abs(b), 1e-30) for a, b in zip(ours, reference, strict=True))
