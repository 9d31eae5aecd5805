"""Forward kernel for Hopper (capability 9.0), in Gluon: warps that load beside warps that compute.

One warp loads queries and keys, and one values, by tensor descriptors (TMA): a block at a time, or several small ones,
as boxes with a place each in one tile, where a level goes on after the one before. Blocks of fewer than 16 rows (with
blocks of 128 tokens those of level 5 and up) are gathered by four more warps. Two groups of four warps compute, each
for half of a query block: the scores of a tile, and while its weights are worked out, what the values of the tile
before give. In between lie rings of tiles in shared memory, each tile with a barrier that says full and one that says
empty. Programs stay: the first tiles of a query block arrive while the last one's are computed.

:mod:`psa_kernels.pyramid_attention.triton_fwd` asks :func:`takes` for what it computes itself.
"""

import torch
import triton
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from psa_kernels.checks import is_hopper
from psa_kernels.pyramid_attention.hopper_kernel import _forward_kernel
from psa_kernels.triton_device import can_copy_by_descriptor, num_multiprocessors, shared_memory_limit

BLOCK = 128
"""Tokens of a query block, and rows of a tile."""
_QUERY_TILES = 2
_KEY_AND_VALUE_TILES = {64: (4, 4), 128: (3, 2)}
"""Tiles of keys and of values in the rings, by the columns of a tile."""
_REGISTERS = {False: (224, 56), True: (208, 48)}
"""Of a thread that computes and of one that loads, without and with warps that gather: 12 or 16 warps share 65,536."""


def _descriptor(x: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """Boxes of rows and columns through TMA."""
    box = [1] * (x.dim() - 2) + [rows, columns]
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=x.dim())
    return TensorDescriptor(x, list(x.shape), list(x.stride()), box, layout)


def _descriptors(
    query: Tensor,
    out: Tensor,
    key: Tensor,
    value: Tensor,
    pooled: Tensor,
    dim_tile: int,
    block_kv: int,
    box_levels: int,
) -> list[TensorDescriptor]:
    """Those of queries, outputs, keys and values, and of levels 2 to 5 of the pooled rows; a box is a block.

    Rows past a level's last one are zeros. Where a level is not read by boxes, the one of keys stands in.
    """
    descriptors = [_descriptor(x, BLOCK // 2, dim_tile) for x in (query, out)]
    descriptors += [_descriptor(x, block_kv, 64) for x in (key, value)]
    rows = pooled.flatten(0, 2)  # [2 B H_kv, rows, D]
    start = 0
    for level in range(2, 6):
        end = start + triton.cdiv(key.shape[2], 1 << (level - 1))
        is_read = level <= box_levels
        descriptors.append(_descriptor(rows[:, start:end], block_kv >> (level - 1), 64) if is_read else descriptors[2])
        start = end
    return descriptors


def _box_levels(block_kv: int, num_levels: int) -> int:
    """Levels whose blocks are copied by descriptor: those of 16 rows and more, and of 8 where that leaves none to
    gather."""
    least_rows = 8 if block_kv >> (num_levels - 1) >= 8 else 16
    return min(num_levels, (block_kv // least_rows).bit_length())


def _dim_tile(head_dim: int) -> int:
    return int(max(64, triton.next_power_of_2(head_dim)))


def shared_memory(head_dim: int, element_size: int) -> int:
    """Bytes that a program takes: the rings, and eight bytes for each of their barriers, aligned."""
    dim_tile = _dim_tile(head_dim)
    tiles = _QUERY_TILES + sum(_KEY_AND_VALUE_TILES[dim_tile])
    return tiles * BLOCK * dim_tile * element_size + 1024


def takes(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kv_lengths: Tensor | None,
    block_q: int,
    block_kv: int,
    num_levels: int,
    is_causal: bool,
    scale: float,
) -> bool:
    """Whether the kernel computes a call."""
    head_dim = query.shape[3]
    if not 64 <= head_dim <= 128 or head_dim % 8:
        return False
    if not is_hopper(query.device) or query.dtype not in (torch.float16, torch.bfloat16):
        return False
    if block_q != BLOCK or block_kv not in (32, 64, 128):
        return False
    if is_causal or kv_lengths is not None or scale <= 0 or 0 in query.shape or 0 in key.shape:
        return False
    if key.shape[2] * head_dim >= 2**30:  # offsets of pooled rows are of 32 bits
        return False
    if shared_memory(head_dim, query.element_size()) > shared_memory_limit(query.device):
        return False
    return all(can_copy_by_descriptor(x) for x in (query, key, value))


def launch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pooled: Tensor,
    order: Tensor,
    indices: Tensor,
    offsets: Tensor,
    out: Tensor,
    lse: Tensor,
    block_kv: int,
    scale_log2: float,
) -> None:
    """Compute ``out`` and ``lse`` of a call that :func:`takes` takes.

    Args:
        query, key, value: ``[B, H, q_len, D]``, ``[B, H_kv, kv_len, D]``.
        pooled: ``[2, B, H_kv, rows, D]``, contiguous: the pooled levels of keys and of values.
        order: rows of the plan in the order to start them.
        indices, offsets: the plan, contiguous.
        out: ``[B, H, q_len, D]``.
        lse: ``[B, H, q_len]``, contiguous.
        block_kv: tokens of a key/value block.
        scale_log2: what makes a score a logit in base 2.
    """
    batch, heads, q_len, head_dim = query.shape
    num_q_blocks, num_kv_blocks = indices.shape[2:]
    num_work = batch * heads * num_q_blocks
    dim_tile = _dim_tile(head_dim)
    num_levels = offsets.shape[3] - 1
    box_levels = _box_levels(block_kv, num_levels)
    key_tiles, value_tiles = _KEY_AND_VALUE_TILES[dim_tile]
    compute_registers, load_registers = _REGISTERS[box_levels < num_levels]
    descriptors = _descriptors(query, out, key, value, pooled, dim_tile, block_kv, box_levels)
    next_work = torch.zeros(1, dtype=torch.int32, device=query.device)
    _forward_kernel[(min(num_work, num_multiprocessors(query.device)),)](
        *descriptors, pooled, order, next_work, indices, offsets, lse,
        heads, heads // key.shape[1], q_len, key.shape[2], num_q_blocks, num_kv_blocks, num_work, pooled.shape[3],
        batch * key.shape[1], scale_log2,
        NUM_LEVELS=num_levels, BOX_LEVELS=box_levels, LOG2_BLOCK_KV=block_kv.bit_length() - 1,
        HEAD_DIM=head_dim, DIM=dim_tile, KEYS=key_tiles, VALUES=value_tiles, QUERIES=_QUERY_TILES,
        COMPUTE_REGISTERS=compute_registers, LOAD_REGISTERS=load_registers, num_warps=4,
    )  # fmt: skip
