"""One step of softmax attention over blocks, against attention over whole sequences in float64."""

import pytest
import torch
from m1_kernels import softmax_attention_step, triton_paged
from m1_kernels.paged import PAGED

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOKENS, SCALE = 16, 0.3


def inputs(positions: list[int], heads: int, groups: int, dim: int, width: int) -> list[torch.Tensor]:
    """q, keys, values, tables, positions; blocks in mixed order, those behind a sequence's last token full of noise."""
    torch.manual_seed(dim)
    blocks = len(positions) * width + 1
    pools = torch.randn(2, blocks, TOKENS, groups, dim)
    tables = torch.randperm(blocks)[: len(positions) * width].view(-1, width).int()
    return [torch.randn(len(positions), heads, dim), *pools, tables, torch.tensor(positions)]


def exact(q, keys, values, tables, positions):
    rows = []
    for query, table, position in zip(q.double(), tables.long(), positions.tolist(), strict=True):
        k, v = (pool.double()[table].flatten(0, 1)[: position + 1] for pool in (keys, values))
        repeat = q.shape[1] // k.shape[1]
        k, v = (x.repeat_interleave(repeat, dim=1) for x in (k, v))
        weights = (torch.einsum("hd,thd->ht", query, k) * SCALE).softmax(dim=-1)
        rows.append(torch.einsum("ht,thd->hd", weights, v))
    return torch.stack(rows)


@pytest.mark.parametrize("implementation", list(PAGED))
@pytest.mark.parametrize(("heads", "groups", "dim"), [(4, 2, 16), (3, 1, 24), (2, 2, 64)])
@pytest.mark.parametrize("programs", [1, 528], ids=["one span", "spans"])
def test_a_step_equals_attention_over_the_whole_sequence(implementation, heads, groups, dim, programs, monkeypatch):
    monkeypatch.setattr(triton_paged, "PROGRAMS", programs)
    tensors = inputs([0, 15, 16, 40, -1], heads, groups, dim, width=3)
    out = softmax_attention_step(*(x.to(DEVICE) for x in tensors), scale=SCALE, implementation=implementation).cpu()
    assert (out[:4].double() - exact(*(x[:4] if x.shape[0] == 5 else x for x in tensors))).abs().max() <= 2e-6
    assert not out[4].any()


def test_nothing_behind_the_last_token_is_read():
    q, keys, values, tables, positions = inputs([20, 3], 4, 2, 16, width=3)
    want = softmax_attention_step(*(x.to(DEVICE) for x in (q, keys, values, tables, positions)), scale=SCALE)
    for pool in (keys, values):
        pool[tables[0, 1], 21 - TOKENS :] = torch.nan
        pool[tables[1, 0], 4:] = torch.nan
    tables[0, 2] = tables[1, 1:] = 1 << 30
    tensors = (x.to(DEVICE) for x in (q, keys, values, tables, positions))
    got = softmax_attention_step(*tensors, scale=SCALE, implementation="triton")
    torch.testing.assert_close(got, want, rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    ("place", "changed", "said"),
    [(3, lambda x: x.long(), "must be int32"), (4, lambda x: x.int(), "must be int64"), (1, lambda x: x.half(), "one dtype")],
)  # fmt: skip
def test_wrong_inputs_are_named(place, changed, said):
    tensors = inputs([3, 4], 4, 2, 16, width=1)
    tensors[place] = changed(tensors[place])
    with pytest.raises(ValueError, match=said):
        softmax_attention_step(*tensors, scale=SCALE)
