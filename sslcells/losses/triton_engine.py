"""The tiled engine as fused GPU kernels, one Triton program for a block of anchors.

The interface is `torch_engine`'s. Shape letters: A anchors of this rank, R references (the rows of all ranks, this
rank's anchors being refs[offset : offset + A]), D width. A program keeps its anchors on the chip, walks over the
references in tiles and reduces each tile of similarities where it was made; backward makes the tile again from the rows
instead of reading it (FlashAttention-2, arXiv 2307.08691, algorithm 2). cos ≤ 1 bounds the logits, so unlike there no
running maximum is needed, and partial sums simply add. Only at a low temperature, where float32 has no number for the
smallest summand, do the kernels keep one, and make two exponentials of a similarity: one for each of its two rows.

No atomics: where the anchors are too few to fill the device, a second grid axis splits the references, and its partial
results are reduced in a fixed order. The same bits from run to run on the same kind of device.
"""

# mypy: allow-incomplete-defs
# Triton takes the annotation of constants alone.

from typing import Any, Literal, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sslcells.losses.torch_engine import FLOAT32_INV_T, Exclude, RowSums

Precision = Literal["bf16", "fp16", "tf32", "fp32"]
"""Of the products' inputs; sums, logits and exponentials are float32 always. fp16 is for weights around one only."""

WIDEST = 512
"""Widest rows whose sums still fit a program's registers."""

_INTERPRETED: bool = triton.knobs.runtime.interpret
_LOG2_E = 1.4426950408889634
_PARTIAL_BYTES = 64 * 2**20
_PROGRAMS_PER_PROCESSOR = 8  # several waves, so that the last one, not full, costs little
_TILES_PER_PROGRAM = 8  # fewer, and loading the anchors costs more than filling the device gains
_SPLIT_SCALE = 4096.0
_NOWHERE = tl.constexpr(2**31 - 1)
_LEAST = tl.constexpr(-1e30)  # below every logarithm of a summand, and a number
# Of a product of two scaled unit rows, more than their low halves add: each is 2⁻¹¹ of its row at most.
_DROPPED = tl.constexpr(1.05 * 2.0**-10 * _SPLIT_SCALE**2)
_SIZES = ["offset", "count", "total", "span"]  # no kernel of its own for each value that 16 divides


class _Tiling(NamedTuple):
    rows: int
    """anchors of a program"""
    columns: int
    """references of a tile"""
    warps: int
    stages: int
    """tiles in flight"""
    registers: int | None = None
    """a thread's, where fewer let two programs share a processor: one multiplies while the other exponentiates"""


def available(device: torch.device) -> bool:
    """True if the kernels run on this device: CUDA of compute capability 8.0 or newer, or Triton's interpreter."""
    if _INTERPRETED:
        return True
    on_cuda = device.type == "cuda" and torch.version.cuda is not None
    return on_cuda and torch.cuda.get_device_capability(device) >= (8, 0)


def row_sums(
    refs: Tensor,
    offset: int,
    count: int,
    inv_t: float,
    exclude: Exclude,
    group: Tensor | None = None,
    *,
    figures: bool = True,
    precision: Precision = "bf16",
    splits: int | None = None,
) -> RowSums:
    """Sums, and with `figures` largest summands, of exp(inv_t · (cos − 1)).

    (R, D) unit rows, (R,) int32 codes of groups → (A,) float32 each. Above FLOAT32_INV_T the summands are divided by
    the largest of their row, and bf16 stands for tf32.
    """
    low = inv_t > FLOAT32_INV_T
    precision = _finer(precision, low)
    tiling = _tiling("sums", _padded(refs.shape[1]), precision, _shared_memory(refs.device))
    splits = splits or _splits(refs, count, tiling, bytes_per_anchor=12)
    group = group if figures else None
    partial = refs.new_empty(splits, count, dtype=torch.float32)
    largest = torch.empty_like(partial) if figures or low else None
    negative = torch.empty_like(partial) if group is not None else None
    arrays = (_operand(refs, tiling, precision), exclude.partner, *_codes(exclude), group, partial, largest, negative)
    _launch(_row_sums_kernel, tiling, precision, refs, splits, arrays, offset, count, inv_t * _LOG2_E, LOW=low)
    shift = None
    if low:
        assert largest is not None
        shift, partial, largest, negative = _shifted(partial, largest, negative, inv_t)
    if not figures:
        return RowSums(partial.sum(0), None, None, shift)
    assert largest is not None
    found = RowSums(partial.sum(0), largest.amax(0), None, shift)
    return found._replace(largest_negative=found.largest if negative is None else negative.amax(0))


