"""Which layouts of a model fit on a cluster, ranked by the estimated time of a step.

python tools/plan_layout.py --gpus 512 --device H800 --seq-length 1048576 --global-batch-tokens 134217728
python tools/plan_layout.py --gpus 256 --seq-length 32768 --layout 8/8/1/8/1/1     # one layout in detail, or why it fails
python tools/plan_layout.py --config A.yaml --gpus 256 --layout config             # where time and memory of a preset go
python tools/plan_layout.py --flops-curve                                         # against DeepSeek-R1
Layouts are written TP/PP/CP/EP/ETP/VPP, and behind that the layers of a last stage that has fewer than the others. Further options
are configuration keys (--training.grad_reduce_dtype bf16); --config gives the model and everything else that is not searched. CPU
only. The rates behind the times stand in megatron_m1/engine/rates.py with their sources; --rates FILE.json replaces any of them. What
their sums were compared with, and how far off they were, is the last line of the output. In the table GiB is what a GPU needs with a
fifth more for activations.
Exit code 1 if no layout fits (it then says what would), 2 for bad input.
"""

import argparse
import dataclasses
import json
import math
import sys

from megatron_m1.config import Config, ConfigError, load_config
from megatron_m1.config.schema import ParallelConfig
from megatron_m1.engine.cluster import DEVICES, Cluster
from megatron_m1.engine.flops import count_parameters, decode_flops
from megatron_m1.engine.memory import RESERVE_GIB, estimate_memory, stage_layers
from megatron_m1.engine.rates import read_rates
from megatron_m1.engine.step_time import stage_balance
from megatron_m1.planning import Plan, Refusal, Search, plan_layout, search
from megatron_m1.planning.generation_flops import flops_curve, r1_decode_flops, r1_multiplied_parameters
from megatron_m1.planning.search import MOST_DOUBLINGS, layout_name, recompute_variants, smallest_cluster

GIB = 2**30
CURVE_LENGTHS = [8192, 16384, 32768, 65536, 80000, 100_000, 131_072]


def main(argv: list[str]) -> int:
    options, rest = parser().parse_known_args(argv)
    try:
        if options.flops_curve:
            print(curve_text(load_config(rest)))
            return 0
        cluster, config = read(options, rest)
        limits = {"reserve_gib": options.reserve_gib, "document_tokens": options.document_tokens}
        if options.layout:
            parallel = parse_layout(options.layout, config)
            found = plan_layout(config, cluster, parallel, **limits)
            found_json = (
                [refusal_json(found)]
                if isinstance(found, Refusal)
                else [plan_json(found, cluster, options.document_tokens)]
            )
            text = found.reason if isinstance(found, Refusal) else detail(found, cluster, options.document_tokens)
            plans = 0 if isinstance(found, Refusal) else 1
        else:
            result = search(config, cluster, **limits)
            found_json = [plan_json(p, cluster, options.document_tokens) for p in result.plans[: options.top]]
            text, plans = table(result, config, cluster, options.top), len(result.plans)
            if not plans:
                remedy = what_would_fit(result, config, cluster, **limits)
                text += f"\n{remedy}"
                if options.json:
                    print(f"no layout fits; {remedy}", file=sys.stderr)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    print(json.dumps(found_json, indent=2) if options.json else text)
    return 0 if plans else 1


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--gpus", type=int, default=256)
    parser.add_argument("--device", choices=sorted(DEVICES), default="H800", help="defaults of the next five options")
    parser.add_argument("--gpus-per-node", type=int)
    parser.add_argument("--memory-gib", type=float, help="of one GPU")
    parser.add_argument("--memory-tb-per-s", type=float, help="bandwidth of the GPU's memory, data sheet")
    parser.add_argument("--nvlink-gb-per-s", type=float, help="per GPU and direction, within a node")
    parser.add_argument("--network-gb-per-s", type=float, help="per GPU and direction, between nodes")
    parser.add_argument("--rates", help="JSON file with fields of megatron_m1.engine.rates.Rates")
    parser.add_argument("--seq-length", type=int, help="training.seq_length")
    parser.add_argument("--global-batch-tokens", type=int, help="tokens of an optimizer step; default 134217728")
    parser.add_argument(
        "--document-tokens",
        type=int,
        help="length of the documents that sequences are packed of, not attended beyond; by default a sequence is one. With "
        "--parallel.context_layout document their padding counts too",
    )
    parser.add_argument("--reserve-gib", type=float, default=RESERVE_GIB, help="left free on each GPU")
    parser.add_argument(
        "--layout", help="TP/PP/CP/EP/ETP/VPP[/last], or `config` for the configuration's own: this one alone"
    )
    parser.add_argument("--top", type=int, default=10, help="layouts to show")
    parser.add_argument("--json", action="store_true")
    parser.add_argument(
        "--flops-curve", action="store_true", help="generation FLOPs against DeepSeek-R1, and nothing else"
    )
    return parser


