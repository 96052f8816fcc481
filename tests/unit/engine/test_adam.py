"""AdamW of engine/adam.py against the formula in fp64, and its resumption."""

import pytest
import torch

from megatron_m1.config.errors import ConfigError
from megatron_m1.engine.adam import AdamW

SHAPES = [(7, 5), (3,), (0,), (2, 3, 4)]
OPTIONS = {"lr": 3e-3, "betas": (0.9, 0.95), "eps": 1e-15, "weight_decay": 0.1}


def parameters(seed: int = 0) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def gradients(step: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def run(optimizer: AdamW, steps: range) -> None:
    for step in steps:
        params = [param for group in optimizer.param_groups for param in group["params"]]
        for param, grad in zip(params, gradients(step), strict=True):
            param.grad = grad
        optimizer.step()


def by_formula(params: list[torch.Tensor], steps: int, *, decoupled: bool) -> list[torch.Tensor]:
    (b1, b2), lr, wd, eps = OPTIONS["betas"], OPTIONS["lr"], OPTIONS["weight_decay"], OPTIONS["eps"]
    results = []
    for index, param in enumerate(params):
        p = param.detach().double().clone()
        m, v = torch.zeros_like(p), torch.zeros_like(p)
        for t in range(1, steps + 1):
            g = gradients(t - 1)[index].double()
            if decoupled:
                p = p * (1 - lr * wd)
            else:
                g = g + wd * p
            m = b1 * m + (1 - b1) * g
            v = b2 * v + (1 - b2) * g * g
            p = p - lr * (m / (1 - b1**t)) / ((v / (1 - b2**t)).sqrt() + eps)
        results.append(p)
    return results


@pytest.mark.parametrize("decoupled", [True, False])
def test_equals_the_formula(decoupled):
    params = parameters()
    expected = by_formula(params, 5, decoupled=decoupled)
    run(AdamW(params, **OPTIONS, adam_w_mode=decoupled), range(5))
    for param, reference in zip(params, expected, strict=True):
        torch.testing.assert_close(param.detach().double(), reference, rtol=2e-6, atol=2e-6)


def test_three_and_two_steps_are_five_bitwise():
    straight = parameters()
    run(AdamW(straight, **OPTIONS), range(5))

    first = parameters()
    optimizer = AdamW(first, **OPTIONS)
    run(optimizer, range(3))
    state = optimizer.state_dict()
    second = [torch.nn.Parameter(param.detach().clone()) for param in first]
    resumed = AdamW(second, lr=1.0)
    resumed.load_state_dict(state)
    run(resumed, range(3, 5))
    for a, b in zip(straight, second, strict=True):
        assert torch.equal(a, b)


def test_step_lives_in_the_group_also_in_an_empty_one():
    filled, empty = parameters(), []
    optimizer = AdamW([{"params": filled}, {"params": empty}], **OPTIONS)
    run(optimizer, range(3))
    assert [group["step"] for group in optimizer.param_groups] == [3, 3]
    assert all(set(state) == {"exp_avg", "exp_avg_sq"} for state in optimizer.state.values())


def test_parameters_without_gradient_stay():
    params = parameters()
    optimizer = AdamW(params, **OPTIONS)
    before = params[0].detach().clone()
    params[1].grad = torch.ones_like(params[1])
    optimizer.step()
    assert torch.equal(params[0], before) and params[0] not in optimizer.state


def test_capturable_is_refused():
    with pytest.raises(ConfigError, match="Transformer Engine"):
        AdamW(parameters(), capturable=True)