def _shifted(
    partial: Tensor, largest: Tensor, negative: Tensor | None, inv_t: float
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Sums that each split divided by its own largest summand, and logarithms, as numbers with one shift for all."""
    shift = largest.amax(0)
    # An anchor without references has a sum of 0; the loss's floor for it must be below every similarity.
    shift = torch.where(shift > _LEAST.value, shift, -4 * inv_t * _LOG2_E)
    largest = (largest - shift).exp2()
    return shift, partial * largest, largest, None if negative is None else (negative - shift).exp2()


def _finer(precision: Precision, low: bool) -> Precision:
    """bf16's error of a cosine, times 1/τ, is too much of an exponential at low temperatures."""
    return "tf32" if low and precision == "bf16" else precision


def weighted_rows(
    refs: Tensor,
    offset: int,
    count: int,
    inv_t: float,
    weight: Tensor,
    exclude: Exclude,
    shift: Tensor | None = None,
    *,
    precision: Precision = "bf16",
    splits: int | None = None,
) -> Tensor:
    """Σ_j E_ij (weight_i + weight_j) z_j with E as in `row_sums`: (R, D) unit rows, (R,) weights → (A, D) float32.

    The weights may be of any magnitude of which E·weight is a moderate number: the two meet in float32. With the shifts
    of `row_sums`, (R,) of all references, it is Σ_j E_ij (weight_i / 2^shift_i + weight_j / 2^shift_j) z_j.
    """
    precision = _finer(precision, shift is not None)
    width = _padded(refs.shape[1])
    tiling = _tiling("rows", width, precision, _shared_memory(refs.device))
    splits = splits or _splits(refs, count, tiling, bytes_per_anchor=4 * width)
    partial = refs.new_empty(splits, count, width, dtype=torch.float32)
    rows = _operand(refs, tiling, precision)
    arrays = (rows, weight.float(), shift, exclude.partner, *_codes(exclude), partial)
    _launch(_weighted_rows_kernel, tiling, precision, refs, splits, arrays, offset, count, inv_t * _LOG2_E)
    out = partial[0] if splits == 1 else partial.sum(0)
    return out[:, : refs.shape[1]]


def hardest(
    refs: Tensor,
    offset: int,
    count: int,
    positive: Tensor,
    source: Tensor | None,
    lab: Tensor | None = None,
    *,
    precision: Precision | Literal["exact"] = "exact",
    splits: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Index of each anchor's least similar positive and most similar negative, -1 where there is none.

    Positives have the anchor's code, negatives another code (and another source, where sources are given, and the same
    laboratory, where these are); a code below zero has no positives and is everyone's negative; the lowest index wins
    ties. refs (R, D), positive, source and lab (R,) int32 codes → two (A,) int64.

    "exact" stands for float32 rows by a high and a low float16 half and three products of them, 22 bits: as good as
    float32's own rounding at several times its speed, where bf16 alone picks another row for a third of the anchors
    of tight classes, and two halves in bf16 (16 bits) still for one in a thousand. The product of the high halves tells
    which tiles may hold a harder row, as the others cannot add more than a bound; only there are all three made.
    """
    tiling = _tiling("hardest", _padded(refs.shape[1]), precision, _shared_memory(refs.device))
    if precision == "exact":
        # Scaled away from float16's subnormals; unit rows cannot overflow, and only the order of products matters.
        scaled = refs.float() * _SPLIT_SCALE
        highs = _operand(scaled, tiling, "fp16")
        lows = _operand(scaled.sub_(scaled.half()), tiling, "fp16")
    else:
        highs, lows = _operand(refs, tiling, precision), None
    splits = splits or _splits(refs, count, tiling, bytes_per_anchor=16)
    value = refs.new_empty(2, splits, count, dtype=torch.float32)
    index = torch.empty_like(value, dtype=torch.int32)
    arrays = (highs, lows, positive, source, lab, value, index)
    _launch(_hardest_kernel, tiling, precision, refs, splits, arrays, offset, count)
    nowhere = _NOWHERE.value
    best = index.masked_fill(value != value.amax(1, keepdim=True), nowhere).amin(1).long()
    far, near = best.masked_fill(best == nowhere, -1)
    return far, near


def _tiling(kernel: Literal["sums", "rows", "hardest"], width: int, precision: str, room: int) -> _Tiling:
    """Preferred tiles, cut down until the anchors and the tiles in flight fit `room` bytes of shared memory.

    Found by compiling for Hopper, without one: at width 128 the first two kernels leave room for two programs on a
    processor, few registers spill and ptxas nowhere waits after each product (its notice C7512), as it does for
    64 columns of the second kernel in 128 registers.
    """
    if precision == "fp32":  # single multiply-adds, their operands in registers: exact, and slower than torch's
        return _Tiling(rows=32 if width <= 128 else 16, columns=16, warps=4, stages=1)
    shared = 128 if width <= 128 else None
    if kernel == "sums":
        tiling = _Tiling(rows=256, columns=64, warps=8, stages=2, registers=128)
    elif kernel == "hardest":
        tiling = _Tiling(128, columns=64, warps=8, stages=3, registers=None if precision == "exact" else 128)
    elif precision == "tf32":
        tiling = _Tiling(rows=64, columns=32, warps=8, stages=2, registers=shared)
    else:
        tiling = _Tiling(64 if width == WIDEST else 128, 32 if width == 128 else 64, 8, stages=4, registers=shared)
    row_bytes = width * {"bf16": 2, "fp16": 2, "tf32": 4, "exact": 4}[precision]
    while (tiling.rows + tiling.stages * tiling.columns) * row_bytes > room:
        if tiling.stages > 2:
            tiling = tiling._replace(stages=tiling.stages - 1)
        elif tiling.columns > (32 if tiling.rows > 64 else 16):
            tiling = tiling._replace(columns=tiling.columns // 2)
        elif tiling.rows > 16:
            tiling = tiling._replace(rows=tiling.rows // 2)
        else:
            tiling = tiling._replace(stages=1)
    return tiling


def _shared_memory(device: torch.device) -> int:
    """Bytes that a program may fill with rows, less what Triton needs for reductions and changes of layout."""
    if device.type != "cuda":
        return 200 * 2**10
    properties: Any = torch.cuda.get_device_properties(device)  # torch's stub lacks the attribute
    return int(properties.shared_memory_per_block_optin) - 24 * 2**10


def _padded(width: int) -> int:
    """Width as the kernels see it: a power of two that tensor cores take."""
    if width > WIDEST:
        raise ValueError(
            f"rows are {width} wide; the fused kernels end at {WIDEST}, and the torch engine takes any width"
        )
    return max(16, 1 << (width - 1).bit_length())


def _operand(refs: Tensor, tiling: _Tiling, precision: Precision) -> Tensor:
    """The rows as the products take them, zero-padded to whole tiles and to a power of two in width.

    One copy of R rows makes every load of the kernels whole, aligned and without a mask.
    """
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
    if precision == "tf32":
        # To the nearest of 10 bits: tensor cores cut off the rest, which at temperature 0.05 makes 20 times the error.
        refs = (refs.float().view(torch.int32) + 0x1000 & ~0x1FFF).view(torch.float32)
    shape = _ceil_div(refs.shape[0], tiling.columns) * tiling.columns, _padded(refs.shape[1])
    if refs.shape == shape:
        return refs.to(dtype)
    rows = refs.new_zeros(shape, dtype=dtype)
    rows[: refs.shape[0], : refs.shape[1]] = refs
    return rows


def _codes(exclude: Exclude) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Positive, source and laboratory codes where any pairs are left out by them, else none of them."""
    if exclude.source is None and exclude.lab is None:
        return None, None, None
    assert exclude.positive is not None
    return exclude.positive, exclude.source, exclude.lab


def _splits(refs: Tensor, count: int, tiling: _Tiling, bytes_per_anchor: int) -> int:
    """How many programs share the references of one block of anchors."""
    if refs.device.type != "cuda":
        return 1
    processors = torch.cuda.get_device_properties(refs.device).multi_processor_count
    wanted = _PROGRAMS_PER_PROCESSOR * processors // _ceil_div(count, tiling.rows)
    worthwhile = refs.shape[0] // (tiling.columns * _TILES_PER_PROGRAM)
    affordable = _PARTIAL_BYTES // (count * bytes_per_anchor)
    return max(1, min(wanted, worthwhile, affordable))


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def _launch(
    kernel: Any,
    tiling: _Tiling,
    precision: Precision | Literal["exact"],
    refs: Tensor,
    splits: int,
    arrays: tuple[Tensor | None, ...],
    offset: int,
    count: int,
    *numbers: float,
    **constants: bool,
) -> None:
    """Run a kernel for every block of anchors and every split of the references.

    Blocks run fastest, so that the programs on the chip at one time read the same references out of L2.
    """
    total, width = refs.shape
    tiles = _ceil_div(total, tiling.columns)
    span = _ceil_div(tiles, splits) * tiling.columns  # the last splits may get less, or nothing
    with torch.cuda.device_of(refs):  # type: ignore[no-untyped-call]
        kernel[(_ceil_div(count, tiling.rows), splits)](
            *(array if array is None else array.contiguous() for array in arrays),
            offset,
            count,
            total,
            span,
            *numbers,
            WIDTH=_padded(width),
            ROWS=tiling.rows,
            COLUMNS=tiling.columns,
            DOT="tf32" if precision == "tf32" else "ieee",
            **constants,
            num_warps=tiling.warps,
            num_stages=tiling.stages,
            maxnreg=tiling.registers,
        )


@triton.jit
def _load_anchors(rows, anchor, WIDTH: tl.constexpr):
    """(n, WIDTH) rows by their index; the offset in 64 bits, as R·D may pass 2³¹."""
    return tl.load(rows + anchor.to(tl.int64)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :])


