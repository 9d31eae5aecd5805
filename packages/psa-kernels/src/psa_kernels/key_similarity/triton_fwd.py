"""One program a block: unit keys are compared with themselves a stride further on."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from psa_kernels.key_similarity.ops import similarity_dtype
from psa_kernels.triton_device import on_device


@triton.jit
def _unit_rows(key_ptr, token, dim, strides, mask):
    """Keys of length 1, ``[tokens, dims]``; a zero key stays zero."""
    offset = token[:, None].to(tl.int64) * strides[2] + dim[None, :].to(tl.int64) * strides[3]
    key = tl.load(key_ptr + offset, mask=mask, other=0.0)
    key = key.to(tl.float64 if key.dtype == tl.float64 else tl.float32)
    norm = tl.sqrt(tl.sum(key * key, axis=1))
    return key / tl.maximum(norm, 1e-12)[:, None]


@triton.jit(do_not_specialize=["num_heads", "kv_len", "num_blocks"])
def _similarity_kernel(
    key_ptr,
    out_ptr,
    kv_lengths_ptr,
    key_strides,
    num_heads,
    kv_len,
    num_blocks,
    HEAD_DIM: tl.constexpr,
    DIM_TILE: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    NUM_LEVELS: tl.constexpr,
    BLOCK_KV: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    block = pid % num_blocks
    head = pid // num_blocks % num_heads
    batch = pid // (num_blocks * num_heads)
    end = kv_len
    if HAS_LENGTHS:
        end = tl.minimum(kv_len, tl.load(kv_lengths_ptr + batch)).to(tl.int32)
    count = tl.minimum(tl.maximum(end - block * BLOCK_KV, 0), BLOCK_KV)

    key_ptr += batch * key_strides[0] + head * key_strides[1]
    slot = tl.arange(0, BLOCK_KV)
    dim = tl.arange(0, DIM_TILE)
    in_dim = (dim < HEAD_DIM)[None, :]
    token = block * BLOCK_KV + slot
    unit = _unit_rows(key_ptr, token, dim, key_strides, (slot < count)[:, None] & in_dim)
    for level in tl.static_range(2, NUM_LEVELS + 1):
        stride = tl.minimum(tl.maximum(count - 1, 0), 1 << (level - 1))
        paired = slot + stride < count
        other = _unit_rows(key_ptr, token + stride, dim, key_strides, paired[:, None] & in_dim)
        total = tl.sum(tl.sum(unit * other, axis=1), axis=0)
        mean = tl.where(count > 1, total / tl.maximum(count - stride, 1).to(unit.dtype), 1.0)
        tl.store(out_ptr + pid * (NUM_LEVELS - 1) + level - 2, mean)


def forward(key: Tensor, kv_lengths: Tensor | None, block_kv: int, num_levels: int) -> Tensor:
    batch, heads, kv_len, head_dim = key.shape
    num_blocks = triton.cdiv(kv_len, block_kv)
    out = torch.empty((batch, heads, num_blocks, num_levels - 1), dtype=similarity_dtype(key), device=key.device)
    if num_levels == 1:
        return out
    kv_lengths = None if kv_lengths is None else kv_lengths.contiguous()
    with on_device(key):
        _similarity_kernel[(batch * heads * num_blocks,)](
            key,
            out,
            kv_lengths,
            key.stride(),
            heads,
            kv_len,
            num_blocks,
            HEAD_DIM=head_dim,
            DIM_TILE=triton.next_power_of_2(head_dim),
            HAS_LENGTHS=kv_lengths is not None,
            NUM_LEVELS=num_levels,
            BLOCK_KV=block_kv,
            num_warps=8 if block_kv * head_dim > 8192 else 4,
        )
    return out
