"""The layouts in examples/configs are what the planner gives."""

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_m1.config import load_config
from megatron_m1.engine.cluster import DEVICES
from megatron_m1.planning import Plan, plan_layout
from megatron_m1.planning.search import layout_name

CONFIGS = Path(__file__).parents[3] / "examples" / "configs"
# For each some of the next in the ranking: the whole search takes seconds.
PRESETS = {
    ("32k", 256): "4/2/4/16/4/5 4/2/4/32/4/1",
    ("32k", 512): "8/2/4/32/1/5 8/2/4/32/1/4 4/2/4/32/4/1 8/8/1/8/1/1",
    ("128k", 256): "4/2/16/16/4/5 4/2/16/32/4/1",
    ("128k", 512): "8/2/16/32/1/5 4/2/16/32/4/1",
    ("512k", 256): "4/2/16/32/4/1 4/2/32/16/4/5",
    ("512k", 512): "8/2/32/32/1/1 8/2/16/32/1/5",
    ("1m", 256): "4/2/32/32/4/1 8/1/32/16/8/1",
    ("1m", 512): "4/2/32/16/4/5 8/2/32/32/1/1 4/2/32/32/4/5",
}


@pytest.mark.parametrize("length, gpus", PRESETS)
def test_preset_fits_and_beats_the_runners_up(length, gpus):
    files = [f"{CONFIGS}/m1_456b.yaml", f"{CONFIGS}/m1_456b_{length}_{gpus}gpu.yaml"]
    config = load_config([option for file in files for option in ("--config", file)])
    cluster = replace(DEVICES["H800"], gpus=gpus)
    best = plan_layout(config, cluster, config.parallel)
    assert isinstance(best, Plan)
    ours, chosen = config.training, best.config.training
    assert ours.recompute == chosen.recompute
    assert ours.recompute != "selective" or ours.recompute_modules == chosen.recompute_modules
    names = ("tensor", "pipeline", "context", "expert", "expert_tensor", "virtual_pipeline")
    for layout in PRESETS[length, gpus].split():
        parallel = replace(config.parallel, **dict(zip(names, map(int, layout.split("/")))))
        assert layout_name(parallel) == layout
        other = plan_layout(config, cluster, parallel)
        assert isinstance(other, Plan) and other.time.total > best.time.total
