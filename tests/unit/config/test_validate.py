import pytest

from megatron_m1.config import Config, ConfigError, derived, load_config, rank_groups, validate
from megatron_m1.config.schema import ParallelConfig

LAYOUT_256 = ["--parallel.tensor=8", "--parallel.pipeline=8", "--parallel.expert=8", "--parallel.expert_tensor=1"]


def options(text):
    return load_config([f"--{word}" for word in text.split()])


def test_the_released_model_on_256_and_512_ranks():
    for world_size, data, expert_data in ((256, 4, 4), (512, 8, 8)):
        config = load_config([*LAYOUT_256, "--training.global_batch=512"])
        validate(config, world_size)
        sizes = derived(config, world_size)
        assert (sizes.data, sizes.expert_data, sizes.expert_tensor) == (data, expert_data, 1)
        assert sizes.sequence_parallel and sizes.layers_per_chunk == 10 and sizes.micro_batches == 512 // data


SMALL = "training.seq_length=64 model.num_hidden_layers=8 "
BROKEN = [
    (
        1,
        "parallel.tensor=3",
        "parallel.tensor=3 must divide model.num_attention_heads=64; use 1, 2, 4 or 8.",
    ),
    (16, "parallel.tensor=16", "parallel.tensor=16 must divide model.num_key_value_heads=8; use 1, 2, 4 or 8."),
    (2, "parallel.tensor=2 model.vocab_size=101", "parallel.tensor=2 must divide model.vocab_size=101; use 1."),
    (
        2,
        "parallel.tensor=2 training.seq_length=63 parallel.sequence=false",
        "parallel.tensor=2 must divide training.seq_length=63 (the experts work on sequence shards); use 1.",
    ),
    (
        2,
        "parallel.tensor=2 model.intermediate_size=27",
        "parallel.expert_tensor (null: parallel.tensor)=2 must divide model.intermediate_size=27; use 1, 3, 9 or 27.",
    ),
    (
        2,
        "parallel.tensor=2 model.intermediate_size=40",
        "model.intermediate_size=40 over 2 expert-tensor ranks gives rows of 20, which must be a multiple of 8 in bf16",
    ),
    (1, "parallel.sequence=true", "parallel.sequence=true needs parallel.tensor above 1"),
    (3, "parallel.pipeline=3", "parallel.pipeline=3 must divide model.num_hidden_layers=8; use 1, 2, 4 or 8."),
    (2, "parallel.pipeline=2 parallel.virtual_pipeline=3", "must divide the 4 layers of a pipeline stage"),
    (1, "parallel.last_stage_layers=3", "parallel.last_stage_layers=3 needs parallel.pipeline above 1; leave it out"),
    (
        3,
        "parallel.pipeline=3 parallel.last_stage_layers=3",
        "parallel.last_stage_layers=3 must leave the other 2 pipeline ranks equal parts of model.num_hidden_layers=8, each rank's in "
        "parallel.virtual_pipeline=1 equal chunks; use one of 2, 4, 6.",
    ),
    (
        2,
        "parallel.pipeline=2 parallel.virtual_pipeline=2 parallel.last_stage_layers=3 training.global_batch=8",
        "parallel.virtual_pipeline=2 equal chunks; use one of 2, 4, 6.",
    ),
    (1, "parallel.virtual_pipeline=2", "parallel.virtual_pipeline=2 needs parallel.pipeline above 1"),
    (
        2,
        "parallel.pipeline=2 parallel.virtual_pipeline=2 training.global_batch=7",
        "training.global_batch=7 makes 7 micro-batches per step; with parallel.virtual_pipeline=2 they must be a "
        "multiple of parallel.pipeline=2; use global_batch 6 or 8.",
    ),
    (3, "parallel.expert=3", "parallel.expert=3 must divide model.num_local_experts=32; use 1, 2, 4, 8, 16 or 32."),
    (
        8,
        "parallel.context=2 parallel.tensor=4 training.seq_length=2052",
        "training.seq_length=2052 must be a multiple of 8 with parallel.context=2 (each rank holds two equal chunks, spread over "
        "parallel.tensor=4); use 2048 or 2056.",
    ),
    (
        8,
        "parallel.context_layout=document",
        "parallel.context_layout=document needs parallel.context above 1; set it to sequence or raise parallel.context.",
    ),
    (
        8,
        "parallel.context_layout=document parallel.context=2 data.document_boundaries=ignore",
        "parallel.context_layout=document cuts documents, but with data.document_boundaries=ignore a sequence has none",
    ),
    (
        8,
        "parallel.context_layout=document parallel.context=2 parallel.expert=2 moe.dispatcher=allgather",
        "which moe.dispatcher=allgather cannot gather; use alltoall.",
    ),
    (
        8,
        "parallel.context_softmax=transformer_engine parallel.context=2",
        "cuts packs by document, not as parallel.context_layout=sequence does; set that to document.",
    ),
    (
        8,
        "parallel.context_softmax=transformer_engine parallel.context=2 parallel.context_layout=document training.precision=fp32",
        "parallel.context_softmax=transformer_engine needs training.precision=bf16; set it, or use auto, ring or all_gather.",
    ),
    (
        6,
        "parallel.tensor=2 parallel.pipeline=2",
        "world_size=6 must be a multiple of parallel.tensor*pipeline*context=2*2*1=4; start 4 or 8 processes",
    ),
    (
        4,
        "parallel.tensor=2 parallel.expert=4",
        "world_size=4 must be a multiple of parallel.pipeline*expert*expert_tensor=1*4*2=8 "
        "(expert_tensor=null is parallel.tensor); start 8 processes",
    ),
    (
        3,
        "training.global_batch=8",
        "training.global_batch=8 must be a multiple of training.micro_batch*data-parallel size=1*3=3; use 6 or 9.",
    ),
    (
        2,
        'training.batch_ramp=[{"from_step":0,"global_batch":3}]',
        "training.batch_ramp[0].global_batch=3 must be a multiple",
    ),
    (
        1,
        'training.batch_ramp=[{"from_step":4,"global_batch":4},{"from_step":2,"global_batch":8}]',
        "training.batch_ramp starts at steps [4, 2]; they must rise",
    ),
    (1, "training.micro_batch=0", "training.micro_batch=0 must be above 0."),
    (1, "optimizer.lr=.nan", "optimizer.lr=nan must be above 0."),
    (1, "optimizer.beta2=1.0", "optimizer.beta2=1.0 must lie in [0, 1)"),
    (1, "model.attn_type_list=[0,1]", "model.attn_type_list has 2 entries but model.num_hidden_layers=8"),
    (1, "model.attn_type_list=[0,1,2,0,0,0,0,0]", "model.attn_type_list holds [2]; each entry must be 0"),
    (1, "model.rotary_dim=65", "model.rotary_dim=65 must be even and at most model.head_dim=128; use 64."),
    (1, "model.rotary_dim=256", "model.rotary_dim=256 must be even and at most model.head_dim=128; use 128."),
    (1, "model.num_experts_per_tok=33", "model.num_experts_per_tok=33 must not exceed model.num_local_experts=32"),
    (1, "model.num_key_value_heads=5", "model.num_key_value_heads=5 must divide model.num_attention_heads=64"),
    (1, "model.max_position_embeddings=32", "training.seq_length=64 must not exceed model.max_position_embeddings=32"),
    (1, "data.train=[a,b] data.train_weights=[1]", "data.train_weights has 1 entries but data.train has 2"),
    (1, "data.train=[a] data.train_weights=[-1]", "data.train_weights=[-1.0] must be above 0"),
    (1, "data.train=[a,b] data.train_weights=[1,0]", "data.train_weights=[1.0, 0.0] must be above 0"),
    (1, "data.eod_token_id=200064", "data.eod_token_id=200064 must be below model.vocab_size=200064"),
    (1, "schedule.kind=exponential", "schedule.kind=exponential never reaches schedule.min_lr=0.0"),
    (1, "schedule.kind=constant_decay", "schedule.decay_style=exponential never reaches schedule.min_lr=0.0"),
    (1, "schedule.constant_steps=5", "schedule.constant_steps=5 is read by schedule.kind=constant_decay only"),
    (1, "schedule.kind=wsd schedule.decay_style=linear", "schedule.kind=wsd needs schedule.decay_steps"),
    (
        1,
        "schedule.kind=wsd schedule.decay_style=linear schedule.decay_steps=99 schedule.warmup_steps=2",
        "schedule.warmup_steps+decay_steps=101 must not exceed training.steps=100",
    ),
    (1, "schedule.min_lr=1", "schedule.min_lr=1.0 must not exceed optimizer.lr=0.0002"),
    (1, "schedule.warmup_steps=9 schedule.decay_steps=8", "schedule.decay_steps=8 counts from step 0"),
    (
        1,
        "training.recompute_modules=[mlp]",
        "training.recompute_modules=['mlp'] is unknown; use any of core_attn, moe.",
    ),
    (1, "training.recompute=full training.recompute_layers=9", "must not exceed the 8 layers of a model chunk"),
    (1, "training.precision=fp32 training.grad_reduce_dtype=bf16", "training.grad_reduce_dtype=bf16 needs"),
    (1, "parallel.overlap_param_gather=true", "parallel.overlap_param_gather=true needs"),
    (1, "checkpoint.every_steps=5", "checkpoint.every_steps=5 needs checkpoint.save"),
    (1, "checkpoint.weights_only=true", "checkpoint.weights_only=true needs checkpoint.load"),
]


