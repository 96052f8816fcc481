"""Terms of a step against arithmetic done by hand on round numbers."""

from dataclasses import replace

import pytest

from megatron_m1.config.schema import Config, ModelConfig, ParallelConfig, TrainingConfig
from megatron_m1.engine import context_exchange
from megatron_m1.engine import step_time as step_time_module
from megatron_m1.engine.cluster import Cluster
from megatron_m1.engine.rates import Rates
from megatron_m1.engine.step_time import stage_balance, step_time

CLUSTER = Cluster(
    gpus=8, gpus_per_node=4, memory_gib=80, memory_tb_per_s=4.8, nvlink_gb_per_s=1.25, network_gb_per_s=0.125,
    rates=Rates(
        dense_tflops=700, grouped_tflops=600, grouped_small_tflops=410, softmax_tflops=554, softmax_backward_tflops=390,
        fp32_tflops=50, copy_share=4.3 / 4.8, nvlink_share=0.8, network_share=0.8, lightning_layer=1, softmax_layer=1,
        forward_wait_s=0, layer_host_s=0, softmax_context=1, softmax_context_flash=1,
    ),
)  # fmt: skip
MODEL = ModelConfig(
    vocab_size=1000, hidden_size=100, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=50,
    intermediate_size=30, num_local_experts=4, num_experts_per_tok=2, attn_type_list=[0, 0, 0, 1],
)  # fmt: skip
SLOW_LINKS = replace(CLUSTER, nvlink_gb_per_s=1e-5)
TOKENS = 4096
COMPUTE = ("gemm", "experts", "lightning", "softmax", "elementwise", "head")


def config(*, recompute="none", modules=("core_attn",), **parallel) -> Config:
    training = TrainingConfig(
        seq_length=TOKENS, micro_batch=1, global_batch=8, recompute=recompute, recompute_modules=list(modules)
    )
    return Config(model=MODEL, parallel=ParallelConfig(**parallel), training=training)


def test_compute_of_one_rank():
    """Eight data-parallel ranks, one sequence each."""
    time = step_time(config(), CLUSTER)
    lightning, softmax = 5 * 100 * 200, 2 * 100 * 200 + 2 * 100 * 100
    assert time.gemm == pytest.approx(3 * 2 * TOKENS * (3 * lightning + softmax) / 700e12)
    routed = 2 * TOKENS  # over 4 experts: 2048 rows each
    assert time.experts == pytest.approx(4 * 3 * 6 * routed * 100 * 30 / 600e12)
    assert time.softmax == pytest.approx(2 * 200 * TOKENS**2 * (1 / 554e12 + 2.5 / 390e12))
    assert time.lightning == pytest.approx(3 * TOKENS * 200 * 2 / 4.3e12 * (4 / 0.71 + 7 / 0.34 + 12))
    # The last 400: four experts on one rank, sorted there and back.
    assert time.elementwise == pytest.approx(
        3 * 2 * (4 * (10 * TOKENS * 100 + routed * (400 + 90 + 400)) + 3 * 4 * TOKENS * 200) / 4.3e12
    )
    assert time.head == pytest.approx(3 * 2 * TOKENS * 100 * 1000 / 50e12)
    assert time.tensor == time.all_to_all == time.ring == time.states == time.pipeline == time.bubble == 0
    assert time.imbalance == 0
    assert time.total == pytest.approx(sum(vars(time).values()))


def test_factors_of_whole_layers_leave_the_attention_kernel_and_the_head():
    plain = step_time(config(), CLUSTER)
    lightning = step_time(config(), replace(CLUSTER, rates=replace(CLUSTER.rates, lightning_layer=3)))
    softmax = step_time(config(), replace(CLUSTER, rates=replace(CLUSTER.rates, softmax_layer=3)))
    assert lightning.lightning == pytest.approx(3 * plain.lightning) and softmax.lightning == plain.lightning
    assert (lightning.softmax, lightning.head) == (softmax.softmax, softmax.head) == (plain.softmax, plain.head)
    for name in ("gemm", "experts", "elementwise"):
        rises = [getattr(time, name) - getattr(plain, name) for time in (lightning, softmax)]
        assert min(rises) > 0 and sum(rises) == pytest.approx(2 * getattr(plain, name))


