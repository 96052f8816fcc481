"""One training or evaluation step over all ranks."""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_m1 import platform
from megatron_m1.config.schema import Config
from megatron_m1.engine.adam import install_adam
from megatron_m1.engine.batch import MicroBatch
from megatron_m1.engine.optimizer import build_optimizer, set_learning_rate, wrap_data_parallel
from megatron_m1.engine.schedule import consumed_samples
from megatron_m1.model.build import build_model, routers, sharded_parameters
from megatron_m1.parallel.transformer_engine import refuse_if_missing

__all__ = ["StepResult", "TokenLoss", "Trainer"]

TokenLoss = Callable[..., tuple[Tensor, Tensor, Tensor]]
"""See `Trainer.accumulate_gradients`."""


@dataclass
class StepResult:
    """Figures of one optimizer step, the same on every rank."""

    loss: float
    """Token-mean negative log-likelihood over the global batch, nats, without auxiliary terms."""
    grad_norm: float
    """Global L2 norm before clipping."""
    tokens: int
    """Tokens with a loss, over the global batch."""
    aux_loss: float
    """Load-balancing loss before its coefficient, mean over layers."""
    z_loss: float
    expert_load: Tensor
    """[layers, E] fp32: tokens per expert over the balanced share."""


class Trainer:
    """Model, gradients and optimizer of this rank, driven by core's pipeline schedules.

    The loss of a step is sum(mask * nll) / sum(mask) over the GLOBAL batch: the denominator is reduced before the forward pass, so
    that micro-batches with different numbers of tokens (or none) weigh in rightly in every layout.
    train: False for the model alone, without gradient buffers and optimizer.  initial_weights: as for `build_model`.
    """

    def __init__(
        self, config: Config, groups: ProcessGroupCollection, *, train: bool = True, initial_weights: bool = True
    ) -> None:
        self.config, self.groups = config, groups
        self.device = platform.device()
        refuse_if_missing(config.parallel)
        plain = build_model(config, groups, initial_weights=initial_weights)
        self.core = plain[0].config
        self.models: list[Any] = plain
        if not train:
            return
        self.models = wrap_data_parallel(plain, config, groups)
        self.adam = install_adam()
        self.optimizer = build_optimizer(self.models, config, groups)
        self.force_all_reduce = False
        self.core.finalize_model_grads_func = self._finalize
        self.core.grad_scale_func = None
        if config.parallel.overlap_grad_reduce:
            self.core.no_sync_func = _one_or_list([model.no_sync for model in self.models])
            self.core.grad_sync_func = _one_or_list([partial(self._start_grad_sync, model) for model in self.models])
        if config.parallel.overlap_param_gather:
            self.core.param_sync_func = _one_or_list([model.start_param_sync for model in self.models])

    def train_step(self, micro_batches: list[dict[str, Any]], *, lr: float) -> StepResult:
        """`forward_backward`, then `update`. `micro_batches`: this data-parallel rank's share of the global batch."""
        loss, tokens = self.forward_backward(micro_batches)
        return self.update(loss, tokens, lr=lr)

    def update(self, loss: float, tokens: int, *, lr: float) -> StepResult:
        """Clip the gradients of `forward_backward`, which gave `loss` and `tokens`, and update the weights.

        Raises FloatingPointError on every rank if the loss or the gradient norm is not finite; the weights in memory are then
        unusable, those on disk untouched.
        """
        _require_finite("loss", loss)
        set_learning_rate(self.optimizer, lr)
        _, grad_norm, _ = self.optimizer.step()
        _require_finite("grad_norm", grad_norm)
        return StepResult(loss=loss, grad_norm=float(grad_norm), tokens=tokens, **self._router_statistics())

    def forward_backward(self, micro_batches: list[dict[str, Any]]) -> tuple[float, int]:
        """(loss, number of loss tokens) of the global batch; gradients end in the data-parallel buffers."""
        tokens = self._global_tokens(micro_batches)
        loss = self.accumulate_gradients(
            micro_batches, loss=partial(_masked_loss, scale=1.0 / max(tokens, 1)), figures=1
        )
        return loss.item(), tokens

    def accumulate_gradients(self, micro_batches: list[dict[str, Any]], *, loss: TokenLoss, figures: int) -> Tensor:
        """Gradients, in the data-parallel buffers, of the sum of a loss over all micro-batches of all data- and context-parallel ranks.

        loss(nll [b, s], batch=MicroBatch): the loss of this rank's part of a micro-batch, normalised by the caller; an unused count,
        see `_finalize`; and [figures] fp64 to sum. nll is with gradients, of every label, masked or not.
        Returns the sum of those figures over the global batch, the same on every rank.
        """
        for model in self.models:
            model.train()
            model.zero_grad_buffer()
        self.optimizer.zero_grad()
        for router in routers(self.models):
            router.reset_statistics(micro_batches=len(micro_batches))
        return self._reduce(self._run(micro_batches, forward_only=False, loss=loss), figures)

    @torch.no_grad()
    def evaluate(self, micro_batches: list[dict[str, Any]]) -> tuple[float, int]:
        """(loss, number of loss tokens) of the global batch, without gradients."""
        for model in self.models:
            model.eval()
        tokens = self._global_tokens(micro_batches)
        parts = self._run(micro_batches, forward_only=True, loss=partial(_masked_loss, scale=1.0 / max(tokens, 1)))
        return self._reduce(parts, 1).item(), tokens

    @torch.no_grad()
    def score(self, micro_batches: list[dict[str, Any]]) -> list[Tensor]:
        """Log-probability in nats of every label of `micro_batches`, masked or not, each [b, T] fp32 like its labels.

        The same on all tensor-, context- and pipeline-parallel ranks of a replica; call it on all of them. The head works chunk by
        chunk (training.head_chunk_tokens) and keeps no logits.
        """
        for model in self.models:
            model.eval()
        parts = self._run(micro_batches, forward_only=True, loss=partial(_log_probabilities, group=self.groups.cp))
        scores = torch.empty(len(micro_batches), *MicroBatch.shape(micro_batches[0]), device=self.device)
        if parts:
            torch.stack(parts, out=scores)
        if self.groups.pp.size() > 1:
            dist.broadcast(scores, src=dist.get_process_group_ranks(self.groups.pp)[-1], group=self.groups.pp)
        return [row.view(batch["labels"].shape) for row, batch in zip(scores, micro_batches)]

    def complete_parameters(self) -> None:
        """Make the weights in the modules those of the last update; under `overlap_param_gather` they otherwise arrive with
        the next forward pass. Call on every rank before weights are read or saved."""
        if self.config.parallel.overlap_param_gather:
            for model in self.models:
                model.disable_forward_pre_hook()
                model.enable_forward_pre_hook()

    def consumed_samples(self, step: int) -> int:
        """Sequences consumed before step `step`, the position in the data that a checkpoint records."""
        return consumed_samples(step, self.config.training)

    def parameters(self) -> dict[str, Tensor]:
        """Native name -> local parameter of this rank, after its last update. Call on every rank."""
        self.complete_parameters()
        return {name: sharded.data for name, sharded in sharded_parameters(self.models).items()}

    def _run(self, micro_batches: list[dict[str, Any]], *, forward_only: bool, loss: Callable) -> list[Tensor]:
        """What `loss(nll [b, s], batch=...)` returns last, for each micro-batch; empty on pipeline stages before the last."""
        rows, length = MicroBatch.shape(micro_batches[0])
        padded = self._padded_tokens(micro_batches)
        # Each chunk brings its micro-batches to the device as it comes to them: a step can have a thousand.
        to_device = partial(
            MicroBatch.from_dict,
            device=self.device,
            context_rank=self.groups.cp.rank(),
            context_size=self.groups.cp.size(),
            padded_tokens=padded,
        )
        batches = [map(to_device, micro_batches) for _ in self.models]
        for model in self.models:
            model.force_all_reduce = (
                not forward_only and self.force_all_reduce
            )  # read by the hooks that overlap the reduction
        return get_forward_backward_func()(
            forward_step_func=partial(_forward_step, loss=loss),
            data_iterator=_one_or_list(batches),
            model=self.models,
            num_microbatches=len(micro_batches),
            seq_length=padded or length,
            micro_batch_size=rows,
            forward_only=forward_only,
            pg_collection=self.groups if self.groups.pp.size() == 1 else None,
            force_all_reduce=False if forward_only else self.force_all_reduce,
        )

    def _padded_tokens(self, micro_batches: list[dict[str, Any]]) -> int | None:
        """With parallel.context_layout=document the tokens that every pack of `micro_batches` is padded to: pipeline stages hand on
        tensors of one size, and tensor-parallel ranks split them."""
        parallel = self.config.parallel
        if parallel.context_layout != "document" or micro_batches[0].get("cu_seqlens") is None:
            return None
        unit = 2 * parallel.context
        longest = max(MicroBatch.padded_tokens(batch, unit=unit) for batch in micro_batches)
        shared = math.lcm(unit, parallel.tensor * parallel.context)
        return -(-longest // shared) * shared

    def _start_grad_sync(self, model: DistributedDataParallel, parameters: Iterable[Tensor]) -> None:
        """What core's DistributedDataParallel.start_grad_sync does, which cannot be told to reduce in full."""
        for bucket_group in model.bucket_groups + model.expert_parallel_bucket_groups:
            bucket_group.start_grad_sync(force_all_reduce=self.force_all_reduce)

    def _finalize(
        self,
        models: list[DistributedDataParallel],
        num_tokens: Tensor | None,
        pg_collection: ProcessGroupCollection | None = None,
        force_all_reduce: bool = False,
    ) -> None:
        """Reduce the gradients; core must not divide them by its own token count, the loss is normalised already."""
        finalize_model_grads(models, None, pg_collection=self.groups, force_all_reduce=force_all_reduce)
        if self.groups.tp.size() > 1 and not self.core.sequence_parallel:
            # The experts run on sequence shards (model/layer.py), so each rank has a part of the gate's gradient; core sums
            # such parts only under sequence parallelism.
            for router in routers(models):
                dist.all_reduce(router.weight.main_grad, group=self.groups.tp)

    def _global_tokens(self, micro_batches: Iterable[dict[str, Any]]) -> int:
        count = (
            torch.stack([batch["loss_mask"].sum(dtype=torch.float64) for batch in micro_batches]).sum().to(self.device)
        )
        dist.all_reduce(count, group=self.groups.dp)  # context-parallel ranks hold the same micro-batches
        return int(count.item())

    def _reduce(self, parts: list[Tensor], figures: int) -> Tensor:
        """Sum [figures] of the micro-batches' parts over the data- and context-parallel ranks, known to every pipeline stage."""
        total = (
            torch.stack(parts).sum(dim=0) if parts else torch.zeros(figures, dtype=torch.float64, device=self.device)
        )
        if self.groups.pp.rank() == self.groups.pp.size() - 1:
            dist.all_reduce(total, group=self.groups.dp_cp)
        if self.groups.pp.size() > 1:
            last = dist.get_process_group_ranks(self.groups.pp)[-1]
            dist.broadcast(total, src=last, group=self.groups.pp)
        return total

    def _router_statistics(self) -> dict[str, Any]:
        """aux_loss, z_loss and expert_load over all layers: summed over the ranks that share a layer, gathered over the pipeline."""
        layers, experts = self.config.model.num_hidden_layers, self.config.model.num_local_experts
        table = torch.zeros(layers, experts + 2, device=self.device)
        for router in routers(self.models):
            table[router.layer_number - 1] = torch.cat(
                [router.tokens_per_expert, torch.stack([router.aux_loss_sum, router.z_loss_sum])]
            )
        dist.all_reduce(table, group=self.groups.tp_dp_cp)
        if self.groups.pp.size() > 1:
            dist.all_reduce(table, group=self.groups.pp)
        counts = table[:, :experts]
        return {
            "aux_loss": table[:, experts].mean().item(),
            "z_loss": table[:, experts + 1].mean().item(),
            "expert_load": (counts / counts.mean(dim=1, keepdim=True).clamp(min=1e-20)).cpu(),
        }


def _forward_step(batches: Iterator[MicroBatch], model: torch.nn.Module, *, loss: Callable) -> tuple[Tensor, Any]:
    """Core's forward_step_func: the stage's output and the function that turns it into a loss."""
    batch = next(batches)
    output = model(
        batch.tokens,
        batch.position_ids,
        labels=batch.labels,
        packed_seq_params=batch.packed,
        padding_mask=batch.padding_mask,
    )
    return output, partial(loss, batch=batch)


def _masked_loss(nll: Tensor, *, batch: MicroBatch, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """(loss part, token count, the same part [1] in fp64 to log); the count is unused, see Trainer._finalize."""
    masked = nll.float() * batch.loss_mask
    part = masked.sum() * scale
    logged = masked.detach().sum(dtype=torch.float64) * scale
    return part, torch.ones((), dtype=torch.int, device=nll.device), logged.view(1)


def _log_probabilities(nll: Tensor, *, batch: MicroBatch, group: dist.ProcessGroup) -> tuple[Tensor, Tensor, Tensor]:
    """As `_masked_loss`, with the log-probabilities of the whole micro-batch, all context-parallel ranks' parts in order."""
    nll = batch.gather(nll, group)
    return nll.sum(), torch.ones((), dtype=torch.int, device=nll.device), -nll


def _require_finite(name: str, value: float | None) -> None:
    if value is None or not math.isfinite(value):
        raise FloatingPointError(
            f"{name}={value} is not finite; lower optimizer.lr, look at the data of this step, or resume from an earlier checkpoint"
        )


def _one_or_list(per_chunk: list[Any]) -> Any:
    """What core takes: the one chunk's, or the list of a virtual pipeline."""
    return per_chunk[0] if len(per_chunk) == 1 else per_chunk
