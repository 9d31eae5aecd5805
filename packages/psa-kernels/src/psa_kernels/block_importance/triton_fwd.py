"""Two passes over the sampled keys: the first finds each row's softmax normaliser, the second reduces by block."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from psa_kernels.block_importance.ops import importance_dtype
from psa_kernels.triton_device import on_device, shared_memory_limit

_LOG2_E = 1.4426950408889634


@triton.jit
def _sampled_logits(
    query,
    row,
    key_ptr,
    key_strides,
    positions_ptr,
    first,
    num_columns,
    dim,
    shift,
    scale_log2,
    HEAD_DIM: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    COLUMNS: tl.constexpr,
    PER_BLOCK: tl.constexpr,
    SAMPLES_KV: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Base-2 logits of a tile of sampled keys, ``[rows, COLUMNS]``, -inf where a token is missing or hidden.

    ``PER_BLOCK`` columns stand for each KV block, the first ``SAMPLES_KV`` of them used.
    """
    column = tl.arange(0, COLUMNS)
    sample = (first + column // PER_BLOCK) * SAMPLES_KV + column % PER_BLOCK
    used = (column % PER_BLOCK < SAMPLES_KV) & (sample < num_columns)
    position = tl.load(positions_ptr + sample, mask=used, other=-1)  # [COLUMNS]
    offset = position.to(tl.int64)[None, :] * key_strides[2] + dim.to(tl.int64)[:, None] * key_strides[3]
    mask = (position >= 0)[None, :] & (dim < HEAD_DIM)[:, None]
    key = tl.load(key_ptr + offset, mask=mask, other=0.0)  # [DIM, COLUMNS]
    logits = tl.dot(query, key, input_precision=PRECISION) * scale_log2
    seen = (row >= 0)[:, None] & (position >= 0)[None, :]
    if IS_CAUSAL:
        seen = seen & (position[None, :] <= row[:, None] + shift)
    return tl.where(seen, logits, float("-inf"))


@triton.jit(do_not_specialize=["num_heads", "group", "shift", "num_q_blocks", "num_kv_blocks", "kv_positions_stride"])
def _importance_kernel(
    query_ptr,
    key_ptr,
    q_positions_ptr,
    kv_positions_ptr,
    out_ptr,
    query_strides,
    key_strides,
    num_heads,
    group,
    shift,
    num_q_blocks,
    num_kv_blocks,
    kv_positions_stride,
    scale_log2,
    HEAD_DIM: tl.constexpr,
    DIM_TILE: tl.constexpr,
    SAMPLES_Q: tl.constexpr,
    ROWS: tl.constexpr,
    SAMPLES_KV: tl.constexpr,
    PER_BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    IS_MEAN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    q_block = pid % num_q_blocks
    head = pid // num_q_blocks % num_heads
    batch = pid // (num_q_blocks * num_heads)
    query_ptr += batch * query_strides[0] + head * query_strides[1]
    key_ptr += batch * key_strides[0] + head // group * key_strides[1]
    kv_positions_ptr += batch * kv_positions_stride
    num_columns = num_kv_blocks * SAMPLES_KV

    slot = tl.arange(0, ROWS)
    dim = tl.arange(0, DIM_TILE)
    row = tl.load(q_positions_ptr + q_block * SAMPLES_Q + slot, mask=slot < SAMPLES_Q, other=-1)  # [ROWS]
    offset = row.to(tl.int64)[:, None] * query_strides[2] + dim.to(tl.int64)[None, :] * query_strides[3]
    query = tl.load(query_ptr + offset, mask=(row >= 0)[:, None] & (dim < HEAD_DIM)[None, :], other=0.0)

    row_max = tl.full([ROWS], float("-inf"), tl.float32)
    row_sum = tl.zeros([ROWS], tl.float32)
    for first in range(0, num_kv_blocks, BLOCKS):
        logits = _sampled_logits(
            query,
            row,
            key_ptr,
            key_strides,
            kv_positions_ptr,
            first,
            num_columns,
            dim,
            shift,
            scale_log2,
            HEAD_DIM,
            IS_CAUSAL,
            BLOCKS * PER_BLOCK,
            PER_BLOCK,
            SAMPLES_KV,
            PRECISION,
        )
        new_max = tl.maximum(row_max, tl.max(logits, axis=1))
        safe_max = tl.where(new_max == float("-inf"), 0.0, new_max)
        row_sum = row_sum * tl.exp2(row_max - safe_max) + tl.sum(tl.exp2(logits - safe_max[:, None]), axis=1)
        row_max = new_max

    # A row that sees nothing gets a normaliser that turns its -inf logits into 0.
    normaliser = tl.where(row_sum > 0, row_max + tl.log2(tl.maximum(row_sum, 1e-30)), 0.0)
    num_rows = tl.sum((row >= 0).to(tl.float32), axis=0)
    out_ptr += pid * num_kv_blocks
    for first in range(0, num_kv_blocks, BLOCKS):
        logits = _sampled_logits(
            query,
            row,
            key_ptr,
            key_strides,
            kv_positions_ptr,
            first,
            num_columns,
            dim,
            shift,
            scale_log2,
            HEAD_DIM,
            IS_CAUSAL,
            BLOCKS * PER_BLOCK,
            PER_BLOCK,
            SAMPLES_KV,
            PRECISION,
        )
        weights = tl.exp2(logits - normaliser[:, None])
        block = first + tl.arange(0, BLOCKS)
        if IS_MEAN:
            score = tl.sum(tl.reshape(tl.sum(weights, axis=0), (BLOCKS, PER_BLOCK)), axis=1)
            sample = block[:, None] * SAMPLES_KV + tl.arange(0, PER_BLOCK)[None, :]
            used = (tl.arange(0, PER_BLOCK) < SAMPLES_KV)[None, :] & (block < num_kv_blocks)[:, None]
            position = tl.load(kv_positions_ptr + sample, mask=used, other=-1)  # [BLOCKS, PER_BLOCK]
            columns = tl.sum((position >= 0).to(tl.float32), axis=1)
            score = score / tl.maximum(columns * num_rows, 1.0)
        else:
            score = tl.max(tl.reshape(tl.max(weights, axis=0), (BLOCKS, PER_BLOCK)), axis=1)
        tl.store(out_ptr + block, score, mask=block < num_kv_blocks)


def forward(
    query: Tensor,
    key: Tensor,
    q_positions: Tensor,
    kv_positions: Tensor,
    reduction: str,
    is_causal: bool,
    scale: float,
) -> Tensor:
    if query.dtype == torch.float64:
        raise TypeError("impl='triton' of block_importance takes float16, bfloat16 or float32, got torch.float64")
    batch, heads, q_len, head_dim = query.shape
    _, num_q_blocks, samples_q = q_positions.shape
    _, num_kv_blocks, samples_kv = kv_positions.shape
    out = torch.empty((batch, heads, num_q_blocks, num_kv_blocks), dtype=importance_dtype(query), device=query.device)
    per_block = triton.next_power_of_2(samples_kv)
    blocks = max(1, 64 // per_block)
    rows, dim_tile = (max(16, triton.next_power_of_2(n)) for n in (samples_q, head_dim))
    with on_device(query):
        limit = shared_memory_limit(query.device)
        # The sampled queries lie in shared memory once, a tile of sampled keys once a stage.
        room = limit // (dim_tile * query.element_size()) - rows
        stages = min(3, room // (blocks * per_block))
        if stages < 1:
            raise ValueError(
                f"samples_q {samples_q} and samples_kv {samples_kv} with head_dim {head_dim} in {query.dtype} do not "
                f"fit the {limit} bytes of shared memory of {query.device}; take fewer samples"
            )
        _importance_kernel[(batch * heads * num_q_blocks,)](
            query,
            key,
            q_positions,
            kv_positions,
            out,
            query.stride(),
            key.stride(),
            heads,
            heads // key.shape[1],
            key.shape[2] - q_len,
            num_q_blocks,
            num_kv_blocks,
            kv_positions.stride(0) if kv_positions.shape[0] > 1 else 0,
            scale * _LOG2_E,
            HEAD_DIM=head_dim,
            DIM_TILE=dim_tile,
            SAMPLES_Q=samples_q,
            ROWS=rows,
            SAMPLES_KV=samples_kv,
            PER_BLOCK=per_block,
            BLOCKS=blocks,
            IS_CAUSAL=is_causal,
            IS_MEAN=reduction == "mean",
            PRECISION="ieee" if query.dtype == torch.float32 else "tf32",
            num_stages=stages,
        )
    return out
