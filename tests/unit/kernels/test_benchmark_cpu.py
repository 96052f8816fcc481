"""The CPU benchmark: its peer is transformers' loop, its floor and its turns are counted right, its file is written."""

import time
from pathlib import Path

import pytest
import torch
from m1_kernels import benchmark_cpu, lightning_attention, slopes
from m1_kernels.benchmark_report import Report
from torch import nn


class OpenGate(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.full((), torch.inf)


def test_the_block_loop_is_that_of_transformers() -> None:
    from transformers.models.minimax.configuration_minimax import MiniMaxConfig
    from transformers.models.minimax.modeling_minimax import MiniMaxLightningAttention

    heads, dim, tokens = 2, 8, 300
    config = MiniMaxConfig(hidden_size=heads * dim, num_attention_heads=heads, head_dim=dim, num_hidden_layers=4)
    assert config.block_size == benchmark_cpu.BLOCK
    layer = MiniMaxLightningAttention(config, 2)
    # only the loop: the projection in front and the norm, gate and projection behind it do nothing
    layer.act_fn = layer.qkv_proj = layer.norm = layer.out_proj = nn.Identity()
    layer.output_gate = OpenGate()
    qkv = torch.randn(1, tokens, 3 * heads * dim)
    expected, _ = layer(qkv, None, None)
    q, k, v = qkv.view(1, tokens, heads, 3 * dim).split(dim, dim=-1)
    decay = layer.slope_rate.flatten()
    actual = benchmark_cpu.block_loop(q, k, v, benchmark_cpu.block_tables(decay))
    assert torch.equal(actual.flatten(2), expected)
    torch.testing.assert_close(lightning_attention(q, k, v, decay), actual, rtol=1e-5, atol=1e-4)


def test_both_sides_yield_the_same_gradient() -> None:
    decay = slopes(2, 0, 8)
    tables = benchmark_cpu.block_tables(decay)
    gradients = []
    for attention in (
        lambda x: lightning_attention(*benchmark_cpu.parts(x), decay),
        lambda x: benchmark_cpu.block_loop(*benchmark_cpu.parts(x), tables),
    ):
        qkv = torch.randn(1, 300, 2, 24, generator=torch.Generator().manual_seed(1)).requires_grad_()
        attention(qkv).sum().backward()
        gradients.append(qkv.grad)
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-3)


def test_calls_take_turns() -> None:
    order: list[str] = []
    durations = {"a": iter([9.0, 2.0, 1.0, 3.0]), "b": iter([9.0, 0.5, 0.7, 0.6])}
    now = 0.0

    def call(name: str):
        def run() -> None:
            nonlocal now
            order.append(name)
            now += next(durations[name])

        return run

    taken = benchmark_cpu.times({"a": call("a"), "b": call("b")}, 2, lambda: now)
    assert taken == {"a": pytest.approx([2.0, 1.0]), "b": pytest.approx([0.5, 0.7])}
    assert order == ["a", "b"] * 3


def test_the_cpu_clock_stands_still_while_others_run() -> None:
    taken = {
        name: benchmark_cpu.times({"": lambda: time.sleep(0.2)}, 1, clock)[""]
        for name, clock in benchmark_cpu.CLOCKS.items()
    }
    assert taken["wall"][0] >= 0.2 > 0.1 > taken["cpu"][0]


@pytest.mark.parametrize("measure, flops", [("forward", 4 + 4), ("forward+backward", 14 + 14)])
def test_floor_counts_the_products_of_a_chunk(measure: str, flops: int) -> None:
    assert benchmark_cpu.floor_flops(measure, 10, 3, 64) == 10 * 3 * flops * 64 * 64  # chunk and width are 64


def test_the_whole_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "cpu.json"
    threads = str(torch.get_num_threads())
    arguments = f"--tokens 64 --heads 1 --head-dim 8 --repeats 1 --threads {threads} --output {output}"
    assert benchmark_cpu.main(arguments.split()) == 0
    report = Report.read(output)
    assert {(row.section, row.measure, row.name) for row in report.rows} == {
        (section, measure, name)
        for section, names in {
            "attention": ("ours", "block loop", "torch flash"),
            "SiLU and attention": ("ours", "block loop"),
        }.items()
        for measure in benchmark_cpu.MEASURES
        for name in names
    }
    assert all(row.ms == row.least_ms > 0 and row.repeats == 1 for row in report.rows)
    assert {"load at start", "load at end"} < set(report.hardware)
    assert "time over ours" in capsys.readouterr().out
