"""What a run keeps of a generation batch, what the next one takes over, and what is told when that fails."""

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_m1.config import ConfigError
from megatron_m1.generation.requests import Sampling
from megatron_m1.rl.journal import Journal, read_journal
from megatron_m1.rl.rewards.protocol import RewardResult, Score
from megatron_m1.rl.rollout import _fits, _make_folder, _of_task, _Plan
from megatron_m1.rl.samples import Facts, Sample, counted_reward
from megatron_m1.rl.step_journal import StepJournal, journal_path, remove_old_journals
from megatron_m1.rl.tasks import Task
from megatron_m1.rl.update import _advantages
from tests.unit.rl.loop_cases import fixed_samples, tiny_config


def opened(path: Path | None, *, weights: str = "0", routing: bool = True, writes: bool = True) -> StepJournal:
    return StepJournal(path, weights, routing=routing, writes=writes)


def unjudged() -> list[Sample]:
    return [replace(sample, reward=None) for sample in fixed_samples()]


def test_samples_and_verdicts_come_back(tmp_path):
    path, samples = tmp_path / "j.jsonl", unjudged()
    judged = [
        samples[0].judged(RewardResult(Score(0.1 + 0.2, {"format": 1.0}), None, 0.5)),
        samples[1].judged(RewardResult(None, "killed after 1 s", 1.0)),
    ]
    with opened(path) as journal:
        assert journal.finished == {}
        for sample in samples[:3]:
            journal.add_sample(sample)
        journal.add_verdicts(judged)
        journal.check()
    for writes in (True, False):
        with opened(path, writes=writes) as journal:
            found = journal.finished
        assert found.keys() == {0, 1, 2}
        assert found[0].reward == 0.1 + 0.2 and found[0].parts == {"format": 1.0} and found[0].has_verdict
        assert found[1].reward is None and found[1].reward_error == "killed after 1 s" and found[1].has_verdict
        assert not found[2].has_verdict
        assert (found[2].routing == samples[2].routing).all() and found[2].response == samples[2].response
    for other in ({"weights": "1"}, {"routing": False}):
        with opened(path, **other) as journal:
            assert journal.finished == {}


def test_a_sample_drawn_anew_has_no_old_verdict(tmp_path):
    path, (sample, *_) = tmp_path / "j.jsonl", unjudged()
    with opened(path) as journal:
        journal.add_sample(sample)
        journal.add_verdicts([replace(sample, reward=1.0)])
        journal.add_sample(replace(sample, text="another"))
    with opened(path) as journal:
        assert journal.finished[0].text == "another" and not journal.finished[0].has_verdict


def test_without_a_path_nothing_is_kept(tmp_path):
    with opened(None) as journal:
        journal.add_sample(unjudged()[0])
        journal.add_verdicts([])
        journal.check()
    with opened(tmp_path / "absent.jsonl", writes=False) as journal:
        journal.add_sample(unjudged()[0])
    assert list(tmp_path.iterdir()) == []


def test_one_message_for_a_journal_in_use_and_for_a_damaged_one(tmp_path):
    path = tmp_path / "j.jsonl"
    with opened(path) as journal:
        for sample in unjudged()[:2]:
            journal.add_sample(sample)
        with pytest.raises(ConfigError, match=r"rl.journal: another run writes to .*j.jsonl; end that run, or name"):
            opened(path)
        assert opened(path, writes=False).finished.keys() == {0, 1}
    content = path.read_bytes()
    path.write_bytes(content[:80] + bytes([content[80] ^ 1]) + content[81:])
    for writes in (True, False):
        with pytest.raises(ConfigError, match=r"rl.journal: .*j.jsonl: record 0 .* is damaged .* move it away"):
            opened(path, writes=writes)
    with pytest.raises(ConfigError, match=r"rl.journal: .*/none/j.jsonl cannot be used: No such file or directory"):
        opened(tmp_path / "none/j.jsonl")


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"rl.journal=.*/file/journal cannot be made: Not a directory; name another"):
        _make_folder(str(tmp_path / "file/journal"))
    _make_folder(str(tmp_path / "new/journal"))
    assert (tmp_path / "new/journal").is_dir()


def test_a_full_disk_is_told_when_the_ranks_are_out_of_the_pass(tmp_path, monkeypatch):
    path, samples = tmp_path / "j.jsonl", unjudged()
    real = Journal.append

    def append(self, record):
        if record.get("number") == 1:
            raise OSError(28, "No space left on device")
        real(self, record)

    monkeypatch.setattr(Journal, "append", append)
    with opened(path) as journal:
        for sample in samples[:3]:
            journal.add_sample(sample)
        with pytest.raises(
            ConfigError, match=r"rl.journal: .*j.jsonl cannot be used: No space left on device; make room"
        ):
            journal.check()
    assert [record["number"] for record in read_journal(path)] == [0]


