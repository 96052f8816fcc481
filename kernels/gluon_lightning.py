"""The forward sweep of `triton_lightning` with one task per warp group, for Hopper (sm_90), 16-bit inputs of head_dim 128.

Three partitions of a program work on different chunks at a time and meet at barriers in shared memory:

    _load     one warp: copies the tiles a, b, v of the chunks to come through tensor descriptors
    _score    four warps: the decayed scores b a^T of a chunk, rounded, into shared memory
    _advance  four warps: keep the state in registers, read it, add the scores' part, store, update it

and, where a, b and v are to be SiLU of what is in memory (ACTIVATE), three more:

    _activate eight warps, twice: the tiles of every other chunk in place
    _copy     one warp: copies them out as well, for the backward pass

so that the tensor cores have products of one partition while the other rounds, scales or stores. What is computed, and
rounded where, is that of `triton_lightning.sweep`: a program has one head, one span and 64 of the value channels, or all
128 of them (HALVES = 2): two partitions `_advance` then share tiles and scores, and have the tensor cores in turn. With equal
spans the bits are the same.

With `_activate` a program has 28 warps, at 72 registers when launched, which they share out anew: 208 for `_advance`, 80 for
`_score`, 48 for `_activate`, which therefore has one tile at a time. Two partitions `_advance` of a whole head leave no room for it.
"""

from typing import Any

from m1_kernels.triton_lightning import _border, _enter, _origin, _span, _within
from m1_kernels.triton_silu import silu
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language import debug_barrier
from triton.language.extra.cuda import gdc_launch_dependents

__all__ = ["descriptor"]

LOG2_E = gl.constexpr(1.4426950408889634)
TILE = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)
"""Layout in shared memory of the tiles [1, C, 1, channels]."""
ROWWISE = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0]))
"""Layout in registers of four warps."""


def descriptor(x: Any, rows: int, columns: int) -> TensorDescriptor:
    """Of tiles [1, rows, 1, columns] of x [B, T, H, D], 16-bit, with strides that are multiples of 16 bytes."""
    return TensorDescriptor.from_tensor(x, [1, rows, 1, columns], TILE)


