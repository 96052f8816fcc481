"""dk and dv of lightning attention in one reverse sweep with one state, for Hopper (sm_90), 16-bit inputs of head_dim 128.

    T = sum_{i after} e^{-s(i - border)} do_i^T q_i    float32 [do channels, q channels]: dv reads its transpose, dk reads it

Four partitions of four warps meet at barriers in shared memory:

    _keep   two, with 64 rows of T each in registers: round it into shared memory, add the chunk; load q or do
    _grad   dv_j = sum_{i >= j} e^{-s(i-j)} (k_j . q_i) do_i, and dk_j with (v_j . do_i) q_i: scores stay in registers

k is read by dv alone and v by dk alone, which load them, and whose results leave from their tiles. A program has one head and one
span; what is computed, and rounded where, is that of two sweeps of `triton_lightning`, whose chunks are as long, but for the decays
of scores, here a difference of exponents (to 5e-6).
"""

from m1_kernels.gluon_lightning import (
    LOG2_E,
    ROWWISE,
    _document,
    _fetch,
    _parts,
    _places,
    _silu_backward,
    _store_rows,
    _zero_rows,
)
from m1_kernels.triton_lightning import _enter, _origin, _span, _within
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

__all__ = ()

OWN_STAGES = gl.constexpr(2)
"""Of k and v, which those load who need them."""


