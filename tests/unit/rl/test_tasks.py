"""What is asked: sources and their mixture, files, held-out prompts, rewards by name."""

import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_m1.config import Config, ConfigError, to_yaml
from megatron_m1.config.load import from_yaml
from megatron_m1.config.schema import CurriculumPoint, RewardConfig, RLConfig, TaskSource
from megatron_m1.rl.rewards.names import BUILT_IN, reward_specs
from megatron_m1.rl.rewards.pool import RewardPool
from megatron_m1.rl.rewards.protocol import RewardRequest
from megatron_m1.rl.tasks import TaskMix, _share_out


@pytest.mark.parametrize("kind", ["sort", "addition"])
def test_made_up_tasks_are_right_repeatable_and_held_out_ones_apart(kind):
    source = TaskSource(kind, size=3)
    tasks = TaskMix(RLConfig(tasks=[source]), seed=5)
    train, held_out = ([tasks.task(i, held_out=h) for i in range(n)] for h, n in ((False, 300), (True, 60)))
    assert train == [TaskMix(RLConfig(tasks=[source]), seed=5).task(i) for i in range(300)]
    assert train != [TaskMix(RLConfig(tasks=[source]), seed=6).task(i) for i in range(300)]
    assert not {t.prompt for t in train} & {t.prompt for t in held_out} and len({t.prompt for t in held_out}) == 60
    for task in train:
        if kind == "sort":
            digits = re.fullmatch(r"sort (\d{3}):", task.prompt)[1]
            assert "".join(sorted(digits)) == task.task["answer"]
        else:
            a, b = re.fullmatch(r"(\d{3})\+(\d{3})=", task.prompt).groups()
            assert int(task.task["answer"][::-1]) == int(a) + int(b) and len(task.task["answer"]) == 4


def test_a_source_without_held_out_prompts_says_so():
    tasks = TaskMix(RLConfig(tasks=[TaskSource("sort", size=1)]), seed=5)
    assert tasks.task(0).task["answer"].isdigit()
    with pytest.raises(ConfigError, match="has no prompt held out, such as 'sort"):
        tasks.task(0, held_out=True)


