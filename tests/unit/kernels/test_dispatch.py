import logging

import pytest
import torch
from m1_kernels import (
    choice,
    dispatch,
    lightning_attention,
    lightning_attention_packed,
    lightning_attention_read,
    lightning_attention_state,
    slopes,
    softmax_attention,
)


@pytest.fixture
def qkv() -> list[torch.Tensor]:
    return list(torch.randn(1, 5, 2, 12).split(4, dim=-1))


def test_auto_logs_its_choice_once(qkv: list[torch.Tensor], caplog: pytest.LogCaptureFixture) -> None:
    choice._log_once.cache_clear()
    with caplog.at_level(logging.INFO, logger="m1_kernels"):
        for _ in range(3):
            lightning_attention(*qkv, slopes(2, 0, 8))
    assert [r.getMessage() for r in caplog.records] == [
        "lightning_attention on cpu: torch (chunked batched matmuls in PyTorch)"
    ]


def test_named_implementations_agree(qkv: list[torch.Tensor]) -> None:
    chunked, reference = (
        lightning_attention(*qkv, slopes(2, 0, 8), implementation=name) for name in ("torch", "reference")
    )
    torch.testing.assert_close(chunked, reference, rtol=1e-5, atol=1e-5)


def test_unknown_implementation_names_the_known_ones(qkv: list[torch.Tensor]) -> None:
    with pytest.raises(ValueError, match=r"'cuda' is not available; use one of auto, triton, torch, reference"):
        lightning_attention(*qkv, slopes(2, 0, 8), implementation="cuda")


