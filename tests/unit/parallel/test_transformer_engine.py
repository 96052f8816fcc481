"""How Transformer Engine would be called; it is not installed here."""

import pytest
import torch

from megatron_m1 import platform
from megatron_m1.config import Config
from megatron_m1.config.errors import ConfigError
from megatron_m1.engine.trainer import Trainer
from megatron_m1.parallel.sequence_layout import SequenceLayout
from megatron_m1.parallel.transformer_engine import (
    TransformerEngineAttention,
    constructor_arguments,
    layout_arguments,
    refuse_if_missing,
)
from megatron_m1.platform.packages import Package

CPU = torch.device("cpu")


def test_where_it_is_missing_it_is_refused_before_a_model_is_built(monkeypatch):
    missing = Package(False, "", "not installed")
    monkeypatch.setattr(platform, "probe", lambda: type("Found", (), {"transformer_engine": missing}))
    config = Config()
    config.parallel.context_softmax = "transformer_engine"
    refuse_if_missing(config.parallel)  # without context parallelism nothing asks for it
    config.parallel.context = 2
    with pytest.raises(ConfigError) as error:
        Trainer(config, groups=None)
    assert str(error.value) == (
        "parallel.context_softmax=transformer_engine needs Transformer Engine, which is not installed; install "
        "transformer-engine[pytorch] 2.2 or later, or use auto, ring or all_gather."
    )


@pytest.mark.parametrize("rank", [0, 1])
def test_borders_are_those_of_the_whole_pack(rank):
    layout = SequenceLayout.per_document(world=2, rank=rank, cu_seqlens=[0, 4, 4, 20, 24])
    found = layout_arguments(layout, CPU)
    borders = {name: found.pop(name) for name in sorted(found) if name.startswith("cu_seqlens")}
    assert list(borders) == ["cu_seqlens_kv", "cu_seqlens_kv_padded", "cu_seqlens_q", "cu_seqlens_q_padded"]
    for edges in borders.values():
        assert edges.dtype == torch.int32 and edges.tolist() == [0, 4, 20, 24]
    assert found == {
        "qkv_format": "thd",
        "attn_mask_type": "padding_causal",
        "pad_between_seqs": False,
        "max_seqlen_q": 16,
        "max_seqlen_kv": 16,
    }


def test_dense_rows_need_no_borders():
    layout = SequenceLayout.dense(world=2, rank=1, rows=3, tokens=8)
    assert layout_arguments(layout, CPU) == {"qkv_format": "bshd", "attn_mask_type": "causal"}


def test_a_pack_that_is_cut_as_a_whole_is_refused():
    layout = SequenceLayout.pack(world=2, rank=0, cu_seqlens=[0, 3, 8], tokens=8)
    with pytest.raises(ValueError, match="per_document only"):
        layout_arguments(layout, CPU)


class Recorder:
    """Stands in for DotProductAttention: notes how it is called and returns [.., heads * D] as that does."""

    def __call__(self, q, k, v, **arguments):
        self.shapes, self.arguments = [tuple(x.shape) for x in (q, k, v)], arguments
        assert all(x.is_contiguous() for x in (q, k, v))
        return q.flatten(-2)


@pytest.mark.parametrize("packed", [True, False])
def test_tensors_go_in_and_out_in_its_format(packed):
    layout = (
        SequenceLayout.per_document(world=2, rank=0, cu_seqlens=[0, 8])
        if packed
        else SequenceLayout.dense(world=2, rank=0, rows=2, tokens=8)
    )
    attention = TransformerEngineAttention.__new__(TransformerEngineAttention)
    attention._attention = recorder = Recorder()
    rows = 1 if packed else 2
    q, k = torch.randn(rows, 4, 4, 8), torch.randn(rows, 4, 8, 2).transpose(2, 3)
    o = attention(q, k, k, layout)
    assert torch.equal(o, q)
    assert (
        recorder.shapes == [(4, 4, 8), (4, 2, 8), (4, 2, 8)] if packed else [(2, 4, 4, 8), (2, 4, 2, 8), (2, 4, 2, 8)]
    )
    assert recorder.arguments["qkv_format"] == ("thd" if packed else "bshd")


def test_it_is_made_for_local_heads_without_dropout():
    made = constructor_arguments(heads=8, key_heads=2, head_dim=16, scale=0.25)
    assert (made["num_attention_heads"], made["num_gqa_groups"], made["kv_channels"]) == (8, 2, 16)
    assert made["attention_dropout"] == 0.0 and made["softmax_scale"] == 0.25 and "tp_size" not in made
