"""Our model in float32 on one rank against the oracle in float64 and against transformers with M1's rotary and slopes.

`grouped_mm` has no float64, so the experts, and with them the model, run in float32 here as in training. The batch goes
through the same Trainer as a training run. `python -m tests.parity_table` prints the worst differences.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor
from torch.nn.functional import cross_entropy

from megatron_m1.checkpoint.names import join, native_layout, split
from megatron_m1.config.schema import Config, ModelConfig, MoEConfig, ParallelConfig, TrainingConfig
from megatron_m1.engine.batch import MicroBatch
from megatron_m1.engine.distributed import init_distributed, shutdown_distributed
from megatron_m1.engine.trainer import Trainer
from megatron_m1.model.lightning import LightningAttention
from megatron_m1.parallel import destroy_groups, init_groups
from tests import oracle
from tests.hf_reference import build_hf, hf_gradients
from tests.model_cases import BASE, CASES, ORACLE_ONLY_CASES, SMALL_V_CASES, random_batch, random_weights

SEED = 3
TOLERANCE = 1e-5
ALL_CASES = CASES | ORACLE_ONLY_CASES
NO_AUX_LOSS = MoEConfig(aux_loss="none")


@dataclass
class Outcome:
    """logits [B, T, V]; loss in nats per token; gradients under the released names."""

    logits: Tensor
    loss: float
    gradients: dict[str, Tensor]


@pytest.fixture(scope="module")
def groups() -> Iterator[ProcessGroupCollection]:
    init_distributed(timeout_s=60)
    yield init_groups(ParallelConfig(), seed=SEED)
    destroy_groups()
    shutdown_distributed()


def case_weights(name: str) -> dict[str, Tensor]:
    return random_weights(ALL_CASES[name], SEED, torch.float32, v_scale=SMALL_V_CASES.get(name, 1.0))


def run_ours(
    groups: ProcessGroupCollection,
    model: ModelConfig,
    weights: dict[str, Tensor],
    batch: dict[str, Tensor],
    *,
    moe: MoEConfig = NO_AUX_LOSS,
) -> Outcome:
    rows, length = batch["tokens"].shape
    training = TrainingConfig(micro_batch=rows, global_batch=rows, seq_length=length, precision="fp32", seed=SEED)
    trainer = Trainer(Config(model=model, moe=moe, training=training), groups)
    parameters = trainer.parameters()
    layout = native_layout(model)
    assert {native.name for native in layout} == parameters.keys()
    with torch.no_grad():
        for native in layout:
            values = join(native, lambda p: weights[p.name], model, start=0, stop=native.shape[0], dtype=torch.float32)
            parameters[native.name].copy_(values)
        micro = MicroBatch.from_dict(batch, trainer.device)
        logits = trainer.models[0](micro.tokens, micro.position_ids, packed_seq_params=micro.packed)
    loss, _ = trainer.forward_backward([batch])
    gradients = {
        piece.name: gradient.clone()
        for native in layout
        for piece, gradient in split(native, parameters[native.name].main_grad, model)
    }
    return Outcome(logits, loss, gradients)


def run_oracle(
    model: ModelConfig,
    weights: dict[str, Tensor],
    batch: dict[str, Tensor],
    *,
    moe: MoEConfig = NO_AUX_LOSS,
    cu_seqlens: Tensor | None = None,
) -> Outcome:
    wide = {name: weight.double().requires_grad_() for name, weight in weights.items()}
    logits, routers = oracle.m1_forward(model, wide, batch["tokens"], cu_seqlens)
    nll = cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), reduction="none")
    mask = batch["loss_mask"].flatten().double()
    loss = (nll * mask).sum() / mask.sum()
    total = loss
    for router in routers:
        if moe.aux_loss != "none":
            total = total + moe.aux_loss_coefficient * oracle.router_aux_loss(router, moe.aux_loss_form)
        total = total + moe.z_loss_coefficient * oracle.router_z_loss(router)
    total.backward()
    return Outcome(logits.detach(), loss.item(), {name: weight.grad for name, weight in wide.items()})


def run_hf(model: ModelConfig, weights: dict[str, Tensor], batch: dict[str, Tensor]) -> Outcome:
    module = build_hf(model, weights)
    logits = module(batch["tokens"]).logits
    loss = cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())
    loss.backward()
    return Outcome(logits.detach(), loss.item(), hf_gradients(module, model))


def plain_batch(model: ModelConfig, *, batch: int = 2, length: int = 37) -> dict[str, Tensor]:
    tokens, labels = random_batch(model, SEED, batch=batch, length=length)
    return {
        "tokens": tokens,
        "labels": labels,
        "loss_mask": torch.ones(batch, length),
        "position_ids": torch.arange(length).repeat(batch, 1),
    }


def differences(ours: Outcome, theirs: Outcome) -> dict[str, float]:
    """||a-b|| / ||b|| of the logits and of every gradient."""
    assert ours.gradients.keys() == theirs.gradients.keys()
    pairs = {"logits": (ours.logits, theirs.logits)}
    pairs |= {name: (ours.gradients[name], theirs.gradients[name]) for name in ours.gradients}
    return {name: float((a.double() - b.double()).norm() / b.double().norm()) for name, (a, b) in pairs.items()}


def too_large(ours: Outcome, theirs: Outcome) -> dict[str, float]:
    values = differences(ours, theirs) | {"loss": abs(ours.loss - theirs.loss) / theirs.loss}
    return {name: value for name, value in values.items() if not value <= TOLERANCE}


@pytest.mark.parametrize("name", ALL_CASES)
def test_logits_and_all_gradients_equal_the_oracle(groups: ProcessGroupCollection, name: str) -> None:
    model, weights = ALL_CASES[name], case_weights(name)
    batch = plain_batch(model)
    assert too_large(run_ours(groups, model, weights, batch), run_oracle(model, weights, batch)) == {}


@pytest.mark.parametrize("name", CASES)
def test_logits_and_all_gradients_equal_transformers(groups: ProcessGroupCollection, name: str) -> None:
    model, weights = CASES[name], case_weights(name)
    batch = plain_batch(model)
    assert too_large(run_ours(groups, model, weights, batch), run_hf(model, weights, batch)) == {}


@pytest.mark.parametrize("heads", [6, 8])
def test_slopes_are_the_released_ones(groups: ProcessGroupCollection, heads: int) -> None:
    """To float32 rounding: transformers' slopes are off by 1e-5, which the logits of short sequences do not show."""
    model = replace(BASE, num_attention_heads=heads)
    training = TrainingConfig(micro_batch=1, global_batch=1, precision="bf16")
    trainer = Trainer(Config(model=model, training=training), groups, train=False)
    lightning = [module for module in trainer.models[0].modules() if isinstance(module, LightningAttention)]
    assert len(lightning) == model.layer_types().count(0)
    for layer, module in enumerate(lightning):
        expected = oracle.lightning_slopes(heads, layer, model.num_hidden_layers)
        assert module.slopes.dtype == torch.float32
        torch.testing.assert_close(module.slopes.double(), expected, rtol=2e-7, atol=0)


