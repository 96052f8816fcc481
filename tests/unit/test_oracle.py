"""The oracle against transformers' MiniMax with M1's rotary and slopes, and against what the formulas imply."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, silu
from transformers import MiniMaxForCausalLM
from transformers.models.minimax.modeling_minimax import load_balancing_loss_func

from megatron_m1.config.schema import ModelConfig
from tests import oracle
from tests.hf_reference import build_hf, hf_config, hf_gradients, load_released_weights, set_m1_slopes
from tests.model_cases import BASE, CASES, ORACLE_ONLY_CASES, SMALL_V_CASES, random_batch, random_weights

SEED = 3
PARTIAL_ROTARY = [
    name for name, model in CASES.items() if 1 in model.layer_types() and model.rotary_dim < model.head_dim
]
HAS_LIGHTNING = [name for name, model in CASES.items() if 0 in model.layer_types()]


def case_weights(name: str) -> dict[str, Tensor]:
    return random_weights(CASES[name], SEED, v_scale=SMALL_V_CASES.get(name, 1.0))


def difference(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


def hf_logits(model: ModelConfig, weights: dict[str, Tensor], tokens: Tensor, **options: object) -> Tensor:
    with torch.no_grad():
        return build_hf(model, weights, dtype=torch.float64, **options)(tokens).logits


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)], ids=["fp32", "fp64"])
@pytest.mark.parametrize("name", CASES)
def test_logits_and_all_gradients_equal_transformers(name: str, dtype: torch.dtype, tolerance: float) -> None:
    model = CASES[name]
    tokens, labels = random_batch(model, SEED)
    weights = {key: value.requires_grad_() for key, value in case_weights(name).items()}
    logits = oracle.m1_logits(model, weights, tokens)
    oracle.m1_loss(model, weights, tokens, labels).backward()

    reference = build_hf(model, weights, dtype=dtype)
    reference_logits = reference(tokens).logits
    cross_entropy(reference_logits.flatten(0, 1), labels.flatten()).backward()
    gradients = hf_gradients(reference, model)

    assert difference(reference_logits.detach(), logits.detach()) <= tolerance
    assert gradients.keys() == weights.keys()
    assert {key: d for key in gradients if (d := difference(gradients[key], weights[key].grad)) > tolerance} == {}


@pytest.mark.parametrize("name", PARTIAL_ROTARY)
def test_rotary_correction_is_needed(name: str) -> None:
    model, weights = CASES[name], case_weights(name)
    tokens, _ = random_batch(model, SEED)
    logits = oracle.m1_logits(model, weights, tokens)
    assert difference(hf_logits(model, weights, tokens, correct_rotary=False), logits) > 1e-3


@pytest.mark.parametrize("name", HAS_LIGHTNING)
def test_slope_correction_is_needed(name: str) -> None:
    model, weights = CASES[name], case_weights(name)
    tokens, _ = random_batch(model, SEED)
    logits = oracle.m1_logits(model, weights, tokens)
    power_of_two = model.num_attention_heads.bit_count() == 1
    uncorrected = difference(hf_logits(model, weights, tokens, correct_slopes=False), logits)
    assert uncorrected > (1e-9 if power_of_two else 1e-2)


@pytest.mark.parametrize("name", SMALL_V_CASES)
def test_lightning_norm_eps_shows(name: str) -> None:
    model, weights = CASES[name], case_weights(name)
    tokens, _ = random_batch(model, SEED)
    logits = oracle.m1_logits(model, weights, tokens)
    other_eps = oracle.m1_logits(replace(model, lightning_norm_eps=1e-5), weights, tokens)
    assert difference(other_eps, logits) > 1e-2


def test_stock_transformers_computes_partial_rotary_with_proportional_rope() -> None:
    """`proportional` RoPE with theta^(D/R) and reordered q, k rows is M1's rotary, with no change to transformers' code."""
    model, weights = BASE, random_weights(BASE, SEED)
    tokens, _ = random_batch(model, SEED)
    config = hf_config(model)
    config.rope_parameters = {
        "rope_type": "proportional",
        "partial_rotary_factor": model.rotary_dim / model.head_dim,
        "rope_theta": model.rope_theta ** (model.head_dim / model.rotary_dim),
    }
    stock = MiniMaxForCausalLM(config)
    set_m1_slopes(stock, model)
    load_released_weights(stock, model, weights, reorder_rotary=True)
    with torch.no_grad():
        assert difference(stock(tokens).logits, oracle.m1_logits(model, weights, tokens)) < 1e-5


@pytest.mark.parametrize(
    "key", [f"layernorm_{part}_{factor}" for part in ("linear_attention", "full_attention", "mlp") for factor in ("alpha", "beta")]
)  # fmt: skip
@pytest.mark.parametrize("name", ["base", *ORACLE_ONLY_CASES])
def test_every_alpha_and_beta_matters(name: str, key: str) -> None:
    model = (CASES | ORACLE_ONLY_CASES)[name]
    weights = random_weights(model, SEED)
    tokens, _ = random_batch(model, SEED)
    changed = replace(model, **{key: getattr(model, key) * 1.1})
    logits = oracle.m1_logits(model, weights, tokens)
    assert difference(oracle.m1_logits(changed, weights, tokens), logits) > 1e-3


def test_published_slopes() -> None:
    """Figures of the released 80-layer model: 0.917 at the top, 4.95e-5 at the bottom of its lightning layers."""
    assert oracle.lightning_slopes(64, 0, 80)[0].item() == pytest.approx(2**-0.125 * (1 + 1e-5), rel=1e-12)
    assert oracle.lightning_slopes(64, 78, 80)[-1].item() == pytest.approx(4.95e-5, rel=1e-3)
    assert oracle.alibi_slopes(6) == [1 / 4, 1 / 16, 1 / 64, 1 / 256, 1 / 2, 1 / 8]


def test_recurrence_equals_decayed_quadratic_form() -> None:
    """o_t = sum over s <= t of exp(-slope (t - s)) (q_t . k_s) v_s."""
    model, layer = CASES["heads_6"], 2
    weights = oracle.sub_dict(random_weights(model, SEED), f"model.layers.{layer}.self_attn.")
    x = torch.randn(2, 19, model.hidden_size, dtype=torch.float64, generator=torch.Generator().manual_seed(SEED))
    qkv = silu(x @ weights["qkv_proj.weight"].T).unflatten(-1, (model.num_attention_heads, 3, model.head_dim))
    q, k, v = qkv.unbind(dim=3)
    distance = torch.arange(19)[:, None] - torch.arange(19)
    slopes = oracle.lightning_slopes(model.num_attention_heads, layer, model.num_hidden_layers)
    decay = torch.exp(-slopes[:, None, None] * distance) * (distance >= 0)
    o = torch.einsum("bthd,bshd,hts,bshe->bthe", q, k, decay, v).flatten(2)
    gated = torch.sigmoid(x @ weights["output_gate.weight"].T) * oracle.rms_norm(o, weights["norm.weight"], 1e-6)
    expected = gated @ weights["out_proj.weight"].T
    assert difference(oracle.lightning_attention(model, weights, x, layer), expected) < 1e-12


def test_documents_of_a_pack_do_not_see_each_other() -> None:
    weights = random_weights(BASE, SEED)
    tokens, _ = random_batch(BASE, SEED, batch=1, length=30)
    packed = oracle.m1_logits(BASE, weights, tokens, cu_seqlens=torch.tensor([0, 11, 12, 30]))
    changed = tokens.clone()
    changed[:, :11] = (changed[:, :11] + 1) % BASE.vocab_size
    repacked = oracle.m1_logits(BASE, weights, changed, cu_seqlens=torch.tensor([0, 11, 12, 30]))
    assert torch.equal(packed[:, 11:], repacked[:, 11:])
    assert not torch.allclose(packed[:, :11], repacked[:, :11])
    assert not torch.allclose(packed[:, 12:], oracle.m1_logits(BASE, weights, tokens)[:, 12:])
    moved = torch.cat([tokens[:, 12:], tokens[:, :12]], dim=1)
    moved_logits = oracle.m1_logits(BASE, weights, moved, cu_seqlens=torch.tensor([0, 18, 30]))
    assert torch.allclose(moved_logits[:, :18], packed[:, 12:])


def test_loss_is_the_mean_over_the_mask() -> None:
    weights = random_weights(BASE, SEED)
    tokens, labels = random_batch(BASE, SEED)
    mask = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(SEED)) < 0.5
    expected = cross_entropy(oracle.m1_logits(BASE, weights, tokens)[mask], labels[mask])
    torch.testing.assert_close(oracle.m1_loss(BASE, weights, tokens, labels, mask), expected)


def test_shared_expert_is_blended_by_its_gate() -> None:
    """A gate of weight 0 gives the mean of mixture and shared expert."""
    model = ORACLE_ONLY_CASES["shared_expert"]
    weights = oracle.sub_dict(random_weights(model, SEED), "model.layers.1.")
    weights["coefficient.weight"] = torch.zeros_like(weights["coefficient.weight"])
    y = torch.randn(1, 9, model.hidden_size, dtype=torch.float64, generator=torch.Generator().manual_seed(SEED))
    mixture, _ = oracle.feed_forward(replace(model, shared_intermediate_size=0), weights, y)
    gate, up = y @ weights["shared_mlp.gate_proj.weight"].T, y @ weights["shared_mlp.up_proj.weight"].T
    shared = (silu(gate) * up) @ weights["shared_mlp.down_proj.weight"].T
    torch.testing.assert_close(oracle.feed_forward(model, weights, y)[0], (mixture + shared) / 2)


@pytest.mark.parametrize("postnorm", [True, False])
def test_residual_is_normed_or_not(postnorm: bool) -> None:
    """With betas 0 a model is its residual path: scaling the embedding changes a layer's output only without post-norm."""
    betas = {f"layernorm_{part}_beta": 0.0 for part in ("linear_attention", "full_attention", "mlp")}
    model = replace(BASE, postnorm=postnorm, **betas)
    hidden = torch.randn(1, 5, model.hidden_size, dtype=torch.float64, generator=torch.Generator().manual_seed(SEED))
    output, _ = oracle.decoder_layer(model, random_weights(model, SEED), hidden, 0)
    scale = model.layernorm_linear_attention_alpha * model.layernorm_mlp_alpha
    if postnorm:
        assert not torch.allclose(output, scale * hidden)
        assert output.square().mean().sqrt().item() == pytest.approx(model.layernorm_mlp_alpha, rel=0.1)
    else:
        torch.testing.assert_close(output, scale * hidden)


