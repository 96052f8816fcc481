"""Rules that a configuration must keep, each with its remedy."""

import math
from collections.abc import Iterable, Iterator

from megatron_m1.config.errors import ConfigError
from megatron_m1.config.layout import derived, last_stage_sizes
from megatron_m1.config.schema import Config, ModelConfig, RLConfig

__all__ = ["validate", "validate_layout", "validate_rl"]

RECOMPUTE_MODULES = ("core_attn", "moe")
_POSITIVE = (
    "model.vocab_size model.hidden_size model.num_hidden_layers model.num_attention_heads model.num_key_value_heads "
    "model.head_dim model.intermediate_size model.num_local_experts model.num_experts_per_tok model.rope_theta "
    "model.max_position_embeddings model.rms_norm_eps model.lightning_norm_eps "
    "parallel.tensor parallel.pipeline parallel.virtual_pipeline parallel.context parallel.expert "
    "parallel.expert_tensor parallel.timeout_s training.micro_batch training.global_batch "
    "training.seq_length training.recompute_layers training.head_chunk_tokens training.exit_after_s optimizer.lr optimizer.eps "
    "evaluation.batches logging.every_steps logging.peak_tflops moe.capacity_factor schedule.decay_steps "
    "rl.samples_per_prompt rl.updates_per_batch rl.max_new_tokens rl.slots rl.cache_tokens rl.reward_workers rl.reward_timeout_s "
    "rl.held_out_samples rl.window_near_share rl.pass_rate_attempts rl.pass_rate_window"
).split()
_NOT_NEGATIVE = (
    "model.shared_intermediate_size model.rotary_dim model.init_std training.steps training.seed "
    "optimizer.weight_decay optimizer.clip_grad schedule.warmup_steps schedule.constant_steps schedule.min_lr "
    "moe.aux_loss_coefficient moe.z_loss_coefficient data.num_workers data.eod_token_id evaluation.every_steps "
    "checkpoint.every_steps checkpoint.keep logging.layer_stats_every_steps "
    "rl.refills rl.overlong_tokens rl.repetition_tokens rl.journal_keep "
    "rl.reward_max_error_share rl.held_out_prompts rl.held_out_every_steps "
    "rl.window_tolerance"
).split()


def validate(config: Config, world_size: int) -> None:
    """Raises ConfigError with one line per broken rule if `config` cannot train on `world_size` ranks.

    Reads no file: whether the data exist is found by whoever opens them.
    """
    validate_layout(config, world_size)
    _raise(
        [
            *_training(config, world_size),
            *_schedule(config),
            *_optimizer(config),
            *_data(config),
            *_checkpoint(config),
        ]
    )


def validate_rl(config: Config, world_size: int) -> None:
    """As `validate`, for the RL stage."""
    validate(config, world_size)
    _raise(_rl(config))


def validate_layout(config: Config, world_size: int) -> None:
    """Raises ConfigError if the model is inconsistent or cannot be laid out on `world_size` ranks (any stage)."""
    _raise(_ranges(config))
    _raise([*_model(config), *_layout(config)])
    _raise(_world(config, world_size))


def _raise(messages: Iterable[str]) -> None:
    lines = list(messages)
    if lines:
        raise ConfigError("\n".join(lines))


def _ranges(config: Config) -> Iterator[str]:
    for keys, accept, rule in ((_POSITIVE, lambda x: x > 0, "above 0"), (_NOT_NEGATIVE, lambda x: x >= 0, "0 or more")):
        for key in keys:
            section, name = key.split(".")
            value = getattr(getattr(config, section), name)
            if value is not None and not (accept(value) and math.isfinite(value)):
                yield f"{key}={value} must be {rule}."


def _model(config: Config) -> Iterator[str]:
    model = config.model
    if model.num_attention_heads % model.num_key_value_heads:
        yield (
            f"model.num_key_value_heads={model.num_key_value_heads} must divide "
            f"model.num_attention_heads={model.num_attention_heads}; use {_divisors(model.num_attention_heads)}."
        )
    if model.num_experts_per_tok > model.num_local_experts:
        yield (
            f"model.num_experts_per_tok={model.num_experts_per_tok} must not exceed "
            f"model.num_local_experts={model.num_local_experts}; use {model.num_local_experts} or less."
        )
    if model.rotary_dim % 2 or model.rotary_dim > model.head_dim:
        yield (
            f"model.rotary_dim={model.rotary_dim} must be even and at most model.head_dim={model.head_dim}; "
            f"use {min(model.rotary_dim // 2 * 2, model.head_dim // 2 * 2)}."
        )
    yield from _attention_types(model)
    if config.training.seq_length > model.max_position_embeddings:
        yield (
            f"training.seq_length={config.training.seq_length} must not exceed "
            f"model.max_position_embeddings={model.max_position_embeddings}; shorten it or raise the limit."
        )


