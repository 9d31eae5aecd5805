"""One program a pair of matrices does the whole iteration. Vectors pass through memory between products, because a
program reads those of all its threads."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from psa_kernels.checks import MAX_HEAD_DIM
from psa_kernels.leading_directions.ops import LEAST_PIVOT, MAX_DIRECTIONS, RIDGE, STEPS, TINY
from psa_kernels.triton_device import on_device

_CHUNK = 32  # columns of a matrix that are held at a time


@triton.jit
def _scale(matrix_ptr, HEAD_DIM: tl.constexpr, DIM_TILE: tl.constexpr, TINY: tl.constexpr):
    """What makes the mean of the diagonal 1."""
    dim = tl.arange(0, DIM_TILE)
    diagonal = tl.load(matrix_ptr + dim * (HEAD_DIM + 1), mask=dim < HEAD_DIM, other=0.0)
    return 1.0 / tl.maximum(tl.sum(diagonal, 0) / HEAD_DIM, TINY)


@triton.jit
def _product(
    matrix_ptr, scale, vectors, vectors_ptr,
    HEAD_DIM: tl.constexpr, CHUNK: tl.constexpr, RIDGE: tl.constexpr,
):  # fmt: skip
    """The matrix times ``scale``, with a little of the identity, times ``vectors`` ``[DIM_TILE, COLUMNS]``, for which
    ``vectors_ptr`` has room."""
    DIM_TILE: tl.constexpr = vectors.shape[0]
    COLUMNS: tl.constexpr = vectors.shape[1]
    dim = tl.arange(0, DIM_TILE)
    column = tl.arange(0, COLUMNS)
    tl.store(vectors_ptr + dim[:, None] * COLUMNS + column[None, :], vectors)
    tl.debug_barrier()
    product = tl.zeros([DIM_TILE, COLUMNS], tl.float32)
    for first in range(0, DIM_TILE, CHUNK):
        k = first + tl.arange(0, CHUNK)
        inside = (dim < HEAD_DIM)[:, None] & (k < HEAD_DIM)[None, :]
        matrix = tl.load(matrix_ptr + dim[:, None] * HEAD_DIM + k[None, :], mask=inside, other=0.0)
        rows = tl.load(vectors_ptr + k[:, None] * COLUMNS + column[None, :])
        product = tl.dot(matrix, rows, product, input_precision="ieee")
    return product * scale + RIDGE * vectors


@triton.jit
def _orthonormal(vectors, images, NUM_DIRECTIONS: tl.constexpr, LEAST_PIVOT: tl.constexpr, TINY: tl.constexpr):
    """Vectors ``[DIM_TILE, COLUMNS]`` with ``vectors.T @ images`` the identity, by Gram and Schmidt; ``images`` are a
    matrix times the vectors, and go along."""
    column = tl.arange(0, vectors.shape[1])
    before = tl.sum(vectors * images, 0)
    for i in range(NUM_DIRECTIONS):
        is_it = column == i
        vector = tl.sum(tl.where(is_it[None, :], vectors, 0.0), 1)
        image = tl.sum(tl.where(is_it[None, :], images, 0.0), 1)
        shares = tl.sum(image[:, None] * vectors, 0)  # [COLUMNS]
        square = tl.sum(tl.where(is_it, shares, 0.0), 0)
        square = tl.maximum(square, LEAST_PIVOT * tl.sum(tl.where(is_it, before, 0.0), 0))
        square = tl.maximum(square, TINY)
        # Itself becomes of unit length, those after it lose their share, those before it stay.
        shrunk = tl.where(is_it, 1.0 / tl.sqrt(square), 1.0)
        taken = tl.where(column > i, shares / square, 0.0)
        vectors = vectors * shrunk[None, :] - vector[:, None] * taken[None, :]
        images = images * shrunk[None, :] - image[:, None] * taken[None, :]
    return vectors, images


@triton.jit
def _directions_kernel(
    seen_ptr, spread_ptr, out_ptr, vectors_ptr, images_ptr,
    HEAD_DIM: tl.constexpr, NUM_DIRECTIONS: tl.constexpr, DIM_TILE: tl.constexpr, COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr, STEPS: tl.constexpr, RIDGE: tl.constexpr, LEAST_PIVOT: tl.constexpr, TINY: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    seen_ptr += pid * HEAD_DIM * HEAD_DIM
    spread_ptr += pid * HEAD_DIM * HEAD_DIM
    vectors_ptr += pid * DIM_TILE * COLUMNS
    images_ptr += pid * DIM_TILE * COLUMNS
    seen_scale = _scale(seen_ptr, HEAD_DIM, DIM_TILE, TINY)
    spread_scale = _scale(spread_ptr, HEAD_DIM, DIM_TILE, TINY)
    dim = tl.arange(0, DIM_TILE)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    vectors = tl.where((dim == column) & (column < NUM_DIRECTIONS), 1.0, 0.0)
    images = _product(seen_ptr, seen_scale, vectors, vectors_ptr, HEAD_DIM, CHUNK, RIDGE)
    # Vectors and images have a place each: what one product still reads, the next one does not write to.
    for _ in range(STEPS):
        vectors = _product(spread_ptr, spread_scale, images, images_ptr, HEAD_DIM, CHUNK, RIDGE)
        images = _product(seen_ptr, seen_scale, vectors, vectors_ptr, HEAD_DIM, CHUNK, RIDGE)
        vectors, images = _orthonormal(vectors, images, NUM_DIRECTIONS, LEAST_PIVOT, TINY)
    longest = tl.sqrt(tl.max(tl.sum(images * images, 0), 0))
    out = images / tl.maximum(longest, TINY)
    at = pid * HEAD_DIM * NUM_DIRECTIONS + dim * NUM_DIRECTIONS + column
    tl.store(out_ptr + at, out, mask=(dim < HEAD_DIM) & (column < NUM_DIRECTIONS))


def forward(seen: Tensor, spread: Tensor, num_directions: int) -> Tensor:
    head_dim = seen.shape[-1]
    if seen.dtype == torch.float64 or head_dim > MAX_HEAD_DIM or num_directions > MAX_DIRECTIONS:
        raise ValueError(
            f"impl='triton' of leading_directions takes float32 of up to {MAX_HEAD_DIM} features and {MAX_DIRECTIONS} "
            f"directions, got {seen.dtype}, {head_dim} and {num_directions}"
        )
    seen, spread = seen.contiguous(), spread.contiguous()
    out = torch.empty((*seen.shape[:-1], num_directions), dtype=seen.dtype, device=seen.device)
    if not out.numel():
        return out
    pairs = seen.shape[:-2].numel()
    dim_tile = max(_CHUNK, triton.next_power_of_2(head_dim))
    columns = max(16, triton.next_power_of_2(num_directions))
    room = torch.empty((2, pairs, dim_tile, columns), dtype=seen.dtype, device=seen.device)
    with on_device(seen):
        _directions_kernel[(pairs,)](
            seen,
            spread,
            out,
            room[0],
            room[1],
            HEAD_DIM=head_dim,
            NUM_DIRECTIONS=num_directions,
            DIM_TILE=dim_tile,
            COLUMNS=columns,
            CHUNK=_CHUNK,
            STEPS=STEPS,
            RIDGE=RIDGE,
            LEAST_PIVOT=LEAST_PIVOT,
            TINY=TINY,
            num_warps=8 if dim_tile >= 128 else 4,
            num_stages=1,
        )
    return out
