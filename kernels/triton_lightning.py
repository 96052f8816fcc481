"""Triton kernels of lightning attention: sweeps over chunks of tokens, states of spans, and their scan.

Words: a document is a row of the batch or what cu_seqlens marks; a span is up to `SEGMENT` tokens of a document,
anchored at its start; a chunk is C tokens of a span. All exponents are non-positive. Rows are addressed in int64 or by
tensor descriptors [B, T, H, D] with the strides of the caller's tensors.

PDL: the GPU can launch a kernel before the one in front has ended (programmatic dependent launch). Ours let the next one start at
once. Launched so, all programs of a kernel wait for the one in front where they need its states, or before they write their own, so
that when one has ended, all in front of it have. The first kernel of a call is never early: its inputs are complete by then.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

__all__ = ["LOG2_E"]

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _within(edge, T):
    """An edge of a document moved into [0, T], int32: wrong ones may give wrong results, but lead out of no tensor."""
    return tl.maximum(tl.minimum(edge, T), 0).to(tl.int32)


@triton.jit
def _document(w, Cu, T, SEGMENT, documents):
    """The document of a pack that owns span w.

    It owns the spans from cu[d] // SEGMENT + d on, which is room enough for each and needs no prefix sum; spans without
    tokens remain. The document after the last is the padding of the pack.
    """
    found = 0
    for first in range(0, documents + 1, 128):
        d = first + tl.arange(0, 128)
        starts = _within(tl.load(Cu + d, mask=d <= documents, other=0), T)
        found += tl.sum(((d <= documents) & (starts // SEGMENT + d <= w)).to(tl.int32))
    return tl.maximum(found - 1, 0)


@triton.jit
def _span(w, document, Cu, T, SEGMENT, documents, VARLEN: tl.constexpr):
    """Span w -> (row of the batch, document, first token, tokens, first of its document?, last of its document?, the document's edges).

    document: of a pack, the one that owns the span.
    """
    if VARLEN:
        row = 0
        begin = _within(tl.load(Cu + document), T)
        end = tl.maximum(_within(tl.load(Cu + document + 1, mask=document < documents, other=T), T), begin)
        # Below 0 where cu_seqlens does not rise from 0: a span of no document.
        index = w - (begin // SEGMENT + document)
    else:
        spans = tl.maximum(tl.cdiv(T, SEGMENT), 1)
        document = w // spans
        row = document
        begin = 0
        end = T
        index = w % spans
    start = begin + index * SEGMENT
    tokens = tl.where(index < 0, 0, tl.maximum(tl.minimum(end - start, SEGMENT), 0))
    is_last = (index >= 0) & (start <= end) & (start + SEGMENT >= end) & ((start < end) | (index == 0))
    return row, document, start, tokens, index == 0, is_last, begin, end


@triton.jit
def _locate(w, Cu, T, SEGMENT, documents, VARLEN: tl.constexpr):
    """`_span` of span w."""
    document = 0
    if VARLEN:
        document = _document(w, Cu, T, SEGMENT, documents)
    return _span(w, document, Cu, T, SEGMENT, documents, VARLEN)


@triton.jit
def _border(row, token, T, SEGMENT):
    """Where the state at `token`, the border of two spans of a document, lies among [B * (ceil(T / SEGMENT) - 1), H, D, D].

    Spans of a document are anchored at its start. Borders of different documents lie more than SEGMENT apart, so that no two
    share a place, however many documents there are.
    """
    return row * (tl.cdiv(T, SEGMENT) - 1) + token // SEGMENT - 1


@triton.jit
def _origin(
    Entry, States, row, document, h, border, begins, tokens, T, H, SPACING, D: tl.constexpr, ENTRY: tl.constexpr
):
    """(Where the state lies that enters a span at `border`, whether there is one), for `_enter`. ENTRY and the tensors: as in `sweep`.

    begins: whether the span is the first of its document in the direction of the sweep.
    """
    entry = Entry + (document.to(tl.int64) * H + h) * D * D
    given = begins
    if ENTRY >= 2:
        goes_on = (begins == 0) & (tokens > 0)
        given = (begins | goes_on) if ENTRY == 3 else goes_on
        if goes_on:
            entry = States + (_border(row, border, T, SPACING).to(tl.int64) * H + h) * D * D
    return entry, given


@triton.jit
def _enter(state, origin, places, inside, PDL: tl.constexpr):
    """The state that enters a span, from `_origin`; state: zeros.

    places: where the elements of a state lie in memory; inside: those that do.
    """
    entry, given = origin
    if PDL:
        gdc_wait()
    if given:
        state = tl.load(entry + places, mask=inside, other=0.0)
    return state


@triton.jit
def _tile(X, row, t, h, e, C: tl.constexpr, E: tl.constexpr):
    """[C, E] of tokens t.. and channels e.. through a descriptor over [B, T, H, D]; zero beyond its ends."""
    return X.load([row, t, h, e]).reshape(C, E)


@triton.jit
def _dot(a, b, accumulator, PRECISION: tl.constexpr):
    """accumulator + a b, float32. PRECISION: tl.dot's input_precision, or "upcast" in the interpreter, which multiplies no bf16."""
    if PRECISION == "upcast":
        return tl.dot(a.to(tl.float32), b.to(tl.float32), accumulator, input_precision="ieee")
    return tl.dot(a, b, accumulator, input_precision=PRECISION)


@triton.jit
def _head(x, n, C: tl.constexpr):
    """x with the rows from n on zeroed."""
    return tl.where((tl.arange(0, C) < n)[:, None], x, 0.0).to(x.dtype)


@triton.jit
def _decays(s, n, C: tl.constexpr, REVERSE: tl.constexpr):
    """Of a chunk of n <= C tokens: of pairs [C (j), C (i)], of the state read by i [C], of j towards the next state [C]."""
    i = tl.arange(0, C)
    if REVERSE:
        distance = i[:, None] - i[None, :]
        reading = n - 1 - i
        leaving = i + 1
    else:
        distance = i[None, :] - i[:, None]
        reading = i + 1
        leaving = n - 1 - i
    pairs = tl.where(distance >= 0, tl.exp2(-s * tl.maximum(distance, 0).to(tl.float32)), 0.0)
    read = tl.exp2(-s * tl.maximum(reading, 0).to(tl.float32))
    left = tl.exp2(-s * tl.maximum(leaving, 0).to(tl.float32))
    return pairs, read, left


@triton.jit
def _advance(a, b, v, state, pairs, read, left, whole, PRECISION: tl.constexpr, EXACT: tl.constexpr):
    """(out, next state) of one chunk, float32, both transposed: [BV, C] and [BV, DP].

    The state is then the left operand of its product and stays in registers. EXACT: the decayed values enter the state in
    two 16-bit parts, so that the rounding of the state as an operand is that path's only error beside the output's own.
    """
    scores = _dot(b, tl.trans(a), None, PRECISION) * pairs
    out = _dot(state.to(a.dtype), tl.trans(a), None, PRECISION)
    turned = tl.trans(v)
    out = _dot(turned, scores.to(v.dtype), out * read[None, :], PRECISION)
    decayed = turned * left[None, :]
    leading = decayed.to(v.dtype)
    state = _dot(leading, b, state * whole, PRECISION)
    if EXACT:
        state = _dot((decayed - leading.to(tl.float32)).to(v.dtype), b, state, PRECISION)
    return out, state


@triton.jit
def _chunk(
    A,
    B_,
    V,
    row,
    t,
    h,
    e,
    n,
    state,
    pairs,
    read,
    left,
    whole,
    C: tl.constexpr,
    DP: tl.constexpr,
    BV: tl.constexpr,
    RAGGED: tl.constexpr,
    PRECISION: tl.constexpr,
    EXACT: tl.constexpr,
):
    """(out, next state) of the n tokens from t on; all C of them unless RAGGED."""
    a = _tile(A, row, t, h, 0, C, DP)
    b = _tile(B_, row, t, h, 0, C, DP)
    v = _tile(V, row, t, h, e, C, BV)
    if RAGGED:
        b = _head(b, n, C)
        v = _head(v, n, C)
    out, state = _advance(a, b, v, state, pairs, read, left, whole, PRECISION, EXACT)
    return tl.trans(out), state


@triton.jit
def _store_rows(Rows, out, t, n, columns, stride_t, C: tl.constexpr, D: tl.constexpr):
    """Store the first n rows of out [C, BV] at the tokens from t on."""
    i = tl.arange(0, C)
    rows = (t + i).to(tl.int64)[:, None] * stride_t
    tl.store(Rows + rows, out.to(Rows.dtype.element_ty), mask=(i < n)[:, None] & (columns < D)[None, :])


@triton.jit(do_not_specialize=["T", "documents"])
def sweep(
    A,
    B_,
    V,
    Out,
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
    D: tl.constexpr,
    DP: tl.constexpr,
    BV: tl.constexpr,
    C: tl.constexpr,
    VARLEN: tl.constexpr,
    REVERSE: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    ENTRY: tl.constexpr,
    SAVING: tl.constexpr,
    LEAVING: tl.constexpr,
    PRECISION: tl.constexpr,
    EXACT: tl.constexpr,
    PDL: tl.constexpr,
    STAGES: tl.constexpr,
):
    """out of one head, value block and span. Grid: spans * H * ceil(D / BV).

    A, B_: descriptors with blocks [1, C, 1, DP]; V, Out: [1, C, 1, BV]. OutRows: the tensor behind Out, for chunks that are not
    full.
    ENTRY: a sum of 1, there is Entry; 2, there are States.
    Entry: float32 [documents, H, D, D], what documents start from, else zero.
    States: [., H, D, D], what their other spans start from, by `_border` among states every SPACING tokens, of which
    SEGMENT is a multiple.
    TRANSPOSED: the states in memory are the transposes of the sweep's own.
    Saved: as States for spans of SAVE tokens, written. SAVE is a multiple of C.
    Left: [documents, H, D, D], the state after the last token of a document in the direction of the sweep.
    """
    if PDL:
        gdc_launch_dependents()
    BLOCKS: tl.constexpr = (D + BV - 1) // BV
    pid = tl.program_id(0)
    w = pid // (H * BLOCKS)
    h = pid // BLOCKS % H
    e = pid % BLOCKS * BV
    row, document, start, tokens, is_first, is_last, _, _ = _locate(w, Cu, T, SEGMENT, documents, VARLEN)
    channels = tl.arange(0, DP)
    columns = e + tl.arange(0, BV)
    inside = (columns < D)[:, None] & (channels < D)[None, :]
    if TRANSPOSED:
        places = columns[:, None] * D + channels[None, :]
    else:
        places = columns[:, None] + channels[None, :] * D
    out_rows = OutRows + row.to(tl.int64) * stride_ob + h * stride_oh + columns[None, :]

    if VARLEN:
        if document == documents:
            zeros = tl.zeros([C, BV], tl.float32)
            for t in range(0, tokens, C):
                _store_rows(out_rows, zeros, start + t, tokens - t, columns, stride_ot, C, D)
            if is_first:
                before = _within(tl.load(Cu), T)
                for t in range(0, before, C):
                    _store_rows(out_rows, zeros, t, before - t, columns, stride_ot, C, D)
            tokens = 0
            is_first = False
            is_last = False

    begins = is_first
    ends = is_last
    border = start
    if REVERSE:
        begins = is_last
        ends = is_first
        border = start + SEGMENT
    state = tl.zeros([BV, DP], tl.float32)
    if ENTRY:
        origin = _origin(Entry, States, row, document, h, border, begins, tokens, T, H, SPACING, D, ENTRY)
        state = _enter(state, origin, places, inside, PDL)
    saved_states = Saved + (_border(row, start, T, SAVE).to(tl.int64) * H + h) * D * D

    s = tl.load(Slopes + h) * LOG2_E
    whole = tl.exp2(-s * C)
    full = tokens // C * C
    if REVERSE:
        # 1 to C tokens of the last chunk stay: a branch around a product before the loop makes ptxas serialise all of them
        full = tl.maximum(tl.cdiv(tokens, C) - 1, 0) * C
    rest = tokens - full

    if REVERSE:
        pairs, read, left = _decays(s, rest, C, REVERSE)
        out, state = _chunk(
            A, B_, V, row, start + full, h, e, rest, state, pairs, read, left, tl.exp2(-s * rest),
            C, DP, BV, True, PRECISION, EXACT,
        )  # fmt: skip
        _store_rows(out_rows, out, start + full, rest, columns, stride_ot, C, D)

    pairs, read, left = _decays(s, C, C, REVERSE)
    for saved in range(0, tl.maximum(full, 1), SAVE):
        if SAVING:
            tl.store(saved_states + places, state, mask=inside & (saved > 0))
            saved_states += H * D * D
        for t0 in tl.range(saved, tl.minimum(saved + SAVE, full), C, num_stages=STAGES):
            t = start + t0
            if REVERSE:
                t = start + full - C - t0
            out, state = _chunk(
                A, B_, V, row, t, h, e, C, state, pairs, read, left, whole,
                C, DP, BV, False, PRECISION, EXACT,
            )  # fmt: skip
            Out.store([row, t, h, e], out.to(OutRows.dtype.element_ty).reshape(1, C, 1, BV))

    if not REVERSE:
        if rest > 0:
            if SAVING:
                if (full > 0) & (full % SAVE == 0):
                    tl.store(saved_states + places, state, mask=inside)
            pairs, read, left = _decays(s, rest, C, REVERSE)
            out, state = _chunk(
                A, B_, V, row, start + full, h, e, rest, state, pairs, read, left, tl.exp2(-s * rest),
                C, DP, BV, True, PRECISION, EXACT,
            )  # fmt: skip
            _store_rows(out_rows, out, start + full, rest, columns, stride_ot, C, D)

    if LEAVING:
        tl.store(Left + (document.to(tl.int64) * H + h) * D * D + places, state, mask=inside & ends)


@triton.jit
def _gather(b, v, state, s, j, tokens, REVERSE: tl.constexpr, PRECISION: tl.constexpr, EXACT: tl.constexpr):
    """state [BV, DP] and what the tokens j of a span of `tokens` add to it; transposed and EXACT as in `_advance`."""
    if REVERSE:
        gap = j + 1
    else:
        gap = tokens - 1 - j
    weighted = tl.trans(v) * tl.exp2(-s * tl.maximum(gap, 0).to(tl.float32))[None, :]
    leading = weighted.to(v.dtype)
    state = _dot(leading, b, state, PRECISION)
    if EXACT:
        state = _dot((weighted - leading.to(tl.float32)).to(v.dtype), b, state, PRECISION)
    return state


@triton.jit(do_not_specialize=["T", "documents"])
def local_states(
    B_,
    V,
    Slopes,
    Cu,
    States,
    Left,
    T,
    H,
    SEGMENT,
    SPAN,
    documents,
    D: tl.constexpr,
    DP: tl.constexpr,
    BV: tl.constexpr,
    C: tl.constexpr,
    VARLEN: tl.constexpr,
    REVERSE: tl.constexpr,
    LEAVING: tl.constexpr,
    HORIZON: tl.constexpr,
    PRECISION: tl.constexpr,
    EXACT: tl.constexpr,
    PDL: tl.constexpr,
    STAGES: tl.constexpr,
):
    """What a span alone leaves behind, float32 [D, D] (REVERSE: the gradient before it). Grid as in `sweep`.

        sum_j e^{-s(n-1-j)} b_j^T v_j   forward           sum_j e^{-s(j+1)} b_j^T v_j   REVERSE

    It goes to States at the border (`_border`) with the span that follows. LEAVING: where none does, to Left [documents, H, D, D],
    unless the document is empty. Else spans are left out that no state at a multiple of SPAN tokens comes from; SPAN is one of SEGMENT.
    HORIZON: chunks whose every weight is exactly zero in float32 are not read; they would add exact zeros.
    """
    BLOCKS: tl.constexpr = (D + BV - 1) // BV
    pid = tl.program_id(0)
    w = pid // (H * BLOCKS)
    h = pid // BLOCKS % H
    e = pid % BLOCKS * BV
    if PDL:
        gdc_launch_dependents()
    row, document, start, tokens, is_first, is_last, begin, end = _locate(w, Cu, T, SEGMENT, documents, VARLEN)
    needed = (document < documents) & (tokens > 0)
    ends = is_last
    border = start + SEGMENT
    if REVERSE:
        ends = is_first
        border = start
    if not LEAVING:
        if REVERSE:
            needed = needed & (border - begin >= SPAN)
        else:
            needed = needed & (border - begin <= (end - begin - 1) // SPAN * SPAN)
    if needed:
        target = States + (_border(row, border, T, SEGMENT).to(tl.int64) * H + h) * D * D
        if LEAVING:
            if ends:
                target = Left + (document.to(tl.int64) * H + h) * D * D
        s = tl.load(Slopes + h) * LOG2_E
        low = 0
        high = tokens
        if HORIZON:
            # 2^-150 rounds to zero in float32, denormals included
            reach = tl.minimum(150.0 / tl.maximum(s, 1e-30) + 2.0, 1e9).to(tl.int32)
            if REVERSE:
                high = tl.minimum(tokens, reach)
            else:
                low = tl.maximum(tokens - reach, 0) // C * C
        i = tl.arange(0, C)
        state = tl.zeros([BV, DP], tl.float32)
        whole = tokens // C * C
        for t in tl.range(low, tl.minimum(tl.cdiv(high, C) * C, whole), C, num_stages=STAGES):
            b = _tile(B_, row, start + t, h, 0, C, DP)
            v = _tile(V, row, start + t, h, e, C, BV)
            state = _gather(b, v, state, s, t + i, tokens, REVERSE, PRECISION, EXACT)
        if high > whole:
            b = _head(_tile(B_, row, start + whole, h, 0, C, DP), tokens - whole, C)
            v = _head(_tile(V, row, start + whole, h, e, C, BV), tokens - whole, C)
            state = _gather(b, v, state, s, whole + i, tokens, REVERSE, PRECISION, EXACT)
        channels = tl.arange(0, DP)
        columns = e + tl.arange(0, BV)
        places = columns[:, None] + channels[None, :] * D
        if PDL:
            # Not before: its inputs are older than the kernel in front.
            gdc_wait()
        tl.store(target + places, state, mask=(columns < D)[:, None] & (channels < D)[None, :])
    else:
        if PDL:
            gdc_wait()


@triton.jit(do_not_specialize=["T"])
def scan_states(
    States,
    Initial,
    Left,
    Slopes,
    Cu,
    T,
    H,
    SEGMENT,
    SPAN,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    VARLEN: tl.constexpr,
    REVERSE: tl.constexpr,
    INITIAL: tl.constexpr,
    LEAVING: tl.constexpr,
    PDL: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Turn what spans leave behind (`local_states`, with its SPAN) into what enters the next, in place.

    Grid: documents * H * D * D / BLOCK.
    Initial: float32 [documents, H, D, D], entering each document (REVERSE: the gradient of its final state).
    LEAVING: Left, of `local_states`, becomes what leaves each document.
    """
    if PDL:
        gdc_launch_dependents()
    BLOCKS: tl.constexpr = D * D // BLOCK
    pid = tl.program_id(0)
    document = pid // (H * BLOCKS)
    h = pid // BLOCKS % H
    inner = pid % BLOCKS * BLOCK + tl.arange(0, BLOCK)
    element = (document.to(tl.int64) * H + h) * D * D + inner
    row = document
    begin = 0
    length = T
    if VARLEN:
        row = 0
        begin = _within(tl.load(Cu + document), T)
        length = tl.maximum(_within(tl.load(Cu + document + 1), T) - begin, 0)
    spans = tl.maximum(tl.cdiv(length, SEGMENT), 1)
    steps = spans - 1
    if not LEAVING:
        if REVERSE:
            steps = tl.maximum(spans - SPAN // SEGMENT, 0)
        else:
            steps = tl.maximum(length - 1, 0) // SPAN * (SPAN // SEGMENT)
    s = tl.load(Slopes + h) * LOG2_E
    if PDL:
        gdc_wait()
    state = tl.zeros([BLOCK], tl.float32)
    if INITIAL:
        state = tl.load(Initial + element)
    for step in tl.range(0, steps, num_stages=STAGES):
        index = step
        border = begin + (index + 1) * SEGMENT
        if REVERSE:
            index = spans - 1 - step
            border = begin + index * SEGMENT
        place = States + (_border(row, border, T, SEGMENT).to(tl.int64) * H + h) * D * D + inner
        left = tl.load(place)
        tokens = tl.minimum(length - index * SEGMENT, SEGMENT)
        state = state * tl.exp2(-s * tokens.to(tl.float32)) + left
        tl.store(place, state)
    if LEAVING:
        tokens = tl.minimum(length, SEGMENT)
        if not REVERSE:
            tokens = length - (spans - 1) * SEGMENT
        left = tl.load(Left + element, mask=(inner >= 0) & (length > 0), other=0.0)
        tl.store(Left + element, state * tl.exp2(-s * tokens.to(tl.float32)) + left)


@triton.jit(do_not_specialize=["T", "documents"])
def zero_padding(X, stride_t, stride_h, Cu, T, H, documents, W: tl.constexpr, BLOCK: tl.constexpr):
    """Zero the rows of X [1, T, H, W] that are of no document of a pack. Grid: any; a program takes every so many rows."""
    begin = _within(tl.load(Cu), T)
    end = tl.maximum(_within(tl.load(Cu + documents), T), begin)
    for i in range(tl.program_id(0), begin + T - end, tl.num_programs(0)):
        t = tl.where(i < begin, i, i - begin + end)
        for first in range(0, H * W, BLOCK):
            at = first + tl.arange(0, BLOCK)
            zeros = tl.zeros([BLOCK], X.dtype.element_ty)
            tl.store(X + t.to(tl.int64) * stride_t + at // W * stride_h + at % W, zeros, mask=at < H * W)
