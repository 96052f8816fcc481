"""Lightning attention on the Triton kernels: which spans, which launches, and the backward pass.

Forward, fused: one sweep per document. Forward, segmented: the states that spans of a document leave behind
(`local_states`, two reads), their scan, then sweeps of all spans at once. Backward: dq from the states that the forward
pass saved where spans meet; dk and dv in one reverse sweep, fused or segmented likewise. Nothing reads cu_seqlens on the host.
"""

import functools
from dataclasses import dataclass, replace
from typing import Any

import torch
from m1_kernels.triton_runtime import gpu, interpreting
from m1_kernels.triton_runtime import obstacle as triton_obstacle
from torch.autograd.function import once_differentiable

__all__ = [
    "CHUNK",
    "STRATEGIES",
    "lightning_attention_packed_triton",
    "lightning_attention_triton",
    "lightning_state_triton",
    "obstacle",
]

STRATEGIES = ("auto", "fused", "segmented")
CHUNK = 64
"""Tokens of a chunk in half precision: where a prefill may be cut with bitwise equal results."""
SEGMENT = 4096
"""Tokens of a span under strategy="segmented"; results depend on it in the last bits."""
WHOLE = 2**30
"""Tokens of a span that no document reaches."""
CHUNK_US = {"specialised": (2, 1.2), "whole": (1, 2.2), "backward": (1, 3.1)}
"""Programs of a head and the time of one of its chunks, all multiprocessors at work. These and the next as measured on an H200."""
WAVE_US, LAUNCH_US, PASS_US, SCAN_US, SAVE_US = 5.0, 4.5, (0.75, 1.06), (2.95, 0.28), 2.0
"""Until a program has its first chunk; the launch of the pass over states; a chunk of that pass, in one program and for a multiprocessor;
a scan launched early, and a state in it; a state saved.
"""


def obstacle(q: torch.Tensor) -> str | None:
    """Why the Triton kernels cannot take q [B, T, H, D], with the remedy, or None when they can."""
    if q.shape[-1] % 16 or q.shape[-1] > 256:
        return f"its kernels take head_dim 16, 32, ... 256, not {q.shape[-1]}"
    return triton_obstacle(q)


