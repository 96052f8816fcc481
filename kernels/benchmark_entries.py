"""Sections of the benchmark: which implementations take part in each, and how each prepares the call that is timed."""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from m1_kernels import benchmark_cases as cases
from m1_kernels import benchmark_peers as peers
from m1_kernels.benchmark_cases import Shape
from m1_kernels.benchmark_report import OURS, decode_bytes, floor_bytes
from m1_kernels.dispatch import lightning_attention
from m1_kernels.softmax_blocks import softmax_attention_backward, softmax_attention_forward

__all__ = ["MEASURES", "Entry", "Section", "section_of"]

MEASURES = {
    "forward": ("forward",),
    "backward": ("backward", "forward+backward"),
    "block": ("forward", "forward+backward"),
    "packed": ("forward", "forward+backward"),
    "packed long": ("forward", "forward+backward"),
    "decode": ("step",),
    "ring block": ("forward", "backward"),
}
YARDSTICK_MOST_TOKENS = 8192
RING_QUERIES_PER_KEY = 8  # heads, as in M1

Call = Callable[[], cases.Tensors]


def _takes_all(shape: Shape) -> str | None:
    return None


@dataclass(frozen=True)
class Entry:
    """One implementation in one section.

    make(measure, shape): the call to time.  floor_bytes(measure, shape): least traffic, None where that is no measure.
    obstacle: why it cannot run at all.  refusal(shape): why it does not take a shape.  growth: exponent of its time in
    tokens.  compared: whether its results should be ours.
    """

    name: str
    make: Callable[[str, Shape], Call]
    floor_bytes: Callable[[str, Shape], int | None]
    obstacle: str | None = None
    refusal: Callable[[Shape], str | None] = _takes_all
    growth: int = 1
    compared: bool = True


@dataclass(frozen=True)
class Section:
    """entries, of which own is ours; yardstick: the plain torch path, which own is compared with."""

    name: str
    entries: tuple[Entry, ...]
    yardstick: Entry

    @property
    def own(self) -> Entry:
        return self.entries[0]


@functools.cache
def section_of(name: str) -> Section:
    """The section of that name; imports the peers."""
    if name == "decode":
        return _decode()
    if name == "ring block":
        return _ring_block()
    return _block() if name == "block" else _attention(name)


def _attention(section: str) -> Section:
    packed = section in cases.PACKS

    def entry(contender: peers.Contender, attention: peers.Attention | str) -> Entry:
        def make(measure: str, shape: Shape) -> Call:
            documents = shape.documents(section) if packed else None
            return cases.attention_call(
                measure,
                attention,
                shape,
                documents,
                heads_first=contender.heads_first,
                negative=contender.negative,
            )

        def least(measure: str, shape: Shape) -> int | None:
            if not contender.exact:
                return None
            return floor_bytes(section, measure, contender.name, shape.tokens, shape.heads, shape.dim)

        return Entry(
            contender.name,
            make,
            least,
            obstacle=attention if isinstance(attention, str) else None,
            refusal=lambda shape: contender.refusal(shape.tokens, shape.heads, shape.dim, packed),
            growth=1 if packed else contender.growth,
            compared=contender.exact,
        )

    taking_part = [c for c in peers.CONTENDERS if section == "forward" or not c.pinned]
    yardstick = peers.Contender("torch path", lambda: _torch_path, "m1_kernels", most_tokens=YARDSTICK_MOST_TOKENS)
    entries = (entry(c, peers.load(c.load, c.requirement)) for c in taking_part)
    return Section(section, tuple(entries), entry(yardstick, _torch_path))


def _torch_path(q, k, v, slopes, documents):
    cu_seqlens = None if documents is None else documents.cu_seqlens
    return lightning_attention(q, k, v, slopes, cu_seqlens=cu_seqlens, implementation="torch")


def _block() -> Section:
    def least(measure: str, shape: Shape) -> int:
        return floor_bytes("block", measure, "", shape.tokens, shape.heads, shape.dim)

    def entry(name: str, block: peers.Block | str, negative: bool = False, refusal=_takes_all) -> Entry:
        return Entry(
            name,
            lambda measure, shape: cases.block_call(measure, block, shape, negative=negative),
            least,
            obstacle=block if isinstance(block, str) else None,
            refusal=refusal,
        )

    entries = [entry(OURS, peers.own_block)]
    for contender in peers.CONTENDERS:
        if not contender.exact or contender.requirement == "m1_kernels":
            continue
        attention = peers.load(contender.load, contender.requirement)
        for way in ("eager", "compiled"):
            block: peers.Block | str = (
                attention if isinstance(attention, str) else peers.peer_block(attention, contender.heads_first)
            )
            if way == "compiled" and not isinstance(block, str):
                block = torch.compile(block)
            entries.append(
                entry(
                    f"{contender.name} {way}",
                    block,
                    contender.negative,
                    lambda shape, c=contender: c.refusal(shape.tokens, shape.heads, shape.dim, False),
                )
            )
    plain = peers.peer_block(_torch_path, False)
    return Section("block", tuple(entries), entry("torch path", plain, refusal=_few_tokens))


def _few_tokens(shape: Shape) -> str | None:
    return None if shape.tokens <= YARDSTICK_MOST_TOKENS else "not run: slow"


def _decode() -> Section:
    def least(measure: str, shape: Shape) -> int:
        return decode_bytes(shape.tokens, shape.heads, shape.dim)

    def entry(name: str, step: peers.Step | str, *, negative: bool = False, graph: bool = False) -> Entry:
        def make(measure: str, shape: Shape) -> Call:
            call = cases.step_call(step, shape, negative=negative)
            return cases.captured(call) if graph else call

        # A captured step is not compared: its warm-up calls have moved the state on.
        return Entry(name, make, least, obstacle=step if isinstance(step, str) else None, compared=not graph)

    fla = peers.load(peers.fla_step, "fla-core")
    return Section(
        "decode",
        (
            entry(OURS, peers.own_step),
            entry("ours, CUDA graph", peers.own_step, graph=True),
            entry("fla", fla, negative=True),
        ),
        entry("torch path", peers.plain_step),
    )


def _ring_block() -> Section:
    def entry(name: str, implementation: str, *, dtype: torch.dtype | None = None, refusal=_takes_all) -> Entry:
        def make(measure: str, shape: Shape) -> Call:
            def tensor(seed: int, heads: int) -> torch.Tensor:
                return shape.normal(1, shape.tokens, heads, shape.dim)(seed).to(dtype or shape.dtype)

            shared = max(shape.heads // RING_QUERIES_PER_KEY, 1)
            q, k, v = tensor(1, shape.heads), tensor(2, shared), tensor(3, shared)
            options = {"scale": shape.dim**-0.5, "causal": False, "implementation": implementation}

            def forward() -> tuple[torch.Tensor, torch.Tensor]:
                return softmax_attention_forward(q, k, v, **options)

            if measure == "forward":
                return forward
            gradient, (o, lse) = tensor(4, shape.heads), forward()
            return lambda: softmax_attention_backward(gradient, q, k, v, o, lse, **options)

        return Entry(name, make, lambda measure, shape: None, refusal=refusal, growth=2)

    plain = entry("torch path", "auto", dtype=torch.float32, refusal=_few_tokens)
    return Section("ring block", (entry(OURS, "auto"), entry("ours, flash", "flash")), plain)
