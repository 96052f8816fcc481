"""`auto` takes the all-gather up to 64 MiB that it would bring a rank, and the ring above."""

import pytest
import torch

from megatron_m1.model import softmax
from megatron_m1.parallel.lightning_exchange import exchange_method
from megatron_m1.parallel.sequence_layout import SequenceLayout
from megatron_m1.parallel.state_chain import state_chains
from megatron_m1.parallel.traffic import method_by_size

MIB = 1 << 20


def lightning(layout: SequenceLayout, state_bytes: int, method: str = "auto") -> str:
    chains = state_chains(layout, torch.device("cpu"))
    return exchange_method(method, chains=chains, world=layout.world, state_bytes=state_bytes)


@pytest.mark.parametrize("rank", [0, 3])
def test_lightning_layers_choose_by_the_states_of_the_busiest_rank(rank):
    dense = SequenceLayout.dense(world=5, rank=rank, rows=2, tokens=20)
    # Two chunks of two rows from each of four others; rank 0, half of whose states nobody needs, chooses as they do.
    assert lightning(dense, 4 * MIB) == "all_gather"
    assert lightning(dense, 4 * MIB + 1) == "ring"
    # One document crosses one border, the others none.
    pack = SequenceLayout.pack(world=5, rank=rank, cu_seqlens=[0, 2, 4, 6, 10, 12, 14, 16, 18, 20], tokens=20)
    assert lightning(pack, 16 * MIB) == "all_gather"
    assert lightning(pack, 16 * MIB + 1) == "ring"
    assert lightning(dense, 1, "ring") == "ring" and lightning(dense, 1 << 40, "all_gather") == "all_gather"


def test_softmax_layers_choose_by_the_keys_and_values_of_the_sequence():
    keys = torch.empty(1, 4 * MIB, 1, 2, dtype=torch.int8, device="meta")  # 8 MiB, and as many of values
    assert softmax._method("auto", keys, world=4) == "all_gather"
    assert softmax._method("auto", keys, world=5) == "ring"
    assert (
        softmax._method("ring", keys, world=1) == "ring"
        and softmax._method("all_gather", keys, world=9) == "all_gather"
    )


def test_the_choice_is_logged_once(caplog):
    caplog.set_level("INFO", logger="megatron_m1")
    for _ in range(2):
        method_by_size("auto", 65 * MIB, of="parcels", world=7)
        method_by_size("ring", 1, of="named parcels", world=7)
    assert [record.getMessage() for record in caplog.records] == [
        "parcels over 7 context-parallel ranks: ring (auto: all_gather up to 64 MiB)"
    ]
