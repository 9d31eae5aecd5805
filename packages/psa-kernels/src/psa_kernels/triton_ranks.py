"""What the kernels share that find a score of some rank in a row, without sorting it.

One program handles a row. Its scores become integers of the same order, keys, which either stay in registers (``held``,
where ``IS_HELD``) or are read anew at each step, ``CHUNK`` at a time.
"""

import triton
import triton.language as tl

# The longest row that a program keeps in registers; a longer one is read anew at each step, in pieces of this size.
_MAX_CHUNK = 8192
# One size for short rows, of which there are many lengths and little to gain.
_MIN_CHUNK = 128


def chunk_of(row_len: int) -> int:
    """The ``CHUNK`` for rows of ``row_len`` scores; they are held where it is no less."""
    return int(min(max(triton.next_power_of_2(row_len), _MIN_CHUNK), _MAX_CHUNK))


def num_warps(chunk: int) -> int:
    """How many warps a program takes."""
    return max(1, chunk // 1024)


@triton.jit
def row_keys(scores_ptr, first, row_len, CHUNK: tl.constexpr):
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
def chunk_keys(held, scores_ptr, first, row_len, CHUNK: tl.constexpr, IS_HELD: tl.constexpr):
    return held if IS_HELD else row_keys(scores_ptr, first, row_len, CHUNK)


@triton.jit
def key_range(held, scores_ptr, row_len, end, CHUNK: tl.constexpr, IS_HELD: tl.constexpr):
    """The lowest and the highest key of the row, the wrong way round where there is none."""
    lowest = 0x7FFFFFFF
    highest = -0x80000000
    for first in range(0, end, CHUNK):
        keys = chunk_keys(held, scores_ptr, first, row_len, CHUNK, IS_HELD)
        inside = first + tl.arange(0, CHUNK) < row_len
        lowest = tl.minimum(lowest, tl.min(tl.where(inside, keys, 0x7FFFFFFF), 0))
        highest = tl.maximum(highest, tl.max(keys, 0))
    return lowest, highest


@triton.jit
def middle_of(low, high):
    """The mean of two keys, rounded up, without overflow."""
    return (low | high) - ((low ^ high) >> 1)


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
        keys = chunk_keys(held, scores_ptr, first, row_len, CHUNK, IS_HELD)
        total += tl.sum(_kept(keys, low, first, cut, CHUNK).to(tl.int32), 0)
    return total


@triton.jit
def find_low(
    held, scores_ptr, row_len, end, count, low, from_low, high, CHUNK: tl.constexpr, IS_HELD: tl.constexpr
):  # fmt: skip
    """The key of rank ``count``, or one that as many scores reach, and how many do.

    It lies in ``low..high``, and ``from_low`` scores are at least ``low``. The key is found when these two meet, and
    ``low`` is as good as it when no more than ``count`` scores are at least ``low``.
    """
    while (from_low > count) & (low < high):
        middle = middle_of(low, high)
        found = _count(held, scores_ptr, row_len, end, middle, end, CHUNK, IS_HELD)
        enough = found >= count
        low = tl.where(enough, middle, low)
        from_low = tl.where(enough, found, from_low)
        high = tl.where(enough, high, middle - 1)
    return low, from_low


@triton.jit
def find_cut(held, scores_ptr, row_len, end, count, low, from_low, CHUNK: tl.constexpr, IS_HELD: tl.constexpr):
    """The position before which scores equal to ``low`` are kept, so that ``count`` are in all, of ``from_low``."""
    cut = row_len
    found = from_low
    cut_from = 0
    cut_to = row_len
    while (found != count) & (cut_from <= cut_to):
        cut = (cut_from + cut_to) // 2
        found = _count(held, scores_ptr, row_len, end, low, cut, CHUNK, IS_HELD)
        cut_from = tl.where(found < count, cut + 1, cut_from)
        cut_to = tl.where(found > count, cut - 1, cut_to)
    return cut


@triton.jit
def mark(levels, held, low, cut, row_len, level, CHUNK: tl.constexpr):
    """``levels`` of a row held, where what ``low`` and ``cut`` keep has become ``level``."""
    if cut < row_len:
        levels = tl.where(_kept(held, low, 0, cut, CHUNK), level, levels)
    else:  # says the same with one comparison
        levels = tl.where(held >= low, level, levels)
    return levels


@triton.jit
def write_level(
    scores_ptr, levels_ptr, row_len, out_len, low, cut, level, IS_FIRST: tl.constexpr, CHUNK: tl.constexpr
):  # fmt: skip
    """Of a row not held, writes ``level`` to what ``low`` and ``cut`` keep, the first time 0 to the rest of
    ``out_len``."""
    for first in range(0, out_len, CHUNK):
        index = first + tl.arange(0, CHUNK)
        kept = _kept(row_keys(scores_ptr, first, row_len, CHUNK), low, first, cut, CHUNK)
        mask = kept  # the finer levels go over what the same thread wrote
        if IS_FIRST:
            mask = index < out_len
        tl.store(levels_ptr + index, tl.where(kept, level, 0).to(tl.int8), mask=mask)