@triton.jit
def _load_tile(rows, start, WIDTH: tl.constexpr, COLUMNS: tl.constexpr):
    """(COLUMNS, WIDTH) rows from `start` on, through one 64-bit address and constant offsets from it."""
    tile = rows + tl.cast(start, tl.int64) * WIDTH
    return tl.load(tile + tl.arange(0, COLUMNS)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :])


@triton.jit
def _load_column(vector, start, total, COLUMNS: tl.constexpr):
    """(COLUMNS,) values of the references of a tile, 0 past their end.

    Call it ahead of the product, which hides its latency. The branch is always taken; without it Triton 3.6 stages what
    goes into a second product through shared memory, in copies of four bytes by every thread.
    """
    values = tl.zeros([COLUMNS], vector.dtype.element_ty)
    if start < total:
        column = start + tl.arange(0, COLUMNS)
        values = tl.load(vector + column, mask=column < total, other=0)
    return values


@triton.jit
def _anchors(offset, count, ROWS: tl.constexpr):
    """This program's rows of the output and their index among the references.

    Rows past the end stand for the last one: their loads need no mask, and the mask of the store drops them.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    return row, offset + tl.minimum(row, count - 1)


@triton.jit
def _on_diagonal(start, offset, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """True if the tile of references from `start` on may hold one of this program's anchors."""
    first = offset + tl.program_id(0) * ROWS
    return (start < first + ROWS) & (start + COLUMNS > first)