def balanced_router(num_experts: int, top_k: int) -> oracle.RouterTrace:
    tokens = torch.arange(num_experts)
    chosen = torch.stack([(tokens + k) % num_experts for k in range(top_k)], dim=-1)
    logits = torch.zeros(1, num_experts, num_experts, dtype=torch.float64)
    return oracle.RouterTrace(logits=logits, probs=logits.softmax(-1), chosen=chosen[None])


@pytest.mark.parametrize(("form", "expected"), [("megatron", 1.0), ("minimax", 1 / 64), ("hf", 2.0)])
def test_aux_loss_at_balance(form: oracle.AuxLossForm, expected: float) -> None:
    assert oracle.router_aux_loss(balanced_router(8, 2), form).item() == pytest.approx(expected, rel=1e-12)


def test_hf_form_is_transformers_loss_of_one_layer_and_leaves_padding_out() -> None:
    tokens, _ = random_batch(BASE, SEED)
    _, routers = oracle.m1_forward(BASE, random_weights(BASE, SEED), tokens)
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[1, 20:] = False
    for router in routers:
        theirs = load_balancing_loss_func((router.logits.flatten(0, 1),), BASE.num_local_experts, 2, mask)
        assert oracle.router_aux_loss(router, "hf", mask).item() == pytest.approx(theirs.item(), rel=1e-6)
        assert oracle.router_aux_loss(router, "hf").item() != pytest.approx(theirs.item(), rel=1e-6)


def test_z_loss_of_uniform_logits() -> None:
    assert oracle.router_z_loss(balanced_router(8, 2)).item() == pytest.approx(torch.tensor(8.0).log().item() ** 2)