def read(options: argparse.Namespace, rest: list[str]) -> tuple[Cluster, Config]:
    """The cluster and the configuration that the options describe. Raises ConfigError."""
    names = [field.name for field in dataclasses.fields(Cluster)]
    given = {
        name: getattr(options, name) for name in names if name != "rates" and getattr(options, name, None) is not None
    }
    if options.rates:
        given["rates"] = read_rates(options.rates)
    cluster = dataclasses.replace(DEVICES[options.device], **given)
    gpus, node = cluster.gpus, cluster.gpus_per_node
    if gpus > node and gpus % node:
        raise ConfigError(
            f"--gpus={gpus} must be a multiple of --gpus-per-node={node}, or fewer; use {gpus // node * node} or "
            f"{-(-gpus // node) * node}."
        )
    for name in ("seq_length", "global_batch_tokens", "document_tokens", "top"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')}={value} must be 1 or more.")
    if not 0 <= options.reserve_gib < cluster.memory_gib:
        raise ConfigError(
            f"--reserve-gib={options.reserve_gib:g} must be from 0 to below the {cluster.memory_gib:g} GiB of a GPU."
        )
    config = load_config(rest)
    length = options.seq_length or config.training.seq_length  # 0 is refused above
    own = config.training.global_batch * config.training.seq_length
    tokens = options.global_batch_tokens or (own if options.layout == "config" else 2**27)
    if tokens % length:
        raise ConfigError(
            f"--global-batch-tokens={tokens} must be a multiple of --seq-length={length}; use {max(tokens // length, 1) * length}."
        )
    training = dataclasses.replace(config.training, seq_length=length, global_batch=tokens // length, batch_ramp=[])
    return cluster, dataclasses.replace(config, training=training)


def parse_layout(text: str, config: Config) -> ParallelConfig:
    """TP/PP/CP/EP/ETP/VPP, with or without the layers of the last stage, as a ParallelConfig; `config`: the configuration's own.
    Raises ConfigError."""
    if text == "config":
        return config.parallel
    names = ("tensor", "pipeline", "context", "expert", "expert_tensor", "virtual_pipeline", "last_stage_layers")
    sizes = text.split("/")
    if len(sizes) not in (6, 7) or not all(size.isdecimal() and int(size) for size in sizes):
        raise ConfigError(
            f"--layout={text} must be six sizes TP/PP/CP/EP/ETP/VPP, such as 8/8/1/8/1/1, or seven with the layers of a smaller last "
            "stage, such as 4/4/4/32/1/1/14, or config."
        )
    chosen = dataclasses.replace(config.parallel, sequence=None, last_stage_layers=None)
    for name, size in zip(names, sizes):
        setattr(chosen, name, int(size))
    return chosen


def table(result: Search, config: Config, cluster: Cluster, top: int) -> str:
    """The best layouts, one a line, and what became of the others."""
    training = config.training
    lines = [
        f"{count_parameters(config.model).total:,d} parameters, {training.seq_length:,d} tokens a sequence, "
        f"{training.global_batch} sequences a step, {cluster.gpus} GPUs of {cluster.memory_gib:g} GiB, "
        f"{training.grad_reduce_dtype} gradients",
        "",
        f"{'TP/PP/CP/EP/ETP/VPP':20s} {'DP':>4s} {'recompute':>20s} {'state':>6s} {'GiB':>6s} {'s/step':>8s} "
        f"{'tok/s/GPU':>9s} {'MFU':>6s}  largest terms, s",
    ]
    for plan in result.plans[:top]:
        terms = sorted(vars(plan.time).items(), key=lambda term: -term[1])[:5]
        parallel = plan.config.parallel
        data = cluster.gpus // (parallel.tensor * parallel.pipeline * parallel.context)
        lines.append(
            f"{layout_name(parallel):20s} {data:4d} {recompute(plan.config):>20s} {plan.fullest.state / GIB:6.1f} "
            f"{plan.needed_gib:6.1f} {plan.time.total:8.1f} {plan.tokens_per_s_per_gpu:9.0f} {plan.mfu:6.1%}"
            f"  {', '.join(f'{name} {seconds:.1f}' for name, seconds in terms)}"
        )
    lines += ["", f"{len(result.plans)} layouts fit; {len(result.refusals)} do not:"]
    for rule, count in result.rules().most_common():
        example = min((r for r in result.refusals if r.rule == rule), key=lambda r: r.needed_gib)
        lines.append(f"{count:6d} {rule}, e.g. {layout_name(example.parallel)}: {example.reason}")
    lines.append(f"times are sums of terms, {cluster.rates.calibration}")
    return "\n".join(lines)


def what_would_fit(
    result: Search, config: Config, cluster: Cluster, *, reserve_gib: float, document_tokens: int | None
) -> str:
    """The remedy where no layout fits: GPUs with so much memory, or so many of them."""
    lines = []
    too_large = [refusal for refusal in result.refusals if refusal.rule == "memory"]
    if too_large:
        least = min(too_large, key=lambda refusal: refusal.needed_gib)
        enough = math.ceil(10 * (least.needed_gib + reserve_gib)) / 10
        lines.append(
            f"{layout_name(least.parallel)} needs least: {cluster.gpus} GPUs of {enough} GiB would do, reserve included"
        )
    larger = smallest_cluster(config, cluster, reserve_gib=reserve_gib, document_tokens=document_tokens)
    if larger is None:
        lines.append(
            f"no number of such GPUs up to {2**MOST_DOUBLINGS} times as many would do; the reasons say what to change"
        )
    else:
        gpus, plan = larger
        lines.append(
            f"{gpus} such GPUs would do: {layout_name(plan.config.parallel)}, recompute {recompute(plan.config)}, "
            f"{plan.needed_gib:.1f} GiB of {cluster.memory_gib:g}"
        )
    return "\n".join(lines)


def detail(plan: Plan, cluster: Cluster, document_tokens: int | None) -> str:
    """Memory by stage and kind, time by term."""
    config = plan.config
    kinds = ("weights", "gradients", "optimizer", "activations", "logits", "update", "buffers", "state", "total")
    lines = [
        f"{layout_name(config.parallel)}, recompute {recompute(config)}: {plan.time.total:.1f} s a step, "
        f"{plan.tokens_per_s_per_gpu:.0f} tokens/s and GPU, {plan.mfu:.1%} MFU",
        f"balance of the stages' arithmetic without the head: {stage_balance(config):.0%}",
        "",
        "GiB   softmax" + "".join(f"{kind:>12s}" for kind in kinds),
    ]
    types = config.model.layer_types()
    for stage, estimate in enumerate(plan.memory):
        softmax = sum(types[layer] for layer in stage_layers(config, stage))
        values = "".join(f"{getattr(estimate, kind) / GIB:12.2f}" for kind in kinds)
        lines.append(f"stage {stage:<2d}{softmax:5d}{values}")
    lines.append(
        f"with a fifth more activations {plan.needed_gib:.1f} of {cluster.memory_gib:g} GiB, the rest in reserve"
    )
    modes = (
        f"{recompute(variant)} {activations(variant, cluster, document_tokens) / GIB:.1f}"
        for variant in recompute_variants(config)
    )
    lines.append(f"activations of the fullest stage by what is recomputed: {'; '.join(modes)}")
    lines += ["", f"{'seconds':>10s}"]
    lines += [
        f"{seconds:10.2f}  {name:12s} {seconds / plan.time.total:6.1%}" for name, seconds in vars(plan.time).items()
    ]
    lines.append(f"times are sums of terms, {cluster.rates.calibration}")
    return "\n".join(lines)


def activations(config: Config, cluster: Cluster, document_tokens: int | None) -> float:
    stages = estimate_memory(config, cluster.gpus, document_tokens=document_tokens)
    return max(estimate.activations for estimate in stages)


def recompute(config: Config) -> str:
    """What is recomputed, in words."""
    training = config.training
    return ", ".join(training.recompute_modules) if training.recompute == "selective" else training.recompute


def plan_json(plan: Plan, cluster: Cluster, document_tokens: int | None) -> dict:
    return {
        "layout": layout_name(plan.config.parallel),
        "parallel": dataclasses.asdict(plan.config.parallel),
        "recompute": recompute(plan.config),
        "needed_gib": plan.needed_gib,
        "activation_bytes": {
            recompute(v): activations(v, cluster, document_tokens) for v in recompute_variants(plan.config)
        },
        "memory_bytes_by_stage": [dataclasses.asdict(estimate) for estimate in plan.memory],
        "seconds": dataclasses.asdict(plan.time) | {"total": plan.time.total},
        "tokens_per_s_per_gpu": plan.tokens_per_s_per_gpu,
        "mfu": plan.mfu,
    }


def refusal_json(refusal: Refusal) -> dict:
    return {"layout": layout_name(refusal.parallel), "rule": refusal.rule, "reason": refusal.reason}


def curve_text(config: Config) -> str:
    """FLOPs of M1 and DeepSeek-R1 by generation length."""
    model = config.model
    m1, r1 = decode_flops(model, 0), r1_decode_flops(0)
    slope, r1_slope, absorbed = (
        f(1) - f(0)
        for f in (lambda t: decode_flops(model, t), r1_decode_flops, lambda t: r1_decode_flops(t, absorbed=True))
    )
    lines = [
        "FLOPs to generate the token after T others",
        f"  this model   {m1 / 1e9:.1f}e9 + {slope:.3g} T",
        f"  DeepSeek-R1  {r1 / 1e9:.1f}e9 + {r1_slope:.3g} T   ({r1_multiplied_parameters() / 1e9:.1f}B parameters x 2; 61 layers x "
        "128 heads x (192 + 128) x 2)",
        f"  DeepSeek-R1  {r1 / 1e9:.1f}e9 + {absorbed:.3g} T   (from the latent cache: 576 + 512 instead of 192 + 128)",
        "",
        "            GFLOP of the last token        TFLOP of all tokens               latent cache",
        f"{'T':>8s} {'model':>9s} {'R1':>9s} {'ratio':>7s} {'model':>11s} {'R1':>9s} {'ratio':>7s} {'R1':>12s} {'ratio':>7s}",
    ]
    for point in flops_curve(model, CURVE_LENGTHS):
        lines.append(
            f"{point.tokens:8d} {point.m1_last / 1e9:9.1f} {point.r1_last / 1e9:9.1f} {point.ratio_last:7.1%}"
            f" {point.m1_sum / 1e12:11.0f} {point.r1_sum / 1e12:9.0f} {point.ratio_sum:7.1%}"
            f" {point.r1_absorbed_sum / 1e12:12.0f} {point.ratio_absorbed_sum:7.1%}"
        )
    lines += [
        "",
        "The M1 report says: less than 50% of R1's FLOPs at 64K generated tokens, about 25% at 100K. The first holds over all tokens",
        "and for the last one. The second is nearest to the last token's ratio (22%); over all 100K tokens the sum is 34%, so 25% is",
        "the ratio at that length and not of the whole generation. Against R1's own latent-cache kernels both are lower.",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
