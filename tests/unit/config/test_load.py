import os

import pytest

from megatron_m1.config import Config, ConfigError, from_yaml, load_config, to_yaml
from megatron_m1.config.help import MEGATRON_OPTIONS, key_texts
from megatron_m1.config.load import known_keys
from megatron_m1.config.schema import BatchStage


def write(path, text):
    path.write_text(text)
    return str(path)


def test_schema_then_preset_then_command_line(tmp_path):
    preset = write(tmp_path / "a.yaml", "optimizer: {lr: 3e-4, eps: 1e-15}\ntraining: {steps: 7}\n")
    layer = write(tmp_path / "b.yaml", "training: {steps: 8}\n")
    config = load_config(["--optimizer.lr", "6e-4", "--config", preset, f"--config={layer}"])
    assert config.optimizer.lr == 6e-4  # the command line wins even when it stands before the file
    assert config.optimizer.eps == 1e-15 and isinstance(config.optimizer.eps, float)
    assert config.training.steps == 8
    assert config.optimizer.beta2 == Config().optimizer.beta2


def test_lists_and_nested_dataclasses(tmp_path):
    file = write(tmp_path / "a.yaml", "training:\n  batch_ramp:\n  - {from_step: 2, global_batch: 16}\n")
    assert load_config(["--config", file]).training.batch_ramp == [BatchStage(2, 16)]
    config = load_config(
        ["--training.batch_ramp", '[{"from_step": 3, "global_batch": 4}]', "--data.train", "[a, b]"]
        + ["--data.train_weights", "[1, 3e-1]", "--parallel.sequence", "true", "--model.attn_type_list", "[0, 1]"]
    )
    assert config.training.batch_ramp == [BatchStage(3, 4)]
    assert config.data.train == ["a", "b"] and config.data.train_weights == [1.0, 0.3]
    assert config.parallel.sequence is True and config.model.attn_type_list == [0, 1]


def test_yaml_round_trip_keeps_every_key(tmp_path):
    config = load_config(
        ["--optimizer.lr", "1.2345678901234567e-5", "--training.batch_ramp", '[{"from_step":0,"global_batch":1}]']
    )
    to_yaml(config, tmp_path / "config.yaml")
    assert from_yaml(tmp_path / "config.yaml") == config
    assert load_config([], base=config) == config
    assert load_config(["--training.steps", "3"], base=config).optimizer.lr == config.optimizer.lr


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    target = tmp_path / "config.yaml"
    to_yaml(Config(), target)
    before = target.read_text()

    def full_disk(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    config = Config()
    config.training.steps = 999
    with pytest.raises(OSError):
        to_yaml(config, target)
    assert target.read_text() == before and os.listdir(tmp_path) == ["config.yaml"]


@pytest.mark.parametrize(
    "argv, message",
    [
        (
            ["--parallel.tensr", "2"],
            "--parallel.tensr (command line) is not a known key; did you mean parallel.tensor?",
        ),
        (["--lr", "2"], "--lr (command line) is not a known key; did you mean optimizer.lr?"),
        (["--tensor-model-parallel-size", "2"], "is not a known key; did you mean parallel.tensor?"),
        (["--train-iters", "2"], "is not a known key; did you mean training.steps?"),
        (["--optimizer.bet", "2"], "--optimizer.bet (command line) is not a known key"),  # no abbreviation
        (["--training.precision", "fp16"], "training.precision=fp16 must be one of fp32, bf16."),
        (["--training.steps", "1.5"], "training.steps=1.5 must be int."),
        (["--parallel.sequence", "4"], "parallel.sequence=4 must be bool or null."),
        (["--data.train", "x"], "data.train=x must be a list of str, e.g. [A,B]."),
        (["--training.batch_ramp", '[{"from": 3}]'], "Option 'from' is not accepted"),
        (["--config", "nowhere.yaml"], "--config=nowhere.yaml cannot be read: No such file or directory"),
        (["--config"], "--config needs the path"),
        (
            ["training.steps=3"],
            "arguments: training.steps=3; keys are given as --section.key VALUE, files as --config FILE",
        ),
    ],
)
def test_bad_input_is_one_clear_error(argv, message):
    with pytest.raises(ConfigError) as caught:
        load_config(argv)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "text, message",
    [
        ("model: {hiden_size: 3}", "model.hiden_size"),
        ("model: {hiden_size: 3}", "did you mean model.hidden_size?"),
        ("training: {steps: many}", "training.steps=many must be int."),
        ("- a", "must be a mapping"),
        ("training: 5", "training=5 (FILE) must be a mapping of keys"),
        ("data:\nmodel: {}", "data=null (FILE) must be a mapping of keys"),
        ("a: [1", "is not YAML"),
    ],
)
def test_bad_files(tmp_path, text, message):
    with pytest.raises(ConfigError) as caught:
        from_yaml(write(tmp_path / "bad.yaml", text))
    assert message in str(caught.value).replace(str(tmp_path / "bad.yaml"), "FILE")


def test_what_is_offered_for_options_of_megatron_exists():
    keys = known_keys()
    assert set(MEGATRON_OPTIONS.values()) <= set(keys)
    assert not {key.rsplit(".", 1)[-1] for key in keys} & set(MEGATRON_OPTIONS)


def test_help_says_what_the_schema_says_of_every_key(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "10000")
    with pytest.raises(SystemExit) as caught:
        load_config(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert caught.value.code == 0
    for key in known_keys():
        assert f"--{key}" in shown
    assert (
        "Seconds after which a collective that a dead rank never joins ends the run. (type: int, default: 600)" in shown
    )
    assert "--checkpoint.save SAVE Directory to write to; holds" in shown
    assert "checkpoint: --checkpoint CONFIG" in shown and "optimizer: AdamW. Defaults are MiniMax-Text-01's." in shown
    assert "--optimizer.lr LR (type: float, default: 0.0002)" in shown
    texts = key_texts()
    assert len(texts) > 80 and set(texts) < set(known_keys())
    assert all(text in shown for text in texts.values())


def test_print_config(capsys):
    with pytest.raises(SystemExit) as caught:
        load_config(["--optimizer.lr", "3e-4", "--print_config"])
    assert caught.value.code == 0 and "lr: 0.0003" in capsys.readouterr().out
