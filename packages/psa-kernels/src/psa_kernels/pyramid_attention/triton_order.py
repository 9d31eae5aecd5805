"""The order in which query blocks start: within a head, those that read most come first.

Where the work differs from one query block to the next, a long one that starts last leaves the rest of the device idle.
Heads stay one after another, as programs that run together find each other's keys in the cache.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_CLASSES = 32
_ROWS = 128


@triton.jit
def _work_class(
    ends_ptr, row, num_rows, dense_work, NUM_LEVELS: tl.constexpr, BLOCK_KV: tl.constexpr, CLASSES: tl.constexpr
):  # fmt: skip
    """int32 [ROWS]: 0 for the rows of the plan with most work to ``CLASSES - 1``; ``CLASSES`` past the last row."""
    work = tl.zeros_like(row)
    start = tl.zeros_like(row)
    for level in tl.static_range(1, NUM_LEVELS + 1):
        end = tl.load(ends_ptr + row * (NUM_LEVELS + 1) + level, mask=row < num_rows, other=0)
        work += (end - start) * (BLOCK_KV >> (level - 1))
        start = end
    # Half of the classes are for less than a sixteenth of dense work: rows of a sparse map lie low.
    share = tl.sqrt(tl.sqrt(work.to(tl.float32) / dense_work))
    falling = CLASSES - 1 - tl.minimum(share * CLASSES, CLASSES - 1).to(tl.int32)
    return tl.where(row < num_rows, falling, CLASSES)


@triton.jit(do_not_specialize=["num_rows", "num_kv_blocks"])
def _order_kernel(
    offsets_ptr, order_ptr, num_rows, num_kv_blocks,
    NUM_LEVELS: tl.constexpr, BLOCK_KV: tl.constexpr, CLASSES: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """A counting sort of the rows of one head."""
    head = tl.program_id(0)
    first = head.to(tl.int64) * num_rows
    offsets_ptr += first * (NUM_LEVELS + 1)
    dense_work = (num_kv_blocks * BLOCK_KV).to(tl.float32)
    classes = tl.arange(0, CLASSES)
    sizes = tl.zeros([CLASSES], tl.int32)
    for start in range(0, num_rows, ROWS):
        own = _work_class(offsets_ptr, start + tl.arange(0, ROWS), num_rows, dense_work, NUM_LEVELS, BLOCK_KV, CLASSES)
        sizes += tl.sum((own[:, None] == classes[None, :]).to(tl.int32), axis=0)
    free = tl.cumsum(sizes, 0) - sizes  # [CLASSES], the next place of each class
    for start in range(0, num_rows, ROWS):
        row = start + tl.arange(0, ROWS)
        own = _work_class(offsets_ptr, row, num_rows, dense_work, NUM_LEVELS, BLOCK_KV, CLASSES)
        is_own = (own[:, None] == classes[None, :]).to(tl.int32)  # [ROWS, CLASSES]
        place = tl.sum(is_own * (free[None, :] + tl.cumsum(is_own, 0) - 1), axis=1)
        tl.store(order_ptr + first + place, head * num_rows + row, mask=row < num_rows)
        free += tl.sum(is_own, axis=0)


def heavy_first(offsets: Tensor, num_kv_blocks: int, block_kv: int) -> Tensor:
    """Rows of a plan in the order to start them.

    Args:
        offsets: int32 ``[B, H, num_q_blocks, num_levels + 1]`` of the plan, contiguous.
        num_kv_blocks, block_kv: of the plan.

    Returns:
        int32 ``[B * H * num_q_blocks]``: each row's number once, head after head, within a head by falling work
        in 32 classes and by position within a class.
    """
    batch, heads, num_q_blocks, ends = offsets.shape
    order = torch.empty(batch * heads * num_q_blocks, dtype=torch.int32, device=offsets.device)
    _order_kernel[(batch * heads,)](
        offsets, order, num_q_blocks, num_kv_blocks,
        NUM_LEVELS=ends - 1, BLOCK_KV=block_kv, CLASSES=_CLASSES, ROWS=_ROWS,
    )  # fmt: skip
    return order
