"""Any rank of a large job on one GPU: its part of the model, its optimizer shard, genuine training steps, no other rank.

    python -m benchmarks.any_rank --config examples/configs/m1_456b.yaml --config examples/configs/m1_456b_32k_512gpu.yaml \
        [--world-size 512] [--rank R | --tensor-rank T] [--micro-batches 4] [--rounds 3] [--time-limit-s 120] [--profile]
        [--output FILE.json] [--key value]
    python -m benchmarks.any_rank --predict-again FILE.json     # no GPU: estimates of today's model, what was measured stays

Without --rank: one rank of each distinct pipeline stage (with the embedding, with neither, with the head; by number of softmax
layers), in the middle of its context-parallel group, one process after the other; --tensor-rank says with which heads, since those
of the first ranks fade soonest and so bring the fewest states from other context-parallel ranks. torch's fake process group stands
for the others: all communication returns at once, its results are finite data of the right shape (fake_ranks.py), tokens go to all
experts alike.
What is measured: seconds of forward and backward of a micro-batch and of the optimizer's update, and memory, of this rank alone.
What is modelled: communication, from counted bytes and the speeds of the links in megatron_m1/engine/cluster.py. The sum of both is
no step of a job: pipeline bubbles, waiting for slower ranks and contention are in neither, nor is it known what would be hidden.
--profile: of one step more, the kernels that take longest, and for how long the GPU was busy.
Exit code 1 if a rank did not finish (out of memory, time, an error); the results say why.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import yaml

from megatron_m1 import platform
from megatron_m1.config import Config, ConfigError, derived, from_yaml, load_config
from megatron_m1.config.validate import validate_layout

platform.setup()

from benchmarks.fake_ranks import Received, balance_routing, fake_rank, fill_weights, modelled_again  # noqa: E402
from megatron_m1.engine.cluster import DEVICES, Cluster  # noqa: E402
from megatron_m1.engine.memory import estimate_memory, stage_layers  # noqa: E402
from megatron_m1.engine.rates import Rates  # noqa: E402
from megatron_m1.engine.step_time import COMPUTE, forward_waits, stage_seconds  # noqa: E402
from megatron_m1.engine.trainer import Trainer  # noqa: E402

__all__ = [
    "device_kind",
    "distinct_ranks",
    "environment",
    "measure_rank",
    "now",
    "predict_again",
    "stored_config",
    "stored_device",
    "why",
    "work_seconds",
    "write",
]

ROOT = Path(__file__).resolve().parents[1]
LABELS = {
    "measured": "one rank alone on one device, neighbours' data supplied, balanced routing, communication returns at once",
    "predicted": "memory by engine/memory.py, seconds by engine/step_time.py with this device's rates, communication left out",
    "modelled": "communication from counted bytes and link speeds, nothing hidden, no contention; not measured; lightning states are "
    "those of the heads of tensor_rank, the fewest on rank 0, whose heads fade soonest",
    "kept_attention": "whether recomputation had the results of softmax attention and did not repeat it",
    "cudnn_blocks": "whether cuDNN computed softmax attention between context-parallel ranks, not flash",
}
GIB = 2**30


def main(argv: list[str] | None = None) -> int:
    options, rest = parser().parse_known_args(argv)
    try:
        if options.predict_again:
            predict_again(options.predict_again)
            return 0
        config = bench_config(load_config(rest), options.world_size, options.micro_batches)
        ranks = distinct_ranks(config, options.world_size, tensor_rank=options.tensor_rank)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    if options.rank is not None:
        rows = [measured_or_why(config, options)]
    else:
        rows = [in_process(rank, options, rest) for rank in ranks]
    results = environment("any_rank", argv) | {"labels": LABELS, "kept_attention": True, "cudnn_blocks": True}
    results |= {"config": asdict(config), "ranks": rows}
    write(options.output, results)
    print(f"written: {options.output}")
    return 1 if any("error" in row for row in rows) else 0


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--world-size", type=int, default=512)
    parser.add_argument("--rank", type=int, help="global rank; default: one of each distinct pipeline stage")
    parser.add_argument("--tensor-rank", type=int, default=0, help="of the ranks that are chosen without --rank")
    parser.add_argument(
        "--predict-again", type=Path, help="results whose estimates are to be made again, and nothing else"
    )
    parser.add_argument("--micro-batches", type=int, default=4, help="of one step")
    parser.add_argument("--rounds", type=int, default=3, help="measured steps at most, after one that does not count")
    parser.add_argument("--time-limit-s", type=float, default=150.0, help="of each rank")
    parser.add_argument("--profile", action="store_true", help="the kernels of one step more, by time")
    parser.add_argument(
        "--device", choices=sorted(DEVICES), default="H800", help="whose links communication is modelled with"
    )
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/any_rank.json")
    return parser


def bench_config(config: Config, world_size: int, micro_batches: int) -> Config:
    """The configuration with a step of so many micro-batches. Raises ConfigError if the layout does not fit the world."""
    data = derived(config, world_size).data
    training = replace(config.training, global_batch=micro_batches * config.training.micro_batch * data, batch_ramp=[])
    config = replace(config, training=training, logging=replace(config.logging, layer_stats_every_steps=0))
    validate_layout(config, world_size)
    pipeline = config.parallel.pipeline
    if config.parallel.virtual_pipeline > 1 and micro_batches % pipeline:
        raise ConfigError(f"--micro-batches={micro_batches} must be a multiple of parallel.pipeline={pipeline}.")
    return config


def distinct_ranks(config: Config, world_size: int, *, tensor_rank: int = 0) -> list[int]:
    """A global rank of each pipeline stage that differs from those before it. Raises ConfigError for a tensor_rank that is none."""
    parallel, types = config.parallel, config.model.layer_types()
    if not 0 <= tensor_rank < parallel.tensor:
        raise ConfigError(
            f"--tensor-rank={tensor_rank} must lie in 0..{parallel.tensor - 1}, the ranks of parallel.tensor={parallel.tensor}."
        )
    found: dict[tuple[bool, bool, int], int] = {}
    for stage in range(parallel.pipeline):
        softmax = sum(types[layer] for layer in stage_layers(config, stage))
        first_of_stage = stage * (world_size // parallel.pipeline)
        rank = first_of_stage + parallel.context // 2 * parallel.tensor + tensor_rank
        found.setdefault((stage == 0, stage == parallel.pipeline - 1, softmax), rank)
    return list(found.values())


def in_process(rank: int, options: argparse.Namespace, rest: list[str]) -> dict[str, Any]:
    """The row of a rank, from a process that ends with it."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "rank.json"
        own = ("world_size", "micro_batches", "rounds", "time_limit_s", "device")
        command = [sys.executable, "-m", "benchmarks.any_rank", "--rank", str(rank), "--output", str(output), *rest]
        for name in own:
            command += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
        command += ["--profile"] * options.profile
        try:
            done = subprocess.run(command, cwd=ROOT, timeout=options.time_limit_s, check=False)
        except subprocess.TimeoutExpired:
            return {"rank": rank, "error": f"not done after --time-limit-s={options.time_limit_s:g}"}
        if not output.exists():
            return {"rank": rank, "error": f"the process ended with exit code {done.returncode}"}
        return json.loads(output.read_text())["ranks"][0]


