"""Sparse against dense attention on a GPU: `nox -s bench -- gpu_attention`.

Every part of the op and its baselines run in one process on one card, each timed as the median of its launches. Shapes
W and C are Wan2.1-1.3B at 720p with 69 frames and CogVideoX-5B.
"""

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import triton
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.profiler import ProfilerActivity, profile
from triton.testing import do_bench

import psa_kernels
from psa_kernels import BlockLayout, LevelPlan, block_importance, pool_pyramid, pyramid_attention
from psa_masks import MaskPolicy, levels_by_quota, levels_by_threshold

SHAPES = {"W": (1, 12, 69120, 128), "C": (1, 48, 17550, 64)}
QUOTAS = (0.10, 0.15, 0.15, 0.35)  # 10% of the blocks at level 1, 5% at 2, none at 3, 20% at 4: density 0.15
ROWS = {
    "quotas .10/.05/0/.20": {"mode": "quota", "bounds": QUOTAS},
    "quotas .05/.10/.10/.25": {"mode": "quota", "bounds": (0.05, 0.15, 0.25, 0.50)},
    "threshold .4/.5/.6/.8": {"mode": "threshold", "bounds": (0.4, 0.5, 0.6, 0.8)},
    "quotas .10/.05/0/.20, rest as means": {"mode": "quota", "bounds": QUOTAS, "skip": "mean"},
    "level 1 for 4%, rest as means": {"mode": "quota", "bounds": (0.04,), "skip": "mean"},
    "level 1 for 15%": {"mode": "quota", "bounds": (0.15,)},
    "quotas .10/.05/0/.20, block_kv 64": {"mode": "quota", "bounds": QUOTAS, "block_kv": 64},
    "quotas .10/.05/0/.20, block_kv 32": {"mode": "quota", "bounds": QUOTAS, "block_kv": 32},
}
POLICIES = {name: MaskPolicy(**options, samples_q=16, samples_kv=16) for name, options in ROWS.items()}


def milliseconds(call: Callable[[], object], rep: int = 100) -> float:
    return float(do_bench(call, warmup=25, rep=rep, return_mode="median"))


def kernel_milliseconds(call: Callable[[], object], kernel: str, launches: int = 20) -> float:
    """The median time that the card spends in ``kernel``, by CUDA's profiler, of calls that find an empty cache."""
    flush = torch.empty(2**26, dtype=torch.int32, device="cuda")
    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as record:
        for _ in range(launches):
            flush.zero_()
            call()
        torch.cuda.synchronize()
    times = [event.device_time_total for event in record.events() if event.name == kernel]
    if len(times) < launches:
        raise RuntimeError(f"the profiler saw {len(times)} launches of {kernel}, not {launches}")
    return statistics.median(times) / 1000


