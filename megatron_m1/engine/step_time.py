"""Estimated time of one optimizer step, term by term."""

from dataclasses import dataclass, fields, replace

from megatron_m1.config.layout import derived, head_parts
from megatron_m1.config.schema import Config
from megatron_m1.engine.cluster import Cluster
from megatron_m1.engine.context_exchange import keeps_attention, key_value_exchange, rank_tokens, state_exchange
from megatron_m1.engine.flops import layer_parameters, training_flops_per_token
from megatron_m1.engine.memory import estimate_memory, head_chunks, stage_layers
from megatron_m1.engine.rates import Rates

__all__ = ["COMPUTE", "StepTime", "forward_waits", "stage_balance", "stage_seconds", "step_time"]

COMPUTE = ("gemm", "experts", "lightning", "softmax", "elementwise", "head")
"""Terms of `stage_seconds` that are work of the GPU itself; the others are communication."""

# Lightning attention in passes over one [tokens, heads, head_dim] tensor at copy speed: the floor over the share of it that was
# measured (4 / 0.71 forward, 7 / 0.34 backward), and SiLU over q, k and v each way.
_LIGHTNING_PASSES = (4 / 0.71 + 6, 7 / 0.34 + 6)
_NORM_PASSES = 10  # over [tokens, hidden] in a layer's forward: two norms, two scaled residuals
_GATE_PASSES = 4  # over [tokens, heads, head_dim]: the norm and gate behind lightning attention
_ROUTED_HIDDEN_PASSES, _ROUTED_INNER_PASSES = 4, 3  # permuting, unpermuting; SwiGLU
_SORT_PASSES = 4  # over the tokens at their experts, where a rank has several: by expert and back
_CAST_PASSES = 3  # the same tokens to fp32, in which core adds them up over an expert-tensor group
_UPDATE_BYTES = 30  # per parameter: fp32 weight and both moments read and written, gradient read, 16-bit weight written
_BF16 = 2


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step by what they are spent on; the first eleven are means over the stages, whose spread is `imbalance`."""

    gemm: float
    """Dense matrix products of attention and shared experts."""
    experts: float
    lightning: float
    softmax: float
    elementwise: float
    head: float
    tensor: float
    """Gathers and scatters of tensor parallelism."""
    all_to_all: float
    """Tokens to their experts and back, to all ranks of an expert-tensor group."""
    ring: float
    """K and V between context-parallel ranks: of the ring what softmax attention does not hide, an all-gather as it is."""
    states: float
    """Lightning states between context-parallel ranks, gathered or from hop to hop, nothing hidden."""
    launch: float
    """The device waiting for the host: in forward passes (rates.forward_wait_s), and for layers that it takes longer to queue than they
    take the device (rates.layer_host_s)."""
    imbalance: float
    """The slowest stage over the mean: softmax layers are few, and the last stage has the head."""
    pipeline: float
    """Activations between stages, nothing hidden."""
    bubble: float
    data: float
    """Gradients summed and weights gathered, as far as one micro-batch does not hide them where overlap is on."""
    update: float

    @property
    def total(self) -> float:
        return sum(getattr(self, field.name) for field in fields(self))


_PER_LAYER = ("gemm", "experts", "lightning", "softmax", "elementwise", "tensor", "all_to_all", "ring", "states")
_RECOMPUTED = {
    "full": frozenset(_PER_LAYER),
    "core_attn": frozenset({"lightning", "softmax", "ring", "states"}),
    "moe": frozenset({"experts", "all_to_all", "elementwise"}),
}


def step_time(config: Config, cluster: Cluster, *, document_tokens: int | None = None) -> StepTime:
    """StepTime of a layout that `validate` accepts, in bf16, experts balanced, no network contention.

    document_tokens: length of the packed documents, which softmax attention does not look beyond and each of which has lightning
    states; None: of whole sequences.
    cluster.rates says what sums of such terms were compared with.
    """
    parallel, stages = config.parallel, stage_seconds(config, cluster, document_tokens=document_tokens)
    totals = [sum(terms.values()) for terms in stages]
    slowest, count = max(totals), derived(config, cluster.gpus).micro_batches
    mean = {name: count * sum(terms[name] for terms in stages) / len(stages) for name in stages[0]}
    return StepTime(
        **mean,
        imbalance=count * (slowest - sum(totals) / len(totals)),
        pipeline=count * _neighbours(config, cluster),
        bubble=(sum(totals) - slowest) / parallel.virtual_pipeline,
        data=_data(config, cluster, slowest),
        update=max(_update_bytes(config, cluster.gpus)) / cluster.bytes_per_s,
    )


def stage_seconds(
    config: Config,
    cluster: Cluster,
    *,
    document_tokens: int | None = None,
    kept_attention: bool = True,
    cudnn_blocks: bool = True,
) -> list[dict[str, float]]:
    """Seconds by term that a rank of every pipeline stage, first to last, takes for one micro-batch, recomputation included.

    kept_attention: whether context-parallel ranks keep the result of softmax attention for recomputation. They do; False: as up to
    version a871f37, of which there are measurements.
    cudnn_blocks: whether cuDNN computes attention between context-parallel ranks, as it does on Hopper but for packs. False: flash, as
    up to version 5fb2f68, of which there are measurements.
    """
    parallel, types = config.parallel, config.model.layer_types()
    attended = min(document_tokens or config.training.seq_length, config.training.seq_length)
    rates = cluster.rates
    if not cudnn_blocks or attended < config.training.seq_length:
        cluster = replace(cluster, rates=replace(rates, softmax_context=rates.softmax_context_flash))
    layers = {kind: _layer(config, cluster, kind, document_tokens, kept_attention) for kind in set(types)}
    stages = []
    for stage in range(parallel.pipeline):
        terms = dict.fromkeys((*_PER_LAYER, "head", "launch"), 0.0)
        for layer in stage_layers(config, stage):
            for name, seconds in layers[types[layer]].items():
                terms[name] += seconds
        if stage == parallel.pipeline - 1:
            terms["head"] = _head(config, cluster)
        stages.append(terms)
    return stages


def forward_waits(config: Config, rates: Rates) -> float:
    """Seconds in which the device waits in the forward passes of one layer for one micro-batch, that of recomputation included."""
    return rates.forward_wait_s * (2 if "experts" in _recomputed(config) else 1)


def stage_balance(config: Config) -> float:
    """Mean over maximum of the stages' arithmetic at training.seq_length, without the head."""
    model, length = config.model, config.training.seq_length
    types = model.layer_types()
    cost = {}
    for kind in (0, 1):
        one = replace(model, num_hidden_layers=1, attn_type_list=[kind])
        cost[kind] = training_flops_per_token(one, length) - 6 * model.vocab_size * model.hidden_size
    stages = [sum(cost[types[i]] for i in stage_layers(config, s)) for s in range(config.parallel.pipeline)]
    return sum(stages) / len(stages) / max(stages)


