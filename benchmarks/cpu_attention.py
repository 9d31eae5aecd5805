"""Sparse against dense attention on a CPU: `nox -s bench -- cpu_attention`.

The whole call is timed: importance, levels, plan, pooling and attention, against torch's dense attention in the same
process. Each figure is the best of several runs, dense and sparse in turn, since a shared machine only ever adds time.
"""

import argparse
import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch
from options import whole
from torch.nn.functional import scaled_dot_product_attention

import psa_kernels
from psa_kernels import BlockLayout, LevelPlan, pyramid_attention
from psa_kernels.testing import make_qkv
from psa_masks import MaskPolicy

HEADS, HEAD_DIM, BLOCK = 4, 64, 128
BOUNDS = (0.10, 0.15, 0.15, 0.35)  # quotas of levels 1, 2, 3, 4: density 0.15
LENGTHS = (2048, 4096, 8192, 16384)


def measure(calls: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Best time of each call in seconds, the calls taken in turn."""
    best = dict.fromkeys(calls, float("inf"))
    for _ in range(repeats + 1):  # the first round warms up; the minimum forgets it
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            best[name] = min(best[name], time.perf_counter() - start)
    return best


def processor() -> str:
    """The CPU's name, where Linux tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2] for line in lines if line.startswith("model name")]
    return names[0].strip() if names else platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=whole, default=2)
    parser.add_argument("--repeats", type=whole, default=5)
    parser.add_argument("--out", type=Path, help="also write the table to this file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    lines = [
        f"# CPU attention: B1 H{HEADS} D{HEAD_DIM}, float32, blocks of {BLOCK}, quotas {BOUNDS}",
        "",
        f"{processor()}, {options.threads} threads, torch {torch.__version__}, "
        f"psa-kernels {psa_kernels.__version__}; best of {options.repeats} runs, in milliseconds.",
        f"Command: `python benchmarks/cpu_attention.py --threads {options.threads} --repeats {options.repeats}`",
        "",
        "| tokens | density | dense SDPA | attention alone | whole call | dense / whole |",
        "|---|---|---|---|---|---|",
    ]
    for length in LENGTHS:
        query, key, value = make_qkv(heads=HEADS, q_len=length, head_dim=HEAD_DIM)
        policy = MaskPolicy(mode="quota", bounds=BOUNDS, block_q=BLOCK, block_kv=BLOCK)
        options_of_call = {"block_q": BLOCK, "block_kv": BLOCK, "num_levels": policy.num_levels}
        layout = BlockLayout(length, length, **options_of_call)
        plan = LevelPlan.from_levels(policy(query, key), layout)
        best = measure(
            {
                "dense": lambda q=query, k=key, v=value: scaled_dot_product_attention(q, k, v),
                "attention": lambda q=query, k=key, v=value, p=plan, o=options_of_call: pyramid_attention(
                    q, k, v, p, **o
                ),
                "whole": lambda q=query, k=key, v=value, p=policy, o=options_of_call: pyramid_attention(
                    q, k, v, p(q, k), **o
                ),
            },
            options.repeats,
        )
        milliseconds = " | ".join(f"{1000 * best[name]:.0f}" for name in ("dense", "attention", "whole"))
        ratio = best["dense"] / best["whole"]
        lines.append(f"| {length} | {plan.density().mean():.3f} | {milliseconds} | {ratio:.2f} |")
    text = "\n".join(lines) + "\n"
    print(text)
    if options.out:
        options.out.write_text(text)


if __name__ == "__main__":
    main()
