"""One program a row: the score that a count ends at is found by bisection, without sorting."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from psa_kernels.rank_levels.ops import MAX_COUNTS
from psa_kernels.triton_device import on_device
from psa_kernels.triton_ranks import chunk_of, find_cut, find_low, key_range, mark, num_warps, row_keys, write_level


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
    held = row_keys(scores_ptr, 0, row_len, CHUNK)
    end = row_len
    if IS_HELD:
        end = CHUNK  # known to the compiler, which then drops the loops over chunks

    low, highest = key_range(held, scores_ptr, row_len, end, CHUNK, IS_HELD)
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
            low, from_low = find_low(held, scores_ptr, row_len, end, count, low, from_low, highest, CHUNK, IS_HELD)
            # Scores equal to `low` may be too many. The earlier ones are kept.
            cut = find_cut(held, scores_ptr, row_len, end, count, low, from_low, CHUNK, IS_HELD)
        done = count
        if IS_HELD:
            levels = mark(levels, held, low, cut, row_len, level, CHUNK)
        else:
            write_level(scores_ptr, levels_ptr, row_len, row_len, low, cut, level, level == NUM_COUNTS, CHUNK)
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
    chunk = chunk_of(row_len)
    ends = [0] * MAX_COUNTS
    ends[: len(counts)] = [min(count, row_len) for count in counts]
    with on_device(scores):
        _rank_kernel[(num_rows,)](
            scores, levels, sample_counts, row_len, num_rows // num_samples, *ends,
            NUM_COUNTS=num_counts, CHUNK=chunk, IS_HELD=row_len <= chunk, OF_SAMPLES=sample_counts is not None,
            num_warps=num_warps(chunk),
        )  # fmt: skip
    return levels
