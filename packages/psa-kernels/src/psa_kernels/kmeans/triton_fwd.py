"""Two kernels an iteration: one finds each token's cluster, one adds up the tokens of each cluster in a fixed order.

Between them the tokens are sorted by cluster. Atomic sums would need no sort, but would round in another way each time.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from psa_kernels.checks import MAX_HEAD_DIM
from psa_kernels.triton_device import on_device

_ROWS = 32  # tokens that the mean of a cluster reads at a time


@triton.jit(do_not_specialize=["num_heads", "length", "num_clusters", "num_tiles"])
def _assign_kernel(
    x_ptr,
    centroids_ptr,
    half_norms_ptr,
    keys_ptr,
    x_strides,
    num_heads,
    length,
    num_clusters,
    num_tiles,
    HEAD_DIM: tl.constexpr,
    DIM_TILE: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Writes the nearest cluster of each token, counted through all heads: head * num_clusters + cluster."""
    pid = tl.program_id(0).to(tl.int64)
    tile = pid % num_tiles
    row = pid // num_tiles  # of [B * H]
    x_ptr += row // num_heads * x_strides[0] + row % num_heads * x_strides[1]
    token = tile * TILE_M + tl.arange(0, TILE_M)
    dim = tl.arange(0, DIM_TILE)
    in_dim = dim < HEAD_DIM
    offset = token[:, None] * x_strides[2] + dim[None, :].to(tl.int64) * x_strides[3]
    x = tl.load(x_ptr + offset, mask=(token < length)[:, None] & in_dim[None, :], other=0.0)  # [TILE_M, DIM_TILE]

    # The nearest centroid has the largest x.c - |c|^2 / 2. A NaN is larger than nothing, so its token is in cluster 0.
    best = tl.full([TILE_M], float("-inf"), tl.float32)
    nearest = tl.zeros([TILE_M], tl.int32)
    for first in range(0, num_clusters, TILE_K):
        cluster = first + tl.arange(0, TILE_K)
        exists = cluster < num_clusters
        at = row * num_clusters + cluster
        centroid = tl.load(
            centroids_ptr + at[:, None] * HEAD_DIM + dim[None, :], mask=exists[:, None] & in_dim[None, :], other=0.0
        )  # [TILE_K, DIM_TILE]
        half_norm = tl.load(half_norms_ptr + at, mask=exists, other=float("inf"))
        score = tl.dot(x, tl.trans(centroid), input_precision=PRECISION) - half_norm[None, :]  # [TILE_M, TILE_K]
        largest = tl.max(score, axis=1)
        there = tl.min(tl.where(score == largest[:, None], cluster[None, :], num_clusters - 1), axis=1)
        nearest = tl.where(largest > best, there, nearest)
        best = tl.maximum(best, largest)
    tl.store(keys_ptr + row * length + token, (row * num_clusters + nearest).to(tl.int32), mask=token < length)


@triton.jit(do_not_specialize=["num_heads", "length", "num_clusters"])
def _mean_kernel(
    x_ptr,
    order_ptr,
    starts_ptr,
    centroids_ptr,
    x_strides,
    num_heads,
    length,
    num_clusters,
    HEAD_DIM: tl.constexpr,
    DIM_TILE: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Moves a centroid to the mean of its cluster, whose tokens are ``order[starts[pid] : starts[pid + 1]]``."""
    pid = tl.program_id(0).to(tl.int64)
    row = pid // num_clusters
    x_ptr += row // num_heads * x_strides[0] + row % num_heads * x_strides[1]
    dim = tl.arange(0, DIM_TILE)
    in_dim = dim < HEAD_DIM
    start = tl.load(starts_ptr + pid)
    stop = tl.load(starts_ptr + pid + 1)
    sums = tl.zeros([ROWS, DIM_TILE], tl.float32)
    for first in range(start, stop, ROWS):
        place = first + tl.arange(0, ROWS)
        inside = place < stop
        token = tl.load(order_ptr + place, mask=inside, other=0) - row * length  # [ROWS]
        offset = token[:, None] * x_strides[2] + dim[None, :].to(tl.int64) * x_strides[3]
        x = tl.load(x_ptr + offset, mask=inside[:, None] & in_dim[None, :], other=0.0)  # [ROWS, DIM_TILE]
        sums += x.to(tl.float32)
    if stop > start:
        mean = tl.sum(sums, axis=0) / (stop - start).to(tl.float32)
        tl.store(centroids_ptr + pid * HEAD_DIM + dim, mean, mask=in_dim)


def _tile(dim_tile: int, element_size: int) -> tuple[int, int]:
    """Tokens and centroids that a program multiplies at a time; with what is loaded ahead, under 99 KiB."""
    row = dim_tile * element_size
    return (128, 64) if row <= 256 else (64, 32) if row <= 512 else (32, 16)


def forward(x: Tensor, centroids: Tensor, num_iterations: int) -> tuple[Tensor, Tensor, Tensor]:
    batch, heads, length, head_dim = x.shape
    if x.dtype == torch.float64 or head_dim > MAX_HEAD_DIM:
        raise ValueError(
            f"impl='triton' of kmeans takes float16, bfloat16 or float32 with head_dim up to {MAX_HEAD_DIM}, "
            f"got {x.dtype} with {head_dim}"
        )
    num_clusters = centroids.shape[2]
    total = batch * heads * num_clusters
    if total >= 2**31:
        raise ValueError(f"impl='triton' of kmeans takes B * H * num_clusters below 2**31, got {total}")
    centroids = centroids.clone(memory_format=torch.contiguous_format)
    keys = torch.empty((batch, heads, length), dtype=torch.int32, device=x.device)
    clusters = torch.arange(total + 1, dtype=torch.int32, device=x.device)
    dim_tile = max(16, triton.next_power_of_2(head_dim))
    tile_m, tile_k = _tile(dim_tile, x.element_size())
    num_tiles = triton.cdiv(length, tile_m)
    with on_device(x):
        for _ in range(num_iterations):
            # Tensor cores multiply two of a kind. The norms are those of the rounded centroids, so that distances to
            # these are exact.
            rounded = centroids.to(x.dtype)
            half_norms = rounded.float().square().sum(-1) / 2
            _assign_kernel[(batch * heads * num_tiles,)](
                x,
                rounded,
                half_norms,
                keys,
                x.stride(),
                heads,
                length,
                num_clusters,
                num_tiles,
                HEAD_DIM=head_dim,
                DIM_TILE=dim_tile,
                TILE_M=tile_m,
                TILE_K=tile_k,
                PRECISION="ieee" if x.dtype == torch.float32 else "tf32",
                num_warps=8 if tile_m == 128 else 4,
                num_stages=2,
            )
            # One sort through all heads: a sort a head launches as many times as there are heads.
            by_cluster, order = keys.flatten().sort(stable=True)
            starts = torch.searchsorted(by_cluster, clusters)
            _mean_kernel[(total,)](
                x,
                order,
                starts,
                centroids,
                x.stride(),
                heads,
                length,
                num_clusters,
                HEAD_DIM=head_dim,
                DIM_TILE=dim_tile,
                ROWS=_ROWS,
            )
    counts = starts.diff().to(torch.int32).view(batch, heads, num_clusters)
    first = clusters[:total:num_clusters].view(batch, heads, 1)
    return keys - first, centroids, counts
