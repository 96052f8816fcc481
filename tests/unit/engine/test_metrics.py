import io
import json
import math
import os

import pytest
import torch.utils.tensorboard  # noqa: F401  (loads tensorboard, which the next import needs)
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_m1.config import from_yaml
from megatron_m1.config.errors import ConfigError
from megatron_m1.config.schema import Config, LoggingConfig, TrainingConfig
from megatron_m1.engine.metrics import MetricsLog

STEP = {"step": 3, "loss": math.pi, "grad_norm": 1 / 3, "lr": 1.25e-4, "tokens_per_s": 12345.678, "aux_loss": 1.0}


def config(folder=None, *, tensorboard=False):
    return Config(
        training=TrainingConfig(steps=10),
        logging=LoggingConfig(dir=None if folder is None else str(folder), tensorboard=tensorboard),
    )


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_floats_keep_every_digit_and_lines_are_there_at_once(tmp_path):
    with MetricsLog(config(tmp_path), rank=0) as log:
        log.event({"event": "start", "process_groups": {"world": 2}})
        log.step(STEP | {"layers": {"grad_norm": {"layer_000": 0.1 + 0.2}}}, show=False)
        # Before the file is closed: a killed run keeps its metrics.
        assert lines(tmp_path) == [
            {"event": "start", "process_groups": {"world": 2}},
            STEP | {"layers": {"grad_norm": {"layer_000": 0.30000000000000004}}},
        ]


def test_a_resumed_run_appends(tmp_path):
    for step in (1, 2):
        with MetricsLog(config(tmp_path), rank=0) as log:
            log.step(STEP | {"step": step}, show=False)
    assert [line["step"] for line in lines(tmp_path)] == [1, 2]
    assert from_yaml(tmp_path / "config.yaml") == config(tmp_path)


def test_plain_lines_only_where_shown(capsys):
    with MetricsLog(config(), rank=0) as log:
        log.step(STEP, show=False)
        log.step(STEP | {"valid_loss": 2.0}, show=True)
        log.say("a [bracket] stays")
    assert capsys.readouterr().out.splitlines() == [
        "step 3/10  loss 3.1416  valid_loss 2.0000  grad_norm 0.3333  lr 1.25e-04  aux_loss 1.0000  tokens_per_s 12,346",
        "a [bracket] stays",
    ]


def test_a_bar_on_a_terminal(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr("sys.stdout", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    with MetricsLog(config(), rank=0) as log:
        log.step(STEP, show=True)
        log.say("a [bracket] stays")
        log.step({"step": 4, "reward": 0.5}, show=True)  # RL has batches without an update
        assert log.progress is not None and log.progress.tasks[0].completed == 4 and log.progress.tasks[0].total == 10
    assert "a [bracket] stays" in terminal.getvalue() and "loss 3.1416" in terminal.getvalue()


def test_other_ranks_write_nothing(tmp_path, capsys):
    with MetricsLog(config(tmp_path / "log"), rank=1) as log:
        log.event({"event": "start"})
        log.step(STEP, show=True)
        log.say("hello")
    assert list(tmp_path.iterdir()) == [] and capsys.readouterr().out == ""


def test_tensorboard_has_every_number(tmp_path):
    with MetricsLog(config(tmp_path, tensorboard=True), rank=0) as log:
        log.step(STEP | {"layers": {"grad_norm": {"layer_000": 0.5}}}, show=False)
        log.event({"event": "evaluation", "after_step": 3, "held_out": {"value": 0.25}}, at_step=3)
        log.event({"event": "start", "from_step": 7})
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    expected = {key: value for key, value in STEP.items() if key != "step"} | {
        "layers/grad_norm/layer_000": 0.5,
        "held_out/value": 0.25,
    }
    assert set(events.Tags()["scalars"]) == set(expected)
    for name, value in expected.items():
        (event,) = events.Scalars(name)
        assert event.step == 3 and event.value == pytest.approx(value, rel=1e-6)


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"logging.dir=.*/file/log cannot be written: Not a directory; name a folder"):
        MetricsLog(config(tmp_path / "file/log"), rank=0)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device that is always full")
def test_a_full_disk_is_an_error_that_names_the_file(tmp_path):
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    message = r"logging.dir: .*/metrics.jsonl cannot be written: No space left on device"
    with pytest.raises(ConfigError, match=message), MetricsLog(config(tmp_path), rank=0) as log:
        log.step(STEP, show=False)