def _attention_types(model: ModelConfig) -> Iterator[str]:
    types = model.attn_type_list
    if types is None:
        return
    if len(types) != model.num_hidden_layers:
        yield (
            f"model.attn_type_list has {len(types)} entries but model.num_hidden_layers={model.num_hidden_layers}; "
            "give one entry per layer, or null for the 7:1 pattern."
        )
    wrong = sorted(set(types) - {0, 1})
    if wrong:
        yield f"model.attn_type_list holds {wrong}; each entry must be 0 (lightning) or 1 (softmax)."


def _layout(config: Config) -> Iterator[str]:
    model, parallel, training = config.model, config.parallel, config.training
    split_by_tensor = {
        "model.num_attention_heads": model.num_attention_heads,
        "model.num_key_value_heads": model.num_key_value_heads,
        "model.vocab_size": model.vocab_size,
        "training.seq_length": training.seq_length,
    }
    if model.shared_intermediate_size:
        split_by_tensor["model.shared_intermediate_size"] = model.shared_intermediate_size
    for name, value in split_by_tensor.items():
        if value % parallel.tensor:
            why = " (the experts work on sequence shards)" if name == "training.seq_length" else ""
            remedy = _divisors(math.gcd(*split_by_tensor.values()))
            yield f"parallel.tensor={parallel.tensor} must divide {name}={value}{why}; use {remedy}."
    expert_tensor = derived(config, 1).expert_tensor
    if model.intermediate_size % expert_tensor:
        source = (
            "parallel.expert_tensor" if parallel.expert_tensor else "parallel.expert_tensor (null: parallel.tensor)"
        )
        remedy = _divisors(model.intermediate_size)
        yield f"{source}={expert_tensor} must divide model.intermediate_size={model.intermediate_size}; use {remedy}."
    # torch's grouped_mm wants rows of a multiple of 16 bytes.
    unit = 8 if training.precision == "bf16" else 4
    rows = {
        f"model.intermediate_size={model.intermediate_size} over {expert_tensor} expert-tensor ranks": (
            model.intermediate_size / expert_tensor
        ),
        f"model.hidden_size={model.hidden_size}": model.hidden_size,
    }
    for name, width in rows.items():
        if width == int(width) and width % unit:
            yield f"{name} gives rows of {int(width)}, which must be a multiple of {unit} in {training.precision}; change it."
    if parallel.sequence and parallel.tensor == 1:
        yield "parallel.sequence=true needs parallel.tensor above 1; set it to null or raise parallel.tensor."
    if model.num_local_experts % parallel.expert:
        yield (
            f"parallel.expert={parallel.expert} must divide model.num_local_experts={model.num_local_experts}; "
            f"use {_divisors(model.num_local_experts)}."
        )
    unit = math.lcm(2 * parallel.context, parallel.tensor * parallel.context)
    if parallel.context > 1 and training.seq_length % unit:
        yield (
            f"training.seq_length={training.seq_length} must be a multiple of {unit} with parallel.context={parallel.context} (each rank "
            f"holds two equal chunks, spread over parallel.tensor={parallel.tensor}); use {_multiples_near(training.seq_length, unit)}."
        )
    yield from _context(config)
    yield from _pipeline(config)


