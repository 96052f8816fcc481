import pytest

from megatron_m1.config import Config, load_config
from megatron_m1.config.layout import head_chunk_tokens
from megatron_m1.engine.memory import estimate_memory, head_chunks, stage_layers

GIB = 2**30


@pytest.mark.parametrize(
    "world_size, pipeline, expert, state, total", [(128, 4, 32, 56, 66), (256, 8, 8, 47, 58), (512, 8, 8, 37, 47)]
)
def test_the_layout_table_of_the_released_model(world_size, pipeline, expert, state, total):
    """GiB per GPU at 32K: full recompute, bf16 gradients. The fullest stage is the last, whose head is fp32."""
    config = load_config(
        ["--parallel.tensor=8", f"--parallel.pipeline={pipeline}", f"--parallel.expert={expert}"]
        + ["--parallel.expert_tensor=1", "--training.recompute=full", "--training.grad_reduce_dtype=bf16"]
        + ["--training.seq_length=32768", "--training.global_batch=512"]
    )
    stages = estimate_memory(config, world_size)
    assert len(stages) == pipeline
    assert max(stage.state for stage in stages) / GIB == pytest.approx(state, abs=2)
    assert max(stage.total for stage in stages) / GIB == pytest.approx(total, abs=5)


@pytest.mark.parametrize(
    "world_size, context, state, total", [(256, 16, 50, 71), (512, 32, 40, 51)], ids=["256 GPUs", "512 GPUs"]
)
def test_the_layout_table_at_a_million_tokens(world_size, context, state, total):
    config = load_config(
        ["--parallel.tensor=8", "--parallel.pipeline=2", f"--parallel.context={context}", "--parallel.expert=32"]
        + ["--parallel.expert_tensor=1", "--training.recompute=full", "--training.grad_reduce_dtype=bf16"]
        + ["--training.seq_length=1048576", "--training.global_batch=16"]
    )
    stages = estimate_memory(config, world_size)
    assert max(stage.state for stage in stages) / GIB == pytest.approx(state, abs=2)
    assert max(stage.total for stage in stages) / GIB == pytest.approx(total, abs=5)


def test_logits_of_one_chunk():
    config = load_config(["--parallel.tensor=8", "--training.seq_length=65536"])
    assert head_chunk_tokens(config) == 21467
    rows, hidden = 200064 // 8, 6144
    assert head_chunks(config) == 4  # 2**31 / (4 * 25008) = 21467 tokens at most
    assert estimate_memory(config, 8)[0].logits == 4 * (16384 * (rows + 2 * hidden) + rows * hidden)
    config.training.head_chunk_tokens = 65536
    assert head_chunks(config) == 1
    config.parallel.context = 4
    assert estimate_memory(config, 32)[0].logits == 4 * (16384 * (rows + 2 * hidden) + rows * hidden)


def test_context_ranks_share_the_optimizer_and_the_tokens():
    one, two = estimate_memory(tiny(), 2)[0], estimate_memory(tiny(context=2), 2)[0]
    assert two.state == one.state and two.activations == one.activations / 2
    # 8-token blocks of K and V (2 x 2 heads x 8), twice, with fp32 gradients; states of 4 heads, 2 chunks x 2 ranks x 2 passes.
    assert one.buffers == 0 and two.buffers == 2 * (2 * 16 * 16) * (2 + 4) + 2 * 2 * 2 * 4 * 8 * 8 * 4


def tiny(**parallel):
    config = Config()
    model = config.model
    model.vocab_size, model.hidden_size, model.num_hidden_layers, model.head_dim = 64, 16, 8, 8
    model.num_attention_heads, model.num_key_value_heads, model.intermediate_size = 4, 2, 24
    model.num_local_experts = 4
    config.training.seq_length = 32
    for key, value in parallel.items():
        setattr(config.parallel, key, value)
    return config


def test_state_in_fp32_is_sixteen_bytes_per_parameter():
    from megatron_m1.engine.flops import count_parameters

    config = tiny()
    config.training.precision = "fp32"
    parameters = count_parameters(config.model).total
    (estimate,) = estimate_memory(config, 1)
    assert estimate.state == 16 * parameters
    (shared,) = estimate_memory(config, 4)
    assert shared.state == (8 + 8 / 4) * parameters
    config.parallel.distributed_optimizer = False
    assert estimate_memory(config, 4)[0].state == 16 * parameters


def test_recomputation_and_sequence_parallelism_save_activations():
    def activations(recompute, **parallel):
        config = tiny(**parallel)
        config.training.recompute = recompute
        return estimate_memory(config, 2)[0].activations

    assert activations("none") > activations("selective") > activations("full")
    assert activations("none", tensor=2, sequence=False) > activations("none", tensor=2)


def test_stages_of_the_interleaved_schedule():
    config = tiny(pipeline=2, virtual_pipeline=2)
    assert stage_layers(config, 0) == [0, 1, 4, 5] and stage_layers(config, 1) == [2, 3, 6, 7]


def test_what_the_update_holds_beside_the_state():
    """The fp32 copy of bf16 gradients, sharded with the optimizer, and the weights that layer statistics compare with."""
    config = tiny(distributed_optimizer=False)
    plain = estimate_memory(config, 2)[0]
    assert plain.update == 0
    config.training.grad_reduce_dtype = "bf16"
    copied = estimate_memory(config, 2)[0]
    low = plain.gradients - copied.gradients  # 2 bytes less for each bf16 parameter
    assert copied.update == 2 * low > 0
    config.parallel.distributed_optimizer = True
    assert estimate_memory(config, 2)[0].update == low
    config.logging.layer_stats_every_steps = 10
    both = estimate_memory(config, 2)[0]
    assert both.update == low + both.weights
    assert both.total == both.state + max(both.activations + both.logits, both.update) + both.buffers