def test_layers_take_at_least_the_hosts_time():
    plain = step_time(config(), CLUSTER)
    waiting = step_time(config(), replace(CLUSTER, rates=replace(CLUSTER.rates, layer_host_s=1.0)))
    work = plain.gemm + plain.experts + plain.lightning + plain.softmax + plain.elementwise
    assert plain.launch == 0 and waiting.launch == pytest.approx(4 * 1.0 - work)  # 4 layers, one micro-batch
    assert waiting.head == plain.head


def test_the_device_waits_in_every_forward_pass():
    def launch(host_s=0.0, **options):
        cluster = replace(CLUSTER, rates=replace(CLUSTER.rates, forward_wait_s=0.25, layer_host_s=host_s))
        return step_time(config(**options), cluster).launch

    assert launch() == launch(recompute="selective", modules=["core_attn"]) == 4 * 0.25
    assert launch(recompute="full") == launch(recompute="selective", modules=["moe"]) == 4 * 0.5
    # They are part of the host's time for a layer, not on top of it.
    assert launch(1.0) == pytest.approx(4 * 1.0, rel=0.01) and launch(0.25) == 4 * 0.25


def test_the_head_computes_a_fourth_product_in_chunks():
    whole, chunks = config(), config()
    chunks.training.head_chunk_tokens = TOKENS // 2
    assert step_time(chunks, CLUSTER).head == pytest.approx(step_time(whole, CLUSTER).head * 4 / 3)