@triton.jit
def _tile_summands(
    q,
    k,
    start,
    anchor,
    mate,
    own_positive,
    own_source,
    own_lab,
    positive,
    source,
    lab,
    offset,
    total,
    scale,
    LOW: tl.constexpr,
    DOT: tl.constexpr,
):
    """exp(inv_t · (q·k − 1)), (ROWS, COLUMNS), zero where excluded; scale is log2(e) · inv_t. LOW: their logarithms.

    A mask costs as much as the exponential, and few tiles need the one for the row itself, its partner and the end of
    the references: ranges tell which. Partners are a range as a rule, the other views of the same images.
    """
    ROWS: tl.constexpr = q.shape[0]
    COLUMNS: tl.constexpr = k.shape[0]
    if positive is not None:
        left_out = tl.zeros([ROWS, COLUMNS], tl.int1)
        if source is not None:
            left_out |= own_source[:, None] == _load_column(source, start, total, COLUMNS)[None, :]
        if lab is not None:
            left_out |= own_lab[:, None] != _load_column(lab, start, total, COLUMNS)[None, :]
        left_out &= own_positive[:, None] != _load_column(positive, start, total, COLUMNS)[None, :]
    s = tl.dot(q, tl.trans(k), input_precision=DOT)
    NOTHING: tl.constexpr = float("-inf") if LOW else 0.0
    e = s * scale - scale
    if not LOW:
        e = tl.exp2(e)
    edge = _on_diagonal(start, offset, ROWS, COLUMNS) | (start + COLUMNS > total)
    if mate is not None:
        edge |= (start <= tl.max(mate)) & (start + COLUMNS > tl.min(mate))
    if edge:
        column = start + tl.arange(0, COLUMNS)
        kept = (column[None, :] != anchor[:, None]) & (column < total)[None, :]
        if mate is not None:
            kept &= column[None, :] != mate[:, None]
        e = tl.where(kept, e, NOTHING)
    if positive is not None:
        e = tl.where(left_out, NOTHING, e)
    return e


