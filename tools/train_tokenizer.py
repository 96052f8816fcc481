"""Train a byte-level BPE tokenizer: DIR/tokenizer.json, and tokenizer_config.json for transformers.

python tools/train_tokenizer.py --input FILES --vocab-size N --output DIR
"""

import argparse
import sys
from pathlib import Path

from megatron_m1.config.errors import ConfigError
from megatron_m1.data.train_tokenizer import train_tokenizer


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "--input",
        nargs="+",
        default=[],
        metavar="PATH",
        help=".jsonl, .jsonl.gz, plain text files, or directories of them",
    )
    add("--input-list", metavar="FILE", help="a file that names one input a line")
    add("--vocab-size", type=int, required=True, metavar="N", help="tokens, <eod> and the 256 bytes included")
    add("--output", required=True, metavar="DIR")
    add(
        "--glob",
        nargs="+",
        default=["*.txt", "*.jsonl", "*.jsonl.gz"],
        metavar="PATTERN",
        help="file names taken from input directories",
    )
    add("--json-key", default="text", metavar="KEY")
    add("--overwrite", action="store_true", help="replace an existing tokenizer")
    args = parser.parse_args()
    inputs = list(args.input)
    if args.input_list:
        inputs += [line for line in Path(args.input_list).read_text(encoding="utf-8").splitlines() if line]
    if not inputs:
        parser.error("give --input or --input-list")
    try:
        size, skipped = train_tokenizer(
            inputs,
            args.output,
            vocab_size=args.vocab_size,
            globs=args.glob,
            json_key=args.json_key,
            overwrite=args.overwrite,
        )
    except (ConfigError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{args.output}: {size:,} tokens (asked for {args.vocab_size:,}); {skipped:,} bad records left out")
    return 0


if __name__ == "__main__":
    sys.exit(main())