@pytest.mark.parametrize(
    "precision, products, one_chunk, chunks",
    [("bf16", "bf16x3", 2 + 3 + 2, 9), ("bf16", "bf16x6", 3 + 6 + 3, 15), ("fp32", "bf16x3", 9, 12), ("fp32", "bf16x6", 18, 24)],
)  # fmt: skip
def test_the_head_in_bf16_parts(precision, products, one_chunk, chunks):
    cluster = replace(CLUSTER, rates=replace(CLUSTER.rates, head_split_tflops=100))
    for tokens, count in ((TOKENS, one_chunk), (TOKENS // 2, chunks)):
        split = config()
        split.training.precision, split.training.head_products = precision, products
        split.training.head_chunk_tokens = tokens
        assert step_time(split, cluster).head == pytest.approx(count * 2 * TOKENS * 100 * 1000 / 100e12)


def test_recomputation_repeats_the_forward_of_its_modules_only():
    none, core, moe, full = (
        step_time(config(recompute=mode, modules=modules), CLUSTER)
        for mode, modules in (
            ("none", ["core_attn"]), ("selective", ["core_attn"]), ("selective", ["moe"]), ("full", ["core_attn"])
        )
    )  # fmt: skip
    assert full.gemm == pytest.approx(none.gemm * 4 / 3) and core.gemm == moe.gemm == none.gemm
    assert moe.experts == full.experts == pytest.approx(none.experts * 4 / 3) and core.experts == none.experts
    assert core.softmax == full.softmax > none.softmax == moe.softmax
    assert full.head == none.head


def test_communication_inside_layers():
    time = step_time(config(tensor=2, expert=4, expert_tensor=1), CLUSTER)
    hidden = TOKENS * 100 * 2
    # 4 data-parallel ranks, 2 sequences each. Gathers of half the hidden states at 1 GB/s: 3 + 5 a lightning layer, 2 + 3 a softmax.
    assert time.tensor == pytest.approx(2 * (3 * 8 + 5) * hidden / 2 / 1e9)
    # Two copies of half the tokens, three quarters of them to other ranks, four times forth and back.
    assert time.all_to_all == pytest.approx(2 * 4 * 4 * (hidden / 2 * 2 * 3 / 4) / 1e9)
    without = step_time(config(tensor=2, sequence=False, expert=4, expert_tensor=1), CLUSTER)
    assert without.tensor == pytest.approx(2 * (3 * 8 + 6) * hidden / 2 / 1e9)


def test_expert_tensor_groups_exchange_in_fp32_and_again_when_recomputed():
    time = step_time(config(tensor=2, expert=2, expert_tensor=2), CLUSTER)
    # Two copies of half the tokens, half of them to other nodes' experts; what arrives, gathered over two ranks in bf16 and added up
    # in fp32; forth and back, 2 micro-batches, 4 layers.
    routed = TOKENS * 100 * 2 / 2 * 2
    one = 2 * routed / 2 / 1e9 + 3 * routed / 1e9
    assert time.all_to_all == pytest.approx(2 * 4 * 2 * one)
    again = step_time(config(tensor=2, expert=2, expert_tensor=2, recompute="selective", modules=["moe"]), CLUSTER)
    assert again.all_to_all == pytest.approx(1.5 * time.all_to_all) and again.tensor == time.tensor
    without = step_time(config(tensor=2, expert=2, expert_tensor=1), CLUSTER)
    rows = 2 * TOKENS / 2 * 100 * 2  # bytes of the copies of a rank's tokens
    # Sorted by expert on either: twice the rows under expert tensor parallelism, which also turns them into fp32.
    assert time.elementwise - without.elementwise == pytest.approx(2 * 4 * 3 * rows * (2 * (4 + 3) - 4) / 4.3e12)


def test_communication_between_context_ranks():
    time = step_time(config(context=4, context_softmax="ring"), CLUSTER)
    compute = 2 * 200 * TOKENS * 1024
    block = 2 * 1024 * 100 * 2  # K and V of a rank, bf16
    forward = 3 * block / 1e9 - compute / 554e12
    backward = 3 * 3 * block / 1e9 - 2.5 * compute / 390e12
    # 2 data-parallel ranks: 4 micro-batches
    assert time.ring == pytest.approx(4 * (forward + backward))
    gathered = step_time(config(context=4), CLUSTER)  # of 3.1 MiB, which nothing hides
    assert gathered.ring == pytest.approx(4 * 4 * 3 * block / 1e9)
    assert time.states == pytest.approx(4 * 3 * 2 * (2 * 3 * 4 * 4 * 50 * 50) / 1e9)
    assert step_time(config(context=8), CLUSTER).states > 10 * time.states  # over the network


def test_states_of_many_documents():
    one, document, short, long = (
        step_time(config(context=4, context_layout=layout), CLUSTER, document_tokens=tokens).states
        for layout, tokens in (("sequence", None), ("document", 128), ("sequence", 512), ("sequence", 513))
    )
    # Each of them, with 3.5 tokens of padding, crosses all borders.
    assert document == pytest.approx(TOKENS / (128 + 3.5) * one)
    # No document of a pack that is no longer than a chunk crosses two borders: two neighbours' states and none of 6 others.
    assert short == pytest.approx(one / 3) and long == one
    ring = step_time(
        config(context=4, context_layout="document", context_lightning="ring"), CLUSTER, document_tokens=128
    )
    assert ring.states == document


def test_which_exchange_auto_takes():
    methods = [
        context_exchange.state_exchange(million(layout), document_tokens=4096).method
        for layout in ("sequence", "document")
    ]
    assert methods == ["all_gather", "ring"]
    keys = [context_exchange.key_value_exchange(million("sequence", length)).method for length in (2**17, 2**17 + 64)]
    assert keys == ["all_gather", "ring"]  # 64 MiB of one head of 128, bf16


def million(layout, length=2**20):
    parallel = ParallelConfig(tensor=8, context=32, context_layout=layout)
    return Config(parallel=parallel, training=TrainingConfig(seq_length=length))


def test_recomputation_does_not_repeat_attention_over_context_ranks():
    def terms(method, modules, **options):
        cut = config(context=4, context_softmax=method, recompute="selective", modules=modules)
        return step_time_module.stage_seconds(cut, SLOW_LINKS, **options)[0]

    for modules in (["moe"], ["core_attn"]):
        assert terms("ring", modules)["softmax"] == terms("ring", ["moe"])["softmax"]
        assert terms("all_gather", modules)["ring"] == terms("all_gather", ["moe"])["ring"] > 0
    plain = terms("ring", ["core_attn"])
    for repeated in (terms("ring", ["core_attn"], kept_attention=False), terms("transformer_engine", ["core_attn"])):
        assert repeated["softmax"] > 1.2 * plain["softmax"] and repeated["ring"] > 1.2 * plain["ring"]
        assert repeated["states"] == plain["states"] and repeated["lightning"] == plain["lightning"]


def test_blocks_of_whole_sequences_are_cudnns_and_those_of_packs_flashs():
    rates = replace(CLUSTER.rates, softmax_context=2.0, softmax_context_flash=3.0)

    def softmax(context, **options):
        cluster = replace(CLUSTER, rates=rates)
        return step_time_module.stage_seconds(config(context=context), cluster, **options)[0]["softmax"]

    assert softmax(4) == pytest.approx(2 * softmax(1) / 4)
    assert softmax(4, cudnn_blocks=False) == pytest.approx(3 * softmax(1) / 4)
    assert softmax(4, document_tokens=TOKENS) == softmax(4)
    assert softmax(4, document_tokens=TOKENS // 2) == pytest.approx(3 / 2 * softmax(1) / 4)
    assert softmax(1, cudnn_blocks=False) == softmax(1)


def test_both_exchanges_choose_as_the_layers_do():
    """By the code that runs, over sizes around the limit."""
    import torch

    from megatron_m1.model.softmax import _method
    from megatron_m1.parallel import SequenceLayout
    from megatron_m1.parallel.lightning_exchange import exchange_method
    from megatron_m1.parallel.state_chain import state_chains

    taken = set()
    for context, documents in ((4, 1), (4, 64), (4, 128), (16, 16), (16, 32)):
        length = documents * 1024
        cut = million("document", length)
        cut.parallel.context = context
        edges = range(0, length + 1, 1024)
        layout = SequenceLayout.per_document(world=context, rank=0, cu_seqlens=list(edges))
        chains = state_chains(layout, torch.device("cpu"))
        state_bytes = 8 * 128 * 128 * 4
        unpadded = 1024 - (2 * context - 1) / 2
        found = context_exchange.state_exchange(cut, document_tokens=unpadded if documents > 1 else None).method
        assert found == exchange_method("auto", chains=chains, world=context, state_bytes=state_bytes)
        keys = torch.empty(1, length // context, 1, 128, dtype=torch.bfloat16, device="meta")
        taken |= {found, context_exchange.key_value_exchange(cut).method}
        assert context_exchange.key_value_exchange(cut).method == _method("auto", keys, world=context)
    assert taken == {"ring", "all_gather"}


def test_pipeline_terms_add_up_to_the_schedule():
    """1F1B takes (micro-batches - 1) of the slowest stage and one of every stage; interleaving divides the rest."""
    for chunks in (1, 2):
        time = step_time(config(pipeline=2, virtual_pipeline=chunks), CLUSTER)  # 4 ranks, 2 micro-batches
        mean = sum(getattr(time, name) for name in COMPUTE) / 2
        slowest = mean + time.imbalance / 2
        assert time.bubble == pytest.approx((2 * mean - slowest) / chunks)
        assert time.pipeline == pytest.approx(2 * 2 * chunks * (TOKENS * 100 * 2) / 0.1e9)
    assert time.imbalance > 0  # the softmax layer and the head are on the last stage


def test_gradients_hide_behind_the_last_micro_batch():
    plain = step_time(config(), CLUSTER)
    lightning, softmax = 5 * 100 * 200, 2 * 100 * 200 + 2 * 100 * 100
    dense = 3 * lightning + softmax + 4 * 4 * 100 + 2 * 1000 * 100
    experts = 4 * 4 * 3 * 100 * 30
    assert plain.data == pytest.approx((dense + experts) * (4 + 2) * 7 / 8 / 0.1e9)
    overlapped = config(overlap_grad_reduce=True, overlap_param_gather=True)
    one = sum(getattr(plain, name) for name in COMPUTE)
    assert step_time(overlapped, CLUSTER).data == pytest.approx(plain.data - one)
    total = dense + experts + 3 * 200 + 4 * 200 + 100  # norms too
    assert plain.update == pytest.approx(30 * total / 8 / 4.3e12, rel=0.1)


def test_the_ring_is_taken_from_the_size_on_from_which_the_layers_take_it():
    from megatron_m1.parallel.traffic import AUTO_RING_BYTES, method_by_size

    for size, method in ((AUTO_RING_BYTES, "all_gather"), (AUTO_RING_BYTES + 1, "ring")):
        assert (
            method_by_size("auto", size, of="keys", world=2) == context_exchange.context_method("auto", size) == method
        )


def test_attention_does_not_look_beyond_a_document():
    whole, packed = (step_time(config(), CLUSTER, document_tokens=tokens) for tokens in (None, TOKENS // 4))
    assert packed.softmax == pytest.approx(whole.softmax / 4) and packed.gemm == whole.gemm


@pytest.mark.parametrize("stages, balance", [(1, 1.0), (2, 1.0), (4, 0.89), (5, 1.0), (8, 0.72), (10, 1.0)])
def test_softmax_layers_unbalance_the_stages_at_a_million_tokens(stages, balance):
    million = Config(parallel=ParallelConfig(pipeline=stages), training=replace(TrainingConfig(), seq_length=2**20))
    assert stage_balance(million) == pytest.approx(balance, abs=0.005)