@gluon.jit
def _document(w, Cu, T, SEGMENT, documents):
    """As `triton_lightning._document`, which names no layout."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    found = 0
    for first in range(0, documents + 1, 128):
        d = first + gl.arange(0, 128, layout=layout)
        starts = _within(gl.load(Cu + d, mask=d <= documents, other=0), T)
        found += gl.sum(((d <= documents) & (starts // SEGMENT + d <= w)).to(gl.int32), 0)
    return gl.maximum(found - 1, 0)


@gluon.jit
def _load(given, C: gl.constexpr, BV: gl.constexpr, HALVES: gl.constexpr, STAGES: gl.constexpr):
    A, B_, V, a_tiles, b_tiles, v_tiles, loaded, free, row, start, h, e, chunks = given
    for c in range(chunks):
        stage = c % STAGES
        bar = loaded.index(stage)
        mbarrier.wait(free.index(stage), ((c // STAGES) & 1) ^ 1)
        mbarrier.expect(bar, A.block_type.nbytes + B_.block_type.nbytes + HALVES * V.block_type.nbytes)
        t = start + c * C
        tma.async_copy_global_to_shared(B_, [row, t, h, 0], bar, b_tiles.index(stage))
        tma.async_copy_global_to_shared(A, [row, t, h, 0], bar, a_tiles.index(stage))
        for half in gl.static_range(HALVES):
            tma.async_copy_global_to_shared(V, [row, t, h, e + half * BV], bar, v_tiles.index(stage * HALVES + half))


@gluon.jit
def _pairs(s, zero, C: gl.constexpr, layout: gl.constexpr):
    """Decays of the pairs of a chunk [C (j), C (i)]. zero: as in `_places`."""
    j = (zero + gl.arange(0, C, layout=gl.SliceLayout(1, layout))).to(gl.float32)
    i = gl.arange(0, C, layout=gl.SliceLayout(0, layout)).to(gl.float32)
    distance = i[None, :] - j[:, None]
    return gl.where(distance >= 0, gl.exp2(-s * gl.maximum(distance, 0.0)), 0.0)


@gluon.jit
def _score(
    given,
    C: gl.constexpr,
    D: gl.constexpr,
    HALVES: gl.constexpr,
    STAGES: gl.constexpr,
):
    a_tiles, b_tiles, scores_tiles, loaded, scored, slope, tokens, chunks = given
    s = gl.load(slope) * LOG2_E
    layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, C, 16])
    j = gl.arange(0, C, layout=gl.SliceLayout(1, layout))
    pairs = _pairs(s, 0, C, layout)
    zeros = gl.zeros([C, C], gl.float32, layout)
    for c in range(chunks):
        stage = c % STAGES
        n = tokens - c * C
        mbarrier.wait(loaded.index(stage), (c // STAGES) & 1)
        b = b_tiles.index(stage).reshape([C, D])
        a = a_tiles.index(stage).reshape([C, D])
        scores = warpgroup_mma(b, a.permute((1, 0)), zeros, use_acc=False)
        if HALVES == 2:
            pairs = _pairs(s, c // 2**30, C, layout)
        scores = gl.where((j < n)[:, None], scores * pairs, 0.0)
        scores_tiles.index(stage).store(scores.to(scores_tiles.dtype))
        fence_async_shared()
        mbarrier.arrive(scored.index(stage), count=1)


@gluon.jit
def _activate(
    given,
    FIRST: gl.constexpr,
    C: gl.constexpr,
    D: gl.constexpr,
    BV: gl.constexpr,
    KEEPING: gl.constexpr,
    STAGES: gl.constexpr,
):
    """The tiles of chunks FIRST, FIRST + 2, ..; the last chunk of all, if it is not full, is stored too (KEEPING)."""
    a_tiles, b_tiles, v_tiles, loaded, activated, kept_rows, stride_kt, start, e, tokens, chunks = given
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [8, 1], [1, 0])
    for c in range(FIRST, chunks, 2):
        stage = c % STAGES
        mbarrier.wait(loaded.index(stage), (c // STAGES) & 1)
        a = a_tiles.index(stage).reshape([C, D])
        a.store(silu(a.load(layout)))
        b = b_tiles.index(stage).reshape([C, D])
        b.store(silu(b.load(layout)))
        v = v_tiles.index(stage).reshape([C, BV])
        v.store(silu(v.load(layout)))
        fence_async_shared()
        mbarrier.arrive(activated.index(stage), count=1)
    if KEEPING:
        c = chunks - 1
        n = tokens - c * C
        if (tokens > 0) & (n < C) & (c % 2 == FIRST):
            stage = c % STAGES
            t = start + c * C
            if e == 0:
                _store_rows(kept_rows, a_tiles.index(stage).reshape([C, D]).load(layout), t, n, stride_kt, layout)
            else:
                _store_rows(kept_rows + D, b_tiles.index(stage).reshape([C, D]).load(layout), t, n, stride_kt, layout)
            v = v_tiles.index(stage).reshape([C, BV]).load(layout)
            _store_rows(kept_rows + 2 * D + e, v, t, n, stride_kt, layout)


@gluon.jit
def _copy(given, C: gl.constexpr, D: gl.constexpr, KEEPING: gl.constexpr, STAGES: gl.constexpr):
    """Of the two programs of a head one copies a, the other b, and each its v. Chunks that are not full are `_activate`'s."""
    Kept, KeptV, a_tiles, b_tiles, v_tiles, activated, free, row, start, h, e, tokens, chunks = given
    if KEEPING:
        for c in range(chunks):
            stage = c % STAGES
            t = start + c * C
            mbarrier.wait(activated.index(stage), (c // STAGES) & 1)
            if tokens - c * C >= C:
                if e == 0:
                    tma.async_copy_shared_to_global(Kept, [row, t, h, 0], a_tiles.index(stage))
                else:
                    tma.async_copy_shared_to_global(Kept, [row, t, h, D], b_tiles.index(stage))
                tma.async_copy_shared_to_global(KeptV, [row, t, h, 2 * D + e], v_tiles.index(stage))
                tma.store_wait(0)
            mbarrier.arrive(free.index(stage), count=1)


@gluon.jit
def _zero_rows(tile, n, C: gl.constexpr, E: gl.constexpr):
    """Zero the rows from n on of a tile [C, E] in shared memory: they may hold anything, NaN included."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    rows = gl.arange(0, C, layout=gl.SliceLayout(1, layout))
    tile.store(gl.where((rows < n)[:, None], tile.load(layout), gl.zeros([C, E], tile.dtype, layout)))


@gluon.jit
def _store_rows(rows, out, t, n, stride_t, layout: gl.constexpr = ROWWISE):
    """Store the first n rows of out, of that layout, at the tokens from t on."""
    i = gl.arange(0, out.shape[0], layout=gl.SliceLayout(1, layout))
    m = gl.arange(0, out.shape[1], layout=gl.SliceLayout(0, layout))
    places = ((t + i).to(gl.int64) * stride_t)[:, None] + m[None, :]
    gl.store(rows + places, out, mask=(i < n)[:, None] & (m >= 0)[None, :])


@gluon.jit
def _parts(x, dtype: gl.constexpr):
    """x, float32, as two 16-bit parts. In pairs: one conversion of two values takes a fourth of the time of two of one."""
    if dtype == gl.bfloat16:
        return gl.inline_asm_elementwise(
            """
            {
            .reg .f32 a, b;
            .reg .b32 t;
            cvt.rn.bf16x2.f32 $0, $3, $2;
            shl.b32 t, $0, 16;
            mov.b32 a, t;
            and.b32 t, $0, 0xffff0000;
            mov.b32 b, t;
            sub.rn.f32 a, $2, a;
            sub.rn.f32 b, $3, b;
            cvt.rn.bf16x2.f32 $1, b, a;
            }
            """,
            "=&r,=r,f,f",
            [x],
            dtype=(gl.bfloat16, gl.bfloat16),
            is_pure=True,
            pack=2,
        )
    else:
        return gl.inline_asm_elementwise(
            """
            {
            .reg .f32 a, b;
            .reg .b16 c, d;
            cvt.rn.f16x2.f32 $0, $3, $2;
            mov.b32 {c, d}, $0;
            cvt.f32.f16 a, c;
            cvt.f32.f16 b, d;
            sub.rn.f32 a, $2, a;
            sub.rn.f32 b, $3, b;
            cvt.rn.f16x2.f32 $1, b, a;
            }
            """,
            "=&r,=r,f,f",
            [x],
            dtype=(gl.float16, gl.float16),
            is_pure=True,
            pack=2,
        )


@gluon.jit
def _silu_backward(gradient, x):
    """gradient * d silu(x) / dx, float32; 1 + e^-x may be infinite. Without the range checks of a division."""
    x = x.to(gl.float32)
    share = gl.inline_asm_elementwise(
        "rcp.approx.ftz.f32 $0, $1;", "=f,f", [1.0 + gl.exp2(-LOG2_E * x)], dtype=gl.float32, is_pure=True, pack=1
    )
    return gradient * (share * (1.0 + x * (1.0 - share)))


@gluon.jit
def _places(e, across, zero, D: gl.constexpr, BV: gl.constexpr, layout: gl.constexpr):
    """Offsets of a state [BV, D] in memory, value channels from e on, whose value channels are `across` (1 or D) apart.

    zero: 0, but not known to be when the kernel is compiled: the offsets then are computed where they are used, in place
    of 64 registers that hold them all along.
    """
    columns = e + zero + gl.arange(0, BV, layout=gl.SliceLayout(1, layout))
    channels = gl.arange(0, D, layout=gl.SliceLayout(0, layout))
    return columns[:, None] * across + channels[None, :] * (D + 1 - across)


@gluon.jit
def _fetch(X, bar, row, t, h, e, tile, needed):
    """The tile of X at token t and channel e, which `bar` tells of."""
    mbarrier.expect(bar, X.block_type.nbytes, pred=needed)
    tma.async_copy_global_to_shared(X, [row, t, h, e], bar, tile, pred=needed)


@gluon.jit
def _advance(
    given,
    HALF: gl.constexpr,
    C: gl.constexpr,
    D: gl.constexpr,
    BV: gl.constexpr,
    ENTRY: gl.constexpr,
    SAVING: gl.constexpr,
    LEAVING: gl.constexpr,
    SILU_BACKWARD: gl.constexpr,
    ACTIVATE: gl.constexpr,
    PDL: gl.constexpr,
    HALVES: gl.constexpr,
    STAGES: gl.constexpr,
):
    Out, out_rows, stride_ot, X, origin, saved, left, across, ends, states_stride = given[0]
    a_tiles, b_tiles, v_tiles, scores_tiles, out_tiles, reads, departs, loaded, scored, free, fetched = given[1]
    slope, row, start, h, e, tokens, chunks, SAVE = given[2]
    # Here, not in front of all partitions: the first tiles would wait for it.
    s = gl.load(slope) * LOG2_E
    # ptxas has the 72 registers of 28 warps at launch to plan with, of which a product of 128 columns takes more.
    COLUMNS: gl.constexpr = D // 2 if ACTIVATE else D
    of_state: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, COLUMNS, 16]
    )
    of_out: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, C, 16])
    state_operand: gl.constexpr = gl.DotOperandLayout(0, of_out, 2)
    values_operand: gl.constexpr = gl.DotOperandLayout(0, of_state, 2)
    i = gl.arange(0, C, layout=gl.BlockedLayout([1], [32], [4], [0]))
    zeros = gl.zeros([BV, C], gl.float32, of_out)
    dtype: gl.constexpr = v_tiles.dtype
    e += HALF * BV
    out_rows += HALF * BV
    reads = reads.index(HALF)
    departs = departs.index(HALF)
    state = gl.zeros([BV, D], gl.float32, of_state)
    if ENTRY:
        places = _places(e, across, 0, D, BV, of_state)
        state = _enter(state, origin, places, True, PDL)
    if SILU_BACKWARD:
        # x comes where the result is to leave from.
        _fetch(X, fetched.index(HALF * 2), row, start, h, e, out_tiles.index(HALF * 2), chunks > 0)
    # One loop for all chunks, or from state to state that is saved: a branch in it costs a tenth of the sweep.
    every = gl.maximum(chunks, 1)
    if SAVING:
        every = SAVE // C
    for first in range(0, chunks, every):
        if SAVING:
            if first > 0:
                place = saved + (first // every).to(gl.int64) * states_stride
                gl.store(place + _places(e, across, chunks // 2**30, D, BV, of_state), state)
        for c in range(first, gl.minimum(first + every, chunks)):
            stage = c % STAGES
            phase = (c // STAGES) & 1
            t = c * C
            n = gl.minimum(tokens - t, C)
            b = b_tiles.index(stage).reshape([C, D])
            a = a_tiles.index(stage).reshape([C, D])
            v = v_tiles.index(stage * HALVES + HALF).reshape([C, BV])
            operand = gl.convert_layout(state.to(dtype), state_operand)
            mbarrier.wait(loaded.index(stage), phase)
            # Registers are short: the decays wait in shared memory. A chunk that is not full is the first or the last one taken.
            if (c < 2) | (n < C):
                reads.store(gl.exp2(-s * (i + 1).to(gl.float32)))
                departs.store(gl.exp2(-s * gl.maximum(n - 1 - i, 0).to(gl.float32)))
                if n < C:
                    _zero_rows(v, n, C, BV)
                    _zero_rows(b, n, C, D)
                    fence_async_shared()
                # Here, or all chunks would have one.
                debug_barrier()

            past = warpgroup_mma(operand, a.permute((1, 0)), zeros, use_acc=False, is_async=True)
            values = v.permute((1, 0)).load(values_operand)
            mbarrier.wait(scored.index(stage), phase)
            within = gl.convert_layout(values, state_operand)
            within = warpgroup_mma(within, scores_tiles.index(stage), zeros, use_acc=False, is_async=True)
            if HALVES == 2 or ACTIVATE:
                # Gives the operand's registers back: with 208 all products would be serialised. The other half's run meanwhile.
                past = warpgroup_mma_wait(1, deps=[past])
            depart = departs.load(gl.SliceLayout(0, values_operand))
            decayed = values.to(gl.float32) * depart[None, :]
            leading, trailing = _parts(decayed, dtype)
            state = state * gl.exp2(-s * n)
            state = warpgroup_mma(leading, b, state, is_async=True)
            state = warpgroup_mma(trailing, b, state, is_async=True)
            place = HALF * 2 + c % 2
            tile = out_tiles.index(place)
            turned = tile.reshape([C, BV]).permute((1, 0))
            if SILU_BACKWARD:
                # Where the result of the chunk before has left from.
                tma.store_wait(0)
                following = HALF * 2 + (c + 1) % 2
                x_place = out_tiles.index(following)
                _fetch(X, fetched.index(following), row, start + t + C, h, e, x_place, c + 1 < chunks)
            past, within = warpgroup_mma_wait(2, deps=[past, within])
            read = reads.load(gl.SliceLayout(0, of_out))
            out = past * read[None, :] + within
            if SILU_BACKWARD:
                mbarrier.wait(fetched.index(place), (c // 2) & 1)
                out = _silu_backward(out, turned.load(of_out))
            else:
                tma.store_wait(1)
            turned.store(out.to(dtype))
            if n == C:
                fence_async_shared()
                tma.async_copy_shared_to_global(Out, [row, start + t, h, e], tile)
            else:
                _store_rows(out_rows, tile.reshape([C, BV]).load(ROWWISE), start + t, n, stride_ot)
            state = warpgroup_mma_wait(0, deps=[state])
            mbarrier.arrive(free.index(stage), count=1)
    if LEAVING:
        if ends:
            gl.store(left + _places(e, across, chunks // 2**30, D, BV, of_state), state)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["T", "documents"])
def sweep(
    A,
    B_,
    V,
    Out,
    X,
    OutRows,
    stride_ob,
    stride_ot,
    stride_oh,
    Slopes,
    Cu,
    Entry,
    States,
    Saved,
    Left,
    T,
    H,
    SEGMENT,
    SPACING,
    SAVE,
    documents,
    D: gl.constexpr,
    BV: gl.constexpr,
    C: gl.constexpr,
    VARLEN: gl.constexpr,
    TRANSPOSED: gl.constexpr,
    ENTRY: gl.constexpr,
    SAVING: gl.constexpr,
    LEAVING: gl.constexpr,
    SILU_BACKWARD: gl.constexpr,
    ACTIVATE: gl.constexpr,
    PDL: gl.constexpr,
    HALVES: gl.constexpr,
    STAGES: gl.constexpr,
    Kept=None,
    KeptV=None,
    KeptRows=None,
    stride_kb=None,
    stride_kt=None,
    stride_kh=None,
):
    """As `triton_lightning.sweep`, forward. Grid: spans * H * D / BV / HALVES.

    HALVES: 2 has all value channels in one program, else 1.
    SILU_BACKWARD: out is multiplied by the derivative of SiLU at X, a descriptor like Out; else X is None.
    ACTIVATE: of SiLU of a, b and v, with HALVES = 1. KeptRows, if there, takes these [B, T, H, a | b | v]; Kept and KeptV: its descriptors
    with blocks as of A and V. Rows of no document are not written.
    """
    if PDL:
        gdc_launch_dependents()
    KEEPING: gl.constexpr = KeptRows is not None
    BLOCKS: gl.constexpr = D // (BV * HALVES)
    pid = gl.program_id(0)
    w = pid // (H * BLOCKS)
    h = pid // BLOCKS % H
    e = pid % BLOCKS * (BV * HALVES)
    document = 0
    if VARLEN:
        document = _document(w, Cu, T, SEGMENT, documents)
    row, document, start, tokens, is_first, is_last, _, _ = _span(w, document, Cu, T, SEGMENT, documents, VARLEN)
    across = D if TRANSPOSED else 1
    out_rows = OutRows + row.to(gl.int64) * stride_ob + h * stride_oh + e

    if VARLEN:
        if document == documents:
            nothing = gl.zeros([C, BV * HALVES], OutRows.dtype.element_ty, ROWWISE)
            for t in range(0, tokens, C):
                _store_rows(out_rows, nothing, start + t, tokens - t, stride_ot)
            if is_first:
                before = _within(gl.load(Cu), T)
                for t in range(0, before, C):
                    _store_rows(out_rows, nothing, t, before - t, stride_ot)
            tokens = 0
            is_first = False
            is_last = False

    origin = _origin(Entry, States, row, document, h, start, is_first, tokens, T, H, SPACING, D, ENTRY)
    saved = Saved + (_border(row, start, T, SAVE).to(gl.int64) * H + h) * D * D
    left = Left + (document.to(gl.int64) * H + h) * D * D
    slope = Slopes + h
    chunks = gl.cdiv(tokens, C)

    a_tiles = gl.allocate_shared_memory(A.dtype, [STAGES] + A.block_type.shape, A.layout)
    b_tiles = gl.allocate_shared_memory(B_.dtype, [STAGES] + B_.block_type.shape, B_.layout)
    v_tiles = gl.allocate_shared_memory(V.dtype, [STAGES * HALVES] + V.block_type.shape, V.layout)
    square: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    scores_tiles = gl.allocate_shared_memory(A.dtype, [STAGES, C, C], square)
    out_tiles = gl.allocate_shared_memory(Out.dtype, [2 * HALVES] + Out.block_type.shape, Out.layout)
    vector: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    reads = gl.allocate_shared_memory(gl.float32, [HALVES, C], vector)
    departs = gl.allocate_shared_memory(gl.float32, [HALVES, C], vector)
    loaded = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    scored = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    fetched = gl.allocate_shared_memory(gl.int64, [2 * HALVES, 1], mbarrier.MBarrierLayout())
    for place in gl.static_range(2 * HALVES):
        mbarrier.init(fetched.index(place), count=1)
    for stage in gl.static_range(STAGES):
        mbarrier.init(loaded.index(stage), count=1)
        mbarrier.init(scored.index(stage), count=1)
        mbarrier.init(free.index(stage), count=HALVES + KEEPING)
    ready = loaded
    if ACTIVATE:
        ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        for stage in gl.static_range(STAGES):
            mbarrier.init(ready.index(stage), count=1)
    fence_async_shared()

    given = (
        (Out, out_rows, stride_ot, X, origin, saved, left, across, is_last, H * D * D),
        (a_tiles, b_tiles, v_tiles, scores_tiles, out_tiles, reads, departs, ready, scored, free, fetched),
        (slope, row, start, h, e, tokens, chunks, SAVE),
    )
    score = (a_tiles, b_tiles, scores_tiles, ready, scored, slope, tokens, chunks)
    load = (A, B_, V, a_tiles, b_tiles, v_tiles, loaded, free, row, start, h, e, chunks)
    if ACTIVATE:
        gl.static_assert(HALVES == 1 and not SILU_BACKWARD)
        kept_rows = out_rows
        if KEEPING:
            kept_rows = KeptRows + row.to(gl.int64) * stride_kb + h * stride_kh
        activate = (a_tiles, b_tiles, v_tiles, loaded, ready, kept_rows, stride_kt, start, e, tokens, chunks)
        copied = (Kept, KeptV, a_tiles, b_tiles, v_tiles, ready, free, row, start, h, e, tokens, chunks)
        gl.warp_specialize(
            [
                (_advance, (given, 0, C, D, BV, ENTRY, SAVING, LEAVING, False, True, PDL, HALVES, STAGES)),
                (_score, (score, C, D, HALVES, STAGES)),
                (_activate, (activate, 0, C, D, BV, KEEPING, STAGES)),
                (_activate, (activate, 1, C, D, BV, KEEPING, STAGES)),
                (_load, (load, C, BV, HALVES, STAGES)),
                (_copy, (copied, C, D, KEEPING, STAGES)),
            ],
            [4, 8, 8, 1, 1],
            [80, 48, 48, 24, 24],
        )
    elif HALVES == 1:
        gl.warp_specialize(
            [
                (_advance, (given, 0, C, D, BV, ENTRY, SAVING, LEAVING, SILU_BACKWARD, False, PDL, HALVES, STAGES)),
                (_score, (score, C, D, HALVES, STAGES)),
                (_load, (load, C, BV, HALVES, STAGES)),
            ],
            [4, 1],
            [128, 24],
        )
    else:
        gl.warp_specialize(
            [
                (_advance, (given, 0, C, D, BV, ENTRY, SAVING, LEAVING, SILU_BACKWARD, False, PDL, HALVES, STAGES)),
                (_advance, (given, 1, C, D, BV, ENTRY, SAVING, LEAVING, SILU_BACKWARD, False, PDL, HALVES, STAGES)),
                (_score, (score, C, D, HALVES, STAGES)),
                (_load, (load, C, BV, HALVES, STAGES)),
            ],
            [4, 4, 1],
            [208, 72, 24],
        )
