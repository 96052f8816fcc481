"""The M1 report's claim about generation: less than half of DeepSeek-R1's FLOPs at 64K tokens, about a quarter at 100K."""

from dataclasses import dataclass

from megatron_m1.config.schema import ModelConfig
from megatron_m1.engine.flops import decode_flops

__all__ = ["CurvePoint", "flops_curve", "r1_decode_flops", "r1_multiplied_parameters"]


@dataclass(frozen=True)
class CurvePoint:
    """Generation of `tokens` tokens from an empty context, FLOPs; `last`: of the last token, `sum`: of all of them."""

    tokens: int
    m1_last: float
    r1_last: float
    m1_sum: float
    r1_sum: float
    r1_absorbed_sum: float

    @property
    def ratio_last(self) -> float:
        return self.m1_last / self.r1_last

    @property
    def ratio_sum(self) -> float:
        return self.m1_sum / self.r1_sum

    @property
    def ratio_absorbed_sum(self) -> float:
        return self.m1_sum / self.r1_absorbed_sum


def flops_curve(model: ModelConfig, lengths: list[int]) -> list[CurvePoint]:
    """CurvePoint of `model` and DeepSeek-R1 at each length."""

    def summed(first: float, last: float, tokens: int) -> float:
        return tokens * (first + last) / 2  # the cost of a token is linear in its position

    points = []
    for tokens in lengths:
        m1, r1, absorbed = decode_flops(model, tokens), r1_decode_flops(tokens), r1_decode_flops(tokens, absorbed=True)
        points.append(
            CurvePoint(
                tokens=tokens,
                m1_last=m1,
                r1_last=r1,
                m1_sum=summed(decode_flops(model, 0), m1, tokens),
                r1_sum=summed(r1_decode_flops(0), r1, tokens),
                r1_absorbed_sum=summed(r1_decode_flops(0, absorbed=True), absorbed, tokens),
            )
        )
    return points


def r1_multiplied_parameters() -> int:
    """Parameters that one token of DeepSeek-R1 (671B, 37B active) is multiplied with, head included, embedding not.

    Its config.json: hidden 7168, 61 layers of which 3 are dense with width 18432, the others with 8 of 256 experts and one shared
    expert of width 2048; multi-head latent attention with ranks 1536 (queries) and 512 (keys and values), 128 heads of
    128 + 64 query and 128 value channels; vocabulary 129280.
    """
    hidden, layers, dense_layers, heads = 7168, 61, 3, 128
    attention = hidden * 1536 + 1536 * heads * (128 + 64) + hidden * (512 + 64) + 512 * heads * (128 + 128)
    attention += heads * 128 * hidden
    dense = 3 * hidden * 18432
    experts = (8 + 1) * 3 * hidden * 2048 + 256 * hidden
    return layers * attention + dense_layers * dense + (layers - dense_layers) * experts + 129280 * hidden


def r1_decode_flops(context: int, *, absorbed: bool = False) -> float:
    """FLOPs of DeepSeek-R1 to generate one token after `context` tokens, from the cache.

    Keys of 192 and values of 128 channels in each of 128 heads and 61 layers; with `absorbed`, as its decoding kernels compute,
    each head reads the latent cache itself: 512 + 64 channels for the scores and 512 for the values.
    """
    key, value = (512 + 64, 512) if absorbed else (128 + 64, 128)
    return 2 * r1_multiplied_parameters() + 2 * 61 * 128 * (key + value) * context