def _context(config: Config) -> Iterator[str]:
    parallel = config.parallel
    if parallel.context_layout == "document" and parallel.context == 1:
        yield "parallel.context_layout=document needs parallel.context above 1; set it to sequence or raise parallel.context."
    if parallel.context_layout == "document" and config.data.document_boundaries == "ignore":
        yield (
            "parallel.context_layout=document cuts documents, but with data.document_boundaries=ignore a sequence has none; "
            "set one to sequence or the other to reset."
        )
    if parallel.context_layout == "document" and config.moe.dispatcher == "allgather" and parallel.expert > 1:
        yield (
            "parallel.context_layout=document gives data-parallel ranks different numbers of tokens, which moe.dispatcher=allgather "
            "cannot gather; use alltoall."
        )
    if parallel.context_softmax != "transformer_engine" or parallel.context == 1:
        return
    if parallel.context_layout == "sequence" and config.data.document_boundaries == "reset":
        yield (
            "parallel.context_softmax=transformer_engine cuts packs by document, not as parallel.context_layout=sequence does; set that "
            "to document."
        )
    if config.training.precision == "fp32":
        yield "parallel.context_softmax=transformer_engine needs training.precision=bf16; set it, or use auto, ring or all_gather."


def _pipeline(config: Config) -> Iterator[str]:
    parallel, layers = config.parallel, config.model.num_hidden_layers
    if parallel.virtual_pipeline > 1 and parallel.pipeline == 1:
        yield (
            f"parallel.virtual_pipeline={parallel.virtual_pipeline} needs parallel.pipeline above 1; "
            "set parallel.virtual_pipeline=1 or raise parallel.pipeline."
        )
    elif parallel.last_stage_layers is not None:
        yield from _last_stage(config)
    elif layers % parallel.pipeline:
        remedy = _divisors(layers)
        yield f"parallel.pipeline={parallel.pipeline} must divide model.num_hidden_layers={layers}; use {remedy}."
    elif layers % (parallel.pipeline * parallel.virtual_pipeline):
        per_stage = layers // parallel.pipeline
        yield (
            f"parallel.virtual_pipeline={parallel.virtual_pipeline} must divide the {per_stage} layers of a pipeline "
            f"stage (model.num_hidden_layers={layers}, parallel.pipeline={parallel.pipeline}); use {_divisors(per_stage)}."
        )


def _last_stage(config: Config) -> Iterator[str]:
    parallel, layers = config.parallel, config.model.num_hidden_layers
    chunks, others = parallel.virtual_pipeline, parallel.pipeline - 1
    given = f"parallel.last_stage_layers={parallel.last_stage_layers}"
    if not others:
        yield f"{given} needs parallel.pipeline above 1; leave it out, or raise parallel.pipeline."
        return
    usable = last_stage_sizes(config)
    if parallel.last_stage_layers not in usable:
        remedy = (
            f"use one of {', '.join(map(str, usable))}" if usable else "change parallel.pipeline or virtual_pipeline"
        )
        yield (
            f"{given} must leave the other {others} pipeline ranks equal parts of model.num_hidden_layers={layers}, each rank's in "
            f"parallel.virtual_pipeline={chunks} equal chunks; {remedy}."
        )


def _world(config: Config, world_size: int) -> Iterator[str]:
    parallel = config.parallel
    expert_tensor = derived(config, world_size).expert_tensor
    dense = parallel.tensor * parallel.pipeline * parallel.context
    expert = parallel.pipeline * parallel.expert * expert_tensor
    together = math.lcm(dense, expert)
    remedy = f"start {_multiples_near(world_size, together)} processes, or make a group smaller"
    if world_size % dense:
        yield (
            f"world_size={world_size} must be a multiple of parallel.tensor*pipeline*context={parallel.tensor}*"
            f"{parallel.pipeline}*{parallel.context}={dense}; {remedy}."
        )
    if world_size % expert:
        implied = " (expert_tensor=null is parallel.tensor)" if parallel.expert_tensor is None else ""
        yield (
            f"world_size={world_size} must be a multiple of parallel.pipeline*expert*expert_tensor={parallel.pipeline}*"
            f"{parallel.expert}*{expert_tensor}={expert}{implied}; {remedy}."
        )


