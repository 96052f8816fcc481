"""Single ranks of jobs of many, on torch's fake process group: what they hold, what they would receive, that their steps are real."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from benchmarks import any_rank, long_context
from benchmarks.any_rank import bench_config, distinct_ranks, measure_rank
from benchmarks.context_formulas import Shape, lightning_bytes
from benchmarks.fake_ranks import RECEIVED_STD, balance_routing, fake_rank, fill_weights
from benchmarks.long_context import Point, estimate, layer_config, left_out, measure_point
from benchmarks.long_context_plot import blocks
from benchmarks.long_context_rates import fit_context, fit_layers, fit_ranks, rank_errors
from megatron_m1.config import ConfigError, load_config
from megatron_m1.config.schema import ModelConfig, ParallelConfig
from megatron_m1.engine.cluster import DEVICES
from megatron_m1.engine.memory import estimate_memory, stage_layers
from megatron_m1.engine.rates import Rates
from megatron_m1.engine.step_time import COMPUTE, stage_seconds
from megatron_m1.engine.trainer import Trainer
from megatron_m1.model.build import build_model, routers

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
WORLD = 16
MILLION = ("m1_456b", "m1_456b_1m_512gpu")
EVEN = (
    "--parallel.tensor 8 --parallel.pipeline 2 --parallel.virtual_pipeline 5 --parallel.last_stage_layers null".split()
)
TINY = (
    *("--config", "examples/configs/tiny_cpu.yaml", "--model.num_hidden_layers", "4", "--model.hidden_size", "64"),
    *("--model.attn_type_list", "[0,1,0,1]", "--model.vocab_size", "256", "--model.intermediate_size", "64"),
    *("--parallel.tensor", "2", "--parallel.pipeline", "2", "--parallel.context", "2", "--parallel.expert", "2"),
    *("--training.seq_length", "64", "--training.micro_batch", "1"),
)
MODEL = ModelConfig(
    vocab_size=256, hidden_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=16, intermediate_size=64,
    num_local_experts=4, rotary_dim=8,
)  # fmt: skip


def tiny(*options: str, micro_batches: int = 2):
    return bench_config(load_config([*TINY, *options]), WORLD, micro_batches)


def test_distinct_ranks_of_the_presets():
    def ranks(*options: str) -> list[int]:
        return distinct_ranks(load_config(["--config", "examples/configs/m1_456b.yaml", *options]), 512)

    # The middle of the first context-parallel group. TP 2, PP 4, CP 2: first, in the middle with as many softmax layers, last.
    assert ranks("--config", "examples/configs/m1_456b_32k_512gpu.yaml") == [2, 128 + 2, 384 + 2]
    # TP 4, PP 4, CP 32: 2 softmax layers, 3, and the last.
    assert ranks("--config", "examples/configs/m1_456b_1m_512gpu.yaml") == [64, 128 + 64, 384 + 64]
    assert ranks("--config", "examples/configs/m1_456b_1m_512gpu.yaml", *EVEN) == [128, 256 + 128]
    # PP 8: first, those in the middle with one and with two softmax layers, last; PP 16: with one and with none.
    assert ranks() == [0, 64, 192, 448]
    assert ranks("--parallel.pipeline", "16") == [0, 32, 64, 480]


@pytest.mark.parametrize(
    ("rank", "options"),
    [
        (2, ()),
        (10, ("--training.precision", "bf16", "--parallel.overlap_grad_reduce", "true",
              "--parallel.overlap_param_gather", "true", "--training.recompute", "selective",
              "--training.recompute_modules", "[core_attn,moe]")),
        (15, ("--parallel.virtual_pipeline", "2", "--parallel.context_softmax", "ring",
              "--parallel.context_lightning", "ring", "--training.recompute", "full")),
    ],
)  # fmt: skip
def test_a_rank_holds_what_is_predicted_and_trains(rank, options):
    config = tiny(*options)
    cluster = replace(DEVICES["H800"], gpus=WORLD)
    row = measure_rank(
        config, rank=rank, world_size=WORLD, rounds=1, time_limit_s=60.0, cluster=cluster, profile=rank == 2
    )
    assert not dist.is_initialized()
    assert (row["tensor_rank"], row["context_rank"], row["stage"]) == (rank % 2, rank // 2 % 2, rank // 8)
    assert row["layers"] == {2: [0, 1], 10: [2, 3], 15: [1, 3]}[rank]
    measured, predicted = row["measured"], estimate_memory(config, WORLD)[row["stage"]]
    for counted, expected in (
        (measured["weight_bytes"], predicted.weights),
        (measured["gradient_bytes"], predicted.gradients),
        (measured["optimizer_bytes"], predicted.optimizer),
    ):
        assert counted == pytest.approx(expected, rel=0.01)  # buffers are padded
    if rank == 2:
        profile = measured["profile"]
        assert 0 < profile["busy_ms"] <= profile["whole_ms"]
        assert [ms for _, ms, _ in profile["kernels"]] == sorted((ms for _, ms, _ in profile["kernels"]), reverse=True)
        assert any(name == "aten::mm" and launches > 4 for name, _, launches in profile["kernels"])
    assert measured["micro_batch_s"] > 0 and 0 < measured["grad_norm"] < float("inf")
    # The part of one of two context ranks of the loss of 2 x 64 tokens; each vocabulary rank sees its own logits alone.
    assert (measured["loss"] is None) if rank < 8 else 0 < measured["loss"] < 10

    # A message is a tensor rank's share of a context rank's tokens; the outer end of the pipeline has no neighbour.
    share = 64 // 2 // 2 * 64 * (2 if "bf16" in options else 4)
    received = {(r["group"], r["operation"]): r for r in row["modelled"]["forward_backward"]}
    messages = received["pp", "receive"]
    assert messages["received_bytes"] == 2 * (2 * config.parallel.virtual_pipeline - 1) * share
    assert (messages["peers"], messages["stride"]) == (2, 8)
    assert messages["seconds"] == pytest.approx(messages["received_bytes"] / (50e9 * 0.8))
    assert row["predicted"] == any_rank.prediction(config, row["stage"], replace(DEVICES["H200"], gpus=WORLD))
    assert row["predicted"]["micro_batch_s"]["launch"] > 0  # layers that small wait for the host


@pytest.mark.parametrize(
    ("length", "rank", "layers"),
    [("32k", 16, range(24)), ("32k", 400, range(72, 80)), ("1m", 128, range(72)), ("1m", 511, range(8, 80))],
)
def test_ranks_of_the_456b_layouts_hold_what_is_predicted(length, rank, layers):
    files = ("m1_456b", f"m1_456b_{length}_512gpu")
    options = [option for file in files for option in ("--config", f"examples/configs/{file}.yaml")]
    config = bench_config(load_config(options + (EVEN if length == "1m" else [])), 512, 4)
    with fake_rank(rank, 512, config.parallel) as (groups, _):
        models = build_model(config, groups, device=torch.device("meta"))
        stage = groups.pp.rank()
    held = [layer.layer_number - 1 for model in models for layer in model.decoder.layers]
    assert held == stage_layers(config, stage) and len(held) == (40 if length == "1m" else len(layers))
    assert {held[0], held[-1]} == {layers[0], layers[-1]}
    parameters = [p for model in models for p in model.parameters()]
    assert sum(p.nbytes for p in parameters) == pytest.approx(estimate_memory(config, 512)[stage].weights, rel=1e-3)
    # One of 32 experts, 32 or 8 of 64 heads.
    assert models[0].decoder.layers[0].mlp.experts.fc1.shape == (1, 2, 9216, 6144)
    assert models[0].decoder.layers[0].self_attention.qkv_proj.weight.shape == (
        3 * 64 * 128 // config.parallel.tensor,
        6144,
    )


def test_routing_is_balanced_and_gradients_flow():
    config = tiny("--training.recompute", "none")
    with fake_rank(2, WORLD, config.parallel) as (groups, _):
        trainer = Trainer(config, groups, initial_weights=False)
        fill_weights(trainer.models)
        balance_routing(trainer.models)
        trainer.optimizer.reload_model_params()
        trainer.forward_backward(any_rank.random_batches(config, WORLD, tensor_rank=0))
        for router in routers(trainer.models):
            # 2 micro-batches of 64 tokens over two context and two tensor ranks, 2 experts each.
            assert router.tokens_per_expert.tolist() == [2 * 64 // 4 * 2 / 8] * 8
        assert all(p.main_grad.abs().max() > 0 for m in trainer.models for p in m.parameters())


def test_operations_leave_finite_data_and_are_counted():
    parallel = ParallelConfig(tensor=2, context=2, expert=4, expert_tensor=1)
    with fake_rank(5, 8, parallel) as (groups, received):
        mine, everyone = torch.arange(4.0), torch.full((8,), torch.nan)
        dist.all_gather_into_tensor(everyone, mine, group=groups.tp)
        assert everyone.tolist() == [0, 1, 2, 3, 0, 1, 2, 3]
        share = torch.full((2,), torch.nan)
        dist.reduce_scatter_tensor(share, mine, group=groups.tp)
        assert share.tolist() == [2, 3]  # rank 5 is the second of its pair
        rows = torch.full((6,), torch.nan)
        dist.all_to_all_single(rows, mine, [0, 1, 5, 0], [1, 1, 1, 1], group=groups.ep)
        assert rows.tolist() == [0, 1, 2, 3, 0, 1]
        arriving = torch.full((1000,), torch.nan)
        dist.irecv(arriving, group_src=1, group=groups.cp).wait()
        assert 0.5 * RECEIVED_STD < arriving.std() < 2 * RECEIVED_STD
        whole = torch.tensor([7.0, 8.0, 9.0, 6.0])
        dist.all_gather_into_tensor(whole, whole[2:], group=groups.tp)
        assert whole.tolist() == [7, 8, 9, 6]
        counted = {(r.group, r.operation): (r.calls, r.received_bytes, r.stride) for r in received.take()}
    assert counted == {
        ("tp", "all_gather"): (2, 16 + 8, 1),
        ("tp", "reduce_scatter"): (1, 8, 1),
        ("ep", "all_to_all"): (1, 18, 1),
        ("cp", "receive"): (1, 4000, 2),
    }


def test_a_ring_is_as_fast_as_its_slowest_link():
    """A message from a neighbour in the same node, in rings within the node and beyond it."""
    cluster = replace(DEVICES["H800"], gpus=32, gpus_per_node=8)
    for context, gb_per_s in ((8, 200.0), (32, 50.0)):
        with fake_rank(1, 32, ParallelConfig(context=context)) as (groups, received):
            dist.irecv(torch.empty(1000), group_src=0, group=groups.cp).wait()
            (message,) = received.take()
        assert (message.group, message.peers, message.stride) == ("cp", context, 1)
        assert message.seconds(cluster) == pytest.approx(4000 / (gb_per_s * 1e9 * 0.8))


def test_estimates_again_leave_what_was_measured(tmp_path):
    ranks = (RESULTS / "any_rank_1m_512gpu.json").read_text()
    before = json.loads(ranks)
    before["kept_attention"] = False
    stage = before["ranks"][0]
    ring = next(r for r in stage["modelled"]["forward_backward"] if (r["group"], r["operation"]) == ("cp", "receive"))
    halves = [
        ring | {"peers": 2, "stride": 8, "received_bytes": ring["received_bytes"] // 2, "calls": 5} for _ in range(2)
    ]
    others = [r for r in stage["modelled"]["forward_backward"] if r is not ring]
    stage["modelled"]["forward_backward"] = [*others, *halves]
    stage["predicted"], stage["modelled"]["links"]["rates"]["fp32_tflops"] = {}, 1.0
    (tmp_path / "ranks.json").write_text(json.dumps(before))
    assert any_rank.main(["--predict-again", str(tmp_path / "ranks.json")]) == 0
    after = json.loads((tmp_path / "ranks.json").read_text())
    assert after["labels"] == any_rank.LABELS and after["config"] == before["config"]
    for old, new in zip(before["ranks"], after["ranks"], strict=True):
        assert {k: v for k, v in new.items() if k not in ("predicted", "modelled")} == {
            k: v for k, v in old.items() if k not in ("predicted", "modelled")
        }
        assert new["modelled"]["links"]["rates"]["fp32_tflops"] == Rates().fp32_tflops
    again = next(
        r
        for r in after["ranks"][0]["modelled"]["forward_backward"]
        if (r["group"], r["operation"]) == ("cp", "receive")
    )
    assert again == ring | {"calls": 10, "received_bytes": again["received_bytes"]}
    assert again["received_bytes"] == 2 * (ring["received_bytes"] // 2)


def test_stored_estimates_are_those_of_todays_model(tmp_path):
    """Estimates and modelled seconds in benchmarks/results; `--predict-again` brings them up to date."""
    for name in ("any_rank_32k_512gpu", "any_rank_1m_512gpu", "rank_of_32k_preset", "long_context"):
        stored, copy = RESULTS / f"{name}.json", tmp_path / f"{name}.json"
        copy.write_text(stored.read_text())
        if name == "long_context":
            long_context.main(["--predict-again", "--output", str(copy)])
        else:
            any_rank.predict_again(copy)
        assert json.loads(copy.read_text()) == near(json.loads(stored.read_text())), name


def near(stored):
    if isinstance(stored, dict):
        return {key: near(value) for key, value in stored.items()}
    if isinstance(stored, list):
        return [near(value) for value in stored]
    return pytest.approx(stored) if isinstance(stored, float) else stored


def test_rings_of_stored_results_cross_nodes():
    rows = [
        (point["point"]["context"], message)
        for point in json.loads((RESULTS / "long_context.json").read_text())["points"]
        for message in point.get("communication", [])
        if message["operation"] == "receive"
    ]
    assert rows
    for context, message in rows:
        assert message["peers"] == context and message["stride"] == 1
        links = 50e9 if context > 8 else 200e9
        assert message["seconds"] == pytest.approx(message["received_bytes"] / (0.8 * links))


@pytest.mark.parametrize("content", [None, "{", "[]", '{"config": {}, "hardware": {"device": "abacus"}}'])
def test_results_that_cannot_be_read_are_named(content, tmp_path, capsys):
    file = tmp_path / "ranks.json"
    if content is not None:
        file.write_text(content)
    assert any_rank.main(["--predict-again", str(file)]) == 2
    assert f"--predict-again={file} cannot be read" in capsys.readouterr().err
    assert content is None or file.read_text() == content


def test_ranks_of_another_tensor_rank(capsys):
    config = load_config([option for f in MILLION for option in ("--config", f"examples/configs/{f}.yaml")])
    assert distinct_ranks(config, 512, tensor_rank=3) == [64 + 3, 128 + 64 + 3, 384 + 64 + 3]
    assert any_rank.main([*TINY, "--world-size", str(WORLD), "--tensor-rank", "2"]) == 2
    assert "--tensor-rank=2 must lie in 0..1" in capsys.readouterr().err


def test_layer_under_context_parallelism():
    cluster = DEVICES["H800"]
    point = Point("context_share", "lightning", "none", 1, 4, 512)
    row = measure_point(point, MODEL, cluster=cluster, experts=4)
    assert row["finite"] and row["local_tokens"] == 128 and row["forward_s"] > 0 and row["backward_s"] > 0
    shape = Shape(world=4, tokens=512, heads=4, key_value_heads=2, head_dim=16)
    states = next(r for r in row["communication"] if (r["group"], r["operation"]) == ("cp", "all_gather"))
    assert states["received_bytes"] >= 2 * lightning_bytes(shape, rank=2, method="all_gather", left_out=0)
    softmax = measure_point(replace(point, kind="softmax", recompute="selective"), MODEL, cluster=cluster, experts=4)
    assert softmax["finite"] and softmax["estimated_s"]["softmax"] > 0 == softmax["estimated_s"]["lightning"]


def test_points_that_are_left_out():
    first = Point("slice", "softmax", "none", 1, 1, 1000)
    rows = [{"point": vars(first), "forward_s": 1.0, "backward_s": 2.0, "rounds": 3}]
    twice = replace(first, tokens=2000)
    assert left_out(twice, rows, limit_s=13.0) is None
    assert "expected up to 12 s" in left_out(twice, rows, limit_s=11.0)
    assert left_out(replace(twice, kind="lightning"), rows, limit_s=1.0) is None
    assert left_out(twice, rows, limit_s=-1.0)
    rows = [{"point": vars(first), "error": "OutOfMemoryError: x"}]
    assert left_out(twice, rows, limit_s=99.0) == "with 1000 tokens: OutOfMemoryError: x"
    assert left_out(replace(first, tokens=500), rows, limit_s=99.0) is None


def test_eight_layers_from_two():
    def row(kind: str, tokens: int, seconds: float, kept: int, peak: int) -> dict:
        point = {"part": "slice", "kind": kind, "recompute": "none", "tokens": tokens}
        return {
            "point": point,
            "forward_s": seconds,
            "backward_s": 2 * seconds,
            "kept_bytes": kept,
            "peak_bytes": peak,
            "rounds": 3,
        }

    rows = [row("lightning", 8, 1.0, 10, 15), row("softmax", 8, 2.0, 20, 28), row("lightning", 16, 2.0, 20, 30)]
    assert blocks(rows, "slice", "hybrid", "none") == [(8, 7 * 3.0 + 6.0, 7 * 10 + 20 + 8)]
    assert blocks(rows, "slice", "all softmax", "none") == [(8, 8 * 6.0, 8 * 20 + 8)]


def test_rates_are_found_again_from_layers_and_ranks_that_have_them():
    true = Rates(
        lightning_layer=2.0, softmax_layer=1.5, softmax_tflops=300.0, softmax_backward_tflops=200.0, fp32_tflops=20.0,
        softmax_context=1.3, softmax_context_flash=1.9, forward_wait_s=0.006,
    )  # fmt: skip
    device, model = replace(DEVICES["H200"], rates=true), ModelConfig()
    rows = []
    for kind in ("lightning", "softmax"):
        for recompute in ("none", "selective"):
            for tokens in (1 << 13, 1 << 17, 1 << 20):
                point = Point("tensor_share", kind, recompute, 8, 1, tokens)
                config = layer_config(point, model, 32)
                again = stage_seconds(config, replace(device, gpus=96))[1]
                config.training.recompute = "none"
                plain = stage_seconds(config, replace(device, gpus=96))[1]
                forward = 0.006 + sum(plain[name] for name in ("gemm", "experts", "elementwise")) / 3
                forward += plain["softmax"] / (1 + 2.5 * 300 / 200)
                total = sum(again[name] for name in COMPUTE) + 0.006 * (2 if recompute == "selective" else 1)
                rows.append({"point": vars(point), "forward_s": forward, "backward_s": total - forward, "rounds": 3})
    # A layer on a ring of flash attention, which recomputation repeated, and one that compiled and must not count.
    point = Point("context_share", "softmax", "selective", 1, 16, 1 << 20)
    old = {"kept_attention": False, "cudnn_blocks": False}
    ring = sum(estimate(layer_config(point, model, 32), replace(device, gpus=3 * 32), **old).values())
    ring_rows = [
        {"point": vars(point), "forward_s": ring / 4, "backward_s": 3 * ring / 4, "rounds": 1},
        {"point": vars(point), "forward_s": ring, "backward_s": ring, "rounds": 1, "first_call": True},
    ]
    found = fit_layers(rows, model, DEVICES["H200"])
    # Ranks that wait 50 ms for the host of every layer, and some that do not.
    million = load_config([o for f in MILLION for o in ("--config", f"examples/configs/{f}.yaml")] + EVEN)
    ranks = []
    for whole, gpus in ((tiny(), WORLD), (million, 512)):
        version = {"kept_attention": whole is million, "cudnn_blocks": whole is million}
        ranks.append({"config": asdict(whole), "ranks": []} | version)
        for stage, terms in enumerate(stage_seconds(whole, replace(device, gpus=gpus), **version)):
            layers = stage_layers(whole, stage)
            work, head = sum(terms[name] for name in COMPUTE if name != "head"), terms["head"]
            waits = 0.006 * len(layers) * (2 if whole is million else 1)
            seconds = max(work + waits, len(layers) * 0.05) + head
            ranks[-1]["ranks"].append({"stage": stage, "layers": layers, "measured": {"micro_batch_s": seconds}})
    default = Rates()
    for given, cudnn, flash in (
        ((ring_rows, []), default.softmax_context, 1.9),
        (([], ranks), 1.3, default.softmax_context_flash),
        ((ring_rows, ranks), 1.3, 1.9),
    ):
        context = fit_context(*given, model, replace(DEVICES["H200"], rates=found))
        assert context.softmax_context == pytest.approx(cudnn, rel=1e-3)
        assert context.softmax_context_flash == pytest.approx(flash, rel=1e-3)
    found = fit_ranks(ranks, context, DEVICES["H200"])
    names = [name for name, value in vars(true).items() if value != getattr(Rates(), name)]
    assert len(names) == 8
    for name in names:
        assert getattr(found, name) == pytest.approx(getattr(true, name), rel=1e-4), name
    assert found.layer_host_s == pytest.approx(0.05)
    assert all(abs(error) < 1e-6 for error in rank_errors(ranks, replace(DEVICES["H200"], rates=found)))
    assert min(rank_errors(ranks, replace(DEVICES["H200"], rates=Rates(layer_host_s=0.0, forward_wait_s=0.0)))) < -0.9


def test_resume_keeps_what_is_there(tmp_path):
    output = tmp_path / "points.json"
    kept = {"forward_s": 1.0, "backward_s": 1.0, "rounds": 3, "finite": True, "estimated_s": {"gemm": 2.0}}
    kept["point"] = vars(Point("slice", "softmax", "none", 1, 1, 64))
    options = [
        *"--parts slice --kinds softmax --recompute none --resume --time-limit-s 0 --output".split(),
        str(output),
    ]
    for row in (kept, kept | {"commit": "1234567"}):  # a point has its own commit, or the file's
        output.write_text(json.dumps({"commit": "89abcde", "points": [row]}))
        before = output.read_bytes()
        assert long_context.main(["--tokens", "64", *options]) == 0
        assert output.read_bytes() == before
        assert long_context.main(["--tokens", "64", "128", *options]) == 0
        first, second = json.loads(output.read_text())["points"]
        assert first == {"commit": "89abcde"} | row and "above the 0 s" in second["skipped"]


def test_bad_layouts_are_refused():
    with pytest.raises(ConfigError, match="world_size=15"):
        bench_config(load_config(list(TINY)), 15, 2)
    with pytest.raises(ConfigError, match="--micro-batches=3 must be a multiple"):
        tiny("--parallel.virtual_pipeline", "2", micro_batches=3)
