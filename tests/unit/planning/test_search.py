from dataclasses import replace

import pytest

from megatron_m1.config.schema import Config, ModelConfig, ParallelConfig, TrainingConfig
from megatron_m1.engine.cluster import DEVICES
from megatron_m1.engine.memory import ACTIVATION_MARGIN, estimate_memory, stage_layers
from megatron_m1.engine.rates import Rates
from megatron_m1.planning import Plan, Refusal, plan_layout, search
from megatron_m1.planning.search import layout_name, padded, smallest_cluster

MODEL = ModelConfig(
    vocab_size=512, hidden_size=256, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=64,
    intermediate_size=128, num_local_experts=4, rotary_dim=32, attn_type_list=[0, 1, 0, 1],
)  # fmt: skip
# The host is never waited for: its share would be all that there is of a model so small.
CLUSTER = replace(DEVICES["H800"], gpus=8, gpus_per_node=2, rates=Rates(layer_host_s=0, forward_wait_s=0))
CONFIG = Config(model=MODEL, training=TrainingConfig(seq_length=16384, global_batch=8))
GIB = 2**30


def needed_gib(config: Config) -> float:
    return max(stage.with_margin for stage in estimate_memory(config, CLUSTER.gpus)) / GIB


def test_every_layout_is_ranked_or_refused():
    result = search(CONFIG, CLUSTER)
    times = [plan.time.total for plan in result.plans]
    assert times == sorted(times) and len(times) > 20
    names = [layout_name(found.config.parallel) for found in result.plans]
    names += [layout_name(refusal.parallel) for refusal in result.refusals]
    assert len(names) == len(set(names))
    assert {"1/1/1/1/1/1", "2/4/1/1/1/1", "1/2/2/2/1/2", "2/1/2/4/2/1"} <= set(names)
    assert not any(name.split("/")[2] == "4" for name in names)  # 4096 tokens a rank
    # PP4 with EP x ETP of 4 or more (5 layouts), PP2, EP4, ETP2 (4)
    assert result.rules() == {"world_size": 9}
    for plan in result.plans:
        assert plan.needed_gib == needed_gib(plan.config) <= CLUSTER.memory_gib - 6


def test_memory_decides_the_recomputation_and_then_refuses():
    parallel = ParallelConfig()
    needed = {}
    for mode in ("none", "full"):
        config = replace(CONFIG, training=replace(CONFIG.training, recompute=mode))
        needed[mode] = needed_gib(config) + 6
    plan = plan_layout(CONFIG, CLUSTER, parallel)
    assert isinstance(plan, Plan) and plan.config.training.recompute == "none"
    (estimate,) = plan.memory
    assert needed["none"] - 6 == pytest.approx((estimate.total + (ACTIVATION_MARGIN - 1) * estimate.activations) / GIB)
    tight = plan_layout(CONFIG, replace(CLUSTER, memory_gib=needed["full"]), parallel)
    assert isinstance(tight, Plan) and tight.config.training.recompute == "full" and tight.time.total > plan.time.total
    refused = plan_layout(CONFIG, replace(CLUSTER, memory_gib=needed["full"] - 0.01), parallel)
    assert isinstance(refused, Refusal) and refused.rule == "memory"
    assert refused.needed_gib == pytest.approx(needed["full"] - 6)
    assert "stage 0 needs" in refused.reason and "with full recomputation (weights " in refused.reason
    assert "use more context ranks" in refused.reason  # activations are most of it


def test_experts_alone_are_recomputed_where_that_is_enough():
    """In lightning layers core_attn keeps nothing, so that to repeat it as well costs time and saves next to none."""
    model = replace(MODEL, attn_type_list=[0, 0, 0, 0])
    config = replace(CONFIG, model=model)
    by_modules = {
        modules: needed_gib(
            replace(config, training=replace(config.training, recompute="selective", recompute_modules=list(modules)))
        )
        for modules in (("core_attn",), ("moe",), ("core_attn", "moe"))
    }
    assert by_modules["moe",] == by_modules["core_attn", "moe"] < by_modules["core_attn",]
    plan = plan_layout(config, replace(CLUSTER, memory_gib=by_modules["moe",] + 6), ParallelConfig())
    assert isinstance(plan, Plan) and plan.config.training.recompute_modules == ["moe"]


