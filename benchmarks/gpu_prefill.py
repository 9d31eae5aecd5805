"""Prefill of a language model that watches videos, sparse against dense: `nox -s bench -- gpu_prefill`.

Attention of the text model of Qwen2.5-VL-7B (28 heads, 4 key/value heads, head_dim 128, causal) at 32k and 128k tokens:
the whole op (antidiagonal importance, similarity, levels, plan, attention) and its parts, against dense SDPA. The op is
held to the oracle on a small shape before it is timed.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from options import whole
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import psa_kernels
from psa_config import load_presets
from psa_integrations.attention import sparse_attention
from psa_integrations.build import mask_policy
from psa_kernels import BlockLayout, LevelPlan, block_importance, key_similarity, pyramid_attention
from psa_kernels.testing import assert_within_error_budget
from psa_masks import MaskPolicy

HEADS, KV_HEADS, HEAD_DIM = 28, 4, 128
LENGTHS = (32768, 131072)
PRESET = "Qwen2.5-VL_7b"
# The similarity of keys is computed as the preset has it, and hinders nothing: the quotas alone decide the density.
COMMON = {"method": "antidiagonal", "samples_q": 8, "samples_kv": 8, "is_causal": True}
COMMON |= {"similarity_thresholds": (-0.999,) * 3}
POLICIES = {
    "quotas .135/.068/0/.27": MaskPolicy(mode="quota", bounds=(0.135, 0.2025, 0.2025, 0.4725), **COMMON),
    "quotas .05/.025/0/.10": MaskPolicy(mode="quota", bounds=(0.05, 0.075, 0.075, 0.175), **COMMON),
    "quotas .05/.025/0/.10, rest as means": MaskPolicy(
        mode="quota", bounds=(0.05, 0.075, 0.075, 0.175), skip="mean", **COMMON
    ),
}


def milliseconds(call: Callable[[], object], device: torch.device, repeats: int = 5, warm: bool = True) -> float:
    """The median time of ``call``, with ``warm`` after one that is not counted."""
    if warm:
        call()
    times = []
    for _ in range(repeats):
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
        else:
            began = time.perf_counter()
            call()
            times.append(1000 * (time.perf_counter() - began))
    return statistics.median(times)


def inputs(length: int, heads: int, kv_heads: int, head_dim: int, device: torch.device) -> tuple[Tensor, ...]:
    """Queries, keys and values that vary slowly along the sequence, with noise, so that blocks differ."""
    generator = torch.Generator(device).manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32

    def draw(count: int) -> Tensor:
        coarse = torch.randn(count, head_dim, -(-length // 256) + 1, generator=generator, device=device)
        smooth = torch.nn.functional.interpolate(coarse, size=length, mode="linear").transpose(1, 2)
        noise = torch.randn(smooth.shape, generator=generator, device=device)
        return (smooth + 0.5 * noise)[None].to(dtype).contiguous()

    key = draw(kv_heads)
    query = draw(heads) + 0.5 * key.repeat_interleave(heads // kv_heads, dim=1)
    return query, key, draw(kv_heads)


def check(policy: MaskPolicy, device: torch.device) -> None:
    """The op is the oracle's on a small shape.

    Raises:
        AssertionError: if it is not.
    """
    query, key, value = inputs(1111 if device.type == "cuda" else 400, 4, 2, 64, device)
    out, _ = sparse_attention(query, key, value, policy)
    levels = policy(query, key)
    options = {"is_causal": True, "num_levels": policy.num_levels, "impl": "reference"}
    exact = pyramid_attention(query.double(), key.double(), value.double(), levels, **options)
    low = pyramid_attention(query, key, value, levels, **options)
    assert_within_error_budget(out, exact, low, input_dtype=query.dtype)


def dense(query: Tensor, key: Tensor, value: Tensor) -> dict[str, float]:
    """Milliseconds of the dense back-ends that this device has."""
    group = query.shape[1] // key.shape[1]
    if query.device.type != "cuda":
        run = partial(scaled_dot_product_attention, query, key, value, is_causal=True, enable_gqa=True)
        return {"SDPA": milliseconds(run, query.device)}
    # Every back-end gets what it takes: keys and values for each head, which costs it no work of its own.
    key, value = (x.repeat_interleave(group, dim=1) for x in (key, value))
    found = {}
    for name, backend in (("cuDNN", SDPBackend.CUDNN_ATTENTION), ("FlashAttention-2", SDPBackend.FLASH_ATTENTION)):
        with sdpa_kernel(backend):
            run = partial(scaled_dot_product_attention, query, key, value, is_causal=True)
            found[name] = milliseconds(run, query.device)
    return found


def measure(name: str, policy: MaskPolicy, query: Tensor, key: Tensor, value: Tensor, best: float) -> str:
    """The table's row of one policy."""
    blocks = {"block_q": policy.block_q, "block_kv": policy.block_kv}
    length, device = query.shape[2], query.device
    layout = BlockLayout(length, length, **blocks, num_levels=policy.num_levels, is_causal=True)
    groups = {"samples_q": policy.samples_q, "samples_kv": policy.samples_kv, "method": policy.method}
    levels = policy(query, key)
    plan = LevelPlan.from_levels(levels, layout)
    density = float(plan.density().mean())
    options = {**blocks, "is_causal": True, "num_levels": policy.num_levels}
    importance = milliseconds(lambda: block_importance(query, key, **blocks, **groups, is_causal=True), device)
    similarity = milliseconds(lambda: key_similarity(key, block_kv=policy.block_kv, num_levels=4), device)
    mask = milliseconds(lambda: policy(query, key), device) - importance - similarity
    mask += milliseconds(lambda: LevelPlan.from_levels(levels, layout), device)
    attention = milliseconds(lambda: pyramid_attention(query, key, value, plan, **options), device)
    whole = milliseconds(lambda: sparse_attention(query, key, value, policy), device)
    rate = 2 * query.shape[1] * length**2 * query.shape[3] * density / attention / 1e9
    return (
        f"| {name} | {density:.3f} | {importance:.2f} | {similarity:.2f} | {mask:.2f} | {attention:.2f} | {rate:.0f} "
        f"| {whole:.2f} | {whole / best:.3f} |"
    )


