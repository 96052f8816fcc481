"""Tasks, settings, validation, the journal record and the page of the RL loop."""

import json
import math
import re
from dataclasses import replace

import pytest
import torch

from megatron_m1.config import ConfigError, to_yaml
from megatron_m1.config.schema import Config, CurriculumPoint, RLConfig, TaskSource, WindowStage
from megatron_m1.config.validate import validate_rl
from megatron_m1.generation.blocks import BLOCK_TOKENS, blocks_for
from megatron_m1.rl import page as page_module
from megatron_m1.rl.loop import _shown, _warnings, loss_settings, main
from megatron_m1.rl.page import write_page
from megatron_m1.rl.progress import Progress
from megatron_m1.rl.rewards.exact import ExactReward
from megatron_m1.rl.rewards.protocol import RewardRequest
from megatron_m1.rl.samples import Facts, from_record, to_record
from megatron_m1.rl.tasks import Task
from tests.unit.rl.loop_cases import fixed_samples, tiny_config


def progress_config() -> Config:
    stages = [WindowStage(10, 2.0, 0.5), WindowStage(20)]
    return tiny_config(windows=stages, max_new_tokens=20, window_patience=2, easy_above=0.5, pass_rate_attempts=2)


def step_facts(length: int, rewards: tuple[float | None, ...]) -> list[Facts]:
    return [Facts(i, 7, 3, length, -0.5 * length, "eos", reward) for i, reward in enumerate(rewards)]


def test_progress_gives_each_window_its_settings_and_comes_back_from_json():
    progress, tasks = Progress(progress_config()), {7: Task("sort 21:", "exact")}
    now = progress.config()
    assert (now.rl.max_new_tokens, now.rl.is_weight_cap, now.optimizer.clip_grad) == (10, 2.0, 0.5)
    figures = progress.take(step_facts(10, (1.0, None)), tasks)
    assert figures == {"window": 10, "perplexity": pytest.approx(math.exp(0.5)), "prompts_ruled_out": 0}
    assert progress.wanted("sort 21:")  # an error is no attempt
    resumed = Progress(progress_config())
    resumed.load(json.loads(json.dumps(progress.state())))
    for each in (progress, resumed):
        figures = each.take(step_facts(10, (1.0, 0.0, 1.0)), tasks)
        assert figures["next_window"] == 20 and figures["prompts_ruled_out"] == 1
        assert not each.wanted("sort 21:") and each.wanted("sort 12:")
        now = each.config()
        assert (now.rl.max_new_tokens, now.rl.is_weight_cap, now.optimizer.clip_grad) == (20, None, 1.0)
    assert resumed.state() == progress.state()
    Progress(tiny_config()).load({})
    with pytest.raises(ConfigError, match="saved window of 20"):
        Progress(tiny_config()).load(progress.state())


def test_exact_reward():
    def value(response: str) -> float:
        return ExactReward()(RewardRequest("exact", "sort 21:", response, {"answer": "12"})).value

    assert [value(r) for r in ("12", " 12\n", "1 2", "123", "", "21")] == [1, 1, 0, 0, 0, 0]


