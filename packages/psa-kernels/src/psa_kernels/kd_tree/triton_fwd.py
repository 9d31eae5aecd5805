"""One program a block, which stays in registers from the root of its tree to the leaves."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from psa_kernels.kd_tree.ops import GRID_BITS, LARGEST, MAX_HELD, held
from psa_kernels.triton_device import on_device

_HELD_BY_WARP = 1024  # coordinates, 32 a thread


@triton.jit
def _on_grid(points, LARGEST: tl.constexpr, GRID_BITS: tl.constexpr):
    """float32 coordinates ``[n, M]`` as steps from the lowest of each, int32."""
    points = tl.where(points == points, points, 0.0)  # NaN
    points = tl.minimum(tl.maximum(points, -LARGEST), LARGEST)
    from_lowest = points - tl.min(points, 0)[None, :]
    # A power of two from the exponent of the largest: 2**e <= largest < 2**(e+1), and 2**(GRID_BITS - 1 - e) a step, or
    # the largest power that there is.
    biased = tl.max(tl.max(from_lowest, 1), 0).to(tl.int32, bitcast=True) >> 23
    scale = tl.minimum(2 * 127 + GRID_BITS - 1 - biased, 2 * 127) << 23
    return (from_lowest * scale.to(tl.float32, bitcast=True)).to(tl.int32)


@triton.jit
def _halve(steps, token, coordinate, exists, NODES: tl.constexpr):
    """The order of a block, int32 ``[n]``, with each of its nodes sorted: their halves are the nodes of the next depth.

    Args:
        steps: int32 ``[n, M]``, coordinates on the grid, M a power of two.
        token: the order so far.
        coordinate: int32 ``[1, M]``, counts them.
        exists: which of them there are.
    """
    SIZE: tl.constexpr = steps.shape[0]
    PADDED: tl.constexpr = steps.shape[1]
    places = steps
    if NODES > 1:
        places = tl.gather(steps, tl.broadcast_to(token[:, None], (SIZE, PADDED)), 0)
    nodes = tl.reshape(places, (NODES, SIZE // NODES, PADDED))
    total = tl.sum(nodes, 1).to(tl.int64)  # [NODES, M]
    wide = nodes.to(tl.int64)
    variance = SIZE // NODES * tl.sum(wide * wide, 1) - total * total
    variance = tl.where(exists, variance, -1)
    largest = tl.max(variance, 1)
    axis = tl.min(tl.where(variance == largest[:, None], coordinate, PADDED), 1)  # the first of equals
    along = tl.sum(tl.where(coordinate[:, None, :] == axis[:, None, None], nodes, 0), 2)  # [NODES, n / NODES]
    # The earlier of equals first, by the token itself, which so comes along with its key.
    keys = along * SIZE + tl.reshape(token, (NODES, SIZE // NODES))
    return tl.reshape(tl.sort(keys), (SIZE,)) % SIZE


@triton.jit
def _tree_kernel(
    points_ptr,
    order_ptr,
    SIZE: tl.constexpr,
    NUM_COORDINATES: tl.constexpr,
    PADDED: tl.constexpr,
    DEPTHS: tl.constexpr,
    LARGEST: tl.constexpr,
    GRID_BITS: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64)
    token = tl.arange(0, SIZE)
    coordinate = tl.arange(0, PADDED)[None, :]
    exists = coordinate < NUM_COORDINATES
    at = points_ptr + block * (SIZE * NUM_COORDINATES) + token[:, None] * NUM_COORDINATES + coordinate
    steps = _on_grid(tl.load(at, mask=exists, other=0.0).to(tl.float32), LARGEST, GRID_BITS)
    for depth in tl.static_range(DEPTHS):
        token = _halve(steps, token, coordinate, exists, NODES=1 << depth)
    tl.store(order_ptr + block * SIZE + tl.arange(0, SIZE), token)


def forward(points: Tensor) -> Tensor:
    size, num_coordinates = points.shape[-2:]
    num_held = held(size, num_coordinates)
    if num_held > MAX_HELD:
        raise ValueError(
            f"impl='triton' of kd_tree takes up to {MAX_HELD} coordinates a block, where their number a token "
            f"counts as the next power of two, got {size} tokens with {num_coordinates}"
        )
    points = points.contiguous()
    order = torch.empty(points.shape[:-1], dtype=torch.int32, device=points.device)
    if not order.numel():
        return order
    with on_device(points):
        _tree_kernel[(order.numel() // size,)](
            points,
            order,
            SIZE=size,
            NUM_COORDINATES=num_coordinates,
            PADDED=num_held // size,
            DEPTHS=max(0, size.bit_length() - 2),
            LARGEST=LARGEST,
            GRID_BITS=GRID_BITS,
            num_warps=max(1, num_held // _HELD_BY_WARP),
        )
    return order