def _layer(
    config: Config, cluster: Cluster, kind: int, document_tokens: int | None, kept_attention: bool
) -> dict[str, float]:
    """Seconds of one layer for one micro-batch by term: forward, backward and what is recomputed."""
    training = config.training
    attended = min(document_tokens or training.seq_length, training.seq_length)
    compute, exchange = _compute(config, cluster, kind, attended), _exchange(config, cluster, kind, document_tokens)
    if kind == 1 and key_value_exchange(config).method != "all_gather":
        hidden = zip(exchange["ring"], compute["softmax"])
        exchange["ring"] = tuple(max(0.0, sent - computed) for sent, computed in hidden)
    again = _recomputed(config)
    if kept_attention and keeps_attention(config):
        again -= {"softmax", "ring"}
    terms = {
        name: backward + forward * (2 if name in again else 1)
        for name, (forward, backward) in (compute | exchange).items()
    }
    rates = cluster.rates
    return terms | {"launch": max(forward_waits(config, rates), rates.layer_host_s - sum(terms.values()))}


def _recomputed(config: Config) -> frozenset[str]:
    """Terms of a layer whose forward part the backward pass repeats."""
    training = config.training
    modules = {"none": [], "full": ["full"], "selective": training.recompute_modules}[training.recompute]
    return frozenset().union(*(_RECOMPUTED[module] for module in modules))


