"""Pooling in one pass: a program reads a run of tokens once and writes its rows of every level.

It takes 32 tokens at a time, however long the run. Levels whose rows are longer add up sums of 32.
"""

import triton
import triton.language as tl
from torch import Tensor

from psa_kernels.layout import num_rows, pool_size
from psa_kernels.triton_device import on_device

_DIM_TILE = 64
_PART = 32
"""Tokens at a time."""


@triton.jit
def _store_level(
    sums, pooled_ptr, run, kv_len, end, head_dim, dim, LEVEL: tl.constexpr, RUN: tl.constexpr, DIM_TILE: tl.constexpr
):
    """Adds up pairs of the finer level's sums and stores their means; returns the sums, and the level's row count."""
    pool: tl.constexpr = 1 << (LEVEL - 1)
    rows: tl.constexpr = RUN // pool
    sums = tl.sum(tl.reshape(sums, (rows, 2, DIM_TILE)), axis=1)
    first = run * rows
    row = tl.arange(0, rows)
    level_rows = (kv_len + pool - 1) // pool
    count = tl.minimum(tl.maximum(end - (first + row) * pool, 1), pool)
    mean = sums / count[:, None].to(sums.dtype)
    mask = (first + row < level_rows)[:, None] & (dim < head_dim)[None, :]
    # The first row's place may need 64 bits; what each thread adds to it does not.
    offset = row[:, None] * head_dim + dim[None, :]
    tl.store(pooled_ptr + first * head_dim + offset, mean.to(pooled_ptr.dtype.element_ty), mask=mask)
    return sums, level_rows


@triton.jit
def _load_part(x_ptr, x_strides, first, end, head_dim, dim, PART: tl.constexpr):
    """Tokens from ``first`` on, [PART, DIM_TILE], zeros from ``end`` on."""
    token = tl.arange(0, PART)
    offset = token[:, None] * x_strides[2] + dim[None, :] * x_strides[3]
    mask = (first + token < end)[:, None] & (dim < head_dim)[None, :]
    return tl.load(x_ptr + first * x_strides[2] + offset, mask=mask, other=0.0)


@triton.jit(do_not_specialize=["num_heads", "kv_len", "rows_total", "num_runs", "num_dim_tiles"])
def _pool_kernel(
    x_ptr,
    pooled_ptr,
    kv_lengths_ptr,
    x_strides,
    num_heads,
    kv_len,
    head_dim,
    rows_total,
    num_runs,
    num_dim_tiles,
    HAS_LENGTHS: tl.constexpr,
    NUM_LEVELS: tl.constexpr,
    RUN: tl.constexpr,
    PART: tl.constexpr,
    PART_LEVELS: tl.constexpr,
    DIM_TILE: tl.constexpr,
):
    PARTS: tl.constexpr = RUN // PART
    pid = tl.program_id(0).to(tl.int64)
    dim_tile = (pid % num_dim_tiles).to(tl.int32)
    run = pid // num_dim_tiles % num_runs
    head = pid // (num_dim_tiles * num_runs) % num_heads
    batch = pid // (num_dim_tiles * num_runs * num_heads)
    end = kv_len
    if HAS_LENGTHS:
        end = tl.minimum(kv_len, tl.load(kv_lengths_ptr + batch)).to(tl.int32)

    dim = dim_tile * DIM_TILE + tl.arange(0, DIM_TILE)
    x_ptr += batch * x_strides[0] + head * x_strides[1]
    pooled_ptr += (batch * num_heads + head) * rows_total * head_dim
    acc_type: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    totals = tl.zeros([PARTS, DIM_TILE], acc_type)  # of each part
    x = _load_part(x_ptr, x_strides, run * RUN, end, head_dim, dim, PART)
    for part in tl.range(PARTS, num_stages=1, disable_licm=True):
        place = run * PARTS + part
        sums = x.to(acc_type)
        if PARTS > 1:  # the next part is on its way while the rows of this one are stored
            x = _load_part(x_ptr, x_strides, (place + 1) * PART, end, head_dim, dim, PART)
        level_ptr = pooled_ptr
        for level in tl.static_range(2, PART_LEVELS + 1):
            sums, level_rows = _store_level(sums, level_ptr, place, kv_len, end, head_dim, dim, level, PART, DIM_TILE)
            level_ptr += level_rows.to(tl.int64) * head_dim
        if PARTS > 1:  # by now a part is one row
            totals = tl.where((tl.arange(0, PARTS) == part)[:, None], sums, totals)
    for level in tl.static_range(2, PART_LEVELS + 1):
        pooled_ptr += tl.cdiv(kv_len, 1 << (level - 1)).to(tl.int64) * head_dim
    for level in tl.static_range(PART_LEVELS + 1, NUM_LEVELS + 1):
        totals, level_rows = _store_level(totals, pooled_ptr, run, kv_len, end, head_dim, dim, level, RUN, DIM_TILE)
        pooled_ptr += level_rows.to(tl.int64) * head_dim


def _pool_into(pooled: Tensor, x: Tensor, kv_lengths: Tensor | None, num_levels: int) -> None:
    """Write levels 2 to ``num_levels`` of ``x`` to ``pooled``, contiguous ``[B, H, rows, D]``."""
    if num_levels == 1:
        return
    batch, heads, kv_len, head_dim = x.shape
    kv_lengths = None if kv_lengths is None else kv_lengths.contiguous()
    run = max(_PART, pool_size(num_levels))
    num_runs = triton.cdiv(kv_len, run)
    num_dim_tiles = triton.cdiv(head_dim, _DIM_TILE)
    with on_device(x):
        _pool_kernel[(batch * heads * num_runs * num_dim_tiles,)](
            x,
            pooled,
            kv_lengths,
            x.stride(),
            heads,
            kv_len,
            head_dim,
            pooled.shape[2],
            num_runs,
            num_dim_tiles,
            HAS_LENGTHS=kv_lengths is not None,
            NUM_LEVELS=num_levels,
            RUN=run,
            PART=_PART,
            PART_LEVELS=min(num_levels, _PART.bit_length()),
            DIM_TILE=_DIM_TILE,
        )


def _pooled_rows(kv_len: int, num_levels: int) -> int:
    return sum(num_rows(kv_len, level) for level in range(2, num_levels + 1))


def forward(x: Tensor, kv_lengths: Tensor | None, num_levels: int) -> Tensor:
    batch, heads, kv_len, head_dim = x.shape
    pooled = x.new_empty((batch, heads, _pooled_rows(kv_len, num_levels), head_dim))
    _pool_into(pooled, x, kv_lengths, num_levels)
    return pooled


def pool_keys_and_values(key: Tensor, value: Tensor, kv_lengths: Tensor | None, num_levels: int) -> Tensor:
    """Both in one tensor ``[2, B, H_kv, rows, D]``, keys first."""
    batch, heads, kv_len, head_dim = key.shape
    pooled = key.new_empty((2, batch, heads, _pooled_rows(kv_len, num_levels), head_dim))
    _pool_into(pooled[0], key, kv_lengths, num_levels)
    _pool_into(pooled[1], value, kv_lengths, num_levels)
    return pooled
