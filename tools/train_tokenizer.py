"""Train a byte-level BPE tokenizer: DIR/tokenizer.json, and tokenizer_config.json for transformers.

python tools/train_tokenizer.py --input FILES --vocab-size N --output DIR
"""

import argparse
import sys

from megatron_m1.config.errors import ConfigError
from megatron_m1.data.inputs import read_input_list
from megatron_m1.data.train_tokenizer import train_tokenizer


def main() -> int:
    """Exit code: 0; 1 if the work failed; 2 for bad input."""
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
        help="file names taken from input directories (default: *.txt *.jsonl *.jsonl.gz)",
    )
    add("--json-key", default="text", metavar="KEY", help="key of a line's text (default: text)")
    add("--overwrite", action="store_true", help="replace an existing tokenizer")
    args = parser.parse_args()
    if not args.input and not args.input_list:
        parser.error("give --input or --input-list")
    try:
        inputs = args.input + (read_input_list(args.input_list) if args.input_list else [])
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
        return 2 if isinstance(error, ConfigError) else 1
    print(f"{args.output}: {size:,} tokens (asked for {args.vocab_size:,}); {skipped:,} bad records left out")
    return 0


if __name__ == "__main__":
    sys.exit(main())
