"""The `generate` command."""

import argparse
import math
import os
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_m1 import platform
from megatron_m1.checkpoint.folders import resolve
from megatron_m1.checkpoint.manifest import read_metadata
from megatron_m1.config import Config, ConfigError, from_yaml, load_config, validate_layout
from megatron_m1.config.schema import MoEConfig, TrainingConfig
from megatron_m1.data.tokenizer import Tokenizer
from megatron_m1.generation.prompts import PromptLimits, check_output, read_prompts, write_lines
from megatron_m1.generation.requests import Request, Result, Sampling, request_seed

__all__ = ["main"]


def main(argv: list[str]) -> None:
    """Complete the prompts of a file with the model of a checkpoint; see --help. Runs alone or under torchrun.

    Raises ConfigError for bad input, on every rank and before the model is built wherever that is possible, and
    FloatingPointError if the model yields logits that are not finite. The output file changes only once all is done.
    """
    options, overrides = _parse(argv)
    step = _step_folder(options.checkpoint)
    trained = _trained_config(step)
    config = _generation_config(trained, _stored_precision(step), overrides)
    tokenizer = _tokenizer(options.tokenizer, trained)
    limits = PromptLimits(config.model.vocab_size, config.model.max_position_embeddings - options.max_new_tokens)
    prompts = read_prompts(options.prompts, tokenizer, limits)
    check_output(options.output)
    end_token = _end_token(options.end_token, trained, tokenizer)

    platform.setup()
    from megatron_m1.checkpoint.native import load_checkpoint
    from megatron_m1.engine.distributed import init_distributed, shutdown_distributed
    from megatron_m1.engine.trainer import Trainer
    from megatron_m1.generation.engine import Engine
    from megatron_m1.parallel import destroy_groups, init_groups

    sampling = Sampling(
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_p=options.top_p,
        top_k=options.top_k,
        end_tokens=() if end_token is None else (end_token,),
        repetition_tokens=options.repetition_tokens,
        repetition_probability=options.repetition_probability,
    )
    requests = [
        Request(tuple(prompt), request_seed(options.seed, index * options.samples + sample), sampling)
        for index, prompt in enumerate(prompts)
        for sample in range(options.samples)
    ]
    init_distributed(config.parallel.timeout_s)
    groups = init_groups(config.parallel, seed=options.seed)
    trainer = Trainer(config, groups, train=False, initial_weights=False)
    load_checkpoint(trainer, config, path=step, weights_only=True)
    start = time.perf_counter()
    engine = Engine(
        trainer.models[0], groups, slots=options.batch_size, prefill_tokens=options.prefill_tokens,
        record_routing=options.routing,
    )  # fmt: skip
    results = engine.generate(requests)
    duration_s = time.perf_counter() - start
    if _is_first_rank():
        records = [
            _record(index // options.samples, index % options.samples, request, result, tokenizer)
            for index, (request, result) in enumerate(zip(requests, results, strict=True))
        ]
        write_lines(options.output, records)
        tokens = sum(len(result.tokens) for result in results)
        print(
            f"{len(records)} completions, {tokens} tokens in {duration_s:.1f} s ({tokens / duration_s:.0f} tokens/s) "
            f"-> {options.output}",
            file=sys.stderr,
        )
    destroy_groups()
    shutdown_distributed()


def _record(index: int, sample: int, request: Request, result: Result, tokenizer: Tokenizer | None) -> dict[str, Any]:
    record: dict[str, Any] = {
        "index": index,
        "sample": sample,
        "token_ids": result.tokens,
        "text": None if tokenizer is None else tokenizer.decode(result.tokens),
        "logprobs": result.logprobs,
        "finish_reason": result.finish_reason,
        "prompt_tokens": len(request.prompt),
    }
    return record if result.routing is None else record | {"routing": result.routing.tolist()}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"generate: {message}; --help lists the options.")