def _training(config: Config, world_size: int) -> Iterator[str]:
    training, parallel = config.training, config.parallel
    together = training.micro_batch * derived(config, world_size).data
    batches = {"training.global_batch": training.global_batch}
    batches |= {f"training.batch_ramp[{i}].global_batch": s.global_batch for i, s in enumerate(training.batch_ramp)}
    for name, batch in batches.items():
        if together and (batch < 1 or batch % together):
            yield (
                f"{name}={batch} must be a multiple of training.micro_batch*data-parallel size={training.micro_batch}*"
                f"{together // training.micro_batch}={together}; use {_multiples_near(batch, together)}."
            )
        elif together and parallel.virtual_pipeline > 1 and (batch // together) % parallel.pipeline:
            unit = together * parallel.pipeline
            yield (
                f"{name}={batch} makes {batch // together} micro-batches per step; with parallel.virtual_pipeline="
                f"{parallel.virtual_pipeline} they must be a multiple of parallel.pipeline={parallel.pipeline}; "
                f"use {name.rsplit('.', 1)[-1]} {_multiples_near(batch, unit)}."
            )
    starts = [stage.from_step for stage in training.batch_ramp]
    if any(later <= earlier for earlier, later in zip([-1, *starts], starts)):
        yield f"training.batch_ramp starts at steps {starts}; they must rise and be 0 or more: sort the stages."
    unknown = sorted(set(training.recompute_modules) - set(RECOMPUTE_MODULES))
    if unknown:
        yield f"training.recompute_modules={unknown} is unknown; use any of {', '.join(RECOMPUTE_MODULES)}."
    if training.recompute == "selective" and not training.recompute_modules:
        yield f"training.recompute_modules=[] with training.recompute=selective; use any of {', '.join(RECOMPUTE_MODULES)}."
    chunk = derived(config, world_size).layers_per_chunk
    if training.recompute == "full" and training.recompute_layers > chunk > 0:
        yield (
            f"training.recompute_layers={training.recompute_layers} must not exceed the {chunk} layers of a model chunk; "
            f"use {_divisors(chunk)}."
        )
    if training.precision == "fp32" and training.grad_reduce_dtype != "fp32":
        yield (
            f"training.grad_reduce_dtype={training.grad_reduce_dtype} needs training.precision=bf16; "
            "set training.grad_reduce_dtype=fp32."
        )


def _schedule(config: Config) -> Iterator[str]:
    schedule, steps = config.schedule, config.training.steps
    if schedule.min_lr > config.optimizer.lr:
        yield (
            f"schedule.min_lr={schedule.min_lr} must not exceed optimizer.lr={config.optimizer.lr}; "
            "lower it or raise optimizer.lr."
        )
    decays = schedule.kind in ("wsd", "constant_decay")
    if (schedule.kind == "exponential" or (decays and schedule.decay_style == "exponential")) and schedule.min_lr == 0:
        key = "schedule.kind" if schedule.kind == "exponential" else "schedule.decay_style"
        yield (
            f"{key}=exponential never reaches schedule.min_lr=0.0; set schedule.min_lr above 0 "
            f"(e.g. {config.optimizer.lr / 10:g}) or another {key}."
        )
    if schedule.constant_steps and schedule.kind != "constant_decay":
        yield (
            f"schedule.constant_steps={schedule.constant_steps} is read by schedule.kind=constant_decay only, not by "
            f"{schedule.kind}; set it to 0 or change the kind."
        )
    if schedule.kind == "wsd" and schedule.decay_steps is None:
        yield "schedule.kind=wsd needs schedule.decay_steps, the length of the final decay; set e.g. a tenth of training.steps."
    used = schedule.warmup_steps + (schedule.decay_steps or 0)
    if schedule.kind == "wsd" and used > steps:
        yield (
            f"schedule.warmup_steps+decay_steps={used} must not exceed training.steps={steps}; "
            "shorten one or raise training.steps."
        )
    if not decays and schedule.decay_steps is not None and schedule.decay_steps < schedule.warmup_steps:
        yield (
            f"schedule.decay_steps={schedule.decay_steps} counts from step 0 and must not end before "
            f"schedule.warmup_steps={schedule.warmup_steps}; raise it."
        )


def _optimizer(config: Config) -> Iterator[str]:
    for name in ("beta1", "beta2"):
        value = getattr(config.optimizer, name)
        if not 0 <= value < 1:
            yield f"optimizer.{name}={value} must lie in [0, 1); use e.g. 0.9 or 0.95."
    parallel = config.parallel
    if parallel.overlap_param_gather and not (parallel.distributed_optimizer and parallel.overlap_grad_reduce):
        yield (
            "parallel.overlap_param_gather=true needs parallel.distributed_optimizer=true and "
            "parallel.overlap_grad_reduce=true; set them or turn it off."
        )


def _data(config: Config) -> Iterator[str]:
    data = config.data
    for name in ("train", "valid"):
        prefixes, weights = getattr(data, name), getattr(data, f"{name}_weights")
        if weights is None:
            continue
        if len(weights) != len(prefixes):
            yield f"data.{name}_weights has {len(weights)} entries but data.{name} has {len(prefixes)}; give one weight each."
        if not all(weight > 0 and math.isfinite(weight) for weight in weights):
            yield f"data.{name}_weights={weights} must be above 0; leave out the prefixes that are not wanted."
    if data.eod_token_id is not None and data.eod_token_id >= config.model.vocab_size:
        yield (
            f"data.eod_token_id={data.eod_token_id} must be below model.vocab_size={config.model.vocab_size}; "
            "take the id from the tokenizer or raise model.vocab_size."
        )


def _rl(config: Config) -> Iterator[str]:
    rl, training = config.rl, config.training
    if config.data.tokenizer is None:
        yield "data.tokenizer=null, but prompts are text; name the directory of the model's tokenizer."
    if not rl.tasks:
        yield "rl.tasks=[] leaves nothing to learn; name a source, e.g. [{kind: sort}]."
    for index, source in enumerate(rl.tasks):
        where = f"rl.tasks[{index}]"
        if not (source.weight > 0 and math.isfinite(source.weight)):
            yield f"{where}.weight={source.weight} must be above 0; leave out the sources that are not wanted."
        needed = {"reasoning_gym": "dataset", "file": "path"}.get(source.kind)
        if needed and getattr(source, needed) is None:
            yield f"{where}.kind={source.kind} needs {where}.{needed}; give it."
        if source.kind == "file" and source.held_out_path is None and rl.held_out_prompts:
            yield f"{where}.kind=file needs {where}.held_out_path; give it or set rl.held_out_prompts=0."
        if source.size < 1:
            yield f"{where}.size={source.size} must be 1 or more."
    if rl.samples_per_prompt < 2:
        yield f"rl.samples_per_prompt={rl.samples_per_prompt} leaves nothing to compare a sample with; use 2 or more."
    if training.global_batch % rl.samples_per_prompt:
        yield (
            f"training.global_batch={training.global_batch} (samples per update) must be a multiple of rl.samples_per_prompt="
            f"{rl.samples_per_prompt}; use {_multiples_near(training.global_batch, rl.samples_per_prompt)}."
        )
    if training.batch_ramp:
        yield "training.batch_ramp has no meaning for rl; leave it out."
    if rl.max_new_tokens >= training.seq_length:
        yield (
            f"rl.max_new_tokens={rl.max_new_tokens} must be below training.seq_length={training.seq_length}, which holds prompt "
            "and response; lower it or raise training.seq_length."
        )
    if rl.overlong_tokens > rl.max_new_tokens:
        yield (
            f"rl.overlong_tokens={rl.overlong_tokens} must not exceed rl.max_new_tokens={rl.max_new_tokens}; lower it."
        )
    yield from _rl_schedule(rl)
    wrong = [k for k in rl.held_out_pass_at if not 1 <= k <= rl.held_out_samples]
    if wrong:
        yield (
            f"rl.held_out_pass_at holds {wrong}; pass@k needs k samples of a prompt: use 1 to rl.held_out_samples="
            f"{rl.held_out_samples}, or raise that."
        )
    yield from _rl_experts(config)
    if rl.cache_tokens is not None and rl.engine == "fast":
        # Blocks of 64 tokens (generation/blocks.py, which needs torch), and one more for a prompt that is kept.
        least = (-(-training.seq_length // 64) + 1) * 64
        if rl.cache_tokens < least:
            yield (
                f"rl.cache_tokens={rl.cache_tokens} must hold a sequence of training.seq_length={training.seq_length} tokens and a block "
                f"of 64; use {least} or more, or null for all slots."
            )
    if not 0 < rl.repetition_probability <= 1:
        yield f"rl.repetition_probability={rl.repetition_probability} must lie above 0 and at most at 1; use e.g. 0.99."
    if rl.engine == "reference" and config.parallel.context > 1:
        yield (
            f"rl.engine=reference with parallel.context={config.parallel.context} would not give training's bits, which then come from "
            "sequences in parts; set parallel.context=1 or rl.engine=fast."
        )
    if rl.engine == "reference" and training.seq_length % 64:
        unit = _multiples_near(training.seq_length, 64)
        yield f"rl.engine=reference needs training.seq_length={training.seq_length} to be a multiple of 64; use {unit}."


def _rl_experts(config: Config) -> Iterator[str]:
    """What is right for pretraining and would make RL's samples or gradients depend on what stands beside them."""
    moe = config.moe
    if moe.aux_loss != "none":
        yield (
            f"moe.aux_loss={moe.aux_loss} balances the tokens of a pack, and which samples share one depends on layout and "
            "training.micro_batch, so that the gradient would too; set it to none for rl."
        )
    if moe.z_loss_coefficient:
        yield (
            f"moe.z_loss_coefficient={moe.z_loss_coefficient} averages over the tokens of a pack, and which samples share one depends on "
            "layout and training.micro_batch; set it to 0 for rl."
        )
    if moe.capacity_factor is not None:
        yield (
            f"moe.capacity_factor={moe.capacity_factor} drops tokens by what stands beside them, other ones in training than while "
            "sampling; set it to null for rl."
        )
    if moe.dispatcher == "allgather" and config.parallel.expert > 1:
        yield (
            "moe.dispatcher=allgather needs equally many tokens on all ranks, which sampling does not have; use alltoall for rl."
        )


def _rl_schedule(rl: RLConfig) -> Iterator[str]:
    windows = [stage.max_new_tokens for stage in rl.windows]
    if windows and (windows[0] < 1 or windows != sorted(set(windows))):
        yield f"rl.windows={windows} must be positive and strictly increasing; list each window once."
    elif windows and windows[-1] != rl.max_new_tokens:
        yield (
            f"rl.max_new_tokens={rl.max_new_tokens} must be the last of rl.windows={windows}; set it to {windows[-1]} or add a window."
        )
    elif windows and rl.overlong_tokens > windows[0]:
        yield f"rl.overlong_tokens={rl.overlong_tokens} must not exceed the first of rl.windows={windows}; lower it."
    for index, stage in enumerate(rl.windows):
        if stage.is_weight_cap is not None and not stage.is_weight_cap > 0:
            yield f"rl.windows[{index}].is_weight_cap={stage.is_weight_cap} must be above 0; use e.g. 5."
        if stage.clip_grad is not None and not (stage.clip_grad >= 0 and math.isfinite(stage.clip_grad)):
            yield f"rl.windows[{index}].clip_grad={stage.clip_grad} must be 0 (no clipping) or more; use e.g. 1."
    if rl.window_patience < 2:
        yield f"rl.window_patience={rl.window_patience} must be at least 2: two halves are compared."
    steps = [point.step for point in rl.curriculum]
    if steps != sorted(set(steps)) or min(steps, default=0) < 0:
        yield f"rl.curriculum is at steps {steps}; they must rise and be 0 or more: sort the points."
    for index, point in enumerate(rl.curriculum):
        where = f"rl.curriculum[{index}].weights={point.weights}"
        if len(point.weights) != len(rl.tasks):
            yield f"{where} must have one entry for each of the {len(rl.tasks)} sources of rl.tasks; 0 leaves one out."
        elif not all(weight >= 0 and math.isfinite(weight) for weight in point.weights) or not sum(point.weights) > 0:
            yield f"{where} must be 0 or more with a sum above 0; mend them."
    if not 0 <= rl.hard_below < rl.easy_above <= 1:
        yield (
            f"rl.hard_below={rl.hard_below} and rl.easy_above={rl.easy_above} are pass rates with 0 <= hard_below < easy_above <= 1; "
            "use e.g. 0 and 0.9."
        )


def _checkpoint(config: Config) -> Iterator[str]:
    checkpoint = config.checkpoint
    if checkpoint.every_steps and checkpoint.save is None:
        yield f"checkpoint.every_steps={checkpoint.every_steps} needs checkpoint.save; name a directory or set it to 0."
    if checkpoint.weights_only and checkpoint.load is None:
        yield "checkpoint.weights_only=true needs checkpoint.load; name the checkpoint or set it to false."


def _divisors(number: int) -> str:
    """`1, 2, 4 or 8`: the divisors of `number`, at most the eight smallest."""
    found = [d for d in range(1, min(number, 4096) + 1) if number % d == 0]
    shown = found[:8]
    return f"{', '.join(map(str, shown[:-1]))} or {shown[-1]}" if len(shown) > 1 else str(shown[0])


def _multiples_near(value: int, unit: int) -> str:
    below = value // unit * unit
    return f"{below} or {below + unit}" if below else str(unit)