@gluon.jit
def _keep(
    load,
    kept,
    bars,
    sizes,
    C: gl.constexpr,
    D: gl.constexpr,
    HALF: gl.constexpr,
    ENTRY: gl.constexpr,
    LEAVING: gl.constexpr,
    PDL: gl.constexpr,
    STAGES: gl.constexpr,
):
    q_tiles, do_tiles, rounded, departs, origin, left, ends = kept
    loaded, free, written, read = bars
    X, x_tiles = load
    s, row, start, h, tokens, chunks = sizes
    ROWS: gl.constexpr = D // 2
    FIRST: gl.constexpr = HALF * ROWS
    layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, layout, 2)
    dtype: gl.constexpr = q_tiles.dtype
    state = gl.zeros([ROWS, D], gl.float32, layout)
    if ENTRY:
        places = _places(FIRST, 1, 0, D, ROWS, layout)
        state = _enter(state, origin, places, True, PDL)
    stage = 0
    phase = 0
    for c in range(chunks):
        t = (chunks - 1 - c) * C
        n = gl.minimum(tokens - t, C)
        operand_state = state.to(dtype)
        mbarrier.wait(loaded.index(stage), phase)
        mbarrier.wait(read, (c & 1) ^ 1)
        rounded.slice(FIRST, ROWS, dim=0).store(operand_state)
        fence_async_shared()
        mbarrier.arrive(written, count=1)

        q = q_tiles.index(stage).reshape([C, D])
        values = do_tiles.index(stage).reshape([C, D]).slice(FIRST, ROWS, dim=1).permute((1, 0)).load(operand)
        decayed = values.to(gl.float32) * departs.load(gl.SliceLayout(0, operand))[None, :]
        leading, trailing = _parts(decayed, dtype)
        state = state * gl.exp2(-s * n)
        state = warpgroup_mma(leading, q, state, is_async=True)
        state = warpgroup_mma(trailing, q, state, is_async=True)
        # Into the place of the chunk before.
        needed = (c > 0) & (c - 1 + STAGES < chunks)
        place = gl.where(stage == 0, STAGES - 1, stage - 1)
        mbarrier.wait(free.index(place), phase ^ (stage == 0).to(gl.int32), pred=needed)
        _fetch(X, loaded.index(place), row, start + t - (STAGES - 1) * C, h, 0, x_tiles.index(place), needed)
        state = warpgroup_mma_wait(0, deps=[state])
        mbarrier.arrive(free.index(stage), count=1)
        phase = phase ^ (stage == STAGES - 1).to(gl.int32)
        stage = gl.where(stage == STAGES - 1, 0, stage + 1)
    if LEAVING:
        if ends:
            gl.store(left + _places(FIRST, 1, chunks // 2**30, D, ROWS, layout), state)


@gluon.jit
def _halves(x):
    """The left and the right columns of x."""
    return x.reshape([x.shape[0], 2, x.shape[1] // 2]).permute((0, 2, 1)).split()


@gluon.jit
def _grad(
    Out,
    out_rows,
    load,
    tiles,
    bars,
    sizes,
    C: gl.constexpr,
    D: gl.constexpr,
    TURNED: gl.constexpr,
    VARLEN: gl.constexpr,
    SILU_BACKWARD: gl.constexpr,
    STAGES: gl.constexpr,
):
    """out_j = sum_{i >= j} e^{-s(i-j)} (a_j . b_i) v_i, through the tiles of a. TURNED: the state is read transposed."""
    A, X, a_tiles, x_tile, arrived, fetched = load
    b_tiles, v_tiles, rounded, exponents = tiles
    loaded, free, written, read = bars
    s, row, start, h, tokens, chunks, stride_ot = sizes
    of_scores: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, C, 16])
    of_out: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16])
    of_quarter: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D // 4, 16]
    )
    operand: gl.constexpr = gl.DotOperandLayout(0, of_out, 2)
    dtype: gl.constexpr = a_tiles.dtype
    no_scores = gl.zeros([C, C], gl.float32, of_scores)
    nothing = gl.zeros([C, D], gl.float32, of_out)
    state = rounded
    if TURNED:
        state = rounded.permute((1, 0))
    for c in range(chunks):
        t = (chunks - 1 - c) * C
        n = gl.minimum(tokens - t, C)
        own_stage = c % OWN_STAGES
        stage = c % STAGES
        phase = (c // STAGES) & 1
        mbarrier.wait(arrived.index(own_stage), (c // OWN_STAGES) & 1)
        mbarrier.wait(loaded.index(stage), phase)
        a = a_tiles.index(own_stage).reshape([C, D])
        b = b_tiles.index(stage).reshape([C, D])
        v = v_tiles.index(stage).reshape([C, D])
        scores = warpgroup_mma(a, b.permute((1, 0)), no_scores, use_acc=False, is_async=True)
        mbarrier.wait(written, c & 1)
        out = warpgroup_mma(a, state, nothing, use_acc=False, is_async=True)
        # The result of the chunk before has left its tile.
        tma.store_wait(0)
        place = (c + OWN_STAGES - 1) % OWN_STAGES
        needed = (c > 0) & (c - 1 + OWN_STAGES < chunks)
        _fetch(A, arrived.index(place), row, start + t - (OWN_STAGES - 1) * C, h, 0, a_tiles.index(place), needed)
        scores = warpgroup_mma_wait(1, deps=[scores])
        # Computed anew with each chunk: there is no room for 32 registers all along.
        i = gl.arange(0, C, layout=gl.SliceLayout(0, of_scores))
        j = gl.arange(0, C, layout=gl.SliceLayout(1, of_scores))
        exponent = exponents.load(i.type.layout)[None, :] - exponents.load(j.type.layout)[:, None]
        scores = scores * gl.exp2(gl.where(i[None, :] >= j[:, None], exponent, float("-inf")))
        scores = gl.convert_layout(scores.to(dtype), operand)
        out = warpgroup_mma_wait(0, deps=[out])
        mbarrier.arrive(read, count=1)
        rows = gl.arange(0, C, layout=gl.SliceLayout(1, of_out))
        out = out * gl.exp2(-s * gl.maximum(n - 1 - rows, 0).to(gl.float32))[:, None]
        out = warpgroup_mma(scores, v, out, is_async=True)
        out = warpgroup_mma_wait(0, deps=[out])
        mbarrier.arrive(free.index(stage), count=1)
        if SILU_BACKWARD:
            mbarrier.wait(fetched, c & 1)
            # A few channels at a time, for want of registers.
            x = x_tile.reshape([C, D])
            left, right = _halves(out)
            quarters = _halves(left) + _halves(right)
            for place in gl.static_range(4):
                quarter = gl.convert_layout(quarters[place], of_quarter, assert_trivial=True)
                quarter = _silu_backward(quarter, x.slice(place * D // 4, D // 4, dim=1).load(of_quarter))
                a.slice(place * D // 4, D // 4, dim=1).store(quarter.to(dtype))
        else:
            a.store(out.to(dtype))
        full = True
        if VARLEN:
            full = n == C
            if n < C:
                _store_rows(out_rows, a.load(ROWWISE), start + t, n, stride_ot)
        fence_async_shared()
        if full:
            tma.async_copy_shared_to_global(Out, [row, start + t, h, 0], a_tiles.index(own_stage))
        if SILU_BACKWARD:
            _fetch(X, fetched, row, start + t - C, h, 0, x_tile, c + 1 < chunks)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["T", "documents"])
def reverse_sweep(
    Q,
    K,
    V,
    DO,
    DK,
    DV,
    KRaw,
    VRaw,
    DKRows,
    DVRows,
    stride_ob,
    stride_ot,
    stride_oh,
    Slopes,
    Cu,
    Entry,
    States,
    Left,
    T,
    H,
    SEGMENT,
    SPACING,
    documents,
    D: gl.constexpr,
    C: gl.constexpr,
    VARLEN: gl.constexpr,
    ENTRY: gl.constexpr,
    LEAVING: gl.constexpr,
    SILU_BACKWARD: gl.constexpr,
    PDL: gl.constexpr,
    STAGES: gl.constexpr,
):
    """dk and dv of one head and span. Grid: spans * H.

    SILU_BACKWARD: times the derivative of SiLU at KRaw and VRaw, else None. STAGES: of q and do.

    All descriptors have blocks [1, C, 1, D]. DKRows, DVRows: the tensors behind DK and DV, with the same strides, for chunks that
    are not full. SEGMENT is a multiple of C, and of SPACING, the tokens between States. Entry, States, Left, ENTRY and LEAVING
    as in `triton_lightning.sweep` of (k, q, do, dv) in reverse.
    """
    pid = gl.program_id(0)
    w = pid // H
    h = pid % H
    document = 0
    if VARLEN:
        document = _document(w, Cu, T, SEGMENT, documents)
    row, document, start, tokens, is_first, is_last, _, _ = _span(w, document, Cu, T, SEGMENT, documents, VARLEN)
    dk_rows = DKRows + row.to(gl.int64) * stride_ob + h * stride_oh
    dv_rows = DVRows + row.to(gl.int64) * stride_ob + h * stride_oh

    if VARLEN:
        if document == documents:
            nothing = gl.zeros([C, D], DKRows.dtype.element_ty, ROWWISE)
            for t in range(0, tokens, C):
                _store_rows(dk_rows, nothing, start + t, tokens - t, stride_ot)
                _store_rows(dv_rows, nothing, start + t, tokens - t, stride_ot)
            if is_first:
                before = _within(gl.load(Cu), T)
                for t in range(0, before, C):
                    _store_rows(dk_rows, nothing, t, before - t, stride_ot)
                    _store_rows(dv_rows, nothing, t, before - t, stride_ot)
            tokens = 0
            is_first = False
            is_last = False

    origin = _origin(Entry, States, row, document, h, start + SEGMENT, is_last, tokens, T, H, SPACING, D, ENTRY)
    left = Left + (document.to(gl.int64) * H + h) * D * D
    s = gl.load(Slopes + h) * LOG2_E
    chunks = gl.cdiv(tokens, C)

    q_tiles = gl.allocate_shared_memory(Q.dtype, [STAGES] + Q.block_type.shape, Q.layout)
    do_tiles = gl.allocate_shared_memory(DO.dtype, [STAGES] + DO.block_type.shape, DO.layout)
    k_tiles = gl.allocate_shared_memory(K.dtype, [OWN_STAGES] + K.block_type.shape, K.layout)
    v_tiles = gl.allocate_shared_memory(V.dtype, [OWN_STAGES] + V.block_type.shape, V.layout)
    k_raw = k_tiles.index(0)
    v_raw = v_tiles.index(0)
    if SILU_BACKWARD:
        k_raw = gl.allocate_shared_memory(K.dtype, K.block_type.shape, K.layout)
        v_raw = gl.allocate_shared_memory(V.dtype, V.block_type.shape, V.layout)
    square: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    rounded = gl.allocate_shared_memory(Q.dtype, [D, D], square)
    vector: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    departs = gl.allocate_shared_memory(gl.float32, [C], vector)
    exponents = gl.allocate_shared_memory(gl.float32, [C], vector)
    loaded = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    written = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    read = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    k_arrived = gl.allocate_shared_memory(gl.int64, [OWN_STAGES, 1], mbarrier.MBarrierLayout())
    v_arrived = gl.allocate_shared_memory(gl.int64, [OWN_STAGES, 1], mbarrier.MBarrierLayout())
    k_fetched = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    v_fetched = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(loaded.index(stage), count=2)
        mbarrier.init(free.index(stage), count=4)
    for stage in gl.static_range(OWN_STAGES):
        mbarrier.init(k_arrived.index(stage), count=1)
        mbarrier.init(v_arrived.index(stage), count=1)
    mbarrier.init(written, count=2)
    mbarrier.init(read, count=2)
    mbarrier.init(k_fetched, count=1)
    mbarrier.init(v_fetched, count=1)
    fence_async_shared()
    last = start + (chunks - 1) * C
    for stage in gl.static_range(STAGES):
        _fetch(Q, loaded.index(stage), row, last - stage * C, h, 0, q_tiles.index(stage), stage < chunks)
        _fetch(DO, loaded.index(stage), row, last - stage * C, h, 0, do_tiles.index(stage), stage < chunks)
    for stage in gl.static_range(OWN_STAGES):
        _fetch(K, k_arrived.index(stage), row, last - stage * C, h, 0, k_tiles.index(stage), stage < chunks)
        _fetch(V, v_arrived.index(stage), row, last - stage * C, h, 0, v_tiles.index(stage), stage < chunks)
    if SILU_BACKWARD:
        _fetch(KRaw, k_fetched, row, last, h, 0, k_raw, chunks > 0)
        _fetch(VRaw, v_fetched, row, last, h, 0, v_raw, chunks > 0)
    # Behind the first loads, which then do not wait for the slope.
    places = gl.arange(0, C, layout=gl.BlockedLayout([1], [32], [4], [0])).to(gl.float32)
    departs.store(gl.exp2(-s * (places + 1)))
    exponents.store(-s * places)
    if VARLEN:
        n = tokens - (chunks - 1) * C
        if (chunks > 0) & (n < C):
            mbarrier.wait(loaded.index(0), 0)
            _zero_rows(q_tiles.index(0).reshape([C, D]), n, C, D)
            _zero_rows(do_tiles.index(0).reshape([C, D]), n, C, D)
            fence_async_shared()

    bars = (loaded, free, written, read)
    of_dv = (q_tiles, do_tiles, rounded, exponents)
    of_dk = (do_tiles, q_tiles, rounded, exponents)
    keys = (K, VRaw, k_tiles, v_raw, k_arrived, v_fetched)
    values = (V, KRaw, v_tiles, k_raw, v_arrived, k_fetched)
    of_rows = (s, row, start, h, tokens, chunks, stride_ot)
    kept = (q_tiles, do_tiles, rounded, departs, origin, left, is_first)
    of_state = (s, row, start, h, tokens, chunks)
    gl.warp_specialize(
        [
            (_grad, (DV, dv_rows, keys, of_dv, bars, of_rows, C, D, True, VARLEN, SILU_BACKWARD, STAGES)),
            (
                _grad,
                (DK, dk_rows, values, of_dk, bars, of_rows, C, D, False, VARLEN, SILU_BACKWARD, STAGES),
            ),
            (_keep, ((Q, q_tiles), kept, bars, of_state, C, D, 0, ENTRY, LEAVING, PDL, STAGES)),
            (_keep, ((DO, do_tiles), kept, bars, of_state, C, D, 1, ENTRY, LEAVING, PDL, STAGES)),
        ],
        [4, 4, 4],
        [128, 128, 128],
    )