@pytest.mark.parametrize("world_size, change, message", BROKEN, ids=[change for _, change, _ in BROKEN])
def test_a_broken_rule_names_value_rule_and_remedy(world_size, change, message):
    validate(options(SMALL), 1)
    with pytest.raises(ConfigError) as caught:
        validate(options(SMALL + change), world_size)
    assert message in str(caught.value)


def test_several_broken_rules_are_told_together():
    with pytest.raises(ConfigError) as caught:
        validate(options(SMALL + "parallel.tensor=3 parallel.expert=5"), 15)
    assert "parallel.tensor=3" in str(caught.value) and "parallel.expert=5" in str(caught.value)


@pytest.mark.parametrize(
    "world_size, parallel",
    [
        (16, ParallelConfig(tensor=2, pipeline=2, expert=4, expert_tensor=1)),
        (16, ParallelConfig(tensor=4, pipeline=2, expert=1, expert_tensor=2)),
        (8, ParallelConfig(tensor=2, context=2)),
        (8, ParallelConfig()),
    ],
)
def test_rank_groups_are_megatron_cores(world_size, parallel):
    from megatron_m1.platform import setup

    setup()
    from megatron.core.parallel_state import RankGenerator

    config = Config(parallel=parallel)
    sizes = derived(config, world_size)
    order = "tp-cp-ep-dp-pp"
    dense = RankGenerator(
        tp=parallel.tensor, ep=1, dp=sizes.data, pp=parallel.pipeline, cp=parallel.context, order=order
    )
    expert = RankGenerator(
        tp=sizes.expert_tensor, ep=parallel.expert, dp=sizes.expert_data, pp=parallel.pipeline, cp=1, order=order
    )
    groups = rank_groups(parallel, world_size)
    for kind, generator, token in (
        ("tensor", dense, "tp"),
        ("context", dense, "cp"),
        ("data", dense, "dp"),
        ("pipeline", dense, "pp"),
        ("expert_tensor", expert, "tp"),
        ("expert", expert, "ep"),
        ("expert_data", expert, "dp"),
    ):
        assert sorted(groups[kind]) == sorted(map(list, generator.get_ranks(token))), kind
    assert len(groups) == 7
