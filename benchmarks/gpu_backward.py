"""Forward and backward, sparse against dense, on a GPU: `nox -s bench -- gpu_backward`.

A step is everything from importance to the gradients of query, key and value, or without importance where its plan or
list of blocks is given. It and its baselines run in one process on one card, each timed as the median of its launches;
the kernels' times are the card's, by CUDA's profiler. FastVideo's kernel, where the package `fastvideo-kernel` is
installed, runs in a process of its own, so that one that fails leaves the rest of the table; its output and gradients
are checked against `pyramid_attention` on the same blocks before they are timed.
"""

import argparse
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import triton
from gpu_attention import POLICIES, SHAPES, milliseconds, smooth_inputs
from gpu_lengths import LEVEL_1, check_same, fastvideo_kernel, half_blocks, kept_blocks, planned, reason
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import pad, scaled_dot_product_attention
from torch.profiler import ProfilerActivity, profile

import psa_kernels
from psa_kernels import BlockLayout, LevelPlan, pyramid_attention
from psa_masks import MaskPolicy

ROWS = ("quotas .10/.05/0/.20", "threshold .4/.5/.6/.8", "quotas .10/.05/0/.20, rest as means")
BASELINES = {"FlashAttention-2": SDPBackend.FLASH_ATTENTION, "cuDNN": SDPBackend.CUDNN_ATTENTION}
FASTVIDEO = "FastVideo VSA (sm_90, blocks of 64), list given"
FASTVIDEO_SECONDS = 120.0
DENSITY = 0.15
GIVEN = {"level 1 for .15, plan given": LEVEL_1[DENSITY], f"{ROWS[0]}, plan given": POLICIES[ROWS[0]]}
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


@dataclass(frozen=True)
class Step:
    """Milliseconds of the forward pass and of both, and GiB beyond inputs and gradients."""

    density: float
    forward: float
    both: float
    extra: float

    def row(self, name: str, baselines: dict[str, float]) -> str:
        shares = " | ".join(f"{baselines[kind] / self.both:.2f}" for kind in BASELINES)
        return f"| {name} | {self.density:.3f} | {self.forward:.2f} | {self.both:.2f} | {shares} | {self.extra:.2f} |"


def measure_step(attend: Callable[..., Tensor], inputs: list[Tensor], grad_out: Tensor, density: float) -> Step:
    def both() -> tuple[Tensor, ...]:
        return step(attend, inputs, grad_out)

    with torch.no_grad():
        forward = milliseconds(lambda: attend(*inputs))
    return Step(density, forward, milliseconds(both), extra_memory(both))


def with_plan(policy: MaskPolicy, inputs: list[Tensor]) -> tuple[Callable[..., Tensor], float]:
    """Attention with the policy's plan made before, and its density."""
    with torch.no_grad():
        plan, density = planned(policy, *inputs[:2])
    return lambda *tensors: pyramid_attention(*tensors, plan, num_levels=policy.num_levels), density


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

    found = measure_step(attend, inputs, grad_out, density)
    times = kernel_times(lambda: step(attend, inputs, grad_out))
    flops = 2 * batch * heads * length**2 * dim * density
    rates = " | ".join(
        f"{times[kernel]:.2f} | {products * flops / times[kernel] / 1e9:.0f}" for kernel, products in PRODUCTS.items()
    )
    rest = sum(time for kernel, time in times.items() if kernel not in PRODUCTS)
    return found.row(name, baselines), f"| {name} | {rates} | {rest:.2f} |"


def draw(shape: tuple[int, int, int, int]) -> tuple[list[Tensor], Tensor]:
    """Query, key and value, and the gradient of their attention's output."""
    inputs = [x.requires_grad_() for x in smooth_inputs(shape)]
    generator = torch.Generator("cuda").manual_seed(1)
    return inputs, torch.randn(shape, generator=generator, device="cuda").to(torch.bfloat16)


def measure_fastvideo(shape: tuple[int, int, int, int]) -> Step:
    """FastVideo's kernel on the blocks that level 1 alone keeps, once its results are ours."""
    kernel = fastvideo_kernel()
    inputs, grad_out = draw(shape)
    with torch.no_grad():
        blocks = half_blocks(*kept_blocks(*inputs[:2], DENSITY), shape[2])
    # It takes whole blocks alone; what is past the end is nothing that a query reads.
    missing = 64 * len(blocks[2]) - shape[2]
    padded = [pad(x.detach(), (0, 0, 0, missing)).requires_grad_() for x in inputs]

    def attend(*tensors: Tensor) -> Tensor:
        out: Tensor = kernel(*tensors, *blocks)[0]
        return out

    reference, density = with_plan(LEVEL_1[DENSITY], inputs)
    padded_grad = pad(grad_out, (0, 0, 0, missing))
    with torch.no_grad():
        check_same("output", attend(*padded)[:, :, : shape[2]], reference(*inputs))
    gradients = zip(step(attend, padded, padded_grad), step(reference, inputs, grad_out), strict=True)
    for name, (found, expected) in zip(("query", "key", "value"), gradients, strict=True):
        check_same(f"gradient of {name}", found[:, :, : shape[2]], expected)
    return measure_step(attend, padded, padded_grad, density)


def fastvideo_row(name: str, baselines: dict[str, float]) -> str:
    """FastVideo's row of one shape, measured in a process of its own, or why there is none."""
    command = [sys.executable, __file__, "--fastvideo", "--shape", name]
    try:
        child = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=FASTVIDEO_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        note = f"its process took more than {FASTVIDEO_SECONDS:.0f} s"
    else:
        lines = child.stdout.splitlines()
        if child.returncode == 0 and lines:
            return Step(**json.loads(lines[-1])).row(FASTVIDEO, baselines)
        note = lines[-1] if lines else f"its process ended with code {child.returncode}"
    return f"| {FASTVIDEO} | not measured: {note.replace('|', '/')} | | | | | |"


def report_fastvideo(name: str) -> int:
    """In the process of its own: prints the figures or the reason, and returns the exit status."""
    try:
        print(json.dumps(asdict(measure_fastvideo(SHAPES[name]))))
    except Exception as error:  # another project's kernel raises anything; its row says what, and this process ends
        print(reason(error))
        return 1
    return 0


def measure(name: str, shape: tuple[int, int, int, int]) -> list[str]:
    """The tables of one shape."""
    batch, heads, length, dim = shape
    inputs, grad_out = draw(shape)
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
    for row, policy in GIVEN.items():
        attend, density = with_plan(policy, inputs)
        steps.append(measure_step(attend, inputs, grad_out, density).row(row, baselines))
    steps.append(fastvideo_row(name, baselines))
    return [*steps, *parts, ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, action="append", help="one of them, may be repeated")
    parser.add_argument("--out", type=Path, help="also write the tables to this file")
    parser.add_argument("--fastvideo", action="store_true", help="only FastVideo's kernel on one shape, as JSON")
    options = parser.parse_args()
    if options.fastvideo:
        sys.exit(report_fastvideo((options.shape or ["W"])[0]))
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
        "the peak beyond inputs and gradients. Plan given, list given: importance, levels and plan were made before.",
        "FastVideo's kernel reads the same blocks as level 1 alone, in halves.",
        "",
    ]
    for name in options.shape or SHAPES:
        lines += measure(name, SHAPES[name])
        print("\n".join(lines), flush=True)
        if options.out:
            options.out.write_text("\n".join(lines))


if __name__ == "__main__":
    main()