@pytest.mark.parametrize(
    "sizes, rule, reason",
    [
        ({"tensor": 4}, "parallel.tensor", "parallel.tensor=4 must divide model.num_key_value_heads=2"),
        ({"pipeline": 3}, "parallel.pipeline", "must divide model.num_hidden_layers=4; use 1, 2 or 4."),
        ({"expert": 4, "tensor": 2, "pipeline": 2}, "world_size", "must be a multiple of parallel.pipeline*expert"),
    ],
)
def test_layouts_that_break_a_rule_say_which(sizes, rule, reason):
    refused = plan_layout(CONFIG, CLUSTER, ParallelConfig(**sizes))
    assert isinstance(refused, Refusal) and refused.rule == rule and reason in refused.reason


def test_last_stages_shrink_until_their_head_is_made_up_for():
    # A head that costs as much as several layers: of 8 layers on 2 stages the last takes fewer, on 1 there is nothing to choose.
    model = replace(MODEL, num_hidden_layers=8, attn_type_list=[0] * 8, vocab_size=32768)
    config = replace(CONFIG, model=model)
    found = {layout_name(plan.config.parallel): plan for plan in search(config, CLUSTER).plans}
    even, uneven = (
        found[name] for name in ("1/2/2/1/1/1", min(name for name in found if name.startswith("1/2/2/1/1/1/")))
    )
    assert uneven.time.imbalance < even.time.imbalance and uneven.time.total < even.time.total
    assert [len(stage_layers(uneven.config, stage)) for stage in (0, 1)] == [
        8 - uneven.config.parallel.last_stage_layers, uneven.config.parallel.last_stage_layers,
    ]  # fmt: skip
    every = [plan_layout(config, CLUSTER, replace(even.config.parallel, last_stage_layers=n)) for n in range(1, 8)]
    best = min(every, key=lambda plan: plan.time.total)
    assert any(name.startswith("1/2/2/1/1/1/") and found[name].time == best.time for name in found)
    assert not any(name.count("/") == 6 and name.split("/")[1] == "1" for name in found)


def test_smallest_cluster_is_the_first_doubling_that_fits():
    two = replace(CLUSTER, gpus=2)
    refusals = search(CONFIG, replace(two, memory_gib=6.001)).refusals
    least = min(refusal.needed_gib for refusal in refusals if refusal.rule == "memory")
    tight = replace(two, memory_gib=least + 6 - 0.01)
    assert not search(CONFIG, tight).plans
    gpus, plan = smallest_cluster(CONFIG, tight)
    assert gpus == 4 and isinstance(plan_layout(CONFIG, replace(tight, gpus=4), plan.config.parallel), Plan)
    assert smallest_cluster(CONFIG, replace(two, memory_gib=6.001)) is None


def test_padding_of_documents():
    config = replace(CONFIG, parallel=ParallelConfig(context=2, context_layout="document"))
    # 128 documents of 128 tokens, each with 1.5 of padding to a multiple of 4 on average.
    assert padded(config, 128).training.seq_length == 16384 + 128 * 1.5
    assert padded(config, None) is config and padded(CONFIG, 128) is CONFIG
    plans = [plan_layout(config, CLUSTER, config.parallel, document_tokens=tokens) for tokens in (None, 128)]
    # of 128 times fewer keys, block by block with flash attention's time for cuDNN's
    assert plans[1].time.softmax < plans[0].time.softmax / 70 and plans[1].time.gemm > plans[0].time.gemm
    assert plans[1].fullest.activations > plans[0].fullest.activations


def test_speed_follows_from_the_step():
    plan = plan_layout(CONFIG, CLUSTER, ParallelConfig(tensor=2, expert=2, expert_tensor=1))
    assert isinstance(plan, Plan)
    assert plan.tokens_per_s_per_gpu == pytest.approx(8 * 16384 / plan.time.total / 8)
    assert 0 < plan.mfu < 0.8