@pytest.mark.parametrize(
    "saved, checkpoint_keep, keep, left",
    [
        ((2, 4), 0, None, "s1 s2 s3 s4 s5 h0 h2 h4"),
        ((2, 4), 2, None, "s3 s4 s5 h2 h4"),
        ((4,), 1, None, "s5 h4"),
        ((2, 4), 2, 0, "s5 h4"),
        ((2, 4), 0, 1, "s4 s5 h4"),
        ((2, 4), 0, 9, "s1 s2 s3 s4 s5 h0 h2 h4"),
        ((), 2, 0, "s1 s2 s3 s4 s5 h0 h2 h4"),
    ],
)
def test_journals_that_no_checkpoint_needs_are_removed(tmp_path, saved, checkpoint_keep, keep, left):
    config = tiny_config(journal=str(tmp_path / "journal"), journal_keep=keep)
    config.checkpoint.save, config.checkpoint.keep = str(tmp_path / "save"), checkpoint_keep
    for step in saved:
        (tmp_path / f"save/step_{step:08d}").mkdir(parents=True)
    (tmp_path / "save").mkdir(exist_ok=True)
    (tmp_path / "journal").mkdir()
    kinds = {"s": ("step", range(1, 6)), "h": ("held_out", (0, 2, 4))}
    files = {
        (f"{letter}{step}", replica): journal_path(config, kind, step, replica=replica)
        for letter, (kind, steps) in kinds.items()
        for step in steps
        for replica in (0, 1)
    }
    for path in files.values():
        path.touch()
    (tmp_path / "journal/notes_00000001.txt").touch()
    remove_old_journals(config, replica=1)
    assert {name for name, replica in files if files[name, replica].exists() and replica == 1} == set(left.split())
    assert all(path.exists() for (_, replica), path in files.items() if replica == 0)
    remove_old_journals(config, replica=None)
    assert {name for (name, _), path in files.items() if path.exists()} == set(left.split())
    assert (tmp_path / "journal/notes_00000001.txt").exists()


def test_responses_cut_off_and_repetitive_ones_count_as_they_are_said_to():
    facts = {reason: Facts(0, 0, 3, 4, -1.0, reason, 0.5) for reason in ("eos", "length", "stop_repetition")}
    for key, reason in (("truncated", "length"), ("repetitive", "stop_repetition")):
        for rule, value in (("score", 0.5), ("zero", 0.0), ("drop", None)):
            rl = tiny_config(**{key: rule}).rl
            found = {name: counted_reward(fact, rl) for name, fact in facts.items()}
            assert found == dict.fromkeys(facts, 0.5) | {reason: value}
    assert counted_reward(replace(facts["length"], reward=None), tiny_config(truncated="zero").rl) is None
    for key, reason in (("truncated", "length"), ("repetitive", "stop_repetition")):
        pair = [replace(facts[reason], reward=1.0), replace(facts["eos"], reward=0.0)]
        assert _advantages(pair, tiny_config(**{key: "score"}).rl).tolist() == [1.0, -1.0]
        assert _advantages(pair, tiny_config(**{key: "zero"}).rl).tolist() == [0.0, 0.0]


def test_a_sample_of_other_settings_does_not_fit(tmp_path):
    sample = replace(fixed_samples()[0], response=[5, 6, 7], finish_reason="eos")
    sample = replace(sample, logprobs=sample.logprobs[:1].repeat(3) * 0.0 - [[3.0, 0.001, 0.002]][0])
    prompt = tuple(sample.prompt)

    def fits(kept: Sample, **sampling: object) -> bool:
        settings = {"max_new_tokens": 8, "end_tokens": (7,), "repetition_tokens": 0} | sampling
        return _fits(kept, prompt, _Plan(range(1), {}, 4, 1, Sampling(**settings)))

    assert fits(sample) and fits(sample, max_new_tokens=3) and fits(sample, repetition_tokens=3)
    assert (
        not fits(sample, max_new_tokens=2) and not fits(sample, end_tokens=()) and not fits(sample, end_tokens=(6, 7))
    )
    assert not fits(sample, repetition_tokens=1) and not fits(replace(sample, prompt=(1,)))
    stopped = replace(sample, finish_reason="stop_repetition")
    assert fits(stopped, repetition_tokens=2, end_tokens=()) and not fits(stopped, end_tokens=())
    assert not fits(stopped, repetition_tokens=2, end_tokens=(), repetition_probability=0.9999)
    cut = replace(sample, finish_reason="length")
    assert fits(cut, max_new_tokens=3, end_tokens=()) and not fits(cut, end_tokens=())


def test_the_verdict_on_another_task_does_not_count():
    task = Task("sort 21:", "exact", {"answer": "12"})
    sample = replace(fixed_samples()[0], task=task, reward=1.0, parts={"exact": 1.0})
    assert _of_task(sample, Task("sort 21:", "exact", {"answer": "12"})).reward == 1.0
    other = _of_task(sample, Task("sort 21:", "exact", {"answer": "21"}))
    assert not other.has_verdict and other.parts == {} and other.task.task == {"answer": "21"}
