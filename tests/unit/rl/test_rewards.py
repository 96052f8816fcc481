"""Format, math and logic rewards, called in this process; the pool has its own tests."""

import ast
import inspect
import json
import os
import random
import re
import textwrap
import time
import zlib
from dataclasses import replace

import psutil
import pytest
from reasoning_gym import utils as reasoning_gym_utils
from reasoning_gym.factory import DATASETS
from sympy.parsing import sympy_parser

from megatron_m1.config import Config, ConfigError, to_yaml
from megatron_m1.config.schema import RLConfig, TaskSource
from megatron_m1.rl.rewards import math as math_module
from megatron_m1.rl.rewards.extract import after_thinking, last_boxed, last_tagged
from megatron_m1.rl.rewards.format import FormatReward
from megatron_m1.rl.rewards.limited import limited
from megatron_m1.rl.rewards.logic import ALLOWED, LogicReward, logic_tasks
from megatron_m1.rl.rewards.math import MathReward
from megatron_m1.rl.rewards.protocol import RewardRequest
from megatron_m1.rl.tasks import TaskMix
from tools import rl_demonstrations


def request(response: str, **task) -> RewardRequest:
    return RewardRequest("x", "", response, task)


@pytest.mark.parametrize(
    "text, expected",
    [
        (r"so \boxed{5} or rather \boxed{ 7 }.", "7"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (
            r"\boxed{\left\{ \begin{matrix} a \\ b \end{matrix} \right.}",
            r"\left\{ \begin{matrix} a \\ b \end{matrix} \right.",
        ),
        (r"\boxed{1} then \fbox{2}", "2"),
        (r"\boxed{5} and \boxed{7", None),
        (r"\boxed{\boxed{3}}", "3"),
        ("boxed{5}", None),
        ("\\boxed{5\\", None),
        ("", None),
    ],
)
def test_last_boxed(text, expected):
    assert last_boxed(text) == expected


def test_after_thinking_and_tags():
    assert after_thinking("<think>a</think>b</think>c") == "c"
    assert after_thinking("plain") == "plain"
    assert after_thinking("<think>never closed") is None
    assert after_thinking("prefilled</think>c") == "c"
    assert last_tagged("<answer>1</answer> <answer> 2 </answer>", "answer") == "2"
    assert last_tagged("<answer>1</answer> <answer>2", "answer") is None
    assert last_tagged("</answer><answer>", "answer") is None


@pytest.mark.parametrize(
    "response, options, value",
    [
        ("<think>hm</think>4", {}, 1),
        ("\n<think>hm</think>4", {}, 1),
        ("<think>hm</think>  ", {}, 0),
        ("<think> </think>4", {}, 0),
        ("4", {}, 0),
        ("x<think>hm</think>4", {}, 0),
        ("<think>a</think><think>b</think>4", {}, 0),
        ("<think>a</think>4</think>", {}, 0),
        ("hm</think>4", {"prefilled": True}, 1),
        ("<think>hm</think>4", {"prefilled": True}, 0),
        ("<think>hm</think>4", {"answer": "boxed"}, 0),
        (r"<think>\boxed{4}</think>4", {"answer": "boxed"}, 0),
        (r"<think>hm</think>\boxed{4}", {"answer": "boxed"}, 1),
        ("<think>hm</think><answer>4</answer>", {"answer": "tag"}, 1),
    ],
)
def test_format(response, options, value):
    assert FormatReward(**options)(request(response)).value == value


@pytest.mark.parametrize(
    "response, answer, value",
    [
        (r"<think>2+2</think>It is \boxed{4}.", "4", 1),
        (r"\boxed{\frac{1}{2}}", "0.5", 1),
        (r"\boxed{0.5}", r"\frac{1}{2}", 1),
        (r"\boxed{x^2 + 2x + 1}", "(x+1)^2", 1),
        (r"\boxed{\{2, 1\}}", r"\{1, 2\}", 1),
        (r"\boxed{(1, 2)}", "(1, 2)", 1),
        (r"\boxed{(2, 1)}", "(1, 2)", 0),
        (r"\boxed{5}", "4", 0),
        (r"<think>\boxed{4}</think>I do not know.", "4", 0),  # a box in the thinking part is no answer
        (r"<think>\boxed{4}", "4", 0),  # thinking was cut off
        (r"\boxed{4} or \boxed{5}", "4", 0),  # only the last box counts
        (r"\boxed{5} no, \boxed{4}", "4", 1),
        (r"I tried 5 and 7 and 10", "10", 0),
        (r"\boxed{I tried 5 and 7 and 10}", "10", 0),
        (r"\boxed{5, 7, 10}", "10", 0),
        (r"\boxed{}", "4", 0),
        (r"\boxed{zzz}", "4", 0),
        (r"\boxed{\frac{1}{}}", "4", 0),
        (r"\boxed{\sum_{", "4", 0),
        (r"\boxed{((((}", "4", 0),
        (r"\boxed{" + "1+" * 600 + "1}", "601", 0),
        # brackets of another kind
        (r"\boxed{(1,2)}", r"\{1,2\}", 0),
        (r"\boxed{\{1,2\}}", "(1,2)", 0),
        (r"\boxed{A = \left(1, 2\right)}", r"\left\{1,2\right\}", 0),
        (r"\boxed{[1,2]}", "(1,2)", 0),
        (r"\boxed{1, 2}", r"\{1,2\}", 1),
        (r"\boxed{2, 1}", r"\{1,2\}", 1),
        (r"\boxed{1, 2}", "(1,2)", 1),
        (r"\boxed{\left( 1, 2 \right)}", "(1,2)", 1),
        (r"\boxed{(x, y) = (1, 2)}", "(1,2)", 1),
        (r"\boxed{(x, y) = (2, 1)}", "(1,2)", 0),
        (r"\boxed{A = \{1, 2\}}", r"\{2,1\}", 1),
        (r"\boxed{x \in (1, 2)}", "(1,2)", 1),
        (r"\boxed{(1,2), (3,4)}", r"\{(1,2), (3,4)\}", 1),
        (r"\boxed{(f(1), 2) + (0, 1)}", "3", 0),
        (r"\boxed{\{1,2\}}", "1<x<2", 0),
        (r"\boxed{x=1, y=2}", "1<x<2", 0),
        (r"\boxed{(1,2)}", "1<x<2", 1),
        (r"\boxed{x \in (1,2)}", "1<x<2", 1),
        (r"\boxed{1<x<2}", r"\{1,2\}", 0),
        (r"\boxed{x=1,\ x=2}", r"\{1,2\}", 1),
        # equations that are false
        (r"\boxed{5=4}", "4", 0),
        (r"\boxed{3 = 4}", "4", 0),
        (r"\boxed{x=5=4}", "4", 0),
        (r"\boxed{x=5=4}", "x=4", 0),
        (r"\boxed{\text{so } = 5 = 4}", "4", 0),
        (r"\boxed{4 = 5 = 4}", "4", 0),
        (r"\boxed{5=4, 3=2}", "4, 2", 0),
        (r"\boxed{4=5}", "4", 0),
        (r"\boxed{x=4}", "4", 1),
        (r"\boxed{x=4}", "x=4", 1),
        (r"\boxed{y=4}", "x=4", 0),
        (r"\boxed{2+2=4}", "4", 1),
        (r"\boxed{x=2+2=4}", "4", 1),
        (r"\boxed{f(2) = 4}", "4", 1),
        (r"\boxed{|A| = 4}", "4", 1),
        (r"\boxed{y = 2x + 1}", "2x+1", 1),
        (r"\boxed{\frac{1}{3} = 0.33}", "0.33", 1),
        (r"\boxed{\frac{1}{2} = 0.33}", "0.33", 0),
        (r"\boxed{50\%}", "0.5", 1),
        (r"\boxed{x \neq 4}", "4", 0),
        (r"\boxed{x \le 4}", "4", 0),
    ],
)
def test_math(response, answer, value):
    assert MathReward()(request(response, answer=answer)).value == value


def test_math_with_a_reference_that_is_no_math_is_an_error():
    with pytest.raises(ValueError, match="reference"):
        MathReward()(request(r"\boxed{4}", answer=""))


CODE = [
    "print('EVAL')",
    "__import__('os').environ.update(M1_RAN='1')",
    "[__import__('os').environ.update(M1_RAN='1')]",
    "[x for x in [().__class__.__base__.__subclasses__()]]",
    "exec('raise SystemExit(3)')",
    "setattr(__import__('reasoning_gym').dataset.ProceduralDataset,'score_answer',lambda *a,**k:1.0)",
    "[[0]]*2 or exit()",
]


BOMBS = [r"10^{10^{10}}", r"9^{9^{9^9}}", r"\binom{10^9}{5 \cdot 10^8}", "(((9!)!)!)!", "(" * 400 + ")" * 400]


@pytest.mark.parametrize("bomb", BOMBS)
def test_boxes_that_take_for_ever_are_wrong_and_the_next_one_is_judged(bomb):
    reward, start = MathReward(), time.monotonic()
    score = reward(RewardRequest("math", "", rf"\boxed{{{bomb}}}", {"answer": "4"}, timeout_s=1.0))
    assert (score.value, score.parts["compared"]) == (0.0, 0.0) and time.monotonic() - start < 5.0
    assert reward(RewardRequest("math", "", r"\boxed{4}", {"answer": "4"})).parts["compared"] == 1.0


def test_work_in_a_forked_process():
    before = psutil.Process().children()
    assert limited(lambda: [1, "x" * 200_000], seconds=5.0) == [1, "x" * 200_000]
    assert limited(lambda: time.sleep(60), seconds=0.1) is None
    assert limited(lambda: os.kill(os.getpid(), 9), seconds=5.0) is None
    assert limited(lambda: bytearray(1 << 60), seconds=5.0) is None
    with pytest.raises(RuntimeError, match="KeyError: 'x'"):
        limited(lambda: {}["x"], seconds=5.0)
    assert psutil.Process().children() == before


def test_sympy_evaluates_numbers_of_a_box_alone(monkeypatch):
    """sympify() is eval(): what reaches it must be what the grammar calls a number."""
    evaluated = []

    def record(code, local_dict, global_dict):
        evaluated.append(code)
        return sympy_parser_eval(code, local_dict, global_dict)

    sympy_parser_eval = sympy_parser.eval_expr
    monkeypatch.setattr(sympy_parser, "eval_expr", record)
    spelled = (
        r"{}",
        r"\text{{{}}}",
        r"\operatorname{{{}}}(1)",
        r"x_{{{}}}",
        r"f({})",
        r"\mathrm{{{}}}",
        r"{}\%",
        r"1e{}",
        r"{}=4",
    )
    for code in CODE:
        for form in (*spelled, r"\{{{},1\}}", r"\bar{{{}}}", r"\max({},1)", r"\begin{{pmatrix}}{}\\1\end{{pmatrix}}"):
            math_module._compared("4", math_module._parse("4", strict=True), form.format(code))
    math_module._compared("4", math_module._parse("4", strict=True), r"12,345.5 + 1.5e3")
    assert len(evaluated) > 10 and "M1_RAN" not in os.environ
    assert not {code for code in evaluated if not re.fullmatch(r"(Integer|Float) \('?[\d.eE+-]+'? *\)", code)}


def junk(entries: list[dict], index: int) -> list[str]:
    """What a model could say without solving: nothing, constants, the question, all answers at once, the answer and more, code."""
    answer, dice = str(entries[index]["answer"]), random.Random(index)
    constants = "|zzz|0|1|-1|None|[]|{}|True|False|Yes|No|no answer|nan|inf|0 0|( )|<answer>".split("|")
    garbled = "".join(dice.sample(answer + "qz7", len(answer) + 3))
    everything = [" ".join(str(entry["answer"]) for entry in entries), " ".join(map(str, range(50)))]
    return [
        *constants,
        *CODE,
        entries[index]["question"],
        *everything,
        f"{answer} zzz",
        f"zzz {answer}",
        f"{answer}\n{answer}x",
        garbled,
    ]


@pytest.mark.parametrize("dataset", sorted(ALLOWED))
def test_logic_verifiers_take_the_answer_and_no_junk(dataset):
    entries = json.loads(json.dumps(logic_tasks(dataset, size=3, seed=11)))
    reward = LogicReward()

    def value(entry: dict, answer: str) -> float:
        return reward(request(f"<think>t</think><answer>{answer}</answer>", entry=entry)).value

    guessed: dict[str, int] = {}
    for index, entry in enumerate(entries):
        assert value(entry, entry["answer"]) == 1.0
        for said in junk(entries, index):
            if said.split() == str(entry["answer"]).split():
                continue
            guessed[said] = guessed.get(said, 0) + (value(entry, said) == 1.0)
    assert not {said: hits for said, hits in guessed.items() if hits}
    assert "M1_RAN" not in os.environ


def names_that_verify(dataset: str) -> dict[str, set[str]]:
    """By function that the data set's verifier can reach within reasoning-gym: every name in its source."""
    cls = DATASETS[dataset][0]
    waiting, found = [cls.score_answer], {}
    while waiting:
        function = waiting.pop()
        nodes = ast.walk(ast.parse(textwrap.dedent(inspect.getsource(function))))
        names = {n.id if isinstance(n, ast.Name) else n.attr for n in nodes if isinstance(n, ast.Name | ast.Attribute)}
        found[function.__qualname__] = names
        scopes = (function.__globals__, vars(reasoning_gym_utils), {name: getattr(cls, name, None) for name in names})
        for target in (scope.get(name) for scope in scopes for name in names):
            reached = inspect.isfunction(target) and target.__module__.startswith("reasoning_gym")
            if reached and target.__qualname__ not in found:
                waiting.append(target)
    return found


RUNS_TEXT = {"eval", "exec", "compile", "parse_expr", "sympify", "__import__", "import_module", "literal_eval", "loads"}


def test_no_verifier_runs_an_answer_as_code():
    """Where one did, an answer that patches the verifier made every later answer in that worker right."""
    found = {dataset: names_that_verify(dataset) for dataset in ALLOWED}
    assert not {(d, f) for d, functions in found.items() for f, names in functions.items() if names & RUNS_TEXT}
    assert "compute_decimal_reward" in found["chain_sum"] and "verify_cryptarithm_solution" in found["cryptarithm"]
    for dataset in (
        "binary_matrix",
        "n_queens",
        "spiral_matrix",
        "string_insertion",
        "countdown",
        "bitwise_arithmetic",
    ):
        assert any(names & RUNS_TEXT for names in names_that_verify(dataset).values()), "the search finds what is there"
        with pytest.raises(ValueError, match="allow-list"):
            logic_tasks(dataset, size=1, seed=0)


def test_logic_answers_must_be_tagged_after_the_thinking_part():
    entry = logic_tasks("chain_sum", size=1, seed=0)[0]
    right = f"<answer>{entry['answer']}</answer>"
    for response, value in (
        (right, 1),
        (f"<think>{right}</think>", 0),
        (str(entry["answer"]), 0),
        (f"<think>{right}", 0),
    ):
        assert LogicReward()(request(response, entry=entry)).value == value
    assert logic_tasks("chain_sum", size=1, seed=0)[0] == entry != logic_tasks("chain_sum", size=1, seed=1)[0]
    with pytest.raises(ValueError, match="allow-list"):
        logic_tasks("game_of_life_halting", size=1, seed=0)
    entry["metadata"]["source_dataset"] = "coin_flip"
    with pytest.raises(ValueError, match="allow-list"):
        LogicReward()(request(right, entry=entry))


FAMILY = TaskSource(
    "reasoning_gym", dataset="family_relationships", options={"min_family_size": 3, "max_family_size": 3}
)


def test_puzzles_of_a_chosen_difficulty_held_out_ones_apart():
    tasks = TaskMix(RLConfig(tasks=[FAMILY]), seed=1)
    train, held_out = ([tasks.task(number, held_out=h) for number in range(40)] for h in (False, True))
    assert {task.task["entry"]["metadata"]["family_size"] for task in train + held_out} == {3}
    for task, apart in [(task, False) for task in train] + [(task, True) for task in held_out]:
        assert (zlib.crc32(task.prompt.encode()) % 10 == 0) == apart
    for change in ({"options": {"size_of_family": 3}}, {"options": {"min_family_size": 9}}, {"dataset": "coin_flip"}):
        with pytest.raises(ConfigError, match=r"rl.tasks: \w+ with options="):
            TaskMix(RLConfig(tasks=[replace(FAMILY, **change)]), seed=1)


@pytest.mark.parametrize("share", [1.0, 0.0])
def test_demonstrations_of_puzzles_are_right_as_often_as_asked(tmp_path, share):
    to_yaml(Config(rl=RLConfig(tasks=[FAMILY])), tmp_path / "rl.yaml")
    wanted = {"--config": tmp_path / "rl.yaml", "--output": tmp_path / "d.jsonl", "--count": 40, "--right-share": share}
    assert rl_demonstrations.main([str(part) for pair in wanted.items() for part in pair]) == 0
    tasks, values = TaskMix(RLConfig(tasks=[FAMILY]), seed=0), []
    for number, line in enumerate((tmp_path / "d.jsonl").read_text().splitlines()):
        task = tasks.task(number)
        prompt, response = json.loads(line)["text"].split("</answer>.\n")
        assert task.prompt == f"{prompt}</answer>.\n"
        values.append(LogicReward()(RewardRequest("logic", task.prompt, response, task.task)).value)
    assert len(values) == 40 and (min(values) == 1.0 if share else sum(values) < 20)