def tables(length: int, heads: int, kv_heads: int, head_dim: int, device: torch.device) -> list[str]:
    query, key, value = inputs(length, heads, kv_heads, head_dim, device)
    found = dense(query, key, value)
    work = 2 * heads * length**2 * head_dim
    best, fastest = min((time, name) for name, time in found.items())
    preset = mask_policy(load_presets().get(PRESET).attention, is_causal=True)
    rows = POLICIES | {f"{PRESET}/psa_balanced": preset}
    times = ", ".join(f"{name} {time:.2f} ms ({work / time / 1e9:.0f} TFLOP/s)" for name, time in found.items())
    return [
        f"## {length:,} tokens, {heads} heads, {kv_heads} of keys, D{head_dim}, causal, {str(query.dtype)[6:]}",
        "",
        f"Dense SDPA: {times}.",
        "",
        f"| what | density | importance | similarity | levels + plan | attention | TFLOP/s | whole op | / {fastest} |",
        "|---|---|---|---|---|---|---|---|---|",
        *(measure(name, policy, query, key, value, best) for name, policy in rows.items()),
        "",
    ]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--length", type=whole, action="append", help="tokens, may be repeated")
    parser.add_argument("--tiny", action="store_true", help="a small shape, on the CPU, to see that it runs")
    parser.add_argument("--out", type=Path, help="also write the tables to this file")
    options = parser.parse_args(arguments)
    if not options.tiny and not torch.cuda.is_available():
        sys.exit("gpu_prefill needs an NVIDIA GPU, or --tiny")
    device = torch.device("cpu" if options.tiny else "cuda")
    where = "a CPU" if options.tiny else f"{torch.cuda.get_device_name()}, cuDNN {torch.backends.cudnn.version()}"
    lines = [
        "# Prefill attention of a language model that watches videos",
        "",
        f"{where}, torch {torch.__version__}, psa-kernels {psa_kernels.__version__}. Medians, in milliseconds.",
        "Command: `nox -s bench -- gpu_prefill`. Random inputs that vary slowly along the sequence. Density is",
        "executed over dense causal work; TFLOP/s are computed ones, 2 H N N D density / attention. Attention is",
        "the call with a plan, pooling included. The whole op is everything from importance to attention. The bounds",
        "and the similarity cap of the preset give another density on other inputs.",
        "",
    ]
    print("\n".join(lines), flush=True)
    shape = (4, 2, 32) if options.tiny else (HEADS, KV_HEADS, HEAD_DIM)
    with torch.no_grad():
        for policy in POLICIES.values():
            check(policy, device)
        for length in options.length or ((512,) if options.tiny else LENGTHS):
            table = tables(length, *shape, device)
            print("\n".join(table), flush=True)
            lines += table
            if options.out:
                options.out.write_text("\n".join(lines))


if __name__ == "__main__":
    main()
