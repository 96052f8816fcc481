"""The rl command with files of tasks and rewards of one's own: what is wrong with them is said before anything is sampled."""

import json
from pathlib import Path

import pytest

from megatron_m1.config import ConfigError, to_yaml
from megatron_m1.config.schema import RewardConfig, TaskSource
from megatron_m1.data.train_tokenizer import train_tokenizer
from megatron_m1.rl.journal import read_journal
from megatron_m1.rl.loop import main
from tests.unit.rl.loop_cases import tiny_config


def failing_rank(rank: int, world: int, argv: list[str]) -> str:
    with pytest.raises(ConfigError) as error:
        main(argv)
    return str(error.value)


def rl_rank(rank: int, world: int, argv: list[str]) -> None:
    main(argv)


@pytest.fixture
def config(tmp_path: Path):
    (tmp_path / "text.txt").write_text("sort 123:123\n")
    train_tokenizer([str(tmp_path / "text.txt")], tmp_path / "tokenizer", vocab_size=257, globs=["*.txt"])
    lines = [{"prompt": f"sort {n}:", "reward": "exact", "task": {"answer": "1"}} for n in range(12)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = tiny_config(
        reward_workers=1,
        dynamic_sampling=False,
        journal=str(tmp_path / "journal"),
        rewards={
            "length": RewardConfig("tests.unit.rl.reward_cases:Misbehaving", {"base": 1.0}),
            "both": RewardConfig(weights={"length": 0.5, "exact": 0.5}),
        },
    )
    config.rl.tasks = [TaskSource("file", path=str(tmp_path / "train.jsonl"), reward="both")]
    config.training.steps, config.data.tokenizer = 1, str(tmp_path / "tokenizer")
    config.logging.dir = str(tmp_path / "log")
    config.logging.tensorboard = False
    return config


def arguments(config, folder: Path) -> list[str]:
    to_yaml(config, folder / "rl.yaml")
    return ["--config", str(folder / "rl.yaml")]


def test_rewards_of_ones_own_reach_the_loop(config, tmp_path, ranks):
    ranks(1, rl_rank, arguments(config, tmp_path), timeout_s=120)
    lines = (tmp_path / "log/metrics.jsonl").read_text().splitlines()
    (step,) = [entry for entry in map(json.loads, lines) if "step" in entry]
    assert 0.5 <= step["reward"] <= 1.0 and step["reward_errors"] == 0
    samples = list(read_journal(next((tmp_path / "journal").glob("step_00000001.*"))))
    prompts = [record["task"]["prompt"] for record in samples if "task" in record]
    assert len(prompts) == 32 and len(set(prompts)) == 8, "eight prompts of twelve, none twice"


def test_a_prompt_that_does_not_fit_is_named_on_every_rank(config, tmp_path, ranks):
    with open(tmp_path / "train.jsonl", "a") as file:
        file.write(json.dumps({"prompt": "9" * 62, "reward": "exact", "task": {"answer": "1"}}) + "\n")
    for message in ranks(2, failing_rank, arguments(config, tmp_path), timeout_s=120):
        assert f"{tmp_path}/train.jsonl:13: the prompt '9999" in message and "has 62 tokens" in message, message
    assert not list((tmp_path / "journal").glob("*"))


def test_a_reward_that_cannot_be_made_is_named_on_every_rank(config, tmp_path, ranks):
    config.rl.rewards["length"].target = "tests.unit.rl.reward_cases:Unmakeable"
    for message in ranks(2, failing_rank, arguments(config, tmp_path), timeout_s=120):
        assert "both: target=" in message and "length: target=tests.unit.rl.reward_cases:Unmakeable" in message, message
