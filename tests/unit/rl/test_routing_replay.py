"""Training with the experts of the rollout: the same ones, for every recorded token, and a gate that still learns.

That it composes with packing and all kinds of parallelism is in test_loop_update.py, whose samples carry experts that no gate would
choose.
"""

from dataclasses import replace

import numpy as np
import torch

from megatron_m1.engine import equality
from megatron_m1.engine.trainer import Trainer
from megatron_m1.generation.engine import Engine
from megatron_m1.generation.requests import Request, Sampling
from megatron_m1.model.build import routers
from megatron_m1.parallel import destroy_groups, init_groups
from megatron_m1.rl.losses import PRESETS
from megatron_m1.rl.samples import Sample, sample_of
from megatron_m1.rl.tasks import Task
from megatron_m1.rl.update import PolicyBatch
from tests.unit.rl.loop_cases import fixed_samples, tiny_config

UNUSED = 3


def samples_without_an_expert() -> list[Sample]:
    """fixed_samples that never go to expert UNUSED; of one no experts are known."""
    rng = np.random.default_rng(0)
    samples = []
    for sample in fixed_samples():
        routing = rng.random((*sample.routing.shape[:2], UNUSED)).argsort(axis=-1)[..., :2].astype(np.uint8)
        samples.append(replace(sample, routing=routing))
    samples[5] = replace(samples[5], routing=None)
    return samples


def passes(rank: int, world: int, recompute: str, samples: list[Sample]) -> dict:
    """Scoring and the gradients of the first update: what the routers gave in each pass, and gradients."""
    config = tiny_config()
    config.training.recompute, config.training.recompute_modules = recompute, ["core_attn", "moe"]
    groups = init_groups(config.parallel, seed=1)
    trainer = Trainer(config, groups)
    policy = PolicyBatch(trainer, config, samples, settings=PRESETS["cispo"])
    chosen: list[list[torch.Tensor]] = [[] for _ in routers(trainer.models)]
    for router, maps in zip(routers(trainer.models), chosen, strict=True):
        router.register_forward_hook(lambda module, inputs, output, maps=maps: maps.append(output[1]))
    policy.score()
    scored = [torch.stack(maps) for maps in chosen]
    changed = policy.routing_changed_share
    for maps in chosen:
        maps.clear()
    policy.gradients(0)
    result = {
        "score": scored,
        "update": [torch.stack(maps) for maps in chosen],
        "recorded": [[pack.batch.get("routing") for pack in packs] for packs in policy.packs],
        "gates": [router.weight.main_grad.clone() for router in routers(trainer.models)],
        "changed": changed,
        "gradients": equality._shards(trainer, "main_grad"),
    }
    destroy_groups()
    return result


def check_maps(found: list[torch.Tensor], recorded: list[torch.Tensor]) -> None:
    for layer, maps in enumerate(found):
        assert len(maps) == len(recorded)
        for chosen, routing in zip(maps, recorded, strict=True):
            routing = routing.flatten(0, 1)[:, layer].long()
            known = routing[:, 0] >= 0
            assert known.any() and (chosen.sum(dim=-1) == 2).all()
            assert torch.equal(chosen[known], torch.zeros_like(chosen)[known].scatter(1, routing[known], True))


def test_scoring_and_updates_take_the_recorded_experts_and_the_gate_learns(ranks):
    (result,) = ranks(1, passes, "none", samples_without_an_expert())
    check_maps(result["score"], [routing for packs in result["recorded"] for routing in packs])
    check_maps(result["update"], result["recorded"][0])
    assert 0.5 < result["changed"] < 1.0
    assert (result["score"][0][:, :, UNUSED].sum(dim=-1) > 0).any()  # padding, and the sample without a record
    for gate in result["gates"]:
        assert (gate[:UNUSED].norm(dim=-1) > 1e-6).all()


def test_no_gradient_reaches_the_gate_rows_of_other_experts(ranks):
    known = [sample for sample in samples_without_an_expert() if sample.routing is not None]
    (result,) = ranks(1, passes, "none", known)
    for gate in result["gates"]:
        assert (gate[:UNUSED].norm(dim=-1) > 1e-6).all() and (gate[UNUSED] == 0).all()


def test_recomputation_replays_too(ranks):
    samples = samples_without_an_expert()
    (plain,) = ranks(1, passes, "none", samples)
    for recompute in ("full", "selective"):
        (again,) = ranks(1, passes, recompute, samples)
        assert equality._worst([again["gradients"]], plain["gradients"])[0] < 1e-6
    (own,) = ranks(1, passes, "full", [replace(sample, routing=None) for sample in samples])
    assert equality._worst([own["gradients"]], plain["gradients"])[0] > 1e-2


def scored(rank: int, world: int) -> list[tuple[float, float]]:
    """(replayed choices, share of them that changed) in scoring what the engine sampled, before and after other gates came."""
    config = tiny_config()
    groups = init_groups(config.parallel, seed=1)
    trainer = Trainer(config, groups)
    requests = [Request((1, 2, 3 + number), number, Sampling(max_new_tokens=4)) for number in range(16)]
    results = Engine(trainer.models, groups, slots=16, record_routing=True).generate(requests)
    samples = [
        replace(
            sample_of(
                result, number=n, group=n // 8, weights="", task=Task("", "exact"), prompt=request.prompt, text=""
            ),
            reward=float(n % 2),
        )
        for n, (request, result) in enumerate(zip(requests, results, strict=True))
    ]
    found = []
    for _ in range(2):
        policy = PolicyBatch(trainer, config, samples, settings=PRESETS["cispo"])
        policy.score()
        found.append((policy.routing_replayed, policy.routing_changed_share))
        for router in routers(trainer.models):
            router.weight.data.neg_()
    destroy_groups()
    return found


def test_the_record_is_what_the_rollout_did(ranks):
    ((before, after),) = ranks(1, scored)
    layers, tokens = 2, 16 * (3 + 4 - 1)
    assert before == (layers * tokens, 0.0) and after[0] == layers * tokens and after[1] > 0.5
