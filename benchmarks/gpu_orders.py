"""What token orders cost on a GPU: `nox -s bench -- gpu_orders`.

The shape is that of Wan2.1-1.3B at 720p with 69 frames. A curve is applied once in a forward of the whole model; orders
by cluster are made and applied in every layer, so their cost stands beside that of one attention.
"""

import argparse
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import torch
import triton
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import interpolate, scaled_dot_product_attention
from torch.profiler import ProfilerActivity, profile
from triton.testing import do_bench

import psa_masks
from psa_kernels import kd_tree, kmeans, leading_directions
from psa_masks import AttentionOrder, VideoGrid, gilbert_order, kd_tree_order, semantic_order
from psa_masks.order.kd_tree import sampled_moments
from psa_masks.order.semantic import path_through

GRID = VideoGrid(frames=18, height=48, width=80)
HEADS, HEAD_DIM = 12, 128
CLUSTERS = (64, 256, 512)


def milliseconds(call: Callable[[], object]) -> float:
    return float(do_bench(call, warmup=10, rep=60, return_mode="median"))


def by_kernel(call: Callable[[], object], launches: int = 5) -> dict[str, float]:
    """Milliseconds a call that the card spends in each kernel, by CUDA's profiler."""
    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as record:
        for _ in range(launches):
            call()
        torch.cuda.synchronize()
    times: dict[str, float] = defaultdict(float)
    for event in record.events():
        times[event.name] += event.device_time_total / 1000 / launches
    return times


def smooth(grid: VideoGrid, heads: int, dim: int, seed: int, device: str) -> Tensor:
    """Tokens ``[1, heads, L, dim]`` that vary slowly over the video, with noise."""
    generator = torch.Generator(device).manual_seed(seed)
    coarse = torch.randn(1, heads * dim, 6, 8, 10, generator=generator, device=device)
    fine = interpolate(coarse, size=grid.shape, mode="trilinear").view(1, heads, dim, -1).transpose(2, 3)
    noise = torch.randn(fine.shape, generator=generator, device=device)
    return (fine + 0.5 * noise).to(torch.bfloat16).contiguous()


def curve_rows(grid: VideoGrid, heads: int, dim: int, device: str) -> list[str]:
    """What the curve costs, once when a grid is new and once a forward."""
    gilbert_order(VideoGrid(frames=2, height=2, width=2))
    start = time.perf_counter()
    order = gilbert_order(grid)
    made = (time.perf_counter() - start) * 1000
    tokens = torch.randn(1, grid.seq_len, heads * dim, device=device).to(torch.bfloat16)
    table = torch.randn(1, grid.seq_len, 1, dim, device=device)
    projected = torch.randn(1, grid.seq_len, 64, device=device).to(torch.bfloat16)

    def forward() -> None:
        order.apply(tokens, 1)
        for _ in range(2):
            order.apply(table, 1)
        order.undo(projected, 1)

    return [
        f"| Gilbert, made (once a grid, on the CPU) | {made:.0f} |",
        f"| Gilbert, tokens, rotary tables and output (once a forward) | {milliseconds(forward):.3f} |",
    ]


def cluster_row(num_clusters: int, key: Tensor, kernels: Callable[..., dict[str, float]]) -> str:
    """One number of clusters: an iteration and its parts, then what comes after it."""
    start = kmeans(key, num_clusters).centroids

    def iterate() -> object:
        return kmeans(key, num_clusters, centroids=start, num_iterations=1)

    times = kernels(iterate)
    assign, mean = times["_assign_kernel"], times["_mean_kernel"]
    rest = sum(times.values()) - assign - mean
    order = semantic_order(key, num_clusters, centroids=start, num_iterations=1)
    one = milliseconds(iterate)
    whole = milliseconds(lambda: semantic_order(key, num_clusters, centroids=start, num_iterations=1))
    path = milliseconds(lambda: path_through(order.centroids))
    return f"| {num_clusters} | {one:.2f} | {assign:.2f} | {mean:.2f} | {rest:.2f} | {path:.2f} | {whole:.2f} |"


