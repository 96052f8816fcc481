import math

import pytest
import torch

from megatron_m1.rl.advantages import group_advantages, informative_samples, overlong_penalty

REWARDS = torch.tensor([1.0, 0.0, 1.0, 0.0, 0.0, 1.0, 0.5, 0.5])
GROUPS = torch.tensor([7, 7, 3, 7, 3, 3, 5, 5])


def test_population_std_gives_mean_square_one_and_sample_std_has_one_degree_less():
    population = group_advantages(REWARDS, GROUPS)
    sample = group_advantages(REWARDS, GROUPS, std="sample")
    for group, mean, deviation in ((7, 1 / 3, math.sqrt(2) / 3), (3, 2 / 3, math.sqrt(2) / 3)):
        members = group == GROUPS
        expected = (REWARDS[members].double() - mean) / deviation
        torch.testing.assert_close(population[members], expected, rtol=0, atol=1e-12)
        torch.testing.assert_close(sample[members], expected * math.sqrt(2 / 3), rtol=0, atol=1e-12)
        torch.testing.assert_close(
            sample[members], (REWARDS[members].double() - mean) / REWARDS[members].double().std()
        )
        assert population[members].square().mean().item() == pytest.approx(1.0, abs=1e-12)


def test_without_std_the_mean_is_taken_off():
    plain = group_advantages(REWARDS, GROUPS, std="none")
    torch.testing.assert_close(plain[0], torch.tensor(2 / 3, dtype=torch.float64), rtol=0, atol=1e-15)


@pytest.mark.parametrize("std", ["population", "sample", "none"])
def test_equal_rewards_and_single_samples_get_exactly_zero(std):
    rewards = torch.tensor([0.1, 0.1, 0.1, 0.7])
    assert group_advantages(rewards, torch.tensor([0, 0, 0, 1]), std=std).tolist() == [0.0] * 4


def test_samples_without_a_reward_count_nowhere():
    rewards = torch.tensor([1.0, 0.0, float("nan"), 1.0])
    groups, valid = torch.zeros(4, dtype=torch.long), torch.tensor([True, True, False, True])
    seen = group_advantages(rewards, groups, valid=valid)
    assert seen[2] == 0
    torch.testing.assert_close(seen[valid], group_advantages(rewards[valid], groups[valid]), rtol=0, atol=0)
    with pytest.raises(ValueError, match="finite"):
        group_advantages(rewards, groups)


def test_dynamic_sampling_keeps_groups_whose_rewards_differ():
    rewards = torch.tensor([1.0, 1.0, 0.0, 0.0, 1.0, 0.0, 1.0, 0.0])
    groups = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])
    kept, report = informative_samples(rewards, groups)
    assert kept.tolist() == [False] * 4 + [True] * 4
    assert (report.groups, report.kept, report.all_right, report.all_equal_below) == (4, 2, 1, 1)
    assert report.discard_rate() == 0.5
    valid = torch.tensor([True] * 5 + [False] + [True] * 2)
    kept, report = informative_samples(rewards, groups, valid=valid)
    assert kept.tolist() == [False] * 6 + [True] * 2
    assert (report.kept, report.all_right) == (1, 2)
    assert informative_samples(torch.tensor([1.0, 0.0, 0.0]), torch.zeros(3), valid=torch.tensor([True, True, False]))[
        0
    ].tolist() == [True, True, False]


def test_overlong_penalty_is_dapo_equation_13():
    lengths = torch.tensor([0, 80, 81, 90, 100, 101, 500])
    seen = overlong_penalty(lengths, max_length=100, cache_length=20)
    assert seen.tolist() == pytest.approx([0, 0, -0.05, -0.5, -1, -1, -1], abs=1e-15)
    with pytest.raises(ValueError, match="cache_length"):
        overlong_penalty(lengths, max_length=10, cache_length=20)
