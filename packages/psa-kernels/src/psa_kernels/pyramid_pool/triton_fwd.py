"""Pooling in one pass: a program, a single warp, reads 32 tokens once and writes their rows of every level up to 6.

Rows of more tokens are few. A second kernel makes those, of the sums of 32 that the first one leaves.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from psa_kernels.pyramid_pool.ops import pooled_rows
from psa_kernels.triton_device import on_device

_DIM_TILE = 64
_RUN = 32
"""Tokens that a program reads."""
_RUN_LEVELS = 6
"""Levels that it makes."""
_SUMS = 8
"""Rows of sums that a program of the second kernel reads: as many as make one of the coarsest level there is."""


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
def _of_program(num_runs, num_dim_tiles, num_heads):
    """Batch, head, run and tile of columns of a program, int64 but for the last."""
    pid = tl.program_id(0).to(tl.int64)
    row = pid // num_dim_tiles
    return row // num_runs // num_heads, row // num_runs % num_heads, row % num_runs, (pid % num_dim_tiles).to(tl.int32)


@triton.jit
def _columns(dim_tile, DIM_TILE: tl.constexpr):
    """int32 [DIM_TILE], said to follow each other by no more than a warp's share of them.

    So a thread gets as many columns, and with a warp a program all rows of these: it adds rows up without another.
    """
    SHARE: tl.constexpr = DIM_TILE // 32
    return tl.max_contiguous(tl.multiple_of(dim_tile * DIM_TILE + tl.arange(0, DIM_TILE), SHARE), SHARE)


@triton.jit(do_not_specialize=["num_heads", "kv_len", "rows_total", "num_runs", "num_dim_tiles"])
def _pool_kernel(
    x_ptr, pooled_ptr, sums_ptr, kv_lengths_ptr, x_strides, num_heads, kv_len, head_dim, rows_total, num_runs,
    num_dim_tiles, HAS_LENGTHS: tl.constexpr, NUM_LEVELS: tl.constexpr, RUN: tl.constexpr, DIM_TILE: tl.constexpr,
):  # fmt: skip
    """Levels 2 to ``NUM_LEVELS`` of a run, and the sums of the last one where ``sums_ptr`` is given."""
    batch, head, run, dim_tile = _of_program(num_runs, num_dim_tiles, num_heads)
    end = kv_len
    if HAS_LENGTHS:
        end = tl.minimum(kv_len, tl.load(kv_lengths_ptr + batch)).to(tl.int32)
    dim = _columns(dim_tile, DIM_TILE)
    token = tl.arange(0, RUN)
    x_ptr += batch * x_strides[0] + head * x_strides[1] + run * RUN * x_strides[2]
    offset = token[:, None] * x_strides[2] + dim[None, :] * x_strides[3]
    mask = (run * RUN + token < end)[:, None] & (dim < head_dim)[None, :]
    acc_type: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    sums = tl.load(x_ptr + offset, mask=mask, other=0.0).to(acc_type)  # [RUN, DIM_TILE]
    pooled_ptr += (batch * num_heads + head) * rows_total * head_dim
    for level in tl.static_range(2, NUM_LEVELS + 1):
        sums, level_rows = _store_level(sums, pooled_ptr, run, kv_len, end, head_dim, dim, level, RUN, DIM_TILE)
        pooled_ptr += level_rows.to(tl.int64) * head_dim
    if sums_ptr is not None:
        ROWS: tl.constexpr = sums.shape[0]
        place = ((batch * num_heads + head) * num_runs + run) * ROWS * head_dim
        row = tl.arange(0, ROWS)
        tl.store(sums_ptr + place + row[:, None] * head_dim + dim[None, :], sums, mask=(dim < head_dim)[None, :])


@triton.jit(do_not_specialize=["num_heads", "kv_len", "rows_total", "num_sums", "num_dim_tiles"])
def _coarser_kernel(
    sums_ptr, pooled_ptr, kv_lengths_ptr, num_heads, kv_len, head_dim, rows_total, num_sums, num_dim_tiles,
    HAS_LENGTHS: tl.constexpr, SUM_LEVEL: tl.constexpr, NUM_LEVELS: tl.constexpr, SUMS: tl.constexpr,
    DIM_TILE: tl.constexpr,
):  # fmt: skip
    """The levels after ``SUM_LEVEL``, to ``NUM_LEVELS``, of ``SUMS`` rows of its sums that follow each other."""
    RUN: tl.constexpr = SUMS << (SUM_LEVEL - 1)
    batch, head, run, dim_tile = _of_program(tl.cdiv(num_sums, SUMS), num_dim_tiles, num_heads)
    end = kv_len
    if HAS_LENGTHS:
        end = tl.minimum(kv_len, tl.load(kv_lengths_ptr + batch)).to(tl.int32)
    dim = _columns(dim_tile, DIM_TILE)
    row = tl.arange(0, SUMS)
    sums_ptr += ((batch * num_heads + head) * num_sums + run * SUMS) * head_dim
    mask = (run * SUMS + row < num_sums)[:, None] & (dim < head_dim)[None, :]
    sums = tl.load(sums_ptr + row[:, None] * head_dim + dim[None, :], mask=mask, other=0.0)  # [SUMS, DIM_TILE]
    pooled_ptr += (batch * num_heads + head) * rows_total * head_dim
    for level in tl.static_range(2, SUM_LEVEL + 1):
        pooled_ptr += tl.cdiv(kv_len, 1 << (level - 1)).to(tl.int64) * head_dim
    for level in tl.static_range(SUM_LEVEL + 1, NUM_LEVELS + 1):
        sums, level_rows = _store_level(sums, pooled_ptr, run, kv_len, end, head_dim, dim, level, RUN, DIM_TILE)
        pooled_ptr += level_rows.to(tl.int64) * head_dim


def _pool_into(pooled: Tensor, x: Tensor, kv_lengths: Tensor | None, num_levels: int) -> None:
    """Write levels 2 to ``num_levels`` of ``x`` to ``pooled``, contiguous ``[B, H, rows, D]``."""
    if num_levels == 1:
        return
    batch, heads, kv_len, head_dim = x.shape
    kv_lengths = None if kv_lengths is None else kv_lengths.contiguous()
    num_runs = triton.cdiv(kv_len, _RUN)
    num_dim_tiles = triton.cdiv(head_dim, _DIM_TILE)
    sums = None
    if num_levels > _RUN_LEVELS:
        num_sums = num_runs * (_RUN >> (_RUN_LEVELS - 1))
        dtype = torch.promote_types(x.dtype, torch.float32)
        sums = torch.empty((batch, heads, num_sums, head_dim), dtype=dtype, device=x.device)
    with on_device(x):
        _pool_kernel[(batch * heads * num_runs * num_dim_tiles,)](
            x, pooled, sums, kv_lengths, x.stride(), heads, kv_len, head_dim, pooled.shape[2], num_runs, num_dim_tiles,
            HAS_LENGTHS=kv_lengths is not None, NUM_LEVELS=min(num_levels, _RUN_LEVELS), RUN=_RUN, DIM_TILE=_DIM_TILE,
            num_warps=1,
        )  # fmt: skip
        if sums is not None:
            _coarser_kernel[(batch * heads * triton.cdiv(num_sums, _SUMS) * num_dim_tiles,)](
                sums, pooled, kv_lengths, heads, kv_len, head_dim, pooled.shape[2], num_sums, num_dim_tiles,
                HAS_LENGTHS=kv_lengths is not None, SUM_LEVEL=_RUN_LEVELS, NUM_LEVELS=num_levels, SUMS=_SUMS,
                DIM_TILE=_DIM_TILE, num_warps=1,
            )  # fmt: skip


def forward(x: Tensor, kv_lengths: Tensor | None, num_levels: int) -> Tensor:
    batch, heads, kv_len, head_dim = x.shape
    pooled = x.new_empty((batch, heads, pooled_rows(kv_len, num_levels), head_dim))
    _pool_into(pooled, x, kv_lengths, num_levels)
    return pooled


def pool_keys_and_values(key: Tensor, value: Tensor, kv_lengths: Tensor | None, num_levels: int) -> Tensor:
    """Both in one tensor ``[2, B, H_kv, rows, D]``, keys first."""
    batch, heads, kv_len, head_dim = key.shape
    pooled = key.new_empty((2, batch, heads, pooled_rows(kv_len, num_levels), head_dim))
    _pool_into(pooled[0], key, kv_lengths, num_levels)
    _pool_into(pooled[1], value, kv_lengths, num_levels)
    return pooled
