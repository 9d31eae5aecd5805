"""Forward and backward, sparse against dense, on a GPU: `nox -s bench -- gpu_backward`.

A step is everything from importance to the gradients of query, key and value. It and its baselines run in one process
on one card, each timed as the median of its launches; the kernels' times are the card's, by CUDA's profiler.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
import triton
from gpu_attention import POLICIES, SHAPES, milliseconds, smooth_inputs
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.profiler import ProfilerActivity, profile

import psa_kernels
from psa_kernels import BlockLayout, LevelPlan, pyramid_attention
from psa_masks import MaskPolicy

ROWS = ("quotas .10/.05/0/.20", "threshold .4/.5/.6/.8", "quotas .10/.05/0/.20, rest as means")
BASELINES = {"FlashAttention-2": SDPBackend.FLASH_ATTENTION, "cuDNN": SDPBackend.CUDNN_ATTENTION}
PRODUCTS = {"_forward_kernel": 2, "_query_kernel": 3, "_key_value_kernel": 4}  # of a logit's size times head_dim


def step(attend: Callable[..., Tensor], inputs: list[Tensor], grad_out: Tensor) -> tuple[Tensor, ...]:
    """Attention and its gradients."""
    return torch.autograd.grad(attend(*inputs), inputs, grad_out)


def kernel_times(call: Callable[[], object], launches: int = 5) -> Counter[str]:
    """Milliseconds that the card spends a call in each of our kernels."""
    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as record:
        for _ in range(launches):
            call()
        torch.cuda.synchronize()
    times: Counter[str] = Counter()
    for event in record.events():
        if event.name.endswith("_kernel") and event.name.startswith("_"):
            times[event.name] += event.device_time_total / 1000 / launches
    return times


def extra_memory(call: Callable[[], tuple[Tensor, ...]]) -> float:
    """GiB at the peak of ``call`` beyond its inputs and the gradients it returns."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    gradients = call()
    torch.cuda.synchronize()
    kept = sum(x.numel() * x.element_size() for x in gradients)
    return (torch.cuda.max_memory_allocated() - before - kept) / 2**30


def measure_policy(
    name: str, policy: MaskPolicy, inputs: list[Tensor], grad_out: Tensor, baselines: dict[str, float]
) -> tuple[str, str]:
    """A row of the table of steps and one of the table of kernels."""
    batch, heads, length, dim = grad_out.shape
    options = {"block_q": policy.block_q, "block_kv": policy.block_kv, "num_levels": policy.num_levels}
    with torch.no_grad():
        levels = policy(*inputs[:2])
    plan = LevelPlan.from_levels(levels, BlockLayout(length, length, **options))
    density = float(plan.density().mean())

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        with torch.no_grad():
            levels = policy(query, key)
        return pyramid_attention(query, key, value, levels, **options)

    def whole() -> tuple[Tensor, ...]:
        return step(attend, inputs, grad_out)

    with torch.no_grad():
        forward = milliseconds(lambda: attend(*inputs))
    total = milliseconds(whole)
    times = kernel_times(whole)
    flops = 2 * batch * heads * length**2 * dim * density
    shares = " | ".join(f"{baselines[name] / total:.2f}" for name in BASELINES)
    rates = " | ".join(
        f"{times[kernel]:.2f} | {products * flops / times[kernel] / 1e9:.0f}" for kernel, products in PRODUCTS.items()
    )
    rest = sum(time for kernel, time in times.items() if kernel not in PRODUCTS)
    return (
        f"| {name} | {density:.3f} | {forward:.2f} | {total:.2f} | {shares} | {extra_memory(whole):.2f} |",
        f"| {name} | {rates} | {rest:.2f} |",
    )


def measure(name: str, shape: tuple[int, int, int, int]) -> list[str]:
    """The tables of one shape."""
    batch, heads, length, dim = shape
    inputs = [x.requires_grad_() for x in smooth_inputs(shape)]
    generator = torch.Generator("cuda").manual_seed(1)
    grad_out = torch.randn(shape, generator=generator, device="cuda").to(torch.bfloat16)
    steps = [
        f"## {name}: B{batch} H{heads} N{length} D{dim}, bfloat16",
        "",
        "| what | density | forward | forward and backward | FlashAttention-2 / this | cuDNN / this | extra GiB |",
        "|---|---|---|---|---|---|---|",
    ]
    baselines = {}
    for kind, backend in BASELINES.items():
        with sdpa_kernel(backend):
            with torch.no_grad():
                forward = milliseconds(lambda: scaled_dot_product_attention(*inputs))

            def dense() -> tuple[Tensor, ...]:
                return step(scaled_dot_product_attention, inputs, grad_out)

            baselines[kind] = milliseconds(dense, rep=400)
            memory = extra_memory(dense)
        steps.append(f"| dense, {kind} | 1 | {forward:.2f} | {baselines[kind]:.2f} | | | {memory:.2f} |")
    parts = [
        "",
        "| kernels | forward | TFLOP/s | gradients of queries | TFLOP/s | of keys and values | TFLOP/s | all others |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in ROWS:
        of_steps, of_kernels = measure_policy(row, POLICIES[row], inputs, grad_out, baselines)
        steps.append(of_steps)
        parts.append(of_kernels)
    return [*steps, *parts, ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, action="append", help="one of them, may be repeated")
    parser.add_argument("--out", type=Path, help="also write the tables to this file")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("gpu_backward needs an NVIDIA GPU")
    lines = [
        "# Attention and its gradients on a GPU",
        "",
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, Triton {triton.__version__}, cuDNN "
        f"{torch.backends.cudnn.version()}, psa-kernels {psa_kernels.__version__}. Medians, in milliseconds.",
        "Command: `nox -s bench -- gpu_backward`. Forward and backward is importance, levels, plan, attention and the",
        "gradients of query, key and value. TFLOP/s are computed ones: 2 B H N N D density for each product, of which",
        "the forward pass has two, the gradients of queries three, and those of keys and values four. Extra memory is",
        "the peak beyond inputs and gradients.",
        "",
    ]
    for name in options.shape or SHAPES:
        lines += measure(name, SHAPES[name])
        print("\n".join(lines), flush=True)
        if options.out:
            options.out.write_text("\n".join(lines))


if __name__ == "__main__":
    main()