def test_keys_replace_the_presets_values():
    assert loss_settings(RLConfig()).interval() == (0.0, 5.0)
    settings = loss_settings(RLConfig(algorithm="dapo", mask_eps_high=0.3, is_weight_cap=8.0))
    assert (settings.mask_eps_low, settings.mask_eps_high, settings.is_weight_cap) == (0.2, 0.3, 8.0)
    assert settings.normalization == "batch_token"
    with pytest.raises(ConfigError, match="must not exceed is_weight_cap"):
        loss_settings(RLConfig(is_weight_floor=6.0))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"tasks": []}, "leaves nothing to learn"),
        ({"samples_per_prompt": 1}, "leaves nothing to compare"),
        ({"samples_per_prompt": 6}, "multiple of rl.samples_per_prompt=6; use 12 or 18"),
        ({"max_new_tokens": 64}, "must be below training.seq_length=64"),
        ({"overlong_tokens": 5}, "must not exceed rl.max_new_tokens=4"),
        ({"tasks": [TaskSource("reasoning_gym")]}, r"needs rl.tasks\[0\].dataset"),
        ({"refills": -1}, "rl.refills=-1 must be 0 or more"),
        ({"windows": [WindowStage(4), WindowStage(2)]}, "must be positive and strictly increasing"),
        (
            {"windows": [WindowStage(2), WindowStage(3)]},
            "rl.max_new_tokens=4 must be the last of rl.windows=.* set it to 3",
        ),
        (
            {"windows": [WindowStage(2), WindowStage(4)], "overlong_tokens": 3},
            "must not exceed the first of rl.windows",
        ),
        ({"windows": [WindowStage(4, clip_grad=-1.0)]}, r"rl.windows\[0\].clip_grad=-1.0 must be 0"),
        ({"windows": [WindowStage(4, is_weight_cap=0.0)]}, r"rl.windows\[0\].is_weight_cap=0.0 must be above 0"),
        ({"window_patience": 1}, "two halves are compared"),
        ({"curriculum": [CurriculumPoint(2, [1.0]), CurriculumPoint(1, [1.0])]}, "sort the points"),
        ({"curriculum": [CurriculumPoint(0, [1.0, 1.0])]}, "one entry for each of the 1 sources"),
        ({"curriculum": [CurriculumPoint(0, [0.0])]}, "a sum above 0"),
        ({"easy_above": 1.5}, "0 <= hard_below < easy_above <= 1"),
        ({"held_out_pass_at": [1, 8]}, r"holds \[8\]; pass@k needs k samples"),
        ({"cache_tokens": 64}, r"rl.cache_tokens=64 must hold a sequence of training.seq_length=64 .* use 128 or more"),
        ({"repetition_probability": 0.0}, "rl.repetition_probability=0.0 must lie above 0"),
        ({"repetition_tokens": -1}, "rl.repetition_tokens=-1 must be 0 or more"),
        ({"journal_keep": -1}, "rl.journal_keep=-1 must be 0 or more"),
    ],
)
def test_what_cannot_run_is_refused(change, message):
    config = tiny_config()
    config.data.tokenizer = "somewhere"
    validate_rl(config, 1)
    for name, value in change.items():
        setattr(config.rl, name, value)
    with pytest.raises(ConfigError, match=message):
        validate_rl(config, 1)


def test_warnings_where_a_resumed_run_may_have_other_bits(monkeypatch):
    def warned(config: Config) -> bool:
        return any("other bits" in warning for warning in _warnings(config, loss_settings(config.rl)))

    monkeypatch.setattr("megatron_m1.platform.is_cuda", lambda: False)
    for threads, tensor, expected in ((1, 1, False), (1, 2, False), (2, 1, True), (1, 4, True)):
        monkeypatch.setattr("torch.get_num_threads", lambda threads=threads: threads)
        config = tiny_config({"tensor": tensor}, journal="somewhere")
        assert warned(config) == expected
        config.rl.engine = "reference"
        assert not warned(config)
        config.rl.engine, config.rl.journal = "fast", None
        assert not warned(config)


@pytest.mark.parametrize("replay", [True, False])
@pytest.mark.parametrize(
    "key, value, remedy",
    [
        ("aux_loss", "micro_batch", "set it to none"),
        ("aux_loss", "global", "set it to none"),
        ("z_loss_coefficient", 1e-3, "set it to 0"),
        ("capacity_factor", 1.5, "set it to null"),
        ("dispatcher", "allgather", "use alltoall"),
    ],
)
def test_experts_that_depend_on_their_neighbours_are_refused(key, value, remedy, replay):
    config = tiny_config({"expert": 2}, routing_replay=replay)
    config.data.tokenizer = "somewhere"
    validate_rl(config, 2)
    setattr(config.moe, key, value)
    with pytest.raises(ConfigError, match=rf"moe\.{key}={value} .*; {remedy}"):
        validate_rl(config, 2)


def test_the_cache_holds_what_validation_says():
    config = tiny_config(cache_tokens=128)
    config.data.tokenizer = "somewhere"
    validate_rl(config, 1)
    assert blocks_for(config.training.seq_length) + 1 == 128 // BLOCK_TOKENS


