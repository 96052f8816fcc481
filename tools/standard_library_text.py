"""List the standard library's Python sources, split by file into training and validation text.

python tools/standard_library_text.py --output DIR [--valid-percent 5] [--max-megabytes X]

Writes DIR/train.txt and DIR/valid.txt, one path a line, for `--input-list` of the other tools; nothing is copied. A file
is validation text by the hash of its path within the library, so the split is the same on every machine and its share of
the bytes near --valid-percent.
"""

import argparse
import hashlib
import sys
import sysconfig
from pathlib import Path

LEFT_OUT = {"__pycache__", "site-packages", "idlelib", "lib2to3", "test", "tests"}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, type=Path, metavar="DIR")
    parser.add_argument("--valid-percent", type=int, default=5, metavar="P")
    parser.add_argument("--max-megabytes", type=float, default=float("inf"), metavar="X", help="of text, in all")
    options = parser.parse_args(argv)
    library = Path(sysconfig.get_path("stdlib"))
    files = sources(library, options.max_megabytes * 1e6)
    valid = [path for path in files if is_valid(path.relative_to(library), options.valid_percent)]
    train = [path for path in files if path not in set(valid)]
    if not train or not valid:
        print(
            f"error: {library} has {len(train)} training and {len(valid)} validation files; both are needed.",
            file=sys.stderr,
        )
        return 1
    options.output.mkdir(parents=True, exist_ok=True)
    for name, paths in (("train", train), ("valid", valid)):
        (options.output / f"{name}.txt").write_text("".join(f"{path}\n" for path in paths), encoding="utf-8")
        print(f"{name}: {len(paths)} files, {sum(path.stat().st_size for path in paths) / 1e6:.1f} MB")
    return 0


def sources(library: Path, max_bytes: float) -> list[Path]:
    """Sorted non-empty .py files of the library without its tests, in order of a hash of their path until max_bytes are reached."""
    files = [
        path
        for path in library.rglob("*.py")
        if not LEFT_OUT.intersection(path.relative_to(library).parts) and path.stat().st_size
    ]
    taken: list[Path] = []
    total = 0
    for path in sorted(files, key=lambda path: digest(path.relative_to(library))):
        total += path.stat().st_size
        if total > max_bytes:
            break
        taken.append(path)
    return sorted(taken)


def is_valid(relative: Path, percent: int) -> bool:
    """Whether a file belongs to the validation text."""
    return int(digest(relative)[-8:], 16) % 100 < percent


def digest(relative: Path) -> str:
    return hashlib.sha256(relative.as_posix().encode()).hexdigest()


if __name__ == "__main__":
    sys.exit(main())