def measured_or_why(config: Config, options: argparse.Namespace) -> dict[str, Any]:
    try:
        return measure_rank(
            config,
            rank=options.rank,
            world_size=options.world_size,
            rounds=options.rounds,
            time_limit_s=0.8 * options.time_limit_s,
            cluster=replace(DEVICES[options.device], gpus=options.world_size),
            profile=options.profile,
        )
    except (RuntimeError, FloatingPointError) as error:
        traceback.print_exc()
        return {"rank": options.rank, "error": why(error), "peak_bytes": platform.peak_memory_bytes()}


def why(error: Exception) -> str:
    """Kind and first line of an error."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def measure_rank(
    config: Config,
    *,
    rank: int,
    world_size: int,
    rounds: int,
    time_limit_s: float,
    cluster: Cluster,
    profile: bool = False,
) -> dict[str, Any]:
    """Figures of genuine steps of `config` on `rank`: `measured`, `predicted` and `modelled`, see LABELS.

    cluster: whose links communication is modelled with.  Rounds stop when another one would pass time_limit_s.
    profile: `measured` gets `profile`, see `kernels_of`.
    """
    started = time.perf_counter()
    with fake_rank(rank, world_size, config.parallel) as (groups, received):
        trainer = Trainer(config, groups, initial_weights=False)
        fill_weights(trainer.models)
        balance_routing(trainer.models)
        trainer.optimizer.reload_model_params()
        stage, held = groups.pp.rank(), held_bytes(trainer)
        print(f"rank {rank}, stage {stage}: built in {time.perf_counter() - started:.1f} s", flush=True)
        batches = random_batches(config, world_size, tensor_rank=groups.tp.rank())
        forward_backward, update, exchanged = [], [], []
        for number in range(rounds + 1):
            if number == 1 and platform.is_cuda():
                torch.cuda.reset_peak_memory_stats()  # the first step compiles and tunes kernels
            received.take()
            start = now()
            loss, tokens = trainer.forward_backward(batches if number else batches[: config.parallel.pipeline])
            middle = now()
            exchanged = received.take()
            result = trainer.update(loss, tokens, lr=1e-4)
            end = now()
            updated = received.take()
            print(f"  step {number}: {middle - start:.2f} + {end - middle:.2f} s", flush=True)
            if number:
                forward_backward.append(middle - start)
                update.append(end - middle)
            if number and time.perf_counter() - started + 1.2 * (end - start) > time_limit_s:
                break
        micro_batches = len(batches)
        is_last = stage == config.parallel.pipeline - 1
        measured: dict[str, Any] = {
            "micro_batch_s": statistics.median(forward_backward) / micro_batches,
            "forward_backward_s": forward_backward,
            "update_s": update,
            "peak_bytes": platform.peak_memory_bytes(),
            **held,
            "loss": result.loss if is_last else None,
            "grad_norm": result.grad_norm,
        }
        if platform.is_cuda():
            measured["reserved_bytes"] = torch.cuda.max_memory_reserved()
        if profile:
            measured["profile"] = kernels_of(lambda: trainer.forward_backward(batches), micro_batches)
        row = {
            "rank": rank,
            "stage": stage,
            "tensor_rank": groups.tp.rank(),
            "context_rank": groups.cp.rank(),
            "layers": stage_layers(config, stage),
            "micro_batches": micro_batches,
            "measured": measured,
            "predicted": prediction(config, stage, replace(DEVICES[device_kind()], gpus=world_size)),
            "modelled": {
                "links": asdict(cluster),
                "forward_backward": [asdict(r) | {"seconds": r.seconds(cluster)} for r in exchanged],
                "update": [asdict(r) | {"seconds": r.seconds(cluster)} for r in updated],
            },
        }
        print(summary(row, exchanged, cluster), flush=True)
        return row


def kernels_of(step: Callable[[], object], micro_batches: int) -> dict[str, Any]:
    """Of a step: milliseconds a micro-batch in all, with the GPU busy, and of its kernels, longest first, [name, ms, launches]."""
    device = torch.profiler.ProfilerActivity.CUDA if platform.is_cuda() else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[device]) as profiler:
        start = now()
        step()
        whole = now() - start
    totals = [
        (event.key, (event.self_device_time_total or event.self_cpu_time_total) / 1e3 / micro_batches, event.count)
        for event in profiler.key_averages()
    ]
    totals = sorted((total for total in totals if total[1]), key=lambda total: -total[1])
    busy_ms = sum(ms for _, ms, _ in totals)
    for name, ms, count in totals[:25]:
        print(f"  {ms:8.2f} ms {count / micro_batches:7.1f} x {name[:110]}")
    print(f"  {busy_ms:8.2f} ms of {1e3 * whole / micro_batches:.2f} a micro-batch", flush=True)
    return {"whole_ms": 1e3 * whole / micro_batches, "busy_ms": busy_ms, "kernels": totals[:60]}


def prediction(
    config: Config, stage: int, device: Cluster, *, kept_attention: bool = True, cudnn_blocks: bool = True
) -> dict[str, Any]:
    """Memory of a rank of a pipeline stage, and seconds of a micro-batch by term. The rest: see `stage_seconds`."""
    estimate = estimate_memory(config, device.gpus)[stage]
    return {
        "memory_bytes": asdict(estimate) | {"total": estimate.total},
        "micro_batch_s": work_seconds(config, stage, device, kept_attention=kept_attention, cudnn_blocks=cudnn_blocks),
    }


def work_seconds(
    config: Config, stage: int, device: Cluster, *, kept_attention: bool, cudnn_blocks: bool
) -> dict[str, float]:
    """Work of a micro-batch on a rank by term, and `launch`, waits for the host; communication returns at once."""
    terms = stage_seconds(config, device, kept_attention=kept_attention, cudnn_blocks=cudnn_blocks)[stage]
    work = {name: terms[name] for name in COMPUTE}
    layers = len(stage_layers(config, stage))
    waits, host = layers * forward_waits(config, device.rates), layers * device.rates.layer_host_s
    return work | {"launch": max(waits, host - sum(work.values()) + work["head"])}


def predict_again(file: Path) -> None:
    """Rewrite `predicted`, `labels`, and links and seconds of `modelled` in a result, from its own configuration."""
    try:
        results = json.loads(file.read_text())
        config, device = stored_config(results), stored_device(results)
        measured = [row for row in results["ranks"] if "measured" in row]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"--predict-again={file} cannot be read: {error!r}; name a result of this benchmark."
        ) from None
    results["labels"] = LABELS
    for row in measured:
        modelled = row["modelled"]
        links = Cluster(**modelled["links"] | {"rates": Rates()})
        row["predicted"] = prediction(config, row["stage"], replace(device, gpus=links.gpus), **version_of(results))
        modelled["links"] = asdict(links)
        for part in ("forward_backward", "update"):
            modelled[part] = modelled_again(modelled[part], config.parallel, links.gpus, links)
    write(file, results)


def version_of(result: dict[str, Any]) -> dict[str, bool]:
    """What `stage_seconds` is told of the version that was measured; a result that does not say, and then does, is older than both."""
    return {name: result.setdefault(name, False) for name in ("kept_attention", "cudnn_blocks")}


def stored_config(results: dict[str, Any]) -> Config:
    """The configuration that a result of this benchmark was measured with."""
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as text:
        text.write(yaml.safe_dump(results["config"]))
        text.flush()
        return from_yaml(text.name)


def stored_device(results: dict[str, Any]) -> Cluster:
    """The device that a result was measured on."""
    name = results["hardware"]["device"]
    kind = next((kind for kind in DEVICES if kind in name), None)
    if kind is None:
        raise KeyError(f"hardware.device={name!r} is none of {', '.join(DEVICES)}")
    return DEVICES[kind]


def write(file: Path, results: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.tmp")
    partial.write_text(json.dumps(results, indent=1) + "\n")
    partial.replace(file)


def held_bytes(trainer: Trainer) -> dict[str, int]:
    """Bytes of this rank's weights, gradient buffers and optimizer (main weights and both moments to come), counted."""
    buffers = [b for model in trainer.models for b in (*model.buffers, *model.expert_parallel_buffers)]
    weights = [p for model in trainer.models for p in model.parameters()]
    storages = {p.untyped_storage().data_ptr() for p in weights}
    shards = [p for group in trainer.optimizer.param_groups for p in group["params"]]
    # fp32 weights are updated where they are; of others the optimizer has a copy.
    copies = [shard for shard in shards if shard.untyped_storage().data_ptr() not in storages]
    return {
        "weight_bytes": sum(p.nbytes for p in weights),
        "gradient_bytes": sum(buffer.grad_data.nbytes for buffer in buffers),
        "optimizer_bytes": sum(2 * shard.nbytes for shard in shards) + sum(copy.nbytes for copy in copies),
    }