def test_a_cap_of_a_later_window_is_checked_at_the_start(tmp_path):
    config = tiny_config(windows=[WindowStage(2), WindowStage(4, is_weight_cap=2.0)], is_weight_floor=3.0)
    config.data.tokenizer = "somewhere"
    to_yaml(config, tmp_path / "rl.yaml")
    with pytest.raises(ConfigError, match="must not exceed is_weight_cap"):
        main(["--config", str(tmp_path / "rl.yaml")])


def test_the_reference_engine_is_refused_under_context_parallelism():
    config = tiny_config({"context": 2}, engine="reference")
    config.data.tokenizer = "somewhere"
    with pytest.raises(ConfigError, match=r"set parallel\.context=1 or rl\.engine=fast"):
        validate_rl(config, 2)
    config.rl.engine = "fast"
    validate_rl(config, 2)


def test_a_record_gives_the_sample_back():
    sample = replace(fixed_samples()[3], reward=None)
    back = from_record(json.loads(json.dumps(to_record(sample))))
    bare = {"logprobs": None, "routing": None}
    assert replace(back, **bare) == replace(sample, **bare)
    assert back.logprobs.tobytes() == sample.logprobs.tobytes()
    assert back.routing.dtype == sample.routing.dtype and (back.routing == sample.routing).all()
    assert from_record(to_record(replace(sample, routing=None))).routing is None


class Letters:
    def decode(self, ids, *, skip_special=True):
        return "".join("<&>"[i % 3] for i in ids)


def test_the_page_shows_tokens_and_marks_the_capped_ones(tmp_path):
    """What a policy, a task or a verifier says is text, whatever it looks like."""
    samples = fixed_samples()
    hostile = "<script>alert(1)</script>"
    samples[0] = replace(samples[0], task=Task(f"{hostile}\ud800", "exact"), parts={hostile: 1.0})
    samples[1] = replace(samples[1], reward=None, reward_error="<boom>")
    marks = torch.zeros(len(samples[0].response), dtype=torch.bool)
    marks[0] = True
    path = tmp_path / "pages/step.html"
    write_page(path, title="a<b", samples=samples[:8], capped={0: marks}, tokenizer=Letters(), prompts=4)
    page = path.read_text()
    assert page.count('class="sample"') == 8 and page.count("token capped") == 1 and page.count("not trained on") == 7
    assert page.count('<span class="token') == sum(len(sample.response) for sample in samples[:8])
    assert "&lt;boom&gt;" in page and "a&lt;b" in page and "2 of 4 prompts" in page
    assert page.count("&lt;script&gt;") == 2 and "&#55296;" in page
    tags = set(re.findall(r"<(/?\w+)", page.replace("<!doctype", "")))
    assert tags == {"meta", *(end + tag for end in ("", "/") for tag in "title style h1 p h2 pre div span".split())}
    assert set(re.findall(r'\)">(.*?)</span>', page)) == {"&lt;", "&amp;", "&gt;"}


def test_pages_of_long_responses_stay_small(tmp_path, monkeypatch):
    monkeypatch.setattr(page_module, "SHOWN_TOKENS", 2)
    sample = max(fixed_samples(), key=lambda sample: len(sample.response))
    write_page(tmp_path / "page.html", title="", samples=[sample], capped={}, tokenizer=Letters(), prompts=1)
    page = (tmp_path / "page.html").read_text()
    assert page.count('<span class="token') == 4 and f"({len(sample.response) - 4} tokens are not shown)" in page
    facts = [Facts(i, i // 2, 3, 30_000, -1.0, "eos", 1.0) for i in range(8)]
    assert _shown(facts) == {0, 1} and _shown([replace(f, length=20_000) for f in facts]) == {0, 1, 2, 3}
    assert _shown([replace(f, length=90_000) for f in facts]) == {0, 1}
    assert len(_shown([Facts(i, i // 2, 3, 1, -1.0, "eos", 1.0) for i in range(80)])) == 32