def lightning_attention_triton(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    slopes: torch.Tensor,
    *,
    initial_state: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    return_final_state: bool = False,
    strategy: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """o [B, T, H, D], or (o, final_state [S, H, D, D]); arguments as in `lightning_attention`.

    Products of 16-bit inputs take 16-bit operands (scores, decayed values and the state rounded to them as operands only) and
    accumulate in float32; float32 inputs run as three TF32 products. Saves its inputs and the states between spans.
    """
    o, final_state = _Attention.apply(
        q, k, v, slopes, initial_state, cu_seqlens, return_final_state, strategy, torch.is_grad_enabled()
    )
    return (o, final_state) if return_final_state else o


def lightning_attention_packed_triton(
    qkv: torch.Tensor,
    slopes: torch.Tensor,
    *,
    initial_state: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    return_final_state: bool = False,
    activation: str | None = "silu",
    recompute_activation: bool = False,
    strategy: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """As `lightning_attention_packed`.

    Specialised sweeps apply the derivative of SiLU themselves, and SiLU where they have half a head of a whole document; it is
    a pass of its own elsewhere, with the same bits on one kind of GPU.
    """
    o, final_state = _PackedAttention.apply(
        qkv, slopes, initial_state, cu_seqlens, return_final_state, activation == "silu", recompute_activation, strategy,
        torch.is_grad_enabled(),
    )  # fmt: skip
    return (o, final_state) if return_final_state else o


def lightning_state_triton(
    k: torch.Tensor,
    v: torch.Tensor,
    slopes: torch.Tensor,
    *,
    cu_seqlens: torch.Tensor | None = None,
    reverse: bool = False,
    horizon: bool = True,
    segment: int | None = None,
) -> torch.Tensor:
    """float32 [S, H, D, D]: sum_j e^{-s(n-1-j)} k_j^T v_j of each document; reverse: sum_j e^{-s(j+1)} k_j^T v_j. No gradients.

    horizon: tokens whose weight is exactly zero in float32 are not read; False reads them, with bitwise equal results.
    """
    call = _Call.of(k, slopes, cu_seqlens)
    left = call.document_states()
    if not call.tokens or not call.documents:
        return left.zero_()
    segment = segment or call.segment(4)
    states = call.states(segment)
    call.local_states(states, _readable(k), _readable(v), segment, reverse=reverse, left=left, horizon=horizon)
    call.scan(states, segment, None, left, reverse=reverse)
    return left


@dataclass(frozen=True)
class Tiling:
    """Tile shape of a kernel: chunk C, channels of the state's value side, warps, pipeline stages."""

    chunk: int
    values: int
    warps: int
    stages: int


@functools.cache
def tiling(kernel: str, dtype: torch.dtype, padded_dim: int, capability: int) -> Tiling:
    """Of kernel "sweep", "specialised", "whole" (heads), "backward" or "local" on compute capability `capability` (times ten).

    Not tuned at run time: bits would change. Tiles whose loops spill no register (`compile_check` compiles them), half precision
    at head_dim 64 and 128 the fastest of those measured on sm_90. Not so float32 at head_dim 256, where an
    operand in two parts alone fills the registers: the least spills.
    """
    if kernel == "specialised":
        return Tiling(CHUNK, 64, 4, 4)
    if kernel == "backward":
        return Tiling(CHUNK, 128, 4, 3)
    if kernel == "whole":
        return Tiling(CHUNK, 64, 4, 3)
    if dtype == torch.float32:
        if kernel == "sweep" and padded_dim > 64:
            return Tiling(16, 16, 4, 1)
        return Tiling(32, min(padded_dim, 32), 8 if padded_dim == 256 else 4, 1)
    if capability < 90:
        return Tiling(32 if padded_dim == 256 and kernel == "sweep" else CHUNK, min(padded_dim, 32), 8, 2)
    if padded_dim == 256:
        narrow = kernel == "sweep" and capability < 100
        return Tiling(32, 32, 8, 2) if narrow else Tiling(CHUNK, 64, 8, 2)
    if kernel == "sweep" and padded_dim == 128:
        # On sm_90 of head_dim 80 to 112: 128 is "specialised", which has the same 64 values.
        return Tiling(CHUNK, 64, 8, 3) if capability >= 100 else Tiling(32, 64, 4, 3)
    return Tiling(CHUNK, min(padded_dim, 64), 4, 3)


@dataclass(frozen=True)
class Spread:
    """How rows of specialised programs go over the multiprocessors.

    kind: of `tiling`; "specialised" programs have half a head, the others a whole one. parts: of a span, summed apart on the way to
    the states where spans meet.
    """

    kind: str
    segment: int
    parts: int

    @classmethod
    @functools.lru_cache(maxsize=1024)
    def of(
        cls, kinds: tuple[str, ...], rows: int, chunks: int, processors: int, segment: int | None, saved: bool
    ) -> "Spread":
        """The fastest for `rows` heads of all documents, of so many chunks each. saved: no pass over states comes before the sweep."""

        def parts(spans: int) -> int:
            """About four programs of the pass, which have half a head, for each multiprocessor; below 8 chunks they do not pay."""
            return max(1, min(round(2 * processors / (rows * max(1, spans - 1))), -(-chunks // spans) // 8))

        def microseconds(choice: tuple[str, int]) -> float:
            kind, spans = choice
            blocks, each = CHUNK_US[kind]
            span = -(-chunks // spans)
            sweep = -(-rows * blocks * spans // processors) * (WAVE_US + each * span)
            if spans == 1 or segment:
                return sweep
            if saved:
                return sweep + SAVE_US * (spans - 1)
            passed = max(PASS_US[0] * span / parts(spans), PASS_US[1] * rows * (chunks - span) / processors)
            return sweep + passed + LAUNCH_US + SCAN_US[0] + SCAN_US[1] * (spans - 1) * parts(spans)

        most = max(1, chunks // 4)
        choices = []
        for kind in kinds:
            counts = (waves * processors // (rows * CHUNK_US[kind][0]) for waves in (1, 2, 3))
            given = [-(-chunks * CHUNK // segment)] if segment else sorted({1, *(min(max(1, n), most) for n in counts)})
            choices += [(kind, spans) for spans in given]
        kind, spans = min(choices, key=microseconds)
        if segment or spans == 1:
            return cls(kind, segment or WHOLE, 1)
        count = 1 if saved else parts(spans)
        return cls(kind, -(-chunks // (spans * count)) * count * CHUNK, count)

    def halved(self) -> "Spread":
        """Spans of half as many parts, where they have an even number, for packs: uneven documents then fill the multiprocessors
        better (16 in 64k tokens, 64 heads: 1.86 ms in place of 2.33), and one of all tokens takes little longer (2.08, 2.00)."""
        return replace(self, segment=self.segment // 2, parts=self.parts // 2) if self.parts % 2 == 0 else self


@dataclass(frozen=True)
class _Call:
    """What the launches of one call share."""

    batch: int
    tokens: int
    heads: int
    dim: int
    documents: int
    slopes: torch.Tensor
    cu_seqlens: torch.Tensor | None
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, x: torch.Tensor, slopes: torch.Tensor, cu_seqlens: torch.Tensor | None) -> "_Call":
        batch, tokens, heads, dim = x.shape
        documents = batch if cu_seqlens is None else len(cu_seqlens) - 1
        slopes = slopes.float().contiguous()
        cu_seqlens = None if cu_seqlens is None else cu_seqlens.contiguous()
        return cls(batch, tokens, heads, dim, documents, slopes, cu_seqlens, x.dtype, x.device)

    @functools.cached_property
    def padded_dim(self) -> int:
        return 1 << (self.dim - 1).bit_length()

    @functools.cached_property
    def blocks(self) -> int:
        """Value blocks of one head in a sweep."""
        return -(-self.dim // self.tiling("sweep").values)

    @functools.cached_property
    def capability(self) -> int:
        return gpu(self.device)[0]

    @functools.cached_property
    def specialised(self) -> bool:
        """Whether the sweeps run with one task per warp group (`gluon_lightning`)."""
        return self.device.type == "cuda" and self.capability == 90 and self.dim == 128 and self.dtype != torch.float32

    @functools.cached_property
    def pdl(self) -> bool:
        """Whether kernels can be launched before those in front have ended."""
        return self.capability >= 90 and not interpreting()

    def tiling(self, kernel: str) -> Tiling:
        return tiling(kernel, self.dtype, self.padded_dim, self.capability)

    @functools.cached_property
    def processors(self) -> int:
        return gpu(self.device)[1]

    def spans(self, segment: int) -> int:
        """Upper bound of the number of spans, from shapes alone; the padding of a pack is a document of its own."""
        if self.cu_seqlens is None:
            return self.batch * max(1, -(-self.tokens // segment))
        return self.tokens // segment + self.documents + 1

    def segment(self, per_processor: int) -> int:
        """Tokens of a span so that each multiprocessor gets about so many programs.

        A pack counts as one document, since its longest may be nearly all of it; documents shorter than a span cost nothing.
        WHOLE where rows suffice, or are so short that the pass over their states would take longer than it saves.
        """
        programs = self.heads * self.blocks
        if self.batch * programs >= 0.8 * per_processor * self.processors or self.tokens <= 16 * CHUNK:
            return WHOLE
        spans = max(1, per_processor * self.processors // programs)
        return max(CHUNK * 4, -(-self.batch * self.tokens // (spans * CHUNK)) * CHUNK)

    def spread(self, *kinds: str, segment: int | None = None, saved: bool = False) -> "Spread":
        """The fastest of specialised programs `kinds` (of `tiling`), with spans of `segment` tokens if given. saved: see `Spread.of`."""
        rows, chunks = max(1, self.batch * self.heads), max(1, -(-self.tokens // CHUNK))
        return Spread.of(kinds, rows, chunks, self.processors, segment, saved)

    def states(self, segment: int) -> torch.Tensor:
        """Room for the states where spans meet (`triton_lightning._border`), however many documents there are."""
        shape = (self.batch * (-(-self.tokens // segment) - 1), self.heads, self.dim, self.dim)
        return torch.empty(shape, dtype=torch.float32, device=self.device)

    def document_states(self) -> torch.Tensor:
        shape = (self.documents, self.heads, self.dim, self.dim)
        return torch.empty(shape, dtype=torch.float32, device=self.device)

    def descriptor(self, x: torch.Tensor, rows: int, columns: int) -> Any:
        from triton.tools.tensor_descriptor import TensorDescriptor

        return TensorDescriptor.from_tensor(x, [1, rows, 1, columns])

    def _launch(self, early: bool) -> dict[str, Any]:
        """Constants and options of a launch. early: before the kernel in front has ended, one of this call's."""
        return {"PDL": self.pdl} | ({"launch_pdl": True} if early and self.pdl else {})

    def _precision(self) -> dict[str, Any]:
        return {"DP": self.padded_dim, "PRECISION": _precision(self.dtype), "EXACT": self.dtype != torch.float32}

    def sweep(
        self,
        a: torch.Tensor,
        b: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        *,
        segment: int,
        reverse: bool = False,
        entry: torch.Tensor | None = None,
        states: torch.Tensor | None = None,
        spacing: int | None = None,
        transposed: bool = False,
        saved: torch.Tensor | None = None,
        save: int = WHOLE,
        left: torch.Tensor | None = None,
        whole: bool = False,
        silu_input: torch.Tensor | None = None,
        activate: bool = False,
        activated: torch.Tensor | None = None,
        early: bool = False,
    ) -> None:
        """Launch a sweep from the states `entry` of documents and `states` where spans meet.

        spacing: tokens between the states that there are, of which `segment`, the default, is a multiple.
        transposed: the states in memory are the transposes of the sweep's.
        whole: specialised programs have all value channels of a head, not 64: scores and tiles once per head, the same bits.
        silu_input: x [B, T, H, D], if specialised; each value of out is multiplied by the derivative of SiLU at it.
        activate: the sweep is that of SiLU of a, b and v, if specialised and not `whole`. activated: [B, T, H, 3D], takes them but for
        rows of no document.
        early: as in `_launch`.
        """
        from m1_kernels import triton_lightning

        tile = self.tiling(("whole" if whole else "specialised") if self.specialised else "sweep")
        grid = self.spans(segment) * self.heads * self.blocks
        absent = self.slopes
        pointers = [absent if x is None else x for x in (self.cu_seqlens, entry, states, saved, left)]
        sizes = (self.tokens, self.heads, segment, spacing or segment, save, self.documents)
        constants: dict[str, Any] = {
            "D": self.dim, "BV": tile.values, "C": tile.chunk, "VARLEN": self.cu_seqlens is not None,
            "TRANSPOSED": transposed, "ENTRY": (entry is not None) + 2 * (states is not None), "SAVING": saved is not None,
            "LEAVING": left is not None, "STAGES": tile.stages, "num_warps": tile.warps,
            **self._launch(early),
        }  # fmt: skip
        if self.specialised:
            from m1_kernels import gluon_lightning

            assert not reverse, "of specialised sweeps the reverse one is `reverse_sweep`"
            assert activated is None or activate, "nothing would copy it, and the sweep would wait for that"
            tiles = (
                None if x is None else gluon_lightning.descriptor(x, tile.chunk, width)
                for x, width in (
                    (a, self.dim), (b, self.dim), (v, tile.values), (out, tile.values), (silu_input, tile.values)
                )
            )  # fmt: skip
            halves = self.blocks if whole else 1
            if activated is not None:
                strides = dict(zip(("stride_kb", "stride_kt", "stride_kh"), activated.stride()))
                constants |= {
                    "Kept": gluon_lightning.descriptor(activated, tile.chunk, self.dim),
                    "KeptV": gluon_lightning.descriptor(activated, tile.chunk, tile.values),
                    "KeptRows": activated, **strides,
                }  # fmt: skip
            gluon_lightning.sweep[(grid // halves,)](
                *tiles, out, *out.stride()[:3], self.slopes, *pointers, *sizes,
                SILU_BACKWARD=silu_input is not None, ACTIVATE=activate, HALVES=halves, **constants,
            )  # fmt: skip
            return
        assert silu_input is None and not activate, "only specialised sweeps apply SiLU or its derivative"
        wide, narrow = (tile.chunk, self.padded_dim), (tile.chunk, tile.values)
        triton_lightning.sweep[(grid,)](
            self.descriptor(a, *wide), self.descriptor(b, *wide), self.descriptor(v, *narrow), self.descriptor(out, *narrow),
            out, *out.stride()[:3], self.slopes, *pointers, *sizes, REVERSE=reverse, **constants,
            **self._precision(),
        )  # fmt: skip

    def reverse_sweep(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        do: torch.Tensor,
        dk: torch.Tensor,
        dv: torch.Tensor,
        *,
        segment: int,
        spacing: int,
        entry: torch.Tensor | None,
        states: torch.Tensor | None,
        left: torch.Tensor | None,
        silu_inputs: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> None:
        """Launch what writes dk and dv, strides alike, from gradients `entry` of final states and `states` at every `spacing` tokens.

        left: takes the gradients of initial states. silu_inputs: of k and v, as in `sweep`.
        """
        if not self.specialised:
            assert silu_inputs is None, "only specialised sweeps multiply by a derivative"
            shared: dict[str, Any] = {
                "segment": segment,
                "spacing": spacing,
                "reverse": True,
                "entry": entry,
                "states": states,
                "early": states is not None,
            }
            self.sweep(k, q, do, dv, left=left, **shared)
            self.sweep(v, do, q, dk, transposed=True, **shared)
            return
        from m1_kernels import gluon_backward, gluon_lightning

        tile = self.tiling("backward")
        tiles = (
            None if x is None else gluon_lightning.descriptor(x, tile.chunk, self.dim)
            for x in (q, k, v, do, dk, dv, *(silu_inputs or (None, None)))
        )
        pointers = (self.slopes if x is None else x for x in (self.cu_seqlens, entry, states, left))
        gluon_backward.reverse_sweep[(self.spans(segment) * self.heads,)](
            *tiles, dk, dv, *dk.stride()[:3], self.slopes, *pointers, self.tokens, self.heads, segment, spacing, self.documents,
            D=self.dim, C=tile.chunk, VARLEN=self.cu_seqlens is not None, ENTRY=(entry is not None) + 2 * (states is not None),
            LEAVING=left is not None, SILU_BACKWARD=silu_inputs is not None, STAGES=tile.stages, num_warps=tile.warps,
            **self._launch(states is not None),
        )  # fmt: skip

    def local_states(self, states, b, v, segment, *, reverse, span=None, left=None, horizon=True, early=False) -> None:
        """span: without `left`, the tokens between the states that are needed, a multiple of `segment`; as in `scan`.

        early: as in `_launch`, where the kernel in front writes neither b nor v.
        """
        from m1_kernels import triton_lightning

        tile = self.tiling("local")
        blocks = -(-self.dim // tile.values)
        triton_lightning.local_states[(self.spans(segment) * self.heads * blocks,)](
            self.descriptor(b, tile.chunk, self.padded_dim), self.descriptor(v, tile.chunk, tile.values), self.slopes,
            self.slopes if self.cu_seqlens is None else self.cu_seqlens, states, states if left is None else left,
            self.tokens, self.heads, segment, span or segment, self.documents,
            D=self.dim, BV=tile.values, C=tile.chunk, VARLEN=self.cu_seqlens is not None, REVERSE=reverse, LEAVING=left is not None,
            HORIZON=horizon, STAGES=tile.stages, num_warps=tile.warps, **self._launch(early), **self._precision(),
        )  # fmt: skip

    def zero_padding(self, x: torch.Tensor) -> None:
        """Of a pack x [1, T, H, W]."""
        from m1_kernels import triton_lightning

        if self.cu_seqlens is not None:
            triton_lightning.zero_padding[(min(self.tokens, 1024),)](
                x, *x.stride()[1:3], self.cu_seqlens, self.tokens, self.heads, self.documents, W=x.shape[-1], BLOCK=1024
            )

    def scan(self, states, segment, initial, left, *, reverse, span=None) -> None:
        from m1_kernels import triton_lightning

        block = next(size for size in (1024, 512, 256) if self.dim * self.dim % size == 0)
        triton_lightning.scan_states[(self.documents * self.heads * (self.dim * self.dim // block),)](
            states, states if initial is None else initial, states if left is None else left, self.slopes,
            self.slopes if self.cu_seqlens is None else self.cu_seqlens, self.tokens, self.heads, segment, span or segment,
            D=self.dim, BLOCK=block, VARLEN=self.cu_seqlens is not None, REVERSE=reverse,
            INITIAL=initial is not None, LEAVING=left is not None, STAGES=8, **self._launch(True),
        )  # fmt: skip


def _precision(dtype: torch.dtype) -> str:
    if interpreting():
        return "upcast"
    return "tf32x3" if dtype == torch.float32 else "ieee"


@dataclass(frozen=True)
class _Plan:
    """Tokens of a span: of the forward sweep, of saved states and dq, of the reverse sweeps. Under a named strategy fixed.

    whole: whether a specialised program of these sweeps has a whole head, which changes no bits. parts: of a span, see `Spread`.
    """

    forward: int
    save: int
    backward: int
    forward_whole: bool = False
    dq_whole: bool = False
    forward_parts: int = 1
    parts: int = 1

    @property
    def spacing(self) -> int:
        """Tokens between the states that the forward pass keeps for dq."""
        return self.save // self.forward_parts

    @classmethod
    def of(cls, call: _Call, strategy: str) -> "_Plan":
        if strategy != "auto":
            span = SEGMENT if strategy == "segmented" else WHOLE
            whole = call.specialised and call.spread("specialised", "whole", segment=span).kind == "whole"
            return cls(span, span, span, whole, whole)
        if call.specialised:
            first, reverse = call.spread("specialised", "whole"), call.spread("backward")
            if call.cu_seqlens is not None and call.documents > 1:
                reverse = reverse.halved()
            dq = first if first.segment != WHOLE else call.spread("specialised", "whole", saved=True)
            return cls(
                first.segment, dq.segment, reverse.segment, first.kind == "whole", dq.kind == "whole", first.parts, reverse.parts
            )  # fmt: skip
        forward = call.segment(1)
        # Two programs share a multiprocessor and hide each other's waits; the forward sweep's states would cost a pass over k and v.
        return cls(forward, min(SEGMENT, call.segment(2)) if forward == WHOLE else forward, call.segment(2))


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, q, k, v, slopes, initial_state, cu_seqlens, return_final_state: bool, strategy: str, differentiable: bool
    ):
        call = _Call.of(q, slopes, cu_seqlens)
        plan = _Plan.of(call, strategy)
        q, k, v = (_readable(x) for x in (q, k, v))
        initial_state = None if initial_state is None else initial_state.contiguous()
        o = _output_like(q)
        needed = _saves(ctx, differentiable)
        final_state, states = _forward(call, plan, q, k, v, o, initial_state, saving=needed, leaving=return_final_state)
        ctx.call, ctx.plan = call, plan
        ctx.save_for_backward(q, k, v, initial_state, states, call.slopes, call.cu_seqlens)
        ctx.set_materialize_grads(False)
        return o, final_state

    @staticmethod
    @once_differentiable
    def backward(ctx, do, dfinal):
        q, k, v, initial_state, states, slopes, cu_seqlens = ctx.saved_tensors
        call = replace(ctx.call, slopes=slopes, cu_seqlens=cu_seqlens)
        grads = [torch.empty(q.shape, dtype=q.dtype, device=q.device) for _ in range(3)]
        do = torch.zeros(q.shape, dtype=q.dtype, device=q.device) if do is None else _readable(do)
        dinitial = _backward(call, ctx.plan, q, k, v, do, dfinal, *grads, initial_state, states)
        return *grads, None, dinitial, None, None, None, None


class _PackedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        qkv,
        slopes,
        initial_state,
        cu_seqlens,
        return_final_state: bool,
        activate: bool,
        recompute: bool,
        strategy: str,
        differentiable: bool,
    ):
        qkv = _readable(qkv)
        call = _Call.of(_thirds(qkv)[0], slopes, cu_seqlens)
        plan = _Plan.of(call, strategy)
        initial_state = None if initial_state is None else initial_state.contiguous()
        needed = _saves(ctx, differentiable)
        o, final_state, states, kept = _packed_forward(
            call, plan, qkv, initial_state, activate=activate, keeping=needed and not recompute, saving=needed,
            leaving=return_final_state,
        )  # fmt: skip
        ctx.call, ctx.plan, ctx.activate = call, plan, activate
        ctx.save_for_backward(qkv, kept, initial_state, states, call.slopes, call.cu_seqlens)
        ctx.set_materialize_grads(False)
        return o, final_state

    @staticmethod
    @once_differentiable
    def backward(ctx, do, dfinal):
        qkv, kept, initial_state, states, slopes, cu_seqlens = ctx.saved_tensors
        call = replace(ctx.call, slopes=slopes, cu_seqlens=cu_seqlens)
        dqkv = _output_like(qkv)
        activated = _silu(call, qkv) if ctx.activate and kept is None else kept
        q, k, v = _thirds(qkv if activated is None else activated)
        do = torch.zeros(q.shape, dtype=q.dtype, device=q.device) if do is None else _readable(do)
        inputs = _thirds(qkv) if ctx.activate and call.specialised else None
        dinitial = _backward(
            call, ctx.plan, q, k, v, do, dfinal, *_thirds(dqkv), initial_state, states, silu_inputs=inputs
        )
        if ctx.activate and inputs is None:
            torch.ops.aten.silu_backward.grad_input(dqkv, qkv, grad_input=dqkv)
            # The derivative of what padding holds, NaN perhaps, times zero.
            call.zero_padding(dqkv)
        return dqkv, None, dinitial, None, None, None, None, None, None


def _saves(ctx: Any, differentiable: bool) -> bool:
    """Whether anything is to be kept for a backward pass. differentiable: whether gradients are enabled, which no input tells."""
    return differentiable and any(ctx.needs_input_grad)


def _thirds(qkv: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return qkv.split(qkv.shape[-1] // 3, dim=-1)


def _silu(call: _Call, qkv: torch.Tensor) -> torch.Tensor:
    """SiLU of qkv [B, T, H, 3D]; where sweeps are specialised, with the bits of those that apply it."""
    if not call.specialised:
        return torch.nn.functional.silu(qkv)
    from m1_kernels import triton_silu

    activated = _output_like(qkv)
    dense = qkv.is_contiguous() or qkv.transpose(0, 1).is_contiguous()
    triton_silu.forward(qkv if dense else activated.copy_(qkv), activated)
    return activated


def _packed_forward(
    call: _Call,
    plan: _Plan,
    qkv: torch.Tensor,
    initial_state: torch.Tensor | None,
    *,
    activate: bool,
    keeping: bool,
    saving: bool,
    leaving: bool,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """(o, final state, states, activated qkv): the second and third as of `_forward`, the last if `activate` and `keeping`.

    Rows of no document of the last may be unwritten.
    """
    fused = activate and call.specialised and plan.forward == WHOLE and not plan.forward_whole
    if fused:
        activated = _output_like(qkv) if keeping else None
    else:
        activated = _silu(call, qkv) if activate else None
    q, k, v = _thirds(qkv if fused or activated is None else activated)
    o = _output_like(q)
    final_state, states = _forward(
        call, plan, q, k, v, o, initial_state, saving=saving, leaving=leaving, activate=fused,
        activated=activated if fused else None,
    )  # fmt: skip
    return o, final_state, states, activated if keeping else None


def _forward(
    call: _Call,
    plan: _Plan,
    q,
    k,
    v,
    o,
    initial_state,
    *,
    saving: bool,
    leaving: bool,
    activate: bool = False,
    activated: torch.Tensor | None = None,
):
    """Write o; returns (final state [S, H, D, D] if `leaving`, states where spans of plan.save meet if `saving`).

    activate, activated: as of `_Call.sweep`, where the plan has whole documents and half heads.
    No states where dq too runs whole documents: it starts from their initial states. The final state of a document in spans
    is that of `scan_states`, so that a document cut between spans goes on with the same bits.
    """
    final_state = call.document_states() if leaving else None
    if not call.tokens or not call.documents:
        o.zero_()
        if final_state is not None:
            final_state.zero_() if initial_state is None else final_state.copy_(initial_state)
        return final_state, None
    if plan.forward == WHOLE:
        states = call.states(plan.save) if saving and plan.save != WHOLE else None
        call.sweep(
            q,
            k,
            v,
            o,
            segment=WHOLE,
            entry=initial_state,
            saved=states,
            save=plan.save,
            left=final_state,
            whole=plan.forward_whole,
            activate=activate,
            activated=activated,
        )
    else:
        states, part = call.states(plan.spacing), plan.spacing
        call.local_states(states, k, v, part, reverse=False, left=final_state, span=plan.forward)
        call.scan(states, part, initial_state, final_state, reverse=False, span=plan.forward)
        call.sweep(
            q,
            k,
            v,
            o,
            segment=plan.forward,
            spacing=part,
            entry=initial_state,
            states=states,
            whole=plan.forward_whole,
            early=True,
        )
    return final_state, states if saving else None


def _backward(call: _Call, plan: _Plan, q, k, v, do, dfinal, dq, dk, dv, initial_state, states, silu_inputs=None):
    """Write dq, dk, dv; returns the gradient of the initial state [S, H, D, D] if there is one.

    silu_inputs: where q, k and v are SiLU of these and the sweeps are specialised, the gradients are theirs.
    """
    dinitial = call.document_states() if initial_state is not None else None
    if not call.tokens or not call.documents:
        for x in (dq, dk, dv):
            x.zero_()
        if dinitial is None:
            return None
        return dinitial.zero_() if dfinal is None else dinitial.copy_(dfinal)
    dfinal = None if dfinal is None else dfinal.float().contiguous()
    call.sweep(
        do,
        v,
        k,
        dq,
        segment=plan.save,
        spacing=plan.spacing,
        entry=initial_state,
        states=states,
        transposed=True,
        whole=plan.dq_whole,
        silu_input=None if silu_inputs is None else silu_inputs[0],
    )
    states, part = None, plan.backward // plan.parts
    if plan.backward != WHOLE:
        states = call.states(part)
        call.local_states(states, q, do, part, reverse=True, span=plan.backward, early=True)
        call.scan(states, part, dfinal, None, reverse=True, span=plan.backward)
    call.reverse_sweep(
        q, k, v, do, dk, dv, segment=plan.backward, spacing=part, entry=dfinal, states=states, left=dinitial,
        silu_inputs=None if silu_inputs is None else silu_inputs[1:],
    )  # fmt: skip
    return dinitial


def _output_like(q: torch.Tensor) -> torch.Tensor:
    """Empty [B, T, H, D], contiguous, or time-major like q: the layer then has nothing to transpose.

    Never with heads in front of tokens: the kernels reach a head of what they write by 32-bit offsets.
    """
    batch, tokens, heads, dim = q.shape
    if batch > 1 and q.stride(0) < q.stride(1):
        return torch.empty(tokens, batch, heads, dim, dtype=q.dtype, device=q.device).transpose(0, 1)
    return torch.empty(q.shape, dtype=q.dtype, device=q.device)


def _readable(x: torch.Tensor) -> torch.Tensor:
    """x, or a contiguous copy where its strides or its place are none that a tensor descriptor can have: multiples of 16 bytes."""
    size = x.element_size()
    fits = x.stride(-1) == 1 and all(stride > 0 and stride * size % 16 == 0 for stride in x.stride()[:-1])
    # Not x.contiguous(): that is x where only its first byte, or the stride of a dimension of size 1, does not fit.
    return x if fits and x.data_ptr() % 16 == 0 else x.clone(memory_format=torch.contiguous_format)