def test_loss_mask_selects_tokens(groups: ProcessGroupCollection) -> None:
    weights, batch = random_weights(BASE, SEED, torch.float32), plain_batch(BASE)
    batch["loss_mask"][0, 5:29] = 0.0
    assert too_large(run_ours(groups, BASE, weights, batch), run_oracle(BASE, weights, batch)) == {}


@pytest.mark.parametrize("name", ["base", "softmax_first", "heads_6"])
def test_packed_documents_equal_the_oracle(groups: ProcessGroupCollection, name: str) -> None:
    """Documents of 11, 1 and 25 tokens: gradients equal those of separate documents."""
    model, weights = ALL_CASES[name], case_weights(name)
    batch = plain_batch(model, batch=1)
    cuts = torch.tensor([0, 11, 12, 37], dtype=torch.int32)
    batch["position_ids"] = torch.cat([torch.arange(n) for n in cuts.diff().tolist()])[None]
    expected = run_oracle(model, weights, batch, cu_seqlens=cuts)
    packed = batch | {"cu_seqlens": cuts, "max_seqlen": torch.tensor(25)}
    assert too_large(run_ours(groups, model, weights, packed), expected) == {}


@pytest.mark.parametrize(
    "moe",
    [
        MoEConfig(aux_loss="global", aux_loss_form="megatron", aux_loss_coefficient=0.1),
        MoEConfig(aux_loss="micro_batch", aux_loss_form="minimax", aux_loss_coefficient=2.0),
        MoEConfig(aux_loss="global", aux_loss_form="hf", aux_loss_coefficient=0.1, z_loss_coefficient=0.01),
        MoEConfig(aux_loss="none", z_loss_coefficient=0.05),
    ],
    ids=["megatron", "minimax", "hf_and_z", "z"],
)
def test_router_losses_equal_the_oracle(groups: ProcessGroupCollection, moe: MoEConfig) -> None:
    weights, batch = random_weights(BASE, SEED, torch.float32), plain_batch(BASE)
    without = run_oracle(BASE, weights, batch)
    expected = run_oracle(BASE, weights, batch, moe=moe)
    assert too_large(without, expected), "the router losses must show in the gradients"
    assert too_large(run_ours(groups, BASE, weights, batch, moe=moe), expected) == {}