def _compute(config: Config, cluster: Cluster, kind: int, attended: int) -> dict[str, tuple[float, ...]]:
    """(forward, backward) seconds of the kernels; attended: tokens of a document."""
    model, parallel, rates = config.model, config.parallel, cluster.rates
    sizes, tokens = derived(config, cluster.gpus), rank_tokens(config)
    inner = model.num_attention_heads * model.head_dim / parallel.tensor
    parameters = layer_parameters(model, kind)
    dense = (
        2 * tokens * (parameters["attention"] + parameters["shared"]) / parallel.tensor / (rates.dense_tflops * 1e12)
    )
    routed = tokens / parallel.tensor * model.num_experts_per_tok
    rows = routed * sizes.expert_tensor * parallel.expert / model.num_local_experts
    products = 6 * routed * model.hidden_size * model.intermediate_size
    experts = products / (cluster.grouped_tflops(rows) * 1e12)
    passes = _NORM_PASSES * tokens / _sequence_shards(config) * model.hidden_size
    passes += routed * (_ROUTED_HIDDEN_PASSES * model.hidden_size + _ROUTED_INNER_PASSES * model.intermediate_size)
    gathered = routed * sizes.expert_tensor * model.hidden_size
    passes += gathered * (
        _SORT_PASSES * (parallel.expert < model.num_local_experts) + _CAST_PASSES * (sizes.expert_tensor > 1)
    )
    if kind == 0:
        passes += _GATE_PASSES * tokens * inner
    elementwise = passes * _BF16 / cluster.bytes_per_s
    terms: dict[str, tuple[float, ...]] = {
        "gemm": (dense, 2 * dense),
        "experts": (experts, 2 * experts),
        "elementwise": (elementwise, 2 * elementwise),
    }
    if kind == 0:
        one_pass = tokens * inner * _BF16 / cluster.bytes_per_s
        terms["lightning"] = tuple(passes * one_pass for passes in _LIGHTNING_PASSES)
    whole_layer = rates.lightning_layer if kind == 0 else rates.softmax_layer
    terms = {name: tuple(seconds * whole_layer for seconds in both) for name, both in terms.items()}
    if kind == 1:
        flops = 2 * inner * attended * tokens / 1e12  # over half of the keys on average
        flops *= rates.softmax_context if parallel.context > 1 else 1.0
        terms["softmax"] = (flops / rates.softmax_tflops, 2.5 * flops / rates.softmax_backward_tflops)
    return terms


def _exchange(config: Config, cluster: Cluster, kind: int, document_tokens: int | None) -> dict[str, tuple[float, ...]]:
    """(forward, backward) seconds of the communication inside one layer, nothing hidden."""
    model, parallel = config.model, config.parallel
    sizes, tokens = derived(config, cluster.gpus), rank_tokens(config)
    tensor, context = parallel.tensor, parallel.context
    hidden = tokens * model.hidden_size * _BF16
    one = cluster.collective_s(
        hidden * (tensor - 1) / tensor, peers=tensor, stride=1
    )  # a gather, or half an all-reduce
    columns = 2 if kind == 0 else 1  # projections that read the hidden states: lightning has a gate besides qkv
    if sizes.sequence_parallel:
        counts = (columns + 1, 2 * columns + 1)  # backward gathers their inputs again
    else:
        counts = (3, 2 * columns + 1)  # all-reduces are two each; the experts' sequence shards are gathered
    routed = hidden / tensor * model.num_experts_per_tok
    within = sizes.expert_tensor
    split = cluster.collective_s(routed * (within - 1), peers=within, stride=1)
    experts = parallel.expert
    sent = routed * (experts - 1) / experts
    exchange = 2 * cluster.exchange_s(sent, peers=experts, stride=within)
    exchange += 3 * split  # gathered in bf16, added up in fp32; backward the other way round
    terms: dict[str, tuple[float, ...]] = {
        "tensor": (counts[0] * one, counts[1] * one),
        "all_to_all": (exchange, exchange),
    }
    if kind == 1:
        received = key_value_exchange(config).in_turn_bytes
        forward = cluster.collective_s(received, peers=context, stride=tensor)
        terms["ring"] = (forward, 3 * forward)  # K, V and their fp32 gradients
    else:
        received = state_exchange(config, document_tokens=document_tokens).in_turn_bytes
        states = cluster.collective_s(received, peers=context, stride=tensor)
        terms["states"] = (states, states)
    return terms


