"""A program copies a few whole rows, so that an index is read once a row and memory in runs of D numbers."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from psa_kernels.triton_device import on_device

_MAX_DIM_TILE = 1024
_NUMBERS = 4096  # that a program copies at a time


@triton.jit(do_not_specialize=["num_heads", "length", "num_tiles"])
def _permute_kernel(
    x_ptr,
    order_ptr,
    out_ptr,
    x_strides,
    num_heads,
    length,
    num_tiles,
    HEAD_DIM: tl.constexpr,
    DIM_TILE: tl.constexpr,
    ROWS: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    row = pid // num_tiles  # of [B * H]
    sample = row // num_heads
    head = row % num_heads
    place = pid % num_tiles * ROWS + tl.arange(0, ROWS)
    inside = place < length
    token = tl.load(order_ptr + row * length + place, mask=inside, other=0)
    token = tl.minimum(tl.maximum(token, 0), length - 1)  # what is no order reads a wrong row, not other memory
    x_ptr += sample * x_strides[0] + head * x_strides[1]
    out_ptr += row * length * HEAD_DIM
    for first in tl.static_range(0, HEAD_DIM, DIM_TILE):
        dim = (first + tl.arange(0, DIM_TILE)).to(tl.int64)
        mask = inside[:, None] & (dim < HEAD_DIM)[None, :]
        offset = token[:, None] * x_strides[2] + dim[None, :] * x_strides[3]  # [ROWS, DIM_TILE]
        x = tl.load(x_ptr + offset, mask=mask, other=0)
        tl.store(out_ptr + place[:, None] * HEAD_DIM + dim[None, :], x, mask=mask)


def forward(x: Tensor, order: Tensor) -> Tensor:
    batch, heads, length, head_dim = x.shape
    order = order.contiguous()  # as its strides follow from the length, a new length compiles nothing
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dim_tile = min(triton.next_power_of_2(head_dim), _MAX_DIM_TILE)
    rows = _NUMBERS // dim_tile
    num_tiles = triton.cdiv(length, rows)
    with on_device(x):
        _permute_kernel[(batch * heads * num_tiles,)](
            x,
            order,
            out,
            x.stride(),
            heads,
            length,
            num_tiles,
            HEAD_DIM=head_dim,
            DIM_TILE=dim_tile,
            ROWS=rows,
        )
    return out
