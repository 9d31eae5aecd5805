"""Forward kernel: one program a query tile, one loop over the rows of each level its plan lists."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from psa_kernels.pyramid_attention.ops import lse_dtype
from psa_kernels.pyramid_attention.tiles import choose_tile
from psa_kernels.pyramid_pool.triton_fwd import forward as pool_rows
from psa_kernels.triton_device import on_device, shared_memory_limit

_LOG2_E = 1.4426950408889634


@triton.jit
def _online_softmax(logits, row_max, row_sum, acc):
    """Fold a tile of base-2 logits into the running statistics; returns its weights too."""
    new_max = tl.maximum(row_max, tl.max(logits, axis=1))
    # A query that has seen nothing yet has a maximum of -inf, and -inf - -inf is not a number.
    safe_max = tl.where(new_max == float("-inf"), 0.0, new_max)
    weights = tl.exp2(logits - safe_max[:, None])
    decay = tl.exp2(row_max - safe_max)
    row_sum = row_sum * decay + tl.sum(weights, axis=1)
    return weights, new_max, row_sum, acc * decay[:, None]


@triton.jit
def _attend_level(
    acc, row_max, row_sum, query, q_position,
    key_ptr, value_ptr, key_strides, value_strides, indices_ptr, first, last, kv_end, scale_log2, dim,
    LEVEL: tl.constexpr, BLOCK_KV: tl.constexpr, HEAD_DIM: tl.constexpr, TILE_N: tl.constexpr,
    MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Attend to the blocks that slots ``first`` to ``last`` of the plan list, at one level.

    Their rows are counted through: rows of several small blocks share a tile.
    """
    pool: tl.constexpr = 1 << (LEVEL - 1)
    rows_per_block: tl.constexpr = BLOCK_KV // pool
    in_dim = dim < HEAD_DIM
    for start in range(first * rows_per_block, last * rows_per_block, TILE_N):
        n = start + tl.arange(0, TILE_N)
        slot = n // rows_per_block
        block = tl.load(indices_ptr + slot, mask=slot < last, other=0)  # [TILE_N]
        row = block * rows_per_block + n % rows_per_block
        count = tl.minimum(tl.maximum(kv_end - row * pool, 0), pool)  # tokens that a row covers
        exists = (slot < last) & (count > 0)
        row64 = row.to(tl.int64)
        mask = exists[:, None] & in_dim[None, :]
        offset = row64[:, None] * key_strides[2] + dim.to(tl.int64)[None, :] * key_strides[3]
        key = tl.load(key_ptr + offset, mask=mask, other=0.0)  # [TILE_N, DIM]
        offset = row64[:, None] * value_strides[2] + dim.to(tl.int64)[None, :] * value_strides[3]
        value = tl.load(value_ptr + offset, mask=mask, other=0.0)  # [TILE_N, DIM]

        bias = tl.where(exists, tl.log2(tl.maximum(count, 1).to(tl.float32)), float("-inf"))
        logits = tl.dot(query, tl.trans(key), input_precision=PRECISION) * scale_log2 + bias[None, :]
        if MASKED:
            logits = tl.where(row[None, :] <= q_position[:, None], logits, float("-inf"))
        weights, row_max, row_sum, acc = _online_softmax(logits, row_max, row_sum, acc)
        acc = tl.dot(weights.to(value.dtype), value, acc, input_precision=PRECISION)
    return acc, row_max, row_sum