def test_an_implementation_that_cannot_run_says_why(qkv: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    blocked = choice.Implementation(run=lambda *_: None, obstacle=lambda q: "it needs CUDA", why="fastest")
    monkeypatch.setitem(dispatch.IMPLEMENTATIONS, "blocked", blocked)
    with pytest.raises(ValueError, match=r"cannot run: it needs CUDA; implementation='auto' picks another"):
        lightning_attention(*qkv, slopes(2, 0, 8), implementation="blocked")
    monkeypatch.delitem(dispatch.IMPLEMENTATIONS, "torch")
    with pytest.raises(ValueError, match=r"found none for .*blocked: it needs CUDA"):
        lightning_attention(*qkv, slopes(2, 0, 8))


def test_requests_that_triton_cannot_meet_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(dim: int, dtype: torch.dtype = torch.float32, **options: str) -> None:
        lightning_attention(*torch.zeros(3, 1, 2, 1, dim, dtype=dtype), slopes(1, 0, 8), **options)

    for dim in (24, 272):
        with pytest.raises(
            ValueError, match=rf"'triton' cannot run: its kernels take head_dim 16, 32, ... 256, not {dim}"
        ):
            ask(dim, implementation="triton")
    with pytest.raises(ValueError, match="accumulate in float32; use bf16, fp16 or fp32"):
        ask(16, torch.float64, implementation="triton")
    with pytest.raises(ValueError, match="strategy='fast' must be one of auto, fused, segmented"):
        ask(16, strategy="fast")
    for implementation in ("auto", "torch", "reference"):
        with pytest.raises(ValueError, match="strategy='fused' is one of the Triton kernels, which do not run here"):
            ask(16, strategy="fused", implementation=implementation)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(
        ValueError, match=r"run on cuda, or on cpu in Triton's interpreter \(TRITON_INTERPRET=1\), not on cpu"
    ):
        ask(16, implementation="triton")


def test_wrong_packed_projections_are_refused_with_a_remedy() -> None:
    qkv, decay = torch.zeros(1, 5, 2, 12), slopes(2, 0, 8)
    refused = [
        ((qkv[0], decay), {}, r"must be \[B, T, H, 3D\]"),
        ((qkv[..., :11], decay), {}, r"must be \[B, T, H, 3D\]"),
        ((qkv, decay), {"activation": "gelu"}, "must be 'silu' or None"),
        ((qkv, decay), {"implementation": "reference"}, "use one of auto, triton, torch"),
        ((qkv, decay), {"strategy": "segmented"}, "leave it at 'auto'"),
        ((qkv.long(), decay), {}, "must share one dtype"),
    ]
    for arguments, options, message in refused:
        with pytest.raises(ValueError, match=message):
            lightning_attention_packed(*arguments, **options)


def test_wrong_inputs_are_refused_with_a_remedy(qkv: list[torch.Tensor]) -> None:
    q, k, v = qkv
    decay = slopes(2, 0, 8)
    state = torch.zeros(1, 2, 4, 4)
    pack = torch.tensor([0, 5], dtype=torch.int32)
    two = [x.expand(2, -1, -1, -1) for x in qkv]
    refused = [
        ((q, k[:, :3], v, decay), {}, "must share one shape"),
        ((q, k.half(), v, decay), {}, "must share one dtype"),
        ((q, k.to("meta"), v, decay), {}, "q on cpu, k on meta, v on cpu, slopes on cpu; move them to one device"),
        ((q, k, v, decay), {"initial_state": state.to("meta")}, "initial_state on meta"),
        ((q, k, v, decay.to("meta")), {}, "slopes on meta"),
        ((q, k, v, decay), {"cu_seqlens": pack.to("meta")}, "cu_seqlens on meta"),
        ((*(x.to("meta") for x in qkv), decay.to("meta")), {}, "found none for torch.float32 on meta"),
        ((q, k, v, -decay), {}, "must be >= 0: .* negate the g_gamma"),
        ((q, k, v, decay * float("nan")), {}, "must be >= 0"),
        ((q, k, v, decay.bfloat16()), {}, "must be float32"),
        ((q, k, v, decay[:1]), {}, r"must be float32 \[2\]"),
        ((q, k, v, decay), {"initial_state": state.bfloat16()}, "never below float32"),
        ((q, k, v, decay), {"initial_state": state.expand(2, -1, -1, -1)}, "one state per document"),
        ((*two, decay), {"cu_seqlens": pack}, "concatenate the rows"),
        ((q, k, v, decay), {"cu_seqlens": pack.float()}, "must be int32"),
        ((q, k, v, decay), {"cu_seqlens": pack + 1}, "must start at 0"),
        ((q, k, v, decay), {"cu_seqlens": pack * 2}, "end at or before T=5"),
        ((q, k, v, decay), {"cu_seqlens": torch.tensor([0, 4, 3, 5])}, "never fall"),
    ]
    for arguments, options, message in refused:
        with pytest.raises(ValueError, match=message):
            lightning_attention(*arguments, **options)


@pytest.mark.parametrize("edges", [[0, 8], [1, 5], [0, 4, 3, 5]])
def test_bad_packs_are_refused_on_the_cpu_by_all_that_read_them(edges: list[int], qkv: list[torch.Tensor]) -> None:
    q, k, v = qkv
    decay, states = slopes(2, 0, 8), torch.zeros(len(edges) - 1, 2, 4, 4)
    pack = {"cu_seqlens": torch.tensor(edges, dtype=torch.int32)}
    soft = {"scale": 0.5, **pack}
    calls = {
        "torch": lambda: lightning_attention(q, k, v, decay, **pack),
        "packed": lambda: lightning_attention_packed(torch.cat(qkv, dim=-1), decay, **pack),
        "reference": lambda: lightning_attention(q, k, v, decay, implementation="reference", **pack),
        "state": lambda: lightning_attention_state(k, v, decay, **pack),
        "read": lambda: lightning_attention_read(q, states, decay, out=q.clone(), **pack),
        "softmax": lambda: softmax_attention(q, k, v, **soft),
        "softmax with lse": lambda: softmax_attention(q, k, v, return_lse=True, **soft),
    }
    for name, call in calls.items():
        with pytest.raises(ValueError, match=r"cu_seqlens=.* must start at 0, never fall, and end at or before T=5"):
            call()
            pytest.fail(name)
