"""Text to token files (PREFIX.bin, PREFIX.idx) that Megatron-Core's IndexedDataset reads.

python tools/preprocess_data.py --input FILES --tokenizer DIR --output-prefix P --workers N
"""

import argparse
import signal
import sys
import time

from megatron_m1.config.errors import ConfigError
from megatron_m1.data.inputs import read_input_list
from megatron_m1.data.preprocess import PreprocessError, PreprocessOptions, preprocess


class Progress:
    """A bar on a terminal; plain lines, at most one in five seconds, otherwise.  Writes to stderr."""

    def __init__(self) -> None:
        self.bar = None
        self.start = self.last = time.monotonic()
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import Progress as Bar

            self.bar = Bar(*Bar.get_default_columns(), console=Console(stderr=True), transient=True)
            self.task = self.bar.add_task("tokenizing", total=None)
            self.bar.start()

    def update(self, done: int, total: int) -> None:
        now = time.monotonic()
        if self.bar is not None:
            self.bar.update(self.task, completed=done, total=total)
        elif now - self.last >= 5:
            self.last = now
            rate = done / 1e6 / (now - self.start)
            print(f"tokenizing: {done / 1e6:.1f} of {total / 1e6:.1f} MB, {rate:.2f} MB/s", file=sys.stderr, flush=True)

    def report(self, line: str) -> None:
        if self.bar is not None:
            self.bar.console.print(line, markup=False, highlight=False)
        else:
            print(line, file=sys.stderr, flush=True)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.stop()


def parse_arguments() -> PreprocessOptions:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "--input",
        nargs="+",
        default=[],
        metavar="PATH",
        help=".jsonl, .jsonl.gz, plain text files (one document each), or directories of them",
    )
    add("--input-list", metavar="FILE", help="a file that names one input a line")
    add("--tokenizer", required=True, metavar="DIR", help="directory with tokenizer.json")
    add(
        "--output-prefix",
        required=True,
        metavar="P",
        help="writes P.bin, P.idx, P.meta.json; a data.train or data.valid entry",
    )
    add("--workers", type=int, default=1, metavar="N", help="worker processes; the output does not depend on it")
    add(
        "--glob",
        nargs="+",
        default=["*.txt", "*.jsonl", "*.jsonl.gz"],
        metavar="PATTERN",
        help="file names taken from input directories, e.g. '*.py' (default: *.txt *.jsonl *.jsonl.gz)",
    )
    add("--json-key", default="text", metavar="KEY", help="key of a line's text (default: text)")
    add("--append-eod", action="store_true", help="end every document with the end-of-document token")
    add("--eod-token", metavar="TOKEN", help="default: eos_token of tokenizer_config.json, else <eod>")
    add("--dtype", choices=["uint16", "int32"], help="default: uint16 below 65,500 tokens, else int32")
    add(
        "--max-bad-lines",
        type=int,
        default=100,
        metavar="K",
        help="quarantine at most K bad lines or files, else fail (default: 100)",
    )
    add("--overwrite", action="store_true", help="replace existing output")
    args = parser.parse_args()
    inputs = args.input + (read_input_list(args.input_list) if args.input_list else [])
    if not inputs:
        parser.error("give --input or --input-list")
    return PreprocessOptions(
        input=inputs,
        tokenizer=args.tokenizer,
        output_prefix=args.output_prefix,
        workers=args.workers,
        globs=args.glob,
        json_key=args.json_key,
        append_eod=args.append_eod,
        eod_token=args.eod_token,
        dtype=args.dtype,
        max_bad_lines=args.max_bad_lines,
        overwrite=args.overwrite,
    )


def main() -> int:
    """Exit code: 0; 1 if the work failed; 2 for bad input; 130 if interrupted."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("error: stopped by SIGTERM; no token file was written."))
    try:
        options = parse_arguments()
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    progress = Progress()
    try:
        summary = preprocess(options, progress=progress.update, report=progress.report)
    except (ConfigError, PreprocessError, OSError) as error:
        progress.close()
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    except KeyboardInterrupt:
        progress.close()
        print("error: interrupted; no token file was written.", file=sys.stderr)
        return 130
    progress.close()
    megabytes, seconds = summary.input_bytes / 1e6, summary.seconds
    print(
        f"{options.output_prefix}: {summary.documents:,} documents, {summary.tokens:,} tokens; left out: "
        f"{summary.empty_documents:,} empty documents, {summary.bad_records:,} bad records"
        + (f" (see {options.output_prefix}.quarantine.jsonl)" if summary.bad_records else "")
    )
    print(
        f"{megabytes:.1f} MB in {seconds:.1f} s: {megabytes / seconds:.2f} MB/s, "
        f"{summary.tokens / seconds / 1e3:.0f}k tokens/s with {options.workers} workers"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