@triton.jit(
    do_not_specialize=[
        "num_heads",
        "group",
        "q_len",
        "kv_len",
        "num_q_blocks",
        "num_kv_blocks",
        "pooled_rows",
    ]
)
def _forward_kernel(
    query_ptr, key_ptr, value_ptr, pooled_key_ptr, pooled_value_ptr, indices_ptr, offsets_ptr, kv_lengths_ptr,
    out_ptr, lse_ptr, query_strides, key_strides, value_strides, out_strides,
    num_heads, group, q_len, kv_len, num_q_blocks, num_kv_blocks, pooled_rows, scale_log2,
    BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr, NUM_LEVELS: tl.constexpr, HEAD_DIM: tl.constexpr,
    DIM_TILE: tl.constexpr, TILE_M: tl.constexpr, TILE_N: tl.constexpr,
    HAS_LENGTHS: tl.constexpr, IS_CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tiles_per_block: tl.constexpr = (BLOCK_Q + TILE_M - 1) // TILE_M
    pid = tl.program_id(0).to(tl.int64)
    tile = pid % tiles_per_block
    q_block = pid // tiles_per_block % num_q_blocks
    head = pid // (tiles_per_block * num_q_blocks) % num_heads
    batch = pid // (tiles_per_block * num_q_blocks * num_heads)
    kv_head = head // group
    plan_row = (batch * num_heads + head) * num_q_blocks + q_block

    in_block = tile * TILE_M + tl.arange(0, TILE_M)
    q_token = q_block * BLOCK_Q + in_block
    in_q = (in_block < BLOCK_Q) & (q_token < q_len)
    dim = tl.arange(0, DIM_TILE)
    mask = in_q[:, None] & (dim < HEAD_DIM)[None, :]
    query_ptr += batch * query_strides[0] + head * query_strides[1]
    offset = q_token[:, None] * query_strides[2] + dim.to(tl.int64)[None, :] * query_strides[3]
    query = tl.load(query_ptr + offset, mask=mask, other=0.0)  # [TILE_M, DIM]

    kv_end = kv_len
    if HAS_LENGTHS:
        kv_end = tl.minimum(kv_len, tl.load(kv_lengths_ptr + batch)).to(tl.int32)
    q_position = (q_token + kv_len - q_len).to(tl.int32)
    indices_ptr += plan_row * num_kv_blocks
    offsets_ptr += plan_row * (NUM_LEVELS + 1)
    key_ptr += batch * key_strides[0] + kv_head * key_strides[1]
    value_ptr += batch * value_strides[0] + kv_head * value_strides[1]
    pooled_start = (batch * (num_heads // group) + kv_head) * pooled_rows * HEAD_DIM
    pooled_key_ptr += pooled_start
    pooled_value_ptr += pooled_start
    pooled_strides = (0, 0, HEAD_DIM, 1)

    row_max = tl.full([TILE_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([TILE_M], tl.float32)
    acc = tl.zeros([TILE_M, DIM_TILE], tl.float32)
    acc, row_max, row_sum = _attend_level(
        acc, row_max, row_sum, query, q_position,
        key_ptr, value_ptr, key_strides, value_strides, indices_ptr,
        tl.load(offsets_ptr), tl.load(offsets_ptr + 1), kv_end, scale_log2, dim,
        1, BLOCK_KV, HEAD_DIM, TILE_N, IS_CAUSAL, PRECISION,
    )  # fmt: skip
    for level in tl.static_range(2, NUM_LEVELS + 1):
        acc, row_max, row_sum = _attend_level(
            acc, row_max, row_sum, query, q_position,
            pooled_key_ptr, pooled_value_ptr, pooled_strides, pooled_strides, indices_ptr,
            tl.load(offsets_ptr + level - 1), tl.load(offsets_ptr + level), kv_end, scale_log2, dim,
            level, BLOCK_KV, HEAD_DIM, TILE_N, False, PRECISION,
        )  # fmt: skip
        level_rows = ((kv_len + (1 << (level - 1)) - 1) // (1 << (level - 1))).to(tl.int64)
        pooled_key_ptr += level_rows * HEAD_DIM
        pooled_value_ptr += level_rows * HEAD_DIM

    has_read = row_sum != 0  # true for NaN too: what is not a number shows
    out = acc / tl.where(has_read, row_sum, 1.0)[:, None]
    out_ptr += batch * out_strides[0] + head * out_strides[1]
    offset = q_token[:, None] * out_strides[2] + dim.to(tl.int64)[None, :] * out_strides[3]
    tl.store(out_ptr + offset, out.to(query.dtype), mask=mask)
    LN_2: tl.constexpr = 0.6931471805599453
    lse = tl.where(has_read, (row_max + tl.log2(tl.where(has_read, row_sum, 1.0))) * LN_2, float("-inf"))
    tl.store(lse_ptr + (batch * num_heads + head) * q_len + q_token, lse, mask=in_q)


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    indices: Tensor,
    offsets: Tensor,
    kv_lengths: Tensor | None,
    block_q: int,
    block_kv: int,
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    batch, heads, q_len, head_dim = query.shape
    if query.dtype == torch.float64 or head_dim > 256:
        raise ValueError(
            "impl='triton' takes float16, bfloat16 or float32 with head_dim up to 256, "
            f"got {query.dtype} with head_dim {head_dim}"
        )
    indices, offsets = indices.contiguous(), offsets.contiguous()
    kv_lengths = None if kv_lengths is None else kv_lengths.contiguous()
    num_q_blocks, num_kv_blocks = indices.shape[2:]
    num_levels = offsets.shape[3] - 1
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    lse = torch.empty(query.shape[:3], dtype=lse_dtype(query), device=query.device)
    dim_tile = max(16, triton.next_power_of_2(head_dim))
    with on_device(query):
        tile = choose_tile(
            block_q=block_q,
            head_dim=dim_tile,
            dtype=query.dtype,
            shared_memory=shared_memory_limit(query.device),
        )
        pooled_key = pool_rows(key, kv_lengths, num_levels)
        pooled_value = pool_rows(value, kv_lengths, num_levels)
        _forward_kernel[(batch * heads * num_q_blocks * triton.cdiv(block_q, tile.tile_m),)](
            query, key, value, pooled_key, pooled_value, indices, offsets, kv_lengths,
            out, lse, query.stride(), key.stride(), value.stride(), out.stride(),
            heads, heads // key.shape[1], q_len, key.shape[2], num_q_blocks, num_kv_blocks, pooled_key.shape[2],
            scale * _LOG2_E,
            BLOCK_Q=block_q, BLOCK_KV=block_kv, NUM_LEVELS=num_levels, HEAD_DIM=head_dim,
            DIM_TILE=dim_tile, TILE_M=tile.tile_m, TILE_N=tile.tile_n,
            HAS_LENGTHS=kv_lengths is not None, IS_CAUSAL=is_causal,
            PRECISION="ieee" if query.dtype == torch.float32 else "tf32",
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
    return out, lse