@triton.jit(do_not_specialize=_SIZES)
def _row_sums_kernel(
    rows,
    partner,
    positive,
    source,
    lab,
    group,
    out,
    out_largest,
    out_negative,
    offset,
    count,
    total,
    span,
    scale,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DOT: tl.constexpr,
    LOW: tl.constexpr,
):
    row, anchor = _anchors(offset, count, ROWS)
    mate = None if partner is None else tl.load(partner + anchor).to(tl.int32)
    own_positive = None if positive is None else tl.load(positive + anchor)
    own_source = None if source is None else tl.load(source + anchor)
    own_lab = None if lab is None else tl.load(lab + anchor)
    q = _load_anchors(rows, anchor, WIDTH)
    begin = tl.program_id(1) * span
    FLOOR: tl.constexpr = _LEAST if LOW else 0.0
    sums = tl.zeros([ROWS], tl.float32)
    largest = tl.full([ROWS], FLOOR, tl.float32)
    negative = tl.full([ROWS], FLOOR, tl.float32)
    if group is not None:
        own_group = tl.load(group + anchor)
    for start in tl.range(begin, tl.minimum(begin + span, total), COLUMNS):
        k = _load_tile(rows, start, WIDTH, COLUMNS)
        if group is not None:
            same = own_group[:, None] == _load_column(group, start, total, COLUMNS)[None, :]
        e = _tile_summands(
            q,
            k,
            start,
            anchor,
            mate,
            own_positive,
            own_source,
            own_lab,
            positive,
            source,
            lab,
            offset,
            total,
            scale,
            LOW,
            DOT,
        )
        if LOW:
            before = largest
            largest = tl.maximum(before, tl.max(e, 1))
            sums = sums * tl.exp2(before - largest) + tl.sum(tl.exp2(e - largest[:, None]), 1)
        else:
            sums += tl.sum(e, 1)
            if out_largest is not None:
                largest = tl.maximum(largest, tl.max(e, 1))
        if group is not None:
            negative = tl.maximum(negative, tl.max(tl.where(same, FLOOR, e), 1))
    at = tl.program_id(1).to(tl.int64) * count + row
    tl.store(out + at, sums, mask=row < count)
    if out_largest is not None:
        tl.store(out_largest + at, largest, mask=row < count)
    if group is not None:
        tl.store(out_negative + at, negative, mask=row < count)


@triton.jit(do_not_specialize=_SIZES)
def _weighted_rows_kernel(
    rows,
    weight,
    shift,
    partner,
    positive,
    source,
    lab,
    out,
    offset,
    count,
    total,
    span,
    scale,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DOT: tl.constexpr,
):
    row, anchor = _anchors(offset, count, ROWS)
    mate = None if partner is None else tl.load(partner + anchor).to(tl.int32)
    own_positive = None if positive is None else tl.load(positive + anchor)
    own_source = None if source is None else tl.load(source + anchor)
    own_lab = None if lab is None else tl.load(lab + anchor)
    own_weight = tl.load(weight + anchor)
    if shift is not None:
        own_shift = tl.load(shift + anchor)
    q = _load_anchors(rows, anchor, WIDTH)
    begin = tl.program_id(1) * span
    sums = tl.zeros([ROWS, WIDTH], tl.float32)
    for start in tl.range(begin, tl.minimum(begin + span, total), COLUMNS):
        k = _load_tile(rows, start, WIDTH, COLUMNS)
        w = _load_column(weight, start, total, COLUMNS)
        if shift is not None:
            by = _load_column(shift, start, total, COLUMNS)
        e = _tile_summands(
            q,
            k,
            start,
            anchor,
            mate,
            own_positive,
            own_source,
            own_lab,
            positive,
            source,
            lab,
            offset,
            total,
            scale,
            shift is not None,
            DOT,
        )
        if shift is None:
            p = e * (own_weight[:, None] + w[None, :])
        else:
            p = own_weight[:, None] * tl.exp2(e - own_shift[:, None]) + w[None, :] * tl.exp2(e - by[None, :])
        sums = tl.dot(p.to(k.dtype), k, sums, input_precision=DOT)
    at = (tl.program_id(1).to(tl.int64) * count + row)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    tl.store(out + at, sums, mask=(row < count)[:, None])