def layer_rows(num_clusters: int, query: Tensor, key: Tensor, value: Tensor) -> list[str]:
    """A layer from its queries, keys and values to those in order, and its output back."""
    starts = [kmeans(x, num_clusters).centroids for x in (query, key)]
    rows = []
    for method in ("Semantic", "Hybrid"):
        for iterations in (1, 2):

            def layer(method: str = method, iterations: int = iterations) -> None:
                queries, keys = (
                    semantic_order(x, num_clusters, centroids=start, num_iterations=iterations)
                    if side or method == "Semantic"
                    else None
                    for side, (x, start) in enumerate(zip((query, key), starts, strict=True))
                )
                order = AttentionOrder(queries, keys)
                order.undo(order.apply(query, key, value)[0])

            rows.append(f"| {method}, K {num_clusters}, iterations: {iterations} | {milliseconds(layer):.2f} |")
    return rows


def tree_rows(query: Tensor, key: Tensor, value: Tensor, kernels: Callable[..., dict[str, float]]) -> list[str]:
    """A layer with the keys of each block by a k-d tree, and the parts of that."""

    def make() -> AttentionOrder:
        return AttentionOrder(None, kd_tree_order(query, key, block_kv=128))

    order = make()
    moments = sampled_moments(query, key)
    directions = leading_directions(*moments, 8).to(key.dtype)
    points = (key @ directions).unflatten(2, (-1, 128))
    times: dict[str, Callable[[], object]] = {
        "KdTree, blocks of 128: order made, keys and values put in it": lambda: make().apply(query, key, value),
        "the order made": make,
        "of that: moments of samples": lambda: sampled_moments(query, key),
        "of that: directions": lambda: leading_directions(*moments, 8),
        "of that: keys projected": lambda: key @ directions,
        "of that: trees": lambda: kd_tree(points),
        "keys and values put in the order": lambda: order.apply(query, key, value),
    }
    alone = sum(kernels(lambda: make().apply(query, key, value)).values())
    first, *parts = (f"| {name} | {milliseconds(call):.3f} |" for name, call in times.items())
    return [first, f"| its kernels alone | {alone:.3f} |", *parts]


def gather_rows(query: Tensor) -> list[str]:
    """Putting one tensor in order: as HeadOrder does, by rows of all heads in one, and as fast as memory copies."""
    order = semantic_order(query, 64, num_iterations=1)
    batch, heads, length, dim = query.shape
    first = torch.arange(batch * heads, device=query.device).view(batch, heads, 1) * length
    rows = (order.order + first).flatten()
    ways = {
        "HeadOrder.apply": lambda: order.apply(query),
        "index_select of rows": lambda: query.reshape(-1, dim).index_select(0, rows),
        "a copy": lambda: query.clone(),
    }
    return [f"| one of q, k, v: {name} | {milliseconds(call):.3f} |" for name, call in ways.items()]


def tables(
    grid: VideoGrid, heads: int, dim: int, device: str, kernels: Callable[..., dict[str, float]], dense: bool = True
) -> list[str]:
    query, key, value = (smooth(grid, heads, dim, seed, device) for seed in range(3))
    lines = ["| what | ms |", "|---|---|", *curve_rows(grid, heads, dim, device), *gather_rows(query)]
    for num_clusters in CLUSTERS:
        lines += layer_rows(num_clusters, query, key, value)
    lines += tree_rows(query, key, value, kernels)
    if dense:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            attention = milliseconds(lambda: scaled_dot_product_attention(query, key, value))
        lines.append(f"| for comparison: dense attention of the layer, cuDNN | {attention:.1f} |")
    lines += ["", "One iteration of k-means, and the order made of it, for keys alone, in ms:", ""]
    lines += ["| K | iteration | assignment | means | sort and the rest | path | whole order |"]
    lines += ["|---|---|---|---|---|---|---|"]
    return lines + [cluster_row(num_clusters, key, kernels) for num_clusters in CLUSTERS] + [""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="also write the tables to this file")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("gpu_orders needs an NVIDIA GPU")
    lines = [
        "# Token orders on a GPU",
        "",
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, Triton {triton.__version__}, "
        f"psa-masks {psa_masks.__version__}.",
        "Command: `nox -s bench -- gpu_orders`. Medians of a call; the parts of an iteration are the card's own time,",
        f"by CUDA's profiler. B1 H{HEADS} N{GRID.seq_len} D{HEAD_DIM} (grid {'x'.join(map(str, GRID.shape))}), bf16.",
        "A row of Semantic or Hybrid is a layer: k-means from the clusters of the step before, sort, gather of q, k",
        "and v, and undoing the output. Hybrid takes queries as they come, in the order of the curve.",
        "",
        *tables(GRID, HEADS, HEAD_DIM, "cuda", by_kernel),
    ]
    print("\n".join(lines), flush=True)
    if options.out:
        options.out.write_text("\n".join(lines))


if __name__ == "__main__":
    main()