def random_batches(config: Config, world_size: int, *, tensor_rank: int) -> list[dict[str, Any]]:
    """Micro-batches of a step, of tokens whose embeddings this tensor-parallel rank holds: those of others would be rows of zeros,
    which post-norm layers turn into gradients without bound."""
    training, generator = config.training, torch.Generator().manual_seed(1)
    rows, length = training.micro_batch, training.seq_length
    vocabulary = config.model.vocab_size // config.parallel.tensor
    batches = []
    for _ in range(derived(config, world_size).micro_batches):
        text = torch.randint(vocabulary, (rows, length + 1), generator=generator) + tensor_rank * vocabulary
        batches.append(
            {
                "tokens": text[:, :-1].contiguous(),
                "labels": text[:, 1:].contiguous(),
                "loss_mask": torch.ones(rows, length),
                "position_ids": torch.arange(length).expand(rows, length).contiguous(),
            }
        )
    return batches


def now() -> float:
    """Seconds, with nothing left to do on the device."""
    platform.synchronize()
    return time.perf_counter()


def device_kind() -> str:
    """The entry of DEVICES that this device is, H200 if none."""
    return next((name for name in DEVICES if name in platform.device_name()), "H200")


def environment(module: str, argv: list[str] | None) -> dict[str, Any]:
    """What every result says of how it came to be."""
    return {
        "command": " ".join([f"python -m benchmarks.{module}", *(sys.argv[1:] if argv is None else argv)]),
        "commit": os.environ.get("M1_COMMIT") or commit(),
        "date": time.strftime("%Y-%m-%d"),
        "hardware": {"device": platform.device_name(), "torch": torch.__version__, "cuda": torch.version.cuda},
    }


def commit() -> str | None:
    """Of the checkout, None in a copy without history."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def summary(row: dict[str, Any], exchanged: list[Received], cluster: Cluster) -> str:
    measured, predicted, count = row["measured"], row["predicted"], row["micro_batches"]
    compute = sum(predicted["micro_batch_s"].values())
    sent = ", ".join(
        f"{r.group} {r.operation} {r.received_bytes / count / 2**20:.0f} MiB {r.seconds(cluster) / count * 1e3:.1f} ms"
        for r in exchanged[:6]
    )
    return (
        f"  measured {measured['micro_batch_s']:.3f} s a micro-batch (compute estimated {compute:.3f}), "
        f"update {statistics.median(measured['update_s']):.3f} s; peak {measured['peak_bytes'] / GIB:.1f} GiB "
        f"(estimated {predicted['memory_bytes']['total'] / GIB:.1f})\n  modelled, a micro-batch: {sent}"
    )


if __name__ == "__main__":
    sys.exit(main())
