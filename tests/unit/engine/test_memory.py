import json
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_m1.config import Config, from_yaml, load_config
from megatron_m1.config.layout import head_chunk_tokens
from megatron_m1.config.schema import ParallelConfig, TrainingConfig
from megatron_m1.engine.context_exchange import state_exchange
from megatron_m1.engine.memory import estimate_memory, head_chunks, stage_layers
from megatron_m1.model.transformer_config import core_config

GIB = 2**30
RESULTS = Path(__file__).parents[3] / "benchmarks" / "results"
CONFIGS = Path(__file__).parents[3] / "examples" / "configs"


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
    plain = estimate_memory(config, 32)[0].logits
    # Two parts of the weight, the hidden states, a part of the logits' gradient.
    config.training.head_products = "bf16x3"
    parts = 2 * (2 * rows * hidden + 16384 * hidden + 16384 * rows)
    assert estimate_memory(config, 32)[0].logits == pytest.approx(plain + parts)
    config.training.head_products = "bf16x6"
    assert estimate_memory(config, 32)[0].logits == pytest.approx(plain + parts + 2 * rows * hidden)
    # Three parts of the hidden states, and few of these, so that making parts of the weight takes more than the gradient's.
    config.training.precision, config.training.head_chunk_tokens = "fp32", 1024
    small = 4 * (1024 * (rows + 2 * hidden) + rows * hidden)
    parts = 2 * 3 * (rows * hidden + 1024 * hidden) + 4 * rows * hidden
    assert estimate_memory(config, 32)[0].logits == pytest.approx(small + parts)


def test_context_ranks_share_the_optimizer_and_the_tokens():
    one, two = estimate_memory(tiny(), 2)[0], estimate_memory(tiny(context=2, context_softmax="ring"), 2)[0]
    # Each of 7 lightning layers keeps the states that entered its two chunks: 4 heads of 8 x 8 fp32 numbers.
    states = 2 * 4 * 8 * 8 * 4
    assert two.state == one.state and two.activations == one.activations / 2 + 7 * states
    # 16-token blocks of K and V (2 x 2 heads x 8), twice, with fp32 gradients; states of two ranks and three times their own.
    assert one.buffers == 0 and two.buffers == 2 * (2 * 16 * 16) * (2 + 4) + (2 + 3) * states


def test_keys_and_values_gathered_or_from_rank_to_rank():
    ring, gathered, chosen = (
        estimate_memory(tiny(context=4, context_softmax=method), 4)[0] for method in ("ring", "all_gather", "auto")
    )
    numbers = 2 * 32 * 2 * 8  # K and V of 32 tokens, 2 heads of 8
    # Two bf16 copies of all of them and three of their gradients in fp32, against two blocks of a quarter of the tokens.
    assert gathered.buffers - ring.buffers == numbers * (2 * 2 + 3 * 4) - 2 * numbers / 4 * (2 + 4)
    assert chosen == gathered and ring.activations == gathered.activations
    long = tiny(context=4)
    long.training.seq_length = 2**22  # 2**27 numbers, 256 MiB
    assert estimate_memory(long, 4) == estimate_memory(with_method(long, "ring"), 4)
    assert estimate_memory(long, 4)[0].buffers < estimate_memory(with_method(long, "all_gather"), 4)[0].buffers


