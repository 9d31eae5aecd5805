"""One program a row: the score that a count ends at is found by bisection, without sorting."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from psa_kernels.rank_levels.ops import MAX_COUNTS
from psa_kernels.triton_device import on_device

# The longest row that a program keeps in registers; a longer one is read anew at each step, in pieces of this size.
_MAX_CHUNK = 8192
# One size for short rows, of which there are many lengths and little to gain.
_MIN_CHUNK = 128


@triton.jit
def _keys(scores_ptr, first, row_len, CHUNK: tl.constexpr):
    """int32 ``[CHUNK]``, ordered as the scores from ``first`` on are; past the row the least integer, which no score
    has for a key.

    A float's bits without its sign are in the order of its magnitude, so with the sign they are in that of the float,
    and 0 is 0 with either sign.
    """
    index = first + tl.arange(0, CHUNK)
    bits = tl.load(scores_ptr + index, mask=index < row_len, other=0).to(tl.float32).to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    key = tl.where(bits < 0, -magnitude, magnitude)
    key = tl.where(magnitude > 0x7F800000, 0x7FFFFFFF, key)  # NaN
    return tl.where(index < row_len, key, -0x80000000)


@triton.jit
def _chunk(held, scores_ptr, first, row_len, CHUNK: tl.constexpr, IS_HELD: tl.constexpr):
    return held if IS_HELD else _keys(scores_ptr, first, row_len, CHUNK)


@triton.jit
def _kept(keys, low, first, cut, CHUNK: tl.constexpr):
    """Which keys are above ``low``, or equal to it and before position ``cut`` of the row."""
    index = first + tl.arange(0, CHUNK)
    return (keys > low) | ((keys == low) & (index < cut))


@triton.jit
def _count(held, scores_ptr, row_len, end, low, cut, CHUNK: tl.constexpr, IS_HELD: tl.constexpr):
    """How many scores of the row are kept by ``low`` and ``cut``."""
    total = 0
    for first in range(0, end, CHUNK):
        keys = _chunk(held, scores_ptr, first, row_len, CHUNK, IS_HELD)
        total += tl.sum(_kept(keys, low, first, cut, CHUNK).to(tl.int32), 0)
    return total


@triton.jit(do_not_specialize=["row_len", "rows_per_sample", *(f"count_{i}" for i in range(MAX_COUNTS))])
def _rank_kernel(
    scores_ptr, levels_ptr, sample_counts_ptr, row_len, rows_per_sample,
    count_0, count_1, count_2, count_3, count_4, count_5, count_6, count_7, count_8,
    NUM_COUNTS: tl.constexpr, CHUNK: tl.constexpr, IS_HELD: tl.constexpr, OF_SAMPLES: tl.constexpr,
):  # fmt: skip
    """The scores kept up to a level become fewer from the last level to the first, so that is the order."""
    counts = (count_0, count_1, count_2, count_3, count_4, count_5, count_6, count_7, count_8)
    row = tl.program_id(0).to(tl.int64)
    scores_ptr += row * row_len
    levels_ptr += row * row_len
    held = _keys(scores_ptr, 0, row_len, CHUNK)
    end = row_len
    if IS_HELD:
        end = CHUNK  # known to the compiler, which then drops the loops over chunks

    low = 0x7FFFFFFF
    highest = -0x80000000
    for first in range(0, end, CHUNK):
        keys = _chunk(held, scores_ptr, first, row_len, CHUNK, IS_HELD)
        inside = first + tl.arange(0, CHUNK) < row_len
        low = tl.minimum(low, tl.min(tl.where(inside, keys, 0x7FFFFFFF), 0))
        highest = tl.maximum(highest, tl.max(keys, 0))

    from_low = row_len  # how many scores are at least `low`
    cut = row_len
    done = -1  # the last count that was dealt with
    levels = tl.zeros([CHUNK], tl.int32)
    for level in tl.static_range(NUM_COUNTS, 0, -1):
        count = counts[level - 1]
        if OF_SAMPLES:
            count = tl.load(sample_counts_ptr + row // rows_per_sample * NUM_COUNTS + level - 1)
            count = tl.minimum(count, row_len)
        if count != done:
            # The score of rank `count` lies in low..high. `low` is it when they meet, and as good as it when no more
            # than `count` scores are at least `low`.
            high = highest
            while (from_low > count) & (low < high):
                middle = (low | high) - ((low ^ high) >> 1)  # their mean, rounded up, without overflow
                found = _count(held, scores_ptr, row_len, end, middle, end, CHUNK, IS_HELD)
                enough = found >= count
                low = tl.where(enough, middle, low)
                from_low = tl.where(enough, found, from_low)
                high = tl.where(enough, high, middle - 1)
            # Scores equal to `low` may be too many. The earlier ones are kept, as far as `cut`.
            cut = row_len
            found = from_low
            cut_from = 0
            cut_to = row_len
            while (found != count) & (cut_from <= cut_to):
                cut = (cut_from + cut_to) // 2
                found = _count(held, scores_ptr, row_len, end, low, cut, CHUNK, IS_HELD)
                cut_from = tl.where(found < count, cut + 1, cut_from)
                cut_to = tl.where(found > count, cut - 1, cut_to)
        done = count

        if IS_HELD:
            if cut < row_len:
                levels = tl.where(_kept(held, low, 0, cut, CHUNK), level, levels)
            else:  # says the same with one comparison
                levels = tl.where(held >= low, level, levels)
        else:
            for first in range(0, row_len, CHUNK):
                index = first + tl.arange(0, CHUNK)
                kept = _kept(_keys(scores_ptr, first, row_len, CHUNK), low, first, cut, CHUNK)
                mask = kept  # the finer levels go over what the same thread wrote
                if level == NUM_COUNTS:
                    mask = index < row_len
                tl.store(levels_ptr + index, tl.where(kept, level, 0).to(tl.int8), mask=mask)
    if IS_HELD:
        index = tl.arange(0, CHUNK)
        tl.store(levels_ptr + index, levels.to(tl.int8), mask=index < row_len)


def forward(scores: Tensor, counts: list[int], sample_counts: Tensor | None) -> Tensor:
    if scores.dtype == torch.float64:
        raise TypeError("impl='triton' of rank_levels takes float16, bfloat16 or float32, got torch.float64")
    scores = scores.contiguous()
    row_len = scores.shape[-1]
    levels = torch.empty_like(scores, dtype=torch.int8)
    if not scores.numel():
        return levels
    num_rows = scores.numel() // row_len
    num_counts, num_samples = len(counts), 1
    if sample_counts is not None:
        sample_counts = sample_counts.contiguous()
        num_samples, num_counts = sample_counts.shape
    chunk = min(max(triton.next_power_of_2(row_len), _MIN_CHUNK), _MAX_CHUNK)
    ends = [0] * MAX_COUNTS
    ends[: len(counts)] = [min(count, row_len) for count in counts]
    with on_device(scores):
        _rank_kernel[(num_rows,)](
            scores, levels, sample_counts, row_len, num_rows // num_samples, *ends,
            NUM_COUNTS=num_counts, CHUNK=chunk, IS_HELD=row_len <= chunk, OF_SAMPLES=sample_counts is not None,
            num_warps=max(1, chunk // 1024),
        )  # fmt: skip
    return levels
