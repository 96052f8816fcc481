"""The router's losses: the three forms, padding, dropped tokens."""

import pytest
import torch

from megatron_m1.engine.equality import equality_batches, equality_config
from megatron_m1.engine.trainer import Trainer
from megatron_m1.model.build import routers
from megatron_m1.model.router import load_balancing_loss
from megatron_m1.parallel import init_groups

EXPERTS, TOP_K, TOKENS = 8, 2, 64


@pytest.mark.parametrize(("form", "value"), [("megatron", 1.0), ("minimax", 1 / EXPERTS**2), ("hf", float(TOP_K))])
def test_forms_at_perfect_balance(form, value):
    probabilities = torch.full((TOKENS, EXPERTS), 1 / EXPERTS)
    counts = torch.full((EXPERTS,), TOKENS * TOP_K / EXPERTS)
    loss = load_balancing_loss(probabilities, counts, torch.tensor(float(TOKENS)), top_k=TOP_K, form=form)
    torch.testing.assert_close(loss.item(), value)


def test_loss_is_the_sum_over_parts():
    probabilities = torch.rand(TOKENS, EXPERTS).softmax(-1)
    counts = torch.rand(EXPERTS) * TOKENS
    whole, *parts = (
        load_balancing_loss(rows, counts, torch.tensor(float(TOKENS)), top_k=TOP_K, form="megatron")
        for rows in (probabilities, probabilities[:11], probabilities[11:])
    )
    torch.testing.assert_close(whole, sum(parts))


def _router_figures(rank: int, world: int, capacity_factor: float | None, pad_with: int) -> dict:
    """Statistics and gate gradients of one step in which token id `pad_with` fills the padding."""
    config = equality_config({}, {"micro_batch": 2, "global_batch": 2})
    config.moe.capacity_factor = capacity_factor
    groups = init_groups(config.parallel, seed=1)
    trainer = Trainer(config, groups)
    batch = equality_batches(config, 0)[0]
    batch["padding_mask"][:, -6:] = True
    batch["loss_mask"][:, -6:] = 0.0
    batch["tokens"] = batch["tokens"].masked_fill(batch["padding_mask"], pad_with)
    loss, _ = trainer.forward_backward([batch])
    gates = routers(trainer.models)
    return {
        "loss": loss,
        "counts": torch.stack([gate.tokens_per_expert for gate in gates]),
        "aux": torch.stack([gate.aux_loss_sum for gate in gates]),
        "z": torch.stack([gate.z_loss_sum for gate in gates]),
        "tokens": int((~batch["padding_mask"]).sum()),
    }


def test_padding_takes_no_part_in_the_statistics(ranks):
    first, second = (ranks(1, _router_figures, None, pad)[0] for pad in (3, 50))
    assert (first["counts"].sum(dim=1) == first["tokens"] * 2).all()
    # Lightning and softmax layers are causal, so the tokens before the padding are the same in both.
    for key in ("counts", "aux", "z"):
        torch.testing.assert_close(first[key][0], second[key][0])


def test_capacity_drops_tokens(ranks):
    free, tight = (ranks(1, _router_figures, factor, 3)[0] for factor in (None, 0.5))
    assert free["loss"] != tight["loss"]
    torch.testing.assert_close(free["counts"][0], tight["counts"][0])  # counted before the drop
