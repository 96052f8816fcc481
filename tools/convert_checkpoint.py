"""Convert between Hugging Face directories and native checkpoints:

python tools/convert_checkpoint.py import --hf DIR --checkpoint DIR --format minimax_m1|minimax
python tools/convert_checkpoint.py export --checkpoint DIR --hf DIR --format minimax_m1|minimax [--tokenizer DIR]
python tools/convert_checkpoint.py verify --checkpoint DIR --hf DIR --format minimax_m1|minimax
"""

import argparse
import re
import sys
from pathlib import Path

from megatron_m1.checkpoint.hf import export_hf, import_hf, plan_export, plan_import, verify_hf
from megatron_m1.config.errors import ConfigError

SHOWN = 10


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0 done or equal, 1 different, 2 bad input."""
    arguments = parse(argv)
    try:
        return {"import": run_import, "export": run_export, "verify": run_verify}[arguments.action](arguments)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def run_import(arguments: argparse.Namespace) -> int:
    hf, checkpoint, format = arguments.hf, arguments.checkpoint, arguments.format
    if arguments.plan:
        print(*plan_import(hf, checkpoint, format).lines(), sep="\n")
    else:
        import_hf(hf, checkpoint, format, strict=arguments.strict, overwrite=arguments.overwrite, log=log)
    return 0


def run_export(arguments: argparse.Namespace) -> int:
    hf, checkpoint, format = arguments.hf, arguments.checkpoint, arguments.format
    dtype = None if arguments.dtype == "keep" else arguments.dtype
    if arguments.plan:
        plan = plan_export(checkpoint, hf, format, dtype=dtype, max_shard_bytes=arguments.max_shard_size)
        print(*plan.lines(), sep="\n")
        return 0
    export_hf(
        checkpoint, hf, format, dtype=dtype, max_shard_bytes=arguments.max_shard_size, tokenizer=arguments.tokenizer,
        strict=arguments.strict, overwrite=arguments.overwrite, log=log,
    )  # fmt: skip
    return 0


def run_verify(arguments: argparse.Namespace) -> int:
    result = verify_hf(arguments.checkpoint, arguments.hf, arguments.format, log=log)
    problems = list(result.mismatches)
    if arguments.strict:
        problems += [f"{name} is rounded" for name in result.rounded]
    for text in problems[:SHOWN]:
        print(f"different: {text}")
    print(
        f"{result.compared:,} tensors compared, {len(problems):,} differences"
        + (f", {len(result.rounded)} rounded to the dtype of the file" if result.rounded else "")
    )
    return 1 if problems else 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    actions = parser.add_subparsers(dest="action", required=True)
    for action, text in (
        ("import", "Hugging Face directory -> native checkpoint"),
        ("export", "native checkpoint -> Hugging Face directory"),
        ("verify", "compare both bit by bit; exit code 1 if they differ"),
    ):
        sub = actions.add_parser(action, help=text, description=text)
        sub.add_argument("--hf", type=Path, required=True, help="Hugging Face directory")
        sub.add_argument(
            "--checkpoint", type=Path, required=True, help="save folder (with `latest`) or one step folder"
        )
        sub.add_argument(
            "--format", choices=("minimax_m1", "minimax"), default="minimax_m1",
            help="minimax_m1: released layout, what vLLM loads; minimax: transformers' own MiniMaxForCausalLM",
        )  # fmt: skip
        sub.add_argument("--strict", action="store_true", help="warnings are errors (verify: rounding is a difference)")
        if action != "verify":
            sub.add_argument("--plan", action="store_true", help="print bytes, files and memory; do nothing")
            sub.add_argument("--overwrite", action="store_true", help="replace an existing output")
        if action == "export":
            sub.add_argument("--dtype", choices=("keep", "bf16", "fp32"), default="keep", help="router gates stay fp32")
            sub.add_argument("--max-shard-size", type=byte_count, default=5 << 30, metavar="SIZE", help="e.g. 2GB")
            sub.add_argument("--tokenizer", type=Path, metavar="DIR", help="tokenizer files to copy into the output")
    return parser.parse_args(argv)


def byte_count(text: str) -> int:
    """Bytes of `2GB`, `500MB`, `1GiB`, `4096`."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", text, re.IGNORECASE)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write e.g. 2GB or 500MB")
    base = 1024 if match[3] else 1000
    count = int(float(match[1]) * base ** " KMGT".index(match[2].upper() or " "))
    if count < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be at least one byte")
    return count


def log(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
