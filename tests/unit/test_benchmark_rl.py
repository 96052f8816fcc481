"""The RL studies: what their tables say, arms that agree where they must, switches that act and go back."""

import copy
import json
from dataclasses import replace

import pytest
import torch

from benchmarks import rl_fork_task, rl_gpu_study, rl_identity_study
from benchmarks.rl_fork_report import crossing, difference, table
from benchmarks.rl_policy import ARMS, fresh_trainer
from megatron_m1.parallel import destroy_groups


def history(forks: list[float], accuracy: float = 0.9) -> list[dict[str, float]]:
    return [{"fork": fork, "accuracy": accuracy, "entropy": 0.1} for fork in forks]


def test_crossing_counts_batches():
    assert crossing(history([0.02, 0.5, 0.51, 0.4])) == 2
    assert crossing(history([0.02, 0.1])) == 2  # never: one more than there were


def test_a_difference_is_a_tie_unless_its_interval_leaves_0_out():
    assert difference([-2.0, -2.0, -3.0, -2.0], 1) == "-2.2 [-2.8, -2.0]"
    assert difference([-1.0, 1.0, 0.0, -1.0], 1).endswith(" tie")
    assert difference([1.0], 0) == "+1 (one seed: no interval)"


def test_the_table_and_its_control():
    runs = [
        {"arm": arm, "lr": 1e-3, "seed": seed, "updates": 16, "history": history(forks)}
        for seed in (1, 2)
        for arm, forks in (("GRPO", [0.02, 0.1, 0.2]), ("CISPO", [0.02, 0.6, 0.9]))
    ]
    control = [
        {"arm": arm, "lr": 1e-3, "seed": 1, "updates": 1, "history": history([0.02, 0.1])} for arm in ("GRPO", "CISPO")
    ]
    results = {
        "command": "x", "commit": "y", "date": "z", "settings": {"batches": 2}, "runs": runs + control,
        "hardware": {"cpu": "c", "processes": 1, "torch": "t"},
    }  # fmt: skip
    text = table(results)
    assert "| GRPO | 2 | 3.0 [3, 3], 2 never |" in text and "| CISPO | 2 | 1.0 [1, 1] | -2.00 [-2.00, -2.00] |" in text
    assert "+0.000 [+0.000, +0.000] tie" in text and "largest difference between arms 0.0e+00" in text
    other = copy.deepcopy(results)
    other["runs"][-1]["history"][1]["fork"] += 1e-9
    assert "largest difference between arms 1.0e-09" in table(other)


def arms(rank: int, world: int) -> dict[str, list]:
    start, _ = rl_fork_task.supervised_start(1, steps=2)
    found = {}
    for name in ("GRPO", "CISPO"):
        for updates in (1, 16):
            settings = {"seed": 1, "settings": ARMS[name], "lr": 1e-2, "batches": 1, "updates": updates}
            found[f"{name} {updates}"] = rl_fork_task.train(start, **settings)
    return found


def test_arms_agree_to_the_last_bit_with_one_update_and_part_with_sixteen(ranks):
    (found,) = ranks(1, arms)
    assert found["GRPO 1"] == found["CISPO 1"] and found["GRPO 1"][1]["fork"] != found["GRPO 1"][0]["fork"]
    assert found["GRPO 16"][1]["fork"] != found["CISPO 16"][1]["fork"] and found["GRPO 16"][0] == found["CISPO 16"][0]


def switches(rank: int, world: int) -> dict[str, tuple[float, list[float]]]:
    """By variant of an untrained model: max_abs_diff; first log-probability of each sample, which no decoding step touches."""
    size = replace(rl_identity_study.SIZES["cpu"], requests=8, prompt_tokens=8, new_tokens=24, exact=(1, 6))
    words = torch.arange(4096) * 37 % size.model.vocab_size
    config = rl_identity_study.configuration(size, "fp32")
    trainer = fresh_trainer(config)
    weight = trainer.parameters()["output_layer.weight"].detach()
    before, found = weight.clone(), {}
    for name, removed in rl_identity_study.VARIANTS.items():
        with rl_identity_study.without(trainer, removed):
            samples = rl_identity_study.rollouts(trainer, words, size, 0)
            figures, _ = rl_identity_study.measure(trainer, config, samples, replay="replay" not in removed)
        assert torch.equal(weight, before)
        assert ("routing_changed_share" in figures) == ("replay" not in removed)
        found[name] = (figures["max_abs_diff"], [float(sample.logprobs[0]) for sample in samples])
    for engine in ("fast", "reference"):
        figures = rl_identity_study.first_update(trainer, config, words, size, engine)
        assert figures["off_policy_share"] == 0.0 and figures["tokens"] == {"fast": 192, "reference": 6}[engine]
        found[engine] = (figures["not_bit_equal_share"], [])
    destroy_groups()
    return found


def test_switches_act_alone_and_go_back(ranks):
    (found,) = ranks(1, switches)
    fixed, first = found["all fixes"]
    assert fixed < 1e-5
    assert found["without fp32 head"][1] != first and found["without fp32 head"][0] < 0.1
    assert found["without fp32 state"][1] == first and found["without fp32 state"][0] > 10 * fixed
    assert found["without routing replay"][1] == first
    assert found["fast"][0] > 0.0 == found["reference"][0]


def gpu_run(arm: str, seed: int, after: float) -> dict:
    point = {"reward": after / 2, "first_off_policy_share": 0.0}
    point |= dict.fromkeys(("seconds_rollout", "seconds_scoring", "seconds_update"), 1.0)
    history = [{"held_out": 0.3}, point | {"held_out": after}]
    return {"arm": arm, "lr": 1e-4, "seed": seed, "seconds": 2.0, "commit": "c", "history": history}


def test_the_gpu_study_goes_on_from_its_own_results_alone(tmp_path):
    """Few seeds: three gains of one sign are no more than a tie where they differ as much as they measure."""
    output, size = tmp_path / "study.json", rl_gpu_study.SIZES["cpu"]
    results = rl_gpu_study.earlier(output, size, 2)
    arms = {"GRPO": (0.5, 0.5, 0.5), "DAPO": (0.52, 0.6, 0.9), "CISPO": (0.59, 0.6, 0.61)}
    results["runs"] = [
        gpu_run(arm, seed, after) for arm, values in arms.items() for seed, after in enumerate(values, start=1)
    ]
    results["parameters"] = 7
    rl_gpu_study.write(results, output)
    again = rl_gpu_study.earlier(output, size, 2)
    assert again["runs"] == results["runs"] and again["parameters"] == 7
    with pytest.raises(SystemExit, match="other settings"):
        rl_gpu_study.earlier(output, size, 3)
    text = rl_gpu_study.table(json.loads(output.read_text()))
    assert "+0.173 [-0.324, +0.671] tie" in text and "+0.100 [+0.075, +0.125] |" in text
    assert "1: 9 of 9 batches" in text