def test_sources_are_mixed_by_weight(tmp_path):
    for name in ("train", "held_out"):
        lines = [{"prompt": f"{name} {i}", "reward": "math", "task": {"answer": "1"}} for i in range(3)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    file = TaskSource("file", weight=3, path=f"{tmp_path}/train.jsonl", held_out_path=f"{tmp_path}/held_out.jsonl")
    tasks = TaskMix(RLConfig(tasks=[file, TaskSource("sort")]), seed=1)
    drawn = [tasks.task(i) for i in range(400)]
    assert all(abs(sum(task.reward == "math" for task in drawn[:n]) - 0.75 * n) < 1 for n in range(1, 401))
    assert [tasks.task(i, held_out=True).prompt.split()[0] for i in range(4)] == ["sort", *["held_out"] * 3]
    assert set(tasks.rewards()) == {"exact", "math"}
    with pytest.raises(ConfigError, match="share 3 prompts"):
        TaskMix(RLConfig(tasks=[replace(file, held_out_path=file.path)]), seed=1)
    (tmp_path / "train.jsonl").write_text('{"prompt": "a", "reward": "vibes", "task": {}}\n')
    with pytest.raises(ConfigError, match=r"train.jsonl:1: reward 'vibes' is unknown"):
        TaskMix(RLConfig(tasks=[file]), seed=1)


def test_curriculum_and_filter_choose_among_the_tasks():
    sources = [TaskSource("sort", size=3), TaskSource("addition", size=2)]
    points = [CurriculumPoint(0, [1.0, 0.0]), CurriculumPoint(10, [0.0, 2.0])]
    tasks = TaskMix(RLConfig(tasks=sources, curriculum=points), seed=1)
    assert all(tasks.task(i, step=0).prompt.startswith("sort") for i in range(50))
    assert sum("+" in tasks.task(i, step=5).prompt for i in range(200)) == 100
    assert all("+" in tasks.task(i, step=99).prompt for i in range(50))
    assert {"+" in tasks.task(i, step=0, held_out=True).prompt for i in range(50)} == {True, False}
    plain = [tasks.task(i).prompt for i in range(50)]
    even = [tasks.task(i, wanted=lambda prompt: int(prompt[5]) % 2 == 0).prompt for i in range(50)]
    assert all(int(prompt[5]) % 2 == 0 for prompt in even) and any(a != b for a, b in zip(plain, even))
    assert all(a == b for a, b in zip(plain, even) if int(a[5]) % 2 == 0)
    assert tasks.task(3, wanted=lambda prompt: False).prompt  # nothing is wanted: one is taken all the same


def write(path: Path, lines: list) -> str:
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    return str(path)


def math_lines(name: str, count: int) -> list[dict]:
    return [{"prompt": f"{name} {i}", "reward": "math", "task": {"answer": str(i)}} for i in range(count)]


def file_source(folder: Path, train: int = 10, held_out: int = 30, name: str = "a") -> TaskSource:
    return TaskSource(
        "file",
        path=write(folder / f"{name}.jsonl", math_lines(f"{name} train", train)),
        held_out_path=write(folder / f"{name}_held_out.jsonl", math_lines(f"{name} held out", held_out)),
    )


def prompts(tasks: TaskMix, numbers, **how) -> list[str]:
    return [tasks.task(number, **how).prompt for number in numbers]


def test_held_out_files_are_walked_once_in_order(tmp_path):
    rl = RLConfig(tasks=[file_source(tmp_path)], held_out_prompts=30)
    assert prompts(TaskMix(rl, seed=1), range(30), held_out=True) == [f"a held out {i}" for i in range(30)]
    with pytest.raises(
        ConfigError, match=r"rl.tasks\[0\] has 30 different held-out prompts.*held_out_prompts=31 is more"
    ):
        TaskMix(replace(rl, held_out_prompts=31), seed=1)


def test_held_out_prompts_of_several_sources_differ(tmp_path):
    """Also where a file says one twice and two files say the same, whatever is asked for first."""
    one, two = file_source(tmp_path), file_source(tmp_path, name="b")
    lines = math_lines("a held out", 12)
    one.held_out_path = write(tmp_path / "twice.jsonl", [*lines[:4], *lines])
    two.held_out_path = write(tmp_path / "same.jsonl", [lines[2], *math_lines("b held out", 12)])
    rl = RLConfig(tasks=[one, two, TaskSource("sort", size=3, weight=2.0)], held_out_prompts=24)
    drawn = prompts(TaskMix(rl, seed=1), range(24), held_out=True)
    assert len(set(drawn)) == 24 and sum("sort" in prompt for prompt in drawn) == 12
    assert prompts(TaskMix(replace(rl, held_out_prompts=0), seed=1), reversed(range(24)), held_out=True) == drawn[::-1]


@pytest.mark.parametrize("source", [TaskSource("sort", size=2), TaskSource("addition", size=1)])
def test_made_up_held_out_prompts_differ_and_run_out(source):
    rl = RLConfig(tasks=[source], held_out_prompts=5)
    assert len(set(prompts(TaskMix(rl, seed=3), range(5), held_out=True))) == 5
    with pytest.raises(ConfigError, match=r"rl.tasks\[0\] has \d+ different held-out prompts"):
        TaskMix(replace(rl, held_out_prompts=60), seed=3)


def test_training_files_come_whole_before_they_come_again(tmp_path):
    rl = RLConfig(tasks=[file_source(tmp_path)])
    tasks = TaskMix(rl, seed=1)
    times = [prompts(tasks, range(start, start + 10)) for start in (0, 10, 20)]
    assert all(len(set(asked)) == 10 for asked in times) and times[0] != times[1] != times[2] != times[0]
    assert prompts(TaskMix(rl, seed=1), range(29, -1, -1)) == [prompt for asked in times for prompt in asked][::-1]
    assert prompts(TaskMix(rl, seed=2), range(10)) != times[0]
    other = prompts(tasks, range(10), wanted=lambda prompt: prompt != times[0][4])
    assert times[0][4] not in other and [a == b for a, b in zip(other, times[0])] == [i != 4 for i in range(10)]


def test_numbers_kept_for_refills_and_other_sources_cost_a_file_nothing(tmp_path):
    files = [file_source(tmp_path, train=12), replace(file_source(tmp_path, train=8, name="b"), weight=2.0)]
    tasks = TaskMix(RLConfig(tasks=files, refills=2), seed=1, prompts_per_step=6)
    asked = [prompts(tasks, range(18 * step, 18 * step + 6)) for step in range(6)]
    counts = Counter(prompt for step in asked for prompt in step)
    assert len(counts) == 20 and {p: n for p, n in counts.items() if n != (1 if p[0] == "a" else 3)} == {}
    assert all(sum(prompt[0] == "a" for prompt in step) == 2 for step in asked)
    refills = prompts(tasks, range(6, 18))
    assert len(set(refills)) > 4 and refills == prompts(tasks, range(6, 18))


def test_shares_are_exact_to_within_one():
    for weights in ([0.3, 0.0, 0.1, 0.6], [1.0, 0.0], [1 / 3, 1 / 3, 1 / 3, 1e-9]):
        given = Counter()
        for position in range(500):
            index, before = _share_out(position, weights)
            assert before == given[index]
            given[index] += 1
            assert all(abs(given[i] - (position + 1) * w / sum(weights)) <= 2 for i, w in enumerate(weights))


@pytest.mark.parametrize(
    "line, message",
    [
        ("{", "must be an object"),
        ("[]", "must be an object"),
        ('{"prompt": "x", "reward": "math"}', "must be an object with prompt, reward and task"),
        ({"prompt": 3, "reward": "math", "task": {"answer": "1"}}, "prompt=3 must be a string"),
        ('{"prompt": "x\\ud800", "reward": "math", "task": {"answer": "1"}}', "half of a character"),
        ({"prompt": "x", "reward": "math", "task": ["1"]}, r"task=\['1'\] must be an object"),
        ({"prompt": "x", "reward": ["math"], "task": {}}, r"reward \['math'\] is unknown"),
        ({"prompt": "x", "reward": "math", "task": {"Answer": "1"}}, "task lacks answer, which the reward math"),
        ({"prompt": "x", "reward": "strict", "task": {}}, "task lacks answer, which the reward strict"),
    ],
)
def test_a_bad_line_is_named_before_anything_runs(tmp_path, line, message):
    source = file_source(tmp_path)
    rl = RLConfig(tasks=[source], rewards={"strict": RewardConfig(product=["format", "math"])})
    TaskMix(rl, seed=1)
    for path in (source.path, source.held_out_path):
        good = Path(path).read_text().splitlines()
        write(Path(path), [*good[:3], line, *good[3:]])
        with pytest.raises(ConfigError, match=f"{re.escape(path)}:4:? .*{message}"):
            TaskMix(rl, seed=1)
        write(Path(path), good)


def test_files_are_split_where_json_lines_are(tmp_path):
    source = file_source(tmp_path)
    lines = ['{"prompt": "a\u2028b\x85c", "reward": "math", "task": {"answer": "1"}}']
    source.path = write(tmp_path / "separators.jsonl", lines)
    assert TaskMix(RLConfig(tasks=[source]), seed=1).task(0).prompt == "a\u2028b\x85c"
    (tmp_path / "bytes.jsonl").write_bytes(lines[0].encode() + b'\n{"prompt": "\xff"}\n')
    source.path = str(tmp_path / "bytes.jsonl")
    with pytest.raises(ConfigError, match=r"bytes.jsonl:2 is not UTF-8"):
        TaskMix(RLConfig(tasks=[source]), seed=1)


def test_prompts_that_do_not_fit_are_named_at_the_start(tmp_path):
    source = file_source(tmp_path)
    tasks = TaskMix(RLConfig(tasks=[source, TaskSource("sort")]), seed=1)
    tasks.check_lengths(str.split, 4)
    with pytest.raises(ConfigError, match=r"a_held_out.jsonl:1: the prompt 'a held out 0' has 4 tokens.* 1 to 3\."):
        tasks.check_lengths(str.split, 3)
    with pytest.raises(ConfigError, match=r"a.jsonl:1: .* has 0 tokens"):
        tasks.check_lengths(lambda prompt: [], 3)


OWN = {
    "mine": RewardConfig("tests.unit.rl.reward_cases:Misbehaving", {"base": 0.5}),
    "boxed": RewardConfig("format", {"answer": "boxed"}),
    "both": RewardConfig(product=["boxed", "math"]),
    "mixed": RewardConfig(weights={"both": 0.75, "boxed": 0.25}),
}


def test_rewards_of_ones_own_and_combined_ones_judge_in_the_pool(tmp_path):
    path = write(tmp_path / "t.jsonl", [{"prompt": "p", "task": {"answer": "4"}}])
    kinds = [TaskSource("file", path=path, reward=name) for name in ("mine", "mixed", "both")]
    to_yaml(Config(rl=RLConfig(tasks=[*kinds, TaskSource("sort")], rewards=OWN)), tmp_path / "rl.yaml")
    rl = from_yaml(tmp_path / "rl.yaml").rl
    assert rl.rewards == OWN
    tasks = TaskMix(rl, seed=1)
    assert set(tasks.rewards()) == {"mine", "mixed", "both", "exact"}
    right, unthought, wrong = r"<think>t</think>\boxed{4}", r"\boxed{4}", r"<think>t</think>\boxed{5}"
    with RewardPool(tasks.rewards(), workers=1, timeout_s=20.0, max_error_share=1.0) as pool:

        def values(name: str, *responses: str) -> list[float]:
            return [
                r.value for r in pool.score([RewardRequest(name, "p", said, {"answer": "4"}) for said in responses])
            ]

        assert values("mine", "x") == [0.5]
        assert values("both", right, unthought, wrong) == [1.0, 0.0, 0.0]
        assert values("mixed", right, unthought, wrong) == [1.0, 0.0, 0.25]
        score = pool.score([RewardRequest("mixed", "p", wrong, {"answer": "4"})])[0].score
        assert (
            score.parts["both"] == 0.0 and score.parts["both/boxed"] == 1.0 and score.parts["both/math/parsed"] == 1.0
        )
        assert "KeyError" in pool.score([RewardRequest("both", "p", right, {})])[0].reward_error


def test_a_plug_in_that_cannot_be_loaded_stops_the_run_at_the_start():
    specs = reward_specs({"mine": RewardConfig(product=["far", "math"]), "far": RewardConfig("no.such:Thing")})
    with pytest.raises(ConfigError, match=r"mine: .* far: target=no\.such:Thing cannot be imported"):
        RewardPool({"mine": specs["mine"]}, workers=1)


@pytest.mark.parametrize(
    "own, message",
    [
        ({"x": RewardConfig()}, "rl.rewards.x must have one of target, product and weights"),
        ({"x": RewardConfig("format", product=["math"])}, "must have one of"),
        ({"x": RewardConfig("vibes")}, "rl.rewards.x.target=vibes must be package.module:Class or one of exact"),
        ({"x": RewardConfig(product=["vibes"])}, "rl.rewards.x names the reward 'vibes', which is unknown; use .* x"),
        ({"x": RewardConfig(product=["math", "math"])}, "names a reward twice"),
        (
            {"x": RewardConfig(product=["y"]), "y": RewardConfig(weights={"x": 1.0})},
            r"is a part of itself \(x > y > x\)",
        ),
        ({"x": RewardConfig(product=["math"], options={"a": 1})}, "belong to a target; give them to one of math"),
    ],
)
def test_rewards_that_say_nothing_clear_are_refused(own, message):
    with pytest.raises(ConfigError, match=message):
        reward_specs(own)


def test_built_in_rewards_keep_their_names_and_can_be_given_options():
    assert reward_specs({}) == BUILT_IN
    assert reward_specs({"code": RewardConfig("code", {"limits": {"cpu_s": 2}})})["code"].options == {
        "limits": {"cpu_s": 2}
    }
    with pytest.raises(ConfigError, match=r"rl.tasks\[0\].reward=vibes is unknown"):
        TaskMix(RLConfig(tasks=[TaskSource("sort", reward="vibes")]), seed=1)