class Live(TorchDispatchMode):
    """`peak`: the most bytes of storages made by operations that were there at once."""

    def __init__(self):
        super().__init__()
        self.sizes, self.peak = {}, 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        out = function(*arguments, **(options or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and x.untyped_storage()._cdata not in self.sizes:
                storage = x.untyped_storage()
                self.sizes[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self.sizes.pop, storage._cdata, None)
        self.peak = max(self.peak, sum(self.sizes.values()))
        return out


def with_method(config, method):
    return replace(config, parallel=replace(config.parallel, context_softmax=method))


def test_states_of_many_documents():
    """512 a head and lightning layer where all of 256 documents cross all borders of 32 ranks; two where the pack is cut as a whole."""
    million = ["--config", f"{CONFIGS}/m1_456b.yaml", "--config", f"{CONFIGS}/m1_456b_1m_512gpu.yaml"]
    million += "--parallel.tensor=8 --parallel.pipeline=2 --parallel.virtual_pipeline=5 --parallel.last_stage_layers=null".split()
    document = load_config([*million, "--parallel.context_layout=document", "--training.recompute=none"])
    pack = load_config([*million, "--training.recompute=none"])
    one, many, cut = (
        estimate_memory(config, 512, document_tokens=tokens)[1]
        for config, tokens in ((document, None), (document, 4096), (pack, 4096))
    )
    state = 8 * 128 * 128 * 4
    assert cut == one
    held = 2 * (2**20 / (4096 + 31.5)) * state  # half of 63 tokens is the padding of a document, which seq_length has
    assert held == pytest.approx(256 * 2**20, rel=0.01)
    # 35 of the 40 layers, with 10 of 5 chunks in flight at most: 9/5 of a micro-batch on the last stage.
    assert many.activations - one.activations == pytest.approx(9 / 5 * 35 * (held - 2 * state))
    # One is gathered from 32 ranks, many, of which that would bring 8 GiB, are handed on.
    assert many.buffers - one.buffers == pytest.approx(4 * held - (32 + 3) * 2 * state)


@pytest.mark.parametrize("method", ["ring", "all_gather"])
def test_states_that_an_exchange_holds_at_its_peak(method):
    """The exchange of a context-parallel rank, its storages counted; tokens so few that next to nothing but states is left."""
    import torch

    from benchmarks.fake_ranks import fake_rank
    from megatron_m1.parallel import SequenceLayout
    from megatron_m1.parallel.lightning_context import LightningContext

    world, documents, length, heads, dim = 8, 8, 16, 2, 128
    parallel = ParallelConfig(
        context=world, context_layout="document", context_lightning=method, context_softmax="ring"
    )
    config = tiny()
    config.model.num_attention_heads, config.model.head_dim, config.parallel = heads, dim, parallel
    config.training.seq_length = documents * length
    unpadded = length - (2 * world - 1) // 2 - 0.5
    exchange = state_exchange(config, document_tokens=unpadded)
    keys = 2 * documents * length / world * config.model.num_key_value_heads * dim
    held = exchange.held_bytes
    predicted = estimate_memory(config, world, document_tokens=unpadded)[0].buffers - 2 * keys * (2 + 4)
    with fake_rank(3, world, parallel) as (groups, _):
        edges = range(0, documents * length + 1, length)
        layout = SequenceLayout.per_document(world=world, rank=3, cu_seqlens=list(edges))
        slopes = torch.tensor([1e-4, 2e-4])
        context = LightningContext(groups.cp, slopes.tolist(), method=method)
        q, k, v = (torch.randn(1, layout.local_tokens, heads, dim, requires_grad=True) for _ in range(3))
        with Live() as live:
            context.start(q, k, v, slopes, layout)().sum().backward()
    assert exchange.method == method and held == 2 * documents * heads * dim**2 * 4
    # One of them is what the layer keeps.
    assert predicted + held == pytest.approx(live.peak, rel=0.1)


def test_recomputation_keeps_the_result_of_attention_over_context_ranks():
    def activations(context, recompute, method="ring"):
        config = tiny(context=context, context_softmax=method)
        config.training.recompute, config.training.recompute_modules = recompute, ["core_attn"]
        return estimate_memory(config, 4)[0].activations

    tokens, heads, one_layer = 16, 4, 1
    sums = one_layer * tokens * heads * 4
    assert activations(2, "full") - activations(2, "full", "transformer_engine") == tokens * heads * 8 * 2 + sums
    # Its output is kept for the projection in any case.
    assert activations(2, "selective") - activations(2, "selective", "transformer_engine") == sums
    assert activations(1, "full") == activations(1, "full", "transformer_engine")


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


@pytest.mark.parametrize("pipeline, chunks, last", [(2, 1, 1), (3, 1, 2), (3, 1, 6), (2, 2, 2), (4, 1, 2), (4, 2, 2)])
def test_layers_of_a_smaller_last_stage_are_where_core_puts_them(pipeline, chunks, last):
    config = tiny(pipeline=pipeline, virtual_pipeline=chunks, last_stage_layers=last)
    core = core_config(config)
    stages = []
    for stage in range(pipeline):
        places = [
            (get_transformer_layer_offset(core, chunk, stage), get_num_layers_to_build(core, chunk, stage))
            for chunk in range(chunks)
        ]
        stages.append(stage_layers(config, stage))
        assert stages[-1] == [first + i for first, count in places for i in range(count)]
    assert len(stages[-1]) == last and sorted(layer for layers in stages for layer in layers) == list(
        range(config.model.num_hidden_layers)
    )


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
