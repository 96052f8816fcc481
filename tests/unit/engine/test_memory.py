import json
from pathlib import Path

import pytest
import yaml

from megatron_m1.config import Config, from_yaml, load_config
from megatron_m1.config.layout import head_chunk_tokens
from megatron_m1.config.schema import ParallelConfig, TrainingConfig
from megatron_m1.engine.memory import estimate_memory, head_chunks, stage_layers

GIB = 2**30
RESULTS = Path(__file__).parents[3] / "benchmarks" / "results"


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
    # That table took more activations.
    assert max(stage.total for stage in stages) / GIB == pytest.approx(total, abs=10)


@pytest.mark.parametrize("result", sorted(RESULTS.glob("any_rank_*.json")), ids=lambda path: path.stem)
def test_the_peak_of_measured_ranks(result, tmp_path):
    """Ranks of the 456B layouts on one H200, balanced experts: state exactly, the peak within 3%."""
    found = json.loads(result.read_text())
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(found["config"]))
    stages = estimate_memory(from_yaml(tmp_path / "config.yaml"), 512)
    measured = [row for row in found["ranks"] if "measured" in row]
    assert measured
    for row in measured:
        estimate, seen = stages[row["stage"]], row["measured"]
        held = seen["weight_bytes"] + seen["gradient_bytes"] + seen["optimizer_bytes"]
        assert estimate.state == pytest.approx(held, rel=1e-3)
        assert estimate.total == pytest.approx(seen["peak_bytes"], rel=0.03)


def test_what_a_layer_keeps_is_what_was_measured():
    """benchmarks/results/long_context.json, one layer of M1 at true width. Its bytes do not count two of the four [tokens, hidden] tensors
    that stay in a stack of layers, the layer's input and its output."""
    rows = json.loads((RESULTS / "long_context.json").read_text())["points"]
    checked = 0
    for row in rows:
        point = row["point"]
        if point["part"] == "context_share" or point["tokens"] < 2**15 or "kept_bytes" not in row:
            continue
        config = load_config(["--model.num_hidden_layers=3", "--model.attn_type_list=[0,0,0]"])
        config.model.attn_type_list = [{"lightning": 0, "softmax": 1}[point["kind"]]] * 3
        config.parallel = ParallelConfig(tensor=point["tensor"], pipeline=3, expert=32, expert_tensor=1)
        config.training = TrainingConfig(
            seq_length=point["tokens"],
            global_batch=96,
            precision="bf16",
            recompute=point["recompute"],
            recompute_modules=["core_attn", "moe"],
        )
        # The second stage has one micro-batch more in flight than the third.
        one, two = (estimate_memory(config, 96)[stage].activations for stage in (2, 1))
        ends = 2 * point["tokens"] / point["tensor"] * 6144 * 2
        assert two - one - ends == pytest.approx(row["kept_bytes"], rel=0.04), point
        checked += 1
    assert checked >= 9


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
        config.training.recompute, config.training.recompute_modules = recompute, ["moe"]
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