def _sequence_shards(config: Config) -> int:
    return config.parallel.tensor if derived(config, 1).sequence_parallel else 1


def _head(config: Config, cluster: Cluster) -> float:
    """Products of a micro-batch: forward, two backward, one more if the logits are computed again chunk by chunk; each of fp32, or of the
    pairs of bf16 parts that training.head_products counts."""
    model, rates, parts = config.model, cluster.rates, head_parts(config)
    hidden = parts if config.training.precision == "fp32" else 1

    def pairs(one: int, other: int) -> int:
        return sum(i + j < parts for i in range(one) for j in range(other))

    logits = 1 if head_chunks(config) == 1 else 2
    products = logits * pairs(hidden, parts) + pairs(parts, parts) + pairs(parts, hidden)
    flops = products * 2 * rank_tokens(config) * model.hidden_size * model.vocab_size / config.parallel.tensor
    return flops / ((rates.fp32_tflops if parts == 1 else rates.head_split_tflops) * 1e12)


def _neighbours(config: Config, cluster: Cluster) -> float:
    """Activations and their gradients of one micro-batch, received once by each chunk of the model."""
    parallel = config.parallel
    if parallel.pipeline == 1:
        return 0.0
    received = rank_tokens(config) / _sequence_shards(config) * config.model.hidden_size * _BF16
    stride = cluster.gpus // parallel.pipeline
    return 2 * parallel.virtual_pipeline * cluster.collective_s(received, peers=parallel.pipeline, stride=stride)


def _data(config: Config, cluster: Cluster, slowest: float) -> float:
    """Reduction of the gradients and gathering of the weights of the fullest stage."""
    parallel, sizes = config.parallel, derived(config, cluster.gpus)
    dense_peers = sizes.data * parallel.context
    expert_stride = sizes.expert_tensor * parallel.expert
    gradient = 4 if config.training.grad_reduce_dtype == "fp32" else _BF16
    reduce = gather = 0.0
    for dense, experts in _parameters(config, cluster.gpus):
        times = []
        for size in (gradient, _BF16):
            both = 0.0
            for parameters, peers, stride in (
                (dense, dense_peers, parallel.tensor),
                (experts, sizes.expert_data, expert_stride),
            ):
                received = parameters * size * (peers - 1) / peers
                both += cluster.collective_s(received, peers=peers, stride=stride)
            times.append(both)
        reduce, gather = max(reduce, times[0]), max(gather, times[1])
    forward = slowest / 4 if config.training.recompute == "full" else slowest / 3
    reduce = max(0.0, reduce - (slowest - forward)) if parallel.overlap_grad_reduce else reduce
    gather = max(0.0, gather - forward) if parallel.overlap_param_gather else gather
    return reduce + gather


def _parameters(config: Config, gpus: int) -> list[tuple[float, float]]:
    """(dense, expert) parameters that a rank of each stage holds, embedding and head included."""
    model, parallel, types = config.model, config.parallel, config.model.layer_types()
    sizes = derived(config, gpus)
    found = []
    for stage in range(parallel.pipeline):
        counts = [layer_parameters(model, types[layer]) for layer in stage_layers(config, stage)]
        dense = sum(c["attention"] + c["shared"] for c in counts) / parallel.tensor + sum(c["router"] for c in counts)
        ends = (stage == 0) + (stage == parallel.pipeline - 1)
        dense += ends * model.vocab_size * model.hidden_size / parallel.tensor
        found.append((dense, sum(c["experts"] for c in counts) / (parallel.expert * sizes.expert_tensor)))
    return found


def _update_bytes(config: Config, gpus: int) -> list[float]:
    """Memory traffic of the optimizer on a rank of each stage; its state has 12 bytes a parameter."""
    return [estimate.optimizer / 12 * _UPDATE_BYTES for estimate in estimate_memory(config, gpus)]