def smooth_inputs(shape: tuple[int, int, int, int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, keys and values that vary slowly along the sequence, with noise, so that blocks differ."""
    batch, heads, length, dim = shape
    generator = torch.Generator("cuda").manual_seed(0)

    def draw() -> torch.Tensor:
        coarse = torch.randn(batch * heads, dim, -(-length // 256), generator=generator, device="cuda")
        smooth = torch.nn.functional.interpolate(coarse, size=length, mode="linear").transpose(1, 2)
        noise = torch.randn(smooth.shape, generator=generator, device="cuda")
        return (smooth + 0.5 * noise).reshape(shape).to(torch.bfloat16).contiguous()

    query, key, value = draw(), draw(), draw()
    return query, (key + 0.5 * query).contiguous(), value


def dense(backend: SDPBackend, *tensors: torch.Tensor) -> float:
    with sdpa_kernel(backend):
        return milliseconds(lambda: scaled_dot_product_attention(*tensors), rep=400)


def extra_memory(call: Callable[[], object], result: torch.Tensor) -> float:
    """GiB that ``call`` has at its peak beyond its inputs and its result."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = call()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    del out
    return (peak - result.numel() * result.element_size()) / 2**30


def measure_policy(
    name: str, policy: MaskPolicy, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cudnn: float
) -> str:
    """The table's row for one policy."""
    batch, heads, length, dim = query.shape
    blocks = {"block_q": policy.block_q, "block_kv": policy.block_kv}
    layout = BlockLayout(length, length, **blocks, num_levels=policy.num_levels)
    levels = policy(query, key)
    plan = LevelPlan.from_levels(levels, layout)
    density = float(plan.density().mean())

    def pool() -> None:
        for x in (key, value):
            pool_pyramid(x, block_kv=policy.block_kv, num_levels=policy.num_levels)

    def whole() -> torch.Tensor:
        return pyramid_attention(query, key, value, policy(query, key), **blocks, num_levels=policy.num_levels)

    importance = milliseconds(lambda: block_importance(query, key, **blocks, samples_q=16, samples_kv=16))
    mask = milliseconds(lambda: policy(query, key)) - importance
    mask += milliseconds(lambda: LevelPlan.from_levels(levels, layout))
    pooling = milliseconds(pool)

    def attend() -> torch.Tensor:
        return pyramid_attention(query, key, value, plan, **blocks, num_levels=policy.num_levels)

    attention = milliseconds(attend)
    kernel = kernel_milliseconds(attend, "_forward_kernel")
    rate = 4 * batch * heads * length**2 * dim * density / kernel / 1e9
    total = milliseconds(whole)
    return (
        f"| {name} | {density:.3f} | {importance:.2f} | {mask:.2f} | {pooling:.2f} | {kernel:.2f} | {rate:.0f} "
        f"| {attention:.2f} | {total:.2f} | {total / cudnn:.3f} | {extra_memory(whole, query):.2f} |"
    )


def measure(name: str, shape: tuple[int, int, int, int]) -> list[str]:
    """The tables of one shape."""
    batch, heads, length, dim = shape
    query, key, value = smooth_inputs(shape)
    cudnn = dense(SDPBackend.CUDNN_ATTENTION, query, key, value)
    flash = dense(SDPBackend.FLASH_ATTENTION, query, key, value)
    rate = 4 * batch * heads * length**2 * dim / cudnn / 1e9
    lines = [
        f"## {name}: B{batch} H{heads} N{length} D{dim}, bfloat16",
        "",
        f"Dense SDPA: cuDNN {cudnn:.2f} ms ({rate:.0f} TFLOP/s), FlashAttention-2 {flash:.2f} ms.",
        "",
        "| what | density | importance | levels + plan | pooling | kernel | TFLOP/s | call | whole op | / cuDNN "
        "| extra GiB |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [measure_policy(row, policy, query, key, value, cudnn) for row, policy in POLICIES.items()]
    lines += ["", "| importance, samples a block | ms |", "|---|---|"]
    for samples in (8, 16, 32):
        time = milliseconds(
            lambda n=samples: block_importance(query, key, block_q=128, block_kv=128, samples_q=n, samples_kv=n)
        )
        lines.append(f"| {samples} | {time:.2f} |")
    scores = block_importance(query, key, block_q=128, block_kv=128, samples_q=16, samples_kv=16)
    for rule in (levels_by_quota, levels_by_threshold):
        time = milliseconds(lambda rule=rule: rule(scores, QUOTAS))
        lines += ["", f"{rule.__name__} alone: {time:.3f} ms"]
    lines.append("")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, action="append", help="one of them, may be repeated")
    parser.add_argument("--out", type=Path, help="also write the tables to this file")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("gpu_attention needs an NVIDIA GPU")
    lines = [
        "# Attention on a GPU",
        "",
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, Triton {triton.__version__}, cuDNN "
        f"{torch.backends.cudnn.version()}, psa-kernels {psa_kernels.__version__}. Medians, in milliseconds.",
        "Command: `nox -s bench -- gpu_attention`. The kernel's time is the card's, by CUDA's profiler; its TFLOP/s",
        "are computed ones, 4 B H N N D density / kernel. The call is `pyramid_attention` with a plan: pooling, the",
        "order of query blocks, the kernel, and launches. The whole op is everything from importance to attention.",
        "",
    ]
    for name in options.shape or SHAPES:
        lines += measure(name, SHAPES[name])
        print("\n".join(lines), flush=True)
        if options.out:
            options.out.write_text("\n".join(lines))


if __name__ == "__main__":
    main()
