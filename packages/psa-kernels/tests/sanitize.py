"""Launch every Triton kernel on small ragged shapes, for a tool that watches memory.

Usage: compute-sanitizer --tool memcheck --error-exitcode 1 python packages/psa-kernels/tests/sanitize.py [SHAPE ...]

SHAPE is the number of one of the shapes below; all of them without. A first run without the tool compiles the kernels,
which takes long under it.

Each tensor is an allocation of its own, and each sequence ends where its allocation does, so that a read past the last
row, or a write past the last result, is one outside of all memory. Without a GPU the first of them runs in Triton's
interpreter, which watches nothing but shows that this script works.
"""

import os

# Read when torch and Triton are imported. Cached memory is cut from larger allocations, in which nothing is outside.
os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import importlib
import pkgutil
import sys
from collections import Counter
from itertools import product

import psa_kernels
from psa_kernels import (
    BlockLayout,
    LevelPlan,
    block_importance,
    kd_tree,
    key_similarity,
    kmeans,
    leading_directions,
    permute_tokens,
    pool_pyramid,
    pyramid_attention,
    rank_levels,
    share_levels,
)
from psa_kernels.testing import VIEWS, make_qkv, random_levels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ON_HOPPER = DEVICE == "cuda" and torch.cuda.get_device_capability() == (9, 0)
DTYPES = (torch.float16, torch.float32) if DEVICE == "cuda" else (torch.float16,)


# As copies by descriptor take them, as a projection leaves them, and at an address that no descriptor takes.
LAYOUTS = (torch.clone, VIEWS["transposed"], VIEWS["odd address"])
# q_len, kv_len, head_dim, block_q, block_kv, is_causal, kv_lengths
SHAPES = (
    (33, 203, 64, 16, 128, False, None),  # with blocks of every level, which alone launch every kernel
    (70, 77, 40, 32, 32, True, None),
    (1, 150, 33, 128, 64, False, (149, 3)),
    (130, 300, 80, 128, 128, False, None),  # for the kernel that Hopper has beside the one of all
)
ON_CPU = 1


def watch():
    """Counts launches by kernel. Returns the counter and the names of all kernels."""
    launches, names = Counter(), set()
    for module in pkgutil.walk_packages(psa_kernels.__path__, "psa_kernels."):
        file = module.name.rpartition(".")[2]
        if file.startswith("triton_") or (file == "hopper_fwd" and ON_HOPPER):
            for name, kernel in vars(importlib.import_module(module.name)).items():
                shown = f"{name} in {file}" if file == "hopper_fwd" else name
                if name.endswith("_kernel") and shown not in names:
                    names.add(shown)
                    count(kernel, shown, launches)
    return launches, names


def count(kernel, name, launches):
    launch = kernel.run

    def run(*args, **kwargs):
        result = launch(*args, **kwargs)
        if DEVICE == "cuda":
            torch.cuda.synchronize()  # what went wrong is named after the kernel in which it did
        launches[name] += 1
        return result

    kernel.run = run


def run_all(view, dtype, q_len, kv_len, head_dim, block_q, block_kv, is_causal, kv_lengths):
    """Every operator once, ``[2, 4, q_len, head_dim]`` on two KV heads."""
    qkv = make_qkv(
        batch=2, heads=4, kv_heads=2, q_len=q_len, kv_len=kv_len, head_dim=head_dim, dtype=dtype, device=DEVICE
    )
    query, key, value = (view(x) for x in qkv)
    lengths = torch.tensor(kv_lengths, device=DEVICE) if kv_lengths else None
    blocks = {"block_q": block_q, "block_kv": block_kv, "is_causal": is_causal}
    layout = BlockLayout(q_len, kv_len, **blocks)
    num_levels = layout.num_levels
    options = {"kv_lengths": lengths, "impl": "triton"}
    results = [
        pool_pyramid(key, block_kv=block_kv, num_levels=num_levels, **options).pooled,
        key_similarity(key, block_kv=block_kv, num_levels=num_levels, **options),
    ]
    results += kmeans(query, min(q_len, 5), num_iterations=1, impl="triton")
    results.append(permute_tokens(key, key[..., 0].argsort(dim=2), impl="triton"))
    moments = (x.float().mT @ x.float() for x in (query, query * 2))
    results.append(leading_directions(*moments, 3, impl="triton"))
    results.append(kd_tree(key[:, :, :16, :5], impl="triton"))
    for reduction in ("max", "mean", "error"):
        samples = {"samples_q": 7, "samples_kv": 5, "reduction": reduction}
        results.append(block_importance(query, key, **samples, **blocks, **options))
    for reduction in ("max", "mean"):
        groups = {"samples_q": block_q // 8, "samples_kv": block_kv // 8, "reduction": reduction}
        results.append(block_importance(query, key, method="antidiagonal", **groups, **blocks, **options))
    counts = [1, layout.num_kv_blocks]
    scores = results[-1]
    results.append(rank_levels(scores, counts, impl="triton"))
    num_blocks = torch.tensor([layout.num_kv_blocks, 1], device=DEVICE)
    results.append(share_levels(scores, [0.5, 0.9], min_first=0.2, lengths=num_blocks, impl="triton"))
    levels = random_levels(layout, batch=2, heads=4, device=DEVICE)
    plan = LevelPlan.from_levels(levels, layout, impl="triton")
    inputs = [x.requires_grad_() for x in (query, key, value)]
    attended = pyramid_attention(*inputs, plan, return_lse=True, **blocks, **options)
    results += [x.detach() for x in attended]
    # Hopper's kernel has another form where no block is as small as the rows that are gathered.
    results.append(
        pyramid_attention(query, key, value, levels.clamp(max=1), num_levels=1, **blocks, **options).detach()
    )
    # Of a sum, so that what comes in for out is one number, expanded.
    results += torch.autograd.grad(attended[0].sum() + attended[1].nan_to_num(neginf=0).sum(), inputs)
    assert not any(x.isnan().any() for x in results)


def main() -> None:
    launches, names = watch()
    shapes = [SHAPES[int(n)] for n in sys.argv[1:]] or SHAPES[: None if DEVICE == "cuda" else ON_CPU]
    for shape, dtype in product(shapes, DTYPES):
        for view in LAYOUTS if DEVICE == "cuda" else LAYOUTS[-1:]:
            run_all(view, dtype, *shape)
    for name in sorted(names):
        print(f"{name}: {launches[name]} launches on {DEVICE}")
    missing = names - set(launches)
    if missing:
        raise SystemExit(f"never launched: {', '.join(sorted(missing))}")


if __name__ == "__main__":
    main()
