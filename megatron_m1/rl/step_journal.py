"""The journal of one generation batch or evaluation on one replica: what is finished of it, and what a resumed run takes over."""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

from megatron_m1.checkpoint.folders import STEP_FOLDER
from megatron_m1.config.errors import ConfigError
from megatron_m1.config.schema import Config
from megatron_m1.rl.journal import Journal, JournalCorrupt, read_journal
from megatron_m1.rl.samples import Sample, from_record, to_record, verdict_record, with_verdict

__all__ = ["StepJournal", "journal_path", "remove_old_journals"]

FILE = re.compile(r"(step|held_out)_(\d{8,})\.replica_(\d{5,})\.jsonl")


class StepJournal:
    """Samples and verdicts on disk as they come. Use it as a context manager.

    finished: samples of these weights that are in the file, by number, with their verdicts, of any rank of the replica.  path: None:
    nothing is finished and nothing is kept.  writes: whether this rank, the one that judges, adds to the file.
    A write that fails while other ranks are in the middle of a pass is raised by `check`, and what comes after it is not kept.
    Raises ConfigError for a file that is damaged, cannot be used or belongs to a run under way.
    """

    def __init__(self, path: Path | None, weights: str, *, routing: bool, writes: bool) -> None:
        self.weights, self.finished = weights, dict[int, Sample]()
        self._journal: Journal | None = None
        self._failure: ConfigError | None = None
        if path is None or not (writes or path.exists()):
            return
        with _explained(path):
            if writes:
                self._journal = Journal(path, sync_every=None)
            for record in read_journal(path):
                if record["weights"] != weights:
                    continue
                if "verdict" not in record:
                    sample = from_record(record)
                    if (sample.routing is not None) == routing:
                        self.finished[sample.number] = sample
                elif (number := record["verdict"]) in self.finished:
                    self.finished[number] = with_verdict(self.finished[number], record)

    def add_sample(self, sample: Sample) -> None:
        """Keep what was generated."""
        if self._journal is not None:
            self._append(to_record(sample))

    def add_verdicts(self, samples: list[Sample]) -> None:
        """Keep what was judged, and return when it is on disk; a resumed run does not judge these again."""
        for sample in samples:
            if self._journal is not None:
                self._append(verdict_record(sample))
        self.sync()

    def sync(self) -> None:
        """Return when all that was added is on disk, safe from power loss."""
        if self._journal is not None:
            with self._kept(), _explained(self._journal.path):
                self._journal.sync()

    def check(self) -> None:
        """Raises ConfigError if something could not be kept."""
        if self._failure is not None:
            raise self._failure

    def _append(self, record: dict) -> None:
        assert self._journal is not None
        with self._kept(), _explained(self._journal.path):
            self._journal.append(record)

    @contextlib.contextmanager
    def _kept(self) -> Iterator[None]:
        try:
            yield
        except ConfigError as error:
            self._failure = error
            self._close()

    def _close(self) -> None:
        journal, self._journal = self._journal, None
        if journal is not None:
            with contextlib.suppress(OSError):  # what matters has been synchronised, or has failed
                journal.close()

    def __enter__(self) -> "StepJournal":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()


def journal_path(config: Config, kind: str, step: int, *, replica: int) -> Path | None:
    """Of `step` number `step` (from 1), or of the `held_out` evaluation after so many steps; None without `rl.journal`."""
    folder = config.rl.journal
    return None if folder is None else Path(folder) / f"{kind}_{step:08d}.replica_{replica:05d}.jsonl"


def remove_old_journals(config: Config, *, replica: int | None) -> None:
    """Delete what `rl.journal_keep` says of this replica's journals, or, with None, of all that are seen. Missing ones are no error."""
    last = _last_superseded(config)
    if last is None:
        return
    assert config.rl.journal is not None
    for path in Path(config.rl.journal).iterdir():
        match = FILE.fullmatch(path.name)
        if match is None or (replica is not None and int(match[3]) != replica):
            continue
        # The evaluation after the step of a checkpoint comes after that checkpoint.
        if int(match[2]) <= last - (match[1] == "held_out"):
            path.unlink(missing_ok=True)


def _last_superseded(config: Config) -> int | None:
    """The last step whose samples no checkpoint that counts needs any more."""
    save, keep = config.checkpoint.save, config.rl.journal_keep
    if config.rl.journal is None or save is None or (keep is None and config.checkpoint.keep == 0):
        return None
    saved = [int(match[1]) for folder in Path(save).iterdir() if (match := STEP_FOLDER.fullmatch(folder.name))]
    if not saved:
        return None
    return min(saved) if keep is None else max(saved) - keep


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except BlockingIOError:
        raise ConfigError(f"rl.journal: another run writes to {path}; end that run, or name another folder.") from None
    except JournalCorrupt as error:
        raise ConfigError(f"rl.journal: {error}") from None
    except OSError as error:
        raise ConfigError(
            f"rl.journal: {path} cannot be used: {error.strerror}; make room or name another folder, and continue from the last "
            "checkpoint."
        ) from None
