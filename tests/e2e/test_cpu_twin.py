"""The CPU twin of the million-token preset runs with all its switches, saves while it trains, and resumes."""

import pytest

from tests.e2e.pretrain_jobs import ROOT, entries, pretrain_rank, steps

CONFIGS = [
    option
    for name in ("tiny_cpu", "tiny_cpu_1m")
    for option in ("--config", str(ROOT / "examples" / "configs" / f"{name}.yaml"))
]
ALONE = [
    f"--parallel.{name}=1" for name in ("pipeline", "virtual_pipeline", "context", "expert", "expert_tensor", "tensor")
]
ALONE += ["--parallel.last_stage_layers", "null"]


@pytest.mark.slow
def test_twin_runs_and_resumes_as_it_was_and_on_one_rank(ranks, tmp_path):
    common = [*CONFIGS, "--training.steps", "2", "--checkpoint.every_steps", "1", "--logging.tensorboard", "false"]
    common += ["--training.seq_length", "1024", "--training.head_chunk_tokens", "128"]
    save = ["--checkpoint.save", str(tmp_path / "saved"), "--logging.dir", str(tmp_path / "whole")]
    assert ranks(4, pretrain_rank, [*common, *save], timeout_s=280) == [None] * 4
    start, evaluation, first, second = entries(tmp_path / "whole")
    sizes = start["process_groups"]
    assert [sizes[name] for name in ("world", "pipeline", "context", "expert", "data")] == [4, 2, 2, 2, 1]
    assert evaluation["valid_loss"] > second["valid_loss"] and first["loss"] > second["loss"]
    assert (tmp_path / "saved" / "latest").read_text().strip() == "step_00000002" and "layers" in second
    for name, world, options in (("again", 4, []), ("alone", 1, ALONE)):
        load = ["--checkpoint.load", str(tmp_path / "saved" / "step_00000001"), "--checkpoint.save", "null"]
        logs = ["--logging.dir", str(tmp_path / name), "--checkpoint.every_steps", "0"]
        assert ranks(world, pretrain_rank, [*common, *load, *logs, *options], timeout_s=280) == [None] * world
        found, expected = steps(tmp_path / name)[2], steps(tmp_path / "whole")[2]
        for key in ("loss", "grad_norm", "aux_loss", "valid_loss"):
            bound = 0.0 if world == 4 else 1e-5
            assert abs(found[key] - expected[key]) <= bound * abs(expected[key]), (name, key)
