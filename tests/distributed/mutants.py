"""Traps put back on purpose: each context manager breaks one thing that some layout must notice."""

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from unittest.mock import patch

import torch
from megatron.core.distributed import finalize_model_grads

from megatron_m1.config.schema import Config
from megatron_m1.engine import trainer as trainer_module
from megatron_m1.engine.equality import RankResult, run_layout
from megatron_m1.model import build, experts, lightning, norm, router

__all__ = ["MUTANTS", "run_mutant"]


@contextlib.contextmanager
def expert_gradients_over_dense_groups() -> Iterator[None]:
    """Trap B of megatron-core: expert gradients are not reduced under TP > 1 with EP = ETP = 1."""
    plain = experts.GroupedExperts.__init__

    def mutant(self, *args, **options):
        plain(self, *args, **options)
        self.fc1.allreduce = self.fc2.allreduce = True

    with patch.object(experts.GroupedExperts, "__init__", mutant):
        yield


@contextlib.contextmanager
def weights_from_one_running_generator() -> Iterator[None]:
    """Trap E: initial weights depend on which parameters a rank builds before."""

    def mutant(parameters, model, *, seed):
        generator = torch.Generator().manual_seed(seed)
        for sharded in parameters.values():
            if len(sharded.global_shape) > 1:
                sharded.data.data.uniform_(-0.1, 0.1, generator=generator)
            else:
                sharded.data.data.fill_(1.0)

    with patch.object(build, "initialize", mutant):
        yield


@contextlib.contextmanager
def per_token_loss_unknown_at_construction() -> Iterator[None]:
    """Trap F: the data-parallel wrapper reads calculate_per_token_loss when it is built, and averages."""
    plain = build.core_config

    def mutant(config):
        core = plain(config)
        core.calculate_per_token_loss = False
        return core

    with patch.object(build, "core_config", mutant):
        yield


@contextlib.contextmanager
def balance_statistics_of_one_rank() -> Iterator[None]:
    """Trap G: token counts of the balance loss are those of this rank's shard."""
    with patch.object(router, "dist", SimpleNamespace(all_reduce=lambda tensor, group: None)):
        yield


@contextlib.contextmanager
def gradients_divided_by_core() -> Iterator[None]:
    """Core divides by its own count of tokens as well."""

    def mutant(self, models, num_tokens, pg_collection=None, force_all_reduce=False):
        finalize_model_grads(models, num_tokens, pg_collection=self.groups, force_all_reduce=force_all_reduce)

    with patch.object(trainer_module.Trainer, "_finalize", mutant):
        yield


@contextlib.contextmanager
def lightning_norm_per_rank() -> Iterator[None]:
    """The RMSNorm over all heads sees the heads of its own rank only."""

    def mutant(self, x, gate):
        return torch.sigmoid(gate) * torch.nn.functional.rms_norm(x, self.weight.shape, self.weight, self.eps)

    with patch.object(norm.GatedRMSNorm, "forward", mutant):
        yield


@contextlib.contextmanager
def lightning_norm_gradient_per_rank() -> Iterator[None]:
    """The sum of squares is reduced forward, the rows' inner products are not reduced backward."""
    plain = norm.gated_rms_norm

    def mutant(*args, all_reduce, **options):
        calls = iter([all_reduce])
        return plain(*args, all_reduce=lambda x: next(calls, lambda _: None)(x), **options)

    with patch.object(norm, "gated_rms_norm", mutant):
        yield


@contextlib.contextmanager
def slopes_of_the_first_heads() -> Iterator[None]:
    """Every tensor-parallel rank decays as if it held the first heads."""
    plain = lightning.LightningAttention.__init__

    def mutant(self, config, layer_number, pg_collection, **options):
        plain(self, config, layer_number, pg_collection, **options)
        m1 = config.m1
        self.slopes = lightning.slopes(m1.num_attention_heads, layer_number - 1, m1.num_hidden_layers)[
            : self.local_heads
        ]

    with patch.object(lightning.LightningAttention, "__init__", mutant):
        yield


@contextlib.contextmanager
def norm_weights_unmarked() -> Iterator[None]:
    """Norm gradients of the sequence shards are not summed."""
    plain = norm.RMSNorm.__init__

    def mutant(self, *args, **options):
        plain(self, *args, **options)
        self.weight.sequence_parallel = False

    with patch.object(norm.RMSNorm, "__init__", mutant):
        yield


@contextlib.contextmanager
def experts_counted_on_the_first_tensor_rank() -> Iterator[None]:
    """The gradient norm takes experts of other tensor-parallel ranks for duplicates."""
    plain = experts.GroupedExperts.__init__

    def mutant(self, *args, **options):
        plain(self, *args, **options)
        del self.fc1.tensor_model_parallel, self.fc2.tensor_model_parallel

    with patch.object(experts.GroupedExperts, "__init__", mutant):
        yield


@contextlib.contextmanager
def gate_gradient_of_one_shard() -> Iterator[None]:
    """Without sequence parallelism nobody sums the parts of the gate's gradient."""
    with patch.object(
        trainer_module, "routers", lambda models: [] if hasattr(models[0], "ddp_config") else build.routers(models)
    ):
        yield


@contextlib.contextmanager
def weights_read_before_they_arrive() -> Iterator[None]:
    """Weights are read while the overlapped all-gather of the last update is still to come."""
    with patch.object(trainer_module.Trainer, "complete_parameters", lambda self: None):
        yield


# mutant -> layout that must notice it
MUTANTS = {
    expert_gradients_over_dense_groups: "TP2, EP1, ETP1",
    weights_from_one_running_generator: "PP2",
    per_token_loss_unknown_at_construction: "DP2",
    balance_statistics_of_one_rank: "TP2+SP",
    gradients_divided_by_core: "DP2",
    lightning_norm_per_rank: "TP2+SP",
    lightning_norm_gradient_per_rank: "TP2+SP",
    slopes_of_the_first_heads: "TP2+SP",
    norm_weights_unmarked: "TP2+SP",
    experts_counted_on_the_first_tensor_rank: "ETP2",
    gate_gradient_of_one_shard: "TP2 without SP",
    weights_read_before_they_arrive: "DP2, overlapped",
}


def run_mutant(rank: int, world: int, config: Config, name: str, steps: int) -> RankResult:
    """`run_layout` with the mutant of that name in place."""
    mutant = next(m for m in MUTANTS if m.__name__ == name)
    with mutant():
        return run_layout(rank, world, config, steps)
