import math

import pytest
import torch
from m1_kernels import slopes


def test_first_layer_of_m1_is_geometric() -> None:
    expected = [2.0 ** (-(h + 1) / 8) * (1 + 1e-5) for h in range(64)]
    torch.testing.assert_close(slopes(64, 0, 80), torch.tensor(expected, dtype=torch.float32), rtol=0, atol=0)


def test_range_over_the_lightning_layers_of_m1() -> None:
    lightning = [layer for layer in range(80) if layer % 8 != 7]
    values = torch.stack([slopes(64, layer, 80) for layer in lightning])
    assert values.max().item() == pytest.approx(0.917, abs=5e-4)
    assert values.min().item() == pytest.approx(4.95e-5, rel=2e-3)
    assert (values.diff(dim=0) < 0).all()
    assert (values.diff(dim=1) < 0).all()


def test_head_counts_that_are_no_power_of_two_interpolate() -> None:
    four = [2.0 ** (-2 * (h + 1)) for h in range(4)]
    between = [2.0**-1, 2.0**-3]
    torch.testing.assert_close(slopes(6, 0, 8), torch.tensor(four + between) * (1 + 1e-5), rtol=1e-7, atol=0)
    assert len(slopes(3, 0, 8)) == 3


def test_last_layer_and_single_layer() -> None:
    assert slopes(8, 7, 8)[0].item() == pytest.approx(0.5e-5, rel=1e-6)
    assert slopes(8, 0, 1)[0].item() == pytest.approx(0.5 * (1 + 1e-5), rel=1e-7)
    assert math.isfinite(slopes(1, 0, 1)[0])


@pytest.mark.parametrize("arguments", [(0, 0, 1), (4, 8, 8), (4, -1, 8)])
def test_impossible_arguments_are_refused(arguments: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="must"):
        slopes(*arguments)