def _parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Our own options, and the `--parallel.*` ones."""
    parser = _Parser(
        prog="python -m megatron_m1 generate",
        description="Complete prompts with the model of a checkpoint. Output lines, in the order of the prompts: token_ids "
        "(generated), text (null without a tokenizer), logprobs (of the generated tokens, natural log, float32, at "
        "temperature 1 and top-p 1), finish_reason (eos, length or stop_repetition), index, sample, "
        "prompt_tokens, and routing if asked for.",
        epilog="--parallel.{tensor,pipeline,expert,expert_tensor} N lay the model out; the other ranks share the prompts. "
        "What is drawn for a prompt depends on --seed and its index, not on what runs beside it.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--checkpoint", type=Path, required=True, metavar="DIR", help="folder with `latest`, or one step folder of it")
    add("--prompts", type=Path, required=True, metavar="FILE", help="JSON lines with `text` or `token_ids`")
    add("--output", type=Path, required=True, metavar="FILE", help="JSON lines; replaced only when all is done")
    add("--max-new-tokens", type=_count, default=128, metavar="N", help="tokens per completion at most (128)")
    add("--temperature", type=_temperature, default=1.0, metavar="T", help="0: always the likeliest token (1.0)")
    add("--top-p", type=_top_p, default=1.0, metavar="P", help="share of the probability to draw from (1.0)")
    add("--top-k", type=_count_or_zero, default=0, metavar="K", help="likeliest tokens to draw from, 0 for all (0)")
    add("--samples", type=_count, default=1, metavar="G", help="completions per prompt, which share its prefill (1)")
    add(
        "--repetition-tokens", type=_count_or_zero, default=3000, metavar="N",
        help="stop after N consecutive tokens of more than --repetition-probability, 0 for never (3000)",
    )  # fmt: skip
    add("--repetition-probability", type=_top_p, default=0.99, metavar="P", help="see --repetition-tokens (0.99)")
    add("--routing", action="store_true", help="write the experts of every token: [tokens, layers, top_k]")
    add(
        "--prefill-tokens",
        type=_chunk,
        default=2048,
        metavar="N",
        help="prompt tokens per pass, a multiple of 64 (2048)",
    )
    add("--seed", type=int, default=0, metavar="S", help="of the draws (0)")
    add("--batch-size", type=_count, default=16, metavar="B", help="sequences at a time on one data-parallel rank (16)")
    add("--tokenizer", type=Path, metavar="DIR", help="default: data.tokenizer of the checkpoint's config.yaml")
    add(
        "--end-token", type=int, metavar="ID",
        help="token that ends a completion, -1 for none (data.eod_token_id of the checkpoint, else the tokenizer's)",
    )  # fmt: skip
    options, overrides = parser.parse_known_args(argv)
    for option in overrides:
        if option.startswith("-") and not option.startswith("--parallel."):
            parser.error(f"{option} is not an option")
    return options, overrides


def _step_folder(checkpoint: Path) -> Path:
    """The step folder that `checkpoint` is, or that its `latest` names."""
    try:
        return resolve(checkpoint)
    except ConfigError as error:
        raise ConfigError(str(error).replace("checkpoint.load", "--checkpoint")) from None


def _stored_precision(step: Path) -> str:
    """`fp32` or `bf16`: what the matrices in the step folder are stored in, whatever its config.yaml says."""
    name = "embedding.word_embeddings.weight"
    stored = read_metadata(step).state_dict_metadata.get(name)
    if not isinstance(stored, TensorStorageMetadata):
        raise ConfigError(f"{name} is not in {step}; use a checkpoint that training or an import has written.")
    return "bf16" if stored.properties.dtype == torch.bfloat16 else "fp32"


def _trained_config(step: Path) -> Config:
    path = step / "config.yaml"
    if not path.is_file():
        raise ConfigError(
            f"{path} is missing, so the model is unknown; use a folder that training or an import has written."
        )
    return from_yaml(path)


def _generation_config(trained: Config, precision: str, overrides: list[str]) -> Config:
    """The trained model in the layout of the `--parallel.*` options, in the precision its weights are stored in."""
    config = load_config(overrides, base=Config(model=trained.model))
    parallel = config.parallel
    if parallel.sequence:
        raise ConfigError("parallel.sequence=true has no use in generation, whose passes are short; leave it out.")
    if parallel.virtual_pipeline != 1:
        raise ConfigError(
            f"parallel.virtual_pipeline={parallel.virtual_pipeline} has no use in generation; leave it out "
            "(any checkpoint loads into any layout)."
        )
    if parallel.context != 1:
        raise ConfigError(
            f"parallel.context={parallel.context} has no use in generation, which spreads no sequence over ranks; leave it out (these "
            "ranks then share the prompts)."
        )
    parallel.sequence = False
    # Token drop would make a completion depend on its neighbours, and uneven ranks need the all-to-all dispatcher.
    config.moe = MoEConfig(aux_loss="none", capacity_factor=None, dispatcher="alltoall")
    config.training = TrainingConfig(
        precision="fp32" if precision == "fp32" else "bf16", seq_length=parallel.tensor, recompute="none"
    )
    validate_layout(config, int(os.environ.get("WORLD_SIZE", "1")))
    return config


def _tokenizer(folder: Path | None, trained: Config) -> Tokenizer | None:
    """The tokenizer asked for, else the checkpoint's if it is there, else None."""
    if folder is not None:
        return Tokenizer(folder, model_vocab_size=trained.model.vocab_size)
    named = trained.data.tokenizer
    if named is None:
        return None
    if not Path(named).is_dir():
        if _is_first_rank():
            print(
                f"data.tokenizer={named} of the checkpoint is not there: no text goes in or out; pass --tokenizer DIR",
                file=sys.stderr,
            )
        return None
    return Tokenizer(named, model_vocab_size=trained.model.vocab_size)


def _end_token(asked: int | None, trained: Config, tokenizer: Tokenizer | None) -> int | None:
    if asked is not None:
        if asked >= trained.model.vocab_size:
            raise ConfigError(
                f"--end-token={asked} must be below model.vocab_size={trained.model.vocab_size}, or -1 for none."
            )
        return None if asked < 0 else asked
    if trained.data.eod_token_id is not None:
        return trained.data.eod_token_id
    return None if tokenizer is None else tokenizer.eod_id


def _is_first_rank() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} must be 1 or more")
    return value


def _count_or_zero(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{value} must be 0 or more")
    return value


def _chunk(text: str) -> int:
    value = int(text)
    if value < 64 or value % 64:
        raise argparse.ArgumentTypeError(f"{value} must be a positive multiple of 64")
    return value


def _temperature(text: str) -> float:
    value = float(text)
    if not (value >= 0 and math.isfinite(value)):
        raise argparse.ArgumentTypeError(f"{value} must be 0 or more")
    return value


def _top_p(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{value} must lie above 0 and at most at 1")
    return value
