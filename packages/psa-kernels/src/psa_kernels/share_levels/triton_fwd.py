"""One program a row: the score that a share ends at is found by bisection, without sorting."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from psa_kernels.share_levels.ops import LESS, MAX_SHARES
from psa_kernels.triton_device import on_device
from psa_kernels.triton_ranks import (
    chunk_keys,
    chunk_of,
    find_cut,
    find_low,
    key_range,
    mark,
    middle_of,
    num_warps,
    row_keys,
    write_level,
)

_LESS = tl.constexpr(LESS)


@triton.jit
def _weights(keys, highest):
    """The integers that the scores behind ``keys`` count as, where ``highest`` is the row's highest key.

    A key that is not negative is the bits of its score: the exponent and under it 23 bits of the fraction, whose
    leading 1 is left out. Denormal numbers have none, and the exponent 0 in place of 1.
    """
    exponent = tl.maximum(keys >> 23, 1)
    fraction = tl.where(keys < 0x800000, keys, (keys & 0x7FFFFF) | 0x800000)
    shift = tl.minimum(tl.maximum(highest >> 23, 1) - exponent, 31)
    return tl.where(keys > 0, (fraction << 7) >> shift, 0)


@triton.jit
def _weigh(held, held_weights, scores_ptr, row_len, end, low, highest, CHUNK: tl.constexpr, IS_HELD: tl.constexpr):
    """What the scores of the row from key ``low`` on count, int64, and how many they are."""
    weight = tl.full((), 0, tl.int64)
    number = 0
    for first in range(0, end, CHUNK):
        keys = chunk_keys(held, scores_ptr, first, row_len, CHUNK, IS_HELD)
        weights = held_weights if IS_HELD else _weights(keys, highest)
        # By way of uint32, as none is negative: the upper halves are then known to be 0.
        weight += tl.sum(tl.where(keys >= low, weights, 0).to(tl.uint32).to(tl.int64), 0)
        number += tl.sum((keys >= low).to(tl.int32), 0)
    return weight, number


@triton.jit
def _whole(product):
    """The least integer not below ``product``, float64, but for what rounding adds."""
    return tl.ceil(product * _LESS)


@triton.jit(do_not_specialize=["row_len", "rows_per_sample"])
def _share_kernel(
    scores_ptr, levels_ptr, lengths_ptr, row_len, rows_per_sample, min_first: tl.float64,
    share_0: tl.float64, share_1: tl.float64, share_2: tl.float64, share_3: tl.float64, share_4: tl.float64,
    share_5: tl.float64, share_6: tl.float64, share_7: tl.float64, share_8: tl.float64,
    NUM_SHARES: tl.constexpr, CHUNK: tl.constexpr, IS_HELD: tl.constexpr, OF_SAMPLES: tl.constexpr,
):  # fmt: skip
    """The scores kept up to a level become fewer from the last level to the first, so that is the order."""
    shares = (share_0, share_1, share_2, share_3, share_4, share_5, share_6, share_7, share_8)
    row = tl.program_id(0).to(tl.int64)
    scores_ptr += row * row_len
    levels_ptr += row * row_len
    length = row_len
    if OF_SAMPLES:
        length = tl.load(lengths_ptr + row // rows_per_sample)
        length = tl.minimum(tl.maximum(length, 0), row_len).to(tl.int32)
    held = row_keys(scores_ptr, 0, length, CHUNK)
    end = length
    if IS_HELD:
        end = CHUNK  # known to the compiler, which then drops the loops over chunks

    lowest, highest = key_range(held, scores_ptr, length, end, CHUNK, IS_HELD)
    held_weights = _weights(held, highest)
    # All is kept. `from_low` scores are at least `low`, and count `upto`.
    low = lowest
    upto, from_low = _weigh(held, held_weights, scores_ptr, length, end, low, highest, CHUNK, IS_HELD)
    total = upto.to(tl.float64)
    cut = row_len
    levels = tl.zeros([CHUNK], tl.int32)
    done = total  # the sum of the last level that was dealt with
    for level in tl.static_range(NUM_SHARES, 0, -1):
        # Never a variable that holds a share alone: the interpreter would round it to float32.
        part = total * shares[level - 1]
        if part != done:
            limit = tl.maximum(_whole(part).to(tl.int64), 1)
            # The lowest kept score has the highest key in low..high from which on the scores count `limit`. It is found
            # when one score is left there, or only equal ones. `above` and `number` are of the keys past `high`.
            high = highest
            above = tl.full((), 0, tl.int64)
            number = 0
            while (from_low - number > 1) & (low < high):
                middle = middle_of(low, high)
                weight, found = _weigh(
                    held, held_weights, scores_ptr, length, end, middle, highest, CHUNK, IS_HELD
                )  # fmt: skip
                enough = weight >= limit
                low = tl.where(enough, middle, low)
                upto = tl.where(enough, weight, upto)
                from_low = tl.where(enough, found, from_low)
                high = tl.where(enough, high, middle - 1)
                above = tl.where(enough, above, weight)
                number = tl.where(enough, number, found)
            # Equal scores may be too many. The earlier ones are kept.
            kept = from_low
            if from_low - number > 1:
                each = (upto - above) // (from_low - number)
                kept = number + ((limit - above + each - 1) // each).to(tl.int32)
            cut = find_cut(held, scores_ptr, length, end, kept, low, from_low, CHUNK, IS_HELD)
        done = part
        if IS_HELD:
            levels = mark(levels, held, low, cut, length, level, CHUNK)
        else:
            write_level(
                scores_ptr, levels_ptr, length, row_len, low, cut, level, level == NUM_SHARES, CHUNK
            )  # fmt: skip

    least = _whole(length.to(tl.float64) * min_first).to(tl.int32)
    if least > 1:
        low, from_low = find_low(held, scores_ptr, length, end, least, lowest, length, highest, CHUNK, IS_HELD)
        cut = find_cut(held, scores_ptr, length, end, least, low, from_low, CHUNK, IS_HELD)
        if IS_HELD:
            levels = mark(levels, held, low, cut, length, 1, CHUNK)
        else:
            write_level(scores_ptr, levels_ptr, length, row_len, low, cut, 1, False, CHUNK)
    if IS_HELD:
        index = tl.arange(0, CHUNK)
        tl.store(levels_ptr + index, levels.to(tl.int8), mask=index < row_len)


def forward(scores: Tensor, shares: list[float], min_first: float, lengths: Tensor | None) -> Tensor:
    scores = scores.contiguous()
    row_len = scores.shape[-1]
    levels = torch.empty_like(scores, dtype=torch.int8)
    if not scores.numel():
        return levels
    num_rows = scores.numel() // row_len
    num_samples = 1
    if lengths is not None:
        lengths = lengths.contiguous()
        num_samples = len(lengths)
    chunk = chunk_of(row_len)
    ends = [0.0] * MAX_SHARES
    ends[: len(shares)] = shares
    with on_device(scores):
        _share_kernel[(num_rows,)](
            scores, levels, lengths, row_len, num_rows // num_samples, min_first, *ends,
            NUM_SHARES=len(shares), CHUNK=chunk, IS_HELD=row_len <= chunk, OF_SAMPLES=lengths is not None,
            num_warps=num_warps(chunk),
        )  # fmt: skip
    return levels
