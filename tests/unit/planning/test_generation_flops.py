import pytest

from megatron_m1.config import ModelConfig
from megatron_m1.planning.generation_flops import flops_curve, r1_decode_flops, r1_multiplied_parameters


def test_parameters_of_deepseek_r1():
    """37B active parameters are these and 0.93B of the embedding."""
    assert r1_multiplied_parameters() + 129280 * 7168 == pytest.approx(37.55e9, rel=1e-3)


def test_cost_of_a_position():
    per_position = r1_decode_flops(1) - r1_decode_flops(0)
    assert per_position == 2 * 61 * 128 * (192 + 128) == 4_997_120
    assert r1_decode_flops(1, absorbed=True) - r1_decode_flops(0, absorbed=True) == 2 * 61 * 128 * (576 + 512)


def test_the_reports_claims():
    """Under 50% at 64K: by either count. About 25% at 100K: 22% for the last token, 34% over the whole generation."""
    at_64k, at_100k = flops_curve(ModelConfig(), [65536, 100_000])
    assert at_64k.m1_last == pytest.approx(94.6e9 + 3.277e5 * 65536, rel=1e-3)
    assert at_64k.r1_sum == pytest.approx(65536 * (73.2e9 + 4_997_120 * 65536 / 2), rel=1e-3)
    assert at_64k.ratio_last == pytest.approx(0.290, abs=1e-3) and at_64k.ratio_sum == pytest.approx(0.445, abs=1e-3)
    assert at_100k.ratio_last == pytest.approx(0.222, abs=1e-3) and at_100k.ratio_sum == pytest.approx(0.344, abs=1e-3)
    assert at_100k.ratio_absorbed_sum == pytest.approx(0.120, abs=1e-3)