@triton.jit(do_not_specialize=_SIZES)
def _hardest_kernel(
    highs,
    lows,
    positive,
    source,
    lab,
    value,
    index,
    offset,
    count,
    total,
    span,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DOT: tl.constexpr,
):
    """value, index (2, splits, count): the largest −s of a positive and the largest s of a negative, and where.

    The places, and with low halves the exact products, are made only in the tiles, fewer and fewer, that may improve
    on any row.
    """
    row, anchor = _anchors(offset, count, ROWS)
    own_positive = tl.load(positive + anchor)
    own_positive = tl.where(own_positive < 0, _NOWHERE, own_positive)  # unknown: no code equals it
    if source is not None:
        own_source = tl.load(source + anchor)
    if lab is not None:
        own_lab = tl.load(lab + anchor)
    q = _load_anchors(highs, anchor, WIDTH)
    if lows is not None:
        q_low = _load_anchors(lows, anchor, WIDTH)
    begin = tl.program_id(1) * span
    far = tl.full([ROWS], float("-inf"), tl.float32)
    near = tl.full([ROWS], float("-inf"), tl.float32)
    far_at = tl.full([ROWS], _NOWHERE, tl.int32)
    near_at = tl.full([ROWS], _NOWHERE, tl.int32)
    for start in tl.range(begin, tl.minimum(begin + span, total), COLUMNS):
        same = own_positive[:, None] == _load_column(positive, start, total, COLUMNS)[None, :]
        ignored = same
        if source is not None:
            ignored |= own_source[:, None] == _load_column(source, start, total, COLUMNS)[None, :]
        if lab is not None:
            ignored |= own_lab[:, None] != _load_column(lab, start, total, COLUMNS)[None, :]
        column = start + tl.arange(0, COLUMNS)
        if _on_diagonal(start, offset, ROWS, COLUMNS) | (start + COLUMNS > total):
            kept = (column[None, :] != anchor[:, None]) & (column < total)[None, :]
            same &= kept
            ignored |= ~kept
        k = _load_tile(highs, start, WIDTH, COLUMNS)
        s = tl.dot(q, tl.trans(k), input_precision=DOT)
        _, _, farthest, nearest = _hardest_of_tile(s, same, ignored)
        room = 0.0 if lows is None else _DROPPED
        if tl.max(((farthest + room > far) | (nearest + room > near)).to(tl.int32)) > 0:
            if lows is None:
                exact = s
            else:  # the product of the two low halves is below float32's rounding
                exact = tl.dot(q_low, tl.trans(k))
                exact = tl.dot(q, tl.trans(_load_tile(lows, start, WIDTH, COLUMNS)), exact) + s
            positives, negatives, farther, nearer = _hardest_of_tile(exact, same, ignored)
            far, far_at = _improved(far, far_at, farther, positives, column)
            near, near_at = _improved(near, near_at, nearer, negatives, column)
    at = tl.program_id(1).to(tl.int64) * count + row
    negative = tl.num_programs(1).to(tl.int64) * count
    tl.store(value + at, far, mask=row < count)
    tl.store(index + at, far_at, mask=row < count)
    tl.store(value + negative + at, near, mask=row < count)
    tl.store(index + negative + at, near_at, mask=row < count)


@triton.jit
def _hardest_of_tile(s, same, ignored):
    """−s of the positives and s of the negatives, −inf elsewhere, and the largest of each row."""
    positives = tl.where(same, -s, float("-inf"))
    negatives = tl.where(ignored, float("-inf"), s)
    return positives, negatives, tl.max(positives, 1), tl.max(negatives, 1)


@triton.jit
def _improved(best, at, largest, values, column):
    """The running largest value of each row and its lowest column, with those of one tile."""
    found = tl.min(tl.where(values == largest[:, None], column[None, :], _NOWHERE), 1)
    at = tl.where(largest > best, found, at)
    return tl.maximum(largest, best), at
