"""Eq. 3-7 of the report as identities, in fp64 to 1e-12, against PPO written from its own formula."""

import math

import pytest
import torch

from megatron_m1.config.errors import ConfigError
from megatron_m1.rl.losses import PRESETS, LossSettings, LossStats, Normalizer, policy_loss

LENGTHS = torch.tensor([3, 5, 1, 7, 0, 4])
GROUPS = torch.tensor([9, 4, 9, 4, 9, 2])
NORMALIZATIONS = ("per_group", "batch_token", "sample", "combined")


class Batch:
    """Packed tokens of six samples, ratios far from 1 on both sides of every bound, and two tokens of padding."""

    def __init__(self, *, on_policy: bool = False, dtype: torch.dtype = torch.float64) -> None:
        g = torch.Generator().manual_seed(5)
        self.sample = torch.cat([torch.repeat_interleave(torch.arange(6), LENGTHS), torch.tensor([0, 0])])
        n = len(self.sample)
        self.mask = torch.arange(n) < n - 2
        self.theta = torch.randn(n, 11, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
        self.tokens = torch.randint(11, (n,), generator=g)
        shift = 0 if on_policy else torch.randn(n, generator=g, dtype=torch.float64).to(dtype)
        self.old = (self.logp().detach() + shift).requires_grad_()
        self.advantage = torch.randn(6, generator=g, dtype=torch.float64).to(dtype)[self.sample]

    def logp(self) -> torch.Tensor:
        return self.theta.log_softmax(-1).gather(-1, self.tokens[:, None]).squeeze(-1)

    def weights(self, normalization: str) -> torch.Tensor:
        return Normalizer.for_batch(LENGTHS, GROUPS, normalization=normalization).of_tokens(self.sample)

    def grad(self, settings: LossSettings, part: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        part = torch.arange(len(self.sample)) if part is None else part
        columns = (self.logp(), self.old, self.advantage, self.weights(settings.normalization), self.mask)
        loss = policy_loss(*(column[part] for column in columns), settings=settings).loss
        return loss.detach(), torch.autograd.grad(loss, self.theta)[0]


def ppo_gradient(batch: Batch, eps_low: float, eps_high: float, normalization: str) -> torch.Tensor:
    """min(r A, clip(r) A) of Schulman et al. 2017, Eq. 7, token by token."""
    objective = torch.zeros((), dtype=torch.float64)
    logp, weights = batch.logp(), batch.weights(normalization)
    for t in range(len(logp) - 2):
        r = torch.exp(logp[t] - batch.old[t].detach())
        a = batch.advantage[t]
        objective = objective + weights[t] * torch.minimum(r * a, torch.clamp(r, 1 - eps_low, 1 + eps_high) * a)
    return torch.autograd.grad(-objective, batch.theta)[0]


@pytest.mark.parametrize("preset", ["grpo", "dapo"])
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_masked_form_without_cap_and_floor_has_ppo_gradient(preset, normalization):
    batch = Batch()
    settings = PRESETS[preset]
    settings = LossSettings(
        mask_eps_low=settings.mask_eps_low, mask_eps_high=settings.mask_eps_high, normalization=normalization
    )
    expected = ppo_gradient(batch, settings.mask_eps_low, settings.mask_eps_high, normalization)
    torch.testing.assert_close(batch.grad(settings)[1], expected, rtol=0, atol=1e-12)
    output = policy_loss(
        batch.logp(), batch.old, batch.advantage, batch.weights(normalization), batch.mask, settings=settings
    )
    assert output.stats.means()["ppo_masked_share"] > 0.1


def test_with_a_cap_the_masked_form_leaves_ppo_exactly_where_a_is_negative_and_r_above_the_cap():
    batch = Batch()
    ratio = torch.exp(batch.logp() - batch.old).detach()
    masked = LossSettings(mask_eps_low=0.2, mask_eps_high=0.2, is_weight_cap=1.5)
    differs = (batch.grad(masked)[1] - ppo_gradient(batch, 0.2, 0.2, "per_group")).abs().amax(-1) > 1e-12
    assert torch.equal(differs, (batch.advantage < 0) & (ratio > 1.5) & batch.mask)
    assert differs.any()


@pytest.mark.parametrize("preset", [name for name in PRESETS if name != "reinforce"])
def test_first_update_equals_reinforce(preset):
    batch = Batch(on_policy=True)
    settings = PRESETS[preset]
    plain = LossSettings(is_weight_cap=1, is_weight_floor=1, normalization=settings.normalization)
    for seen, expected in zip(batch.grad(settings), batch.grad(plain), strict=True):
        torch.testing.assert_close(seen, expected, rtol=0, atol=1e-12)
    by_hand = -(batch.weights(settings.normalization) * batch.advantage * batch.logp())[batch.mask].sum()
    torch.testing.assert_close(batch.grad(settings)[0], by_hand.detach(), rtol=0, atol=1e-12)


def test_cispo_is_equation_4_token_by_token():
    batch = Batch()
    logp, total = batch.logp(), 0.0
    for group in (9, 4, 2):
        members = [i for i in range(6) if GROUPS[i] == group]
        tokens = sum(int(LENGTHS[i]) for i in members)
        for t in range(len(logp) - 2):
            if int(batch.sample[t]) in members:
                r_hat = min(math.exp(logp[t].item() - batch.old[t].item()), 1.5)
                total = total + r_hat * batch.advantage[t] * logp[t] / tokens / 3
    seen = batch.grad(LossSettings(is_weight_cap=1.5))
    torch.testing.assert_close(seen[0], -total.detach(), rtol=0, atol=1e-12)
    torch.testing.assert_close(seen[1], torch.autograd.grad(-total, batch.theta)[0], rtol=0, atol=1e-12)


def test_reinforce_corrected_is_equation_3():
    batch = Batch()
    per_sample = []
    terms = torch.exp(batch.logp() - batch.old).detach() * batch.advantage * batch.logp()
    for i in range(6):
        if LENGTHS[i]:
            per_sample.append(terms[(batch.sample == i) & batch.mask].mean())
    expected = torch.autograd.grad(-torch.stack(per_sample).mean(), batch.theta)[0]
    torch.testing.assert_close(batch.grad(PRESETS["reinforce_corrected"])[1], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("pieces", [2, 3, 22])
def test_any_split_into_micro_batches_gives_the_same_sum(normalization, pieces):
    batch = Batch()
    settings = LossSettings(is_weight_cap=1.3, is_weight_floor=0.4, normalization=normalization)
    loss, gradient = batch.grad(settings)
    order = torch.randperm(len(batch.sample), generator=torch.Generator().manual_seed(pieces))
    parts = [batch.grad(settings, part) for part in order.tensor_split(pieces)]
    torch.testing.assert_close(sum(part[0] for part in parts), loss, rtol=0, atol=1e-12)
    torch.testing.assert_close(sum(part[1] for part in parts), gradient, rtol=0, atol=1e-12)


def test_a_padded_layout_gives_the_packed_gradient_whatever_the_padding_holds():
    batch = Batch()
    settings = LossSettings(is_weight_cap=1.3)
    shape = (6, 8)
    rows = [torch.nonzero((batch.sample == i) & batch.mask).flatten() for i in range(6)]
    index = torch.zeros(shape, dtype=torch.long)
    mask = torch.zeros(shape, dtype=torch.bool)
    for i, row in enumerate(rows):
        index[i, : len(row)] = row
        mask[i, : len(row)] = True
    padding = torch.where(mask, 0.0, torch.tensor(float("nan")))
    logp = batch.logp()
    padded = torch.where(mask, logp[index], -torch.inf)
    columns = [padded, *(c[index] + padding for c in (batch.old, batch.advantage, batch.weights("per_group")))]
    output = policy_loss(*columns, mask, settings=settings)
    gradient = torch.autograd.grad(output.loss, batch.theta)[0]
    torch.testing.assert_close(gradient, batch.grad(settings)[1], rtol=0, atol=1e-12)
    assert torch.isfinite(output.stats.as_tensor()).all()


def test_only_logp_gets_a_gradient_and_the_weight_none():
    batch = Batch()
    columns = [batch.logp(), batch.old, batch.advantage.clone().requires_grad_(), batch.weights("sample"), batch.mask]
    loss = policy_loss(*columns, settings=PRESETS["reinforce_corrected"]).loss
    gradients = torch.autograd.grad(loss, [batch.old, columns[2]], allow_unused=True)
    assert gradients == (None, None)


def test_normalizers_sum_as_defined():
    weights = {n: Normalizer.for_batch(LENGTHS, GROUPS, normalization=n).weights for n in NORMALIZATIONS}
    for normalization in NORMALIZATIONS:
        assert (weights[normalization] * LENGTHS).sum().item() == pytest.approx(1.0, abs=1e-15)
        assert weights[normalization][4] == 0
    per_group = {4: 12, 9: 4, 2: 4}
    expected = [1 / 3 / per_group[g] if n else 0 for g, n in zip(GROUPS.tolist(), LENGTHS.tolist(), strict=True)]
    assert weights["per_group"].tolist() == pytest.approx(expected, abs=1e-16)
    assert weights["batch_token"][0] == 1 / 20
    assert weights["sample"].tolist()[:2] == [1 / 15, 1 / 25]
    torch.testing.assert_close(weights["combined"], (weights["sample"] + weights["batch_token"]) / 2)
    empty = Normalizer.for_batch(torch.tensor([3, 0]), torch.tensor([0, 1]), normalization="per_group").weights
    assert empty.tolist() == [1 / 3, 0]  # a group without tokens is no group
    with pytest.raises(ValueError, match="No sample"):
        Normalizer.for_batch(torch.zeros(2), torch.zeros(2), normalization="sample")


def test_truncated_correction_multiplies_every_term():
    batch = Batch()
    rollout = batch.old.detach() + torch.linspace(-1, 1, len(batch.old), dtype=torch.float64)
    columns = (batch.logp(), batch.old, batch.advantage, batch.weights("per_group"), batch.mask)
    on = LossSettings(is_weight_cap=2.0, correction_cap=1.25)
    output = policy_loss(*columns, settings=on, rollout_logp=rollout)
    factor = torch.exp(batch.old.detach() - rollout).clamp(max=1.25)
    plain = policy_loss(*columns[:3], columns[3] * factor, batch.mask, settings=LossSettings(is_weight_cap=2.0))
    torch.testing.assert_close(output.loss, plain.loss, rtol=0, atol=1e-12)
    assert output.stats.corrected == ((torch.exp(batch.old - rollout) > 1.25) & batch.mask).sum()
    with pytest.raises(ValueError, match="rollout_logp"):
        policy_loss(*columns, settings=on)
    with pytest.raises(ValueError, match="rollout_logp"):
        policy_loss(*columns, settings=LossSettings(), rollout_logp=rollout)


def test_statistics_are_sums_over_loss_tokens():
    batch = Batch()
    settings = LossSettings(is_weight_cap=1.5, is_weight_floor=0.5)
    columns = (batch.logp(), batch.old, batch.advantage, batch.weights("sample"), batch.mask)
    whole = policy_loss(*columns, settings=settings)
    ratio = torch.exp(batch.logp() - batch.old).detach()
    assert torch.equal(whole.capped, (ratio > 1.5) & batch.mask)
    means = whole.stats.means()
    assert means["capped_share"] == ((ratio > 1.5) & batch.mask).sum().item() / 20
    assert means["floored_share"] == ((ratio < 0.5) & batch.mask).sum().item() / 20
    assert means["mean_is_weight"] == pytest.approx(ratio.clamp(0.5, 1.5)[batch.mask].mean().item(), abs=1e-15)
    assert means["off_policy_share"] == ((ratio != 1) & batch.mask).sum().item() / 20 > 0
    same = policy_loss(batch.old, batch.old, *columns[2:], settings=settings)
    assert same.stats.means()["off_policy_share"] == 0.0
    halves = [
        policy_loss(*(c[part] for c in columns), settings=settings).stats for part in (slice(0, 9), slice(9, None))
    ]
    torch.testing.assert_close((halves[0] + halves[1]).as_tensor(), whole.stats.as_tensor())
    assert LossStats(*whole.stats.as_tensor().unbind()) == whole.stats


def test_fp32_loss_is_near_fp64_and_half_precision_is_refused():
    settings = LossSettings(is_weight_cap=2.0)
    single, double = Batch(dtype=torch.float32).grad(settings), Batch().grad(settings)
    assert single[0].dtype == torch.float32
    torch.testing.assert_close(single[1].double(), double[1], rtol=1e-5, atol=1e-6)
    batch = Batch()
    columns = (batch.logp().bfloat16(), batch.old, batch.advantage, batch.weights("sample"), batch.mask)
    with pytest.raises(ValueError, match="bfloat16"):
        policy_loss(*columns, settings=settings)
    with pytest.raises(ValueError, match="one shape"):
        policy_loss(batch.logp()[:3], *columns[1:], settings=settings)


def test_effective_interval_is_printed():
    assert LossSettings(is_weight_cap=5.0).describe() == "importance weight in [0, 5]; normalisation per_group"
    assert PRESETS["dapo"].describe() == (
        "importance weight in [0, inf); masked where A > 0 and r > 1.28; masked where A < 0 and r < 0.8; "
        "normalisation batch_token"
    )


@pytest.mark.parametrize(
    "settings, updates, words",
    [
        (LossSettings(is_weight_cap=5.0), 1, "is_weight_cap cannot act"),
        (LossSettings(mask_eps_low=0.2), 1, "mask_eps_low cannot act"),
        (LossSettings(is_weight_cap=0.2), 16, "below 1"),
        (LossSettings(is_weight_floor=1.2), 16, "above 1"),
        (LossSettings(mask_eps_low=1.0), 16, "no ratio is below 0"),
        (LossSettings(is_weight_cap=5.0, mask_eps_high=0.2), 16, "only where A < 0"),
        (LossSettings(is_weight_floor=0.5, mask_eps_low=0.2), 16, "only where A > 0"),
        (LossSettings(correction_cap=0.5), 16, "correction_cap"),
    ],
)
def test_settings_that_cannot_act_are_told(settings, updates, words):
    assert any(words in warning for warning in settings.warnings(updates_per_batch=updates))


def test_the_warning_that_a_bound_acts_on_one_sign_only_is_true():
    batch = Batch()
    masked = LossSettings(mask_eps_low=0.2, mask_eps_high=0.2)
    capped = LossSettings(mask_eps_low=0.2, mask_eps_high=0.2, is_weight_cap=1.4, is_weight_floor=0.5)
    changed = (batch.grad(masked)[1] != batch.grad(capped)[1]).any(-1)
    ratio = torch.exp(batch.logp() - batch.old).detach()
    assert torch.equal(
        changed, batch.mask & (((batch.advantage < 0) & (ratio > 1.4)) | ((batch.advantage > 0) & (ratio < 0.5)))
    )


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_nothing_to_warn_of(name):
    assert PRESETS[name].warnings(updates_per_batch=16) == []


@pytest.mark.parametrize(
    "arguments",
    [
        {"is_weight_cap": -1.0},
        {"is_weight_cap": 0.0},
        {"is_weight_cap": 0.5, "is_weight_floor": 0.8},
        {"mask_eps_low": float("nan")},
        {"normalization": "token"},
        {"sample_share": 1.5},
    ],
)
def test_contradictions_are_refused(arguments):
    with pytest.raises(ConfigError):
        LossSettings(**arguments)
