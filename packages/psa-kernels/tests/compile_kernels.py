"""Compile the kernels that the operators launch, to machine code for a GPU that need not be there.

Usage: TRITON_INTERPRET=0 python compile_kernels.py CAPABILITY [--tiles | --every], for example 90

Launches are caught with their arguments and compiled instead. The interpreter runs Python, so it takes code that the
compiler refuses. What is compiled must fit the shared memory of the device, and may not need more than its tile counts.

By default every kernel is compiled for a few arguments. ``--tiles`` compiles attention and importance, whose tiles the
device decides, where their count is tightest; ``--every`` compiles these for every head dim, dtype and size of shared
memory, which takes many minutes.
"""

import importlib
import sys
from contextlib import nullcontext
from itertools import product

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonDescriptor
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

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
from psa_kernels.testing import make_qkv, random_levels

_TYPES = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int8: "*i8",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
_LAUNCH_OPTIONS = ("num_warps", "num_stages", "maxnreg")
# KiB that a program may have, by capability.
_SHARED_MEMORY = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}


def type_of(value):
    if isinstance(value, torch.Tensor):
        return _TYPES[value.dtype]
    if isinstance(value, TensorDescriptor):
        return f"tensordesc<{_TYPES[value.base.dtype][1:]}{value.block_shape}>".replace(" ", "")
    if isinstance(value, GluonDescriptor):
        return f"tensordesc<{_TYPES[value.base.dtype][1:]}{value.block_shape},{value.layout!r}>"
    if isinstance(value, tuple):
        return tuple("i64" for _ in value)
    return "fp32" if isinstance(value, float) else "i32"


def counted(kernel, given, options):
    """Bytes of shared memory that the tile of a launch counts; None where the tile does not depend on the device."""
    if kernel.is_gluon():
        hopper = importlib.import_module("psa_kernels.pyramid_attention.hopper_fwd")
        return hopper.shared_memory(given["HEAD_DIM"], given["pooled_ptr"].element_size())
    if kernel.fn.__name__ == "_forward_kernel":
        tiles = importlib.import_module("psa_kernels.pyramid_attention.tiles")
        tile = tiles.Tile(given["TILE_M"], given["TILE_N"], options["num_warps"], options["num_stages"])
    elif kernel.fn.__name__ in ("_query_kernel", "_key_value_kernel"):
        tiles = importlib.import_module("psa_kernels.pyramid_attention.tiles")
        sizes = (given["TILE_M"], given["TILE_N"])
        held, streamed = sizes if kernel.fn.__name__ == "_query_kernel" else sizes[::-1]
        tile = tiles.BackwardTile(held, streamed, options["num_warps"], options["num_stages"])
    elif kernel.fn.__name__ == "_logits_kernel":
        importance = importlib.import_module("psa_kernels.block_importance.triton_fwd")
        tile = importance._Tile(given["TILE_M"], given["BLOCKS"] * given["PER_BLOCK"], **options)
    elif kernel.fn.__name__ == "_groups_kernel":
        importance = importlib.import_module("psa_kernels.block_importance.antidiagonal.triton_fwd")
        tile = importance._Tile(given["TILE_M"], given["BLOCKS"] * given["PER_BLOCK"], **options)
    else:
        return None
    return tile.shared_memory(given["DIM_TILE"], given["query_ptr"].element_size())


def compile_instead(target, limit, compiled):
    """A stand-in for a launch."""

    def run(kernel, *args, grid, warmup, **kwargs):
        options = {name: kwargs.pop(name) for name in _LAUNCH_OPTIONS if name in kwargs}
        given = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
        constants = {p.name: given[p.name] for p in kernel.params if p.is_constexpr or given[p.name] is None}
        types = {p.name: p.annotation_type or type_of(given[p.name]) for p in kernel.params if p.name not in constants}
        signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
        language = GluonASTSource if kernel.is_gluon() else ASTSource
        source = language(
            kernel, signature, constexprs={(kernel.arg_names.index(name),): constants[name] for name in constants}
        )
        binary = triton.compile(source, target=target, options=options)
        assert binary.asm["cubin"]
        used, promised = binary.metadata.shared, counted(kernel, given, options)
        what = f"{kernel.fn.__name__} {constants} {options} needs {used} bytes of shared memory"
        assert used <= limit, f"{what}, {target} has {limit}"
        assert promised is None or used <= promised, f"{what}, its tile counts {promised}"
        compiled.add("gluon" * kernel.is_gluon() + kernel.fn.__name__)

    return run


def pretend(capability, limit, compiled):
    """The operators find a GPU of ``capability`` on which a program may have ``limit`` bytes of shared memory."""
    JITFunction.run = compile_instead(GPUTarget("cuda", capability, 32), limit, compiled)
    names = ("pyramid_attention.triton_fwd", "pyramid_attention.triton_bwd")
    names += ("block_importance.triton_fwd", "block_importance.antidiagonal.triton_fwd")
    for module in (importlib.import_module(f"psa_kernels.{name}") for name in names):
        module.shared_memory_limit = lambda device: limit
        module.has_tensor_memory_access = lambda device: capability >= 90
    hopper = importlib.import_module("psa_kernels.pyramid_attention.hopper_fwd")
    hopper.is_hopper = lambda device: capability == 90
    hopper.num_multiprocessors = lambda device: 132
    hopper.shared_memory_limit = lambda device: limit


def tiles(dtype, head_dim, block_q, block_kv, is_causal, gradients=False):
    """Attention and importance of one shape."""
    query, key, value = make_qkv(q_len=100, head_dim=head_dim, dtype=dtype)
    blocks = {"block_q": block_q, "block_kv": block_kv, "is_causal": is_causal}
    layout = BlockLayout(100, 100, **blocks)
    plan = LevelPlan.from_levels(random_levels(layout), layout)
    qkv = [x.requires_grad_(gradients) for x in (query, key, value)]
    out = pyramid_attention(*qkv, plan, impl="triton", **blocks)
    if gradients:
        out.backward(torch.ones_like(out))
    samples = {"samples_q": 16, "samples_kv": 16, "reduction": "mean" if is_causal else "max"}
    query, key = query.detach(), key.detach()
    block_importance(query, key, impl="triton", **samples, **blocks)
    groups = {"samples_q": block_q // 8, "samples_kv": block_kv // 8, "method": "antidiagonal"}
    block_importance(query, key, impl="triton", **groups, **blocks)


def main() -> None:
    capability, mode = int(sys.argv[1]), sys.argv[2:]
    compiled = set()
    # Imported when an operator first runs, so they are there to be changed only after a first call.
    operators = ("pyramid_attention", "pyramid_pool", "block_importance", "key_similarity", "level_plan", "rank_levels")
    operators += ("share_levels", "kd_tree", "kmeans", "leading_directions", "permute_tokens")
    operators += ("block_importance.antidiagonal",)
    for module in operators:
        __import__(f"psa_kernels.{module}.triton_fwd", fromlist=["on_device"]).on_device = lambda tensor: nullcontext()
    backward = importlib.import_module("psa_kernels.pyramid_attention.triton_bwd")
    backward.on_device = lambda tensor: nullcontext()
    if mode == ["--every"]:
        shapes = product((64, 99, 163, 227), (16, 32, 64, 128, 256), (torch.float16, torch.float32))
        for kib, head_dim, dtype in shapes:
            pretend(capability, kib * 1024, compiled)
            for blocks in ((128, 128, False), (32, 128, True), (16, 16, True)):
                tiles(dtype, head_dim, *blocks, gradients=kib >= 99)  # the least of a GPU that the kernels run on
            print(f"capability {capability}, {kib} KiB: head_dim {head_dim} in {dtype} fits", flush=True)
        return
    pretend(capability, _SHARED_MEMORY[capability] * 1024, compiled)
    if mode == ["--tiles"]:
        for dtype, head_dim in ((torch.float16, 64), (torch.float16, 256), (torch.float32, 16)):
            tiles(dtype, head_dim, 128, 128, False)
        return

    for dtype, head_dim, is_causal in ((torch.bfloat16, 128, False), (torch.float32, 40, True)):
        query, key, value = make_qkv(q_len=100, head_dim=head_dim, dtype=dtype)
        blocks = {"block_q": 64, "block_kv": 64}
        lengths = torch.tensor([90]) if is_causal else None
        options = {"kv_lengths": lengths, "impl": "triton"}
        layout = BlockLayout(100, 100, **blocks, is_causal=is_causal)
        plan = LevelPlan.from_levels(random_levels(layout), layout)
        LevelPlan.from_levels(random_levels(layout), layout, impl="triton")
        pool_pyramid(key, block_kv=64, num_levels=7, **options)
        key_similarity(key, block_kv=64, num_levels=4, **options)
        kmeans(key, 5, num_iterations=1, impl="triton")
        kd_tree(key[:, :, :64, :8], impl="triton")
        leading_directions(key.float().mT @ key.float(), key.float().mT @ key.float(), 8, impl="triton")
        permute_tokens(key, torch.arange(100).expand(1, 2, 100), impl="triton")
        for reduction in ("mean" if is_causal else "max", "error"):
            samples = {"samples_q": 16, "samples_kv": 8, "reduction": reduction}
            block_importance(query, key, **blocks, **samples, is_causal=is_causal, **options)
        groups = {"samples_q": 8, "samples_kv": 8, "method": "antidiagonal"}
        block_importance(query, key, **blocks, **groups, is_causal=is_causal, **options)
        for row_len, counts in ((50, [1, 5, 5]), (20_000, [9])):
            scores = torch.zeros(2, row_len, dtype=dtype)
            rank_levels(scores, counts, impl="triton")
            rank_levels(scores, torch.tensor([counts] * 2, dtype=torch.int32), impl="triton")
            shares = [count / row_len for count in counts]
            share_levels(scores, shares, impl="triton")
            share_levels(scores, shares, lengths=torch.tensor([row_len] * 2), impl="triton")
        pyramid_attention(query, key, value, plan, **blocks, is_causal=is_causal, **options)
        if capability < 90 and not is_causal:
            continue  # code that others share; what it adds here is time
        # float32, which no tensor core multiplies, takes long to compile.
        half = [x.to(torch.bfloat16).requires_grad_() for x in (query, key, value)]
        out = pyramid_attention(*half, plan, **blocks, is_causal=is_causal, **options)
        out.backward(torch.ones_like(out))
    if capability == 90:
        # Hopper's kernel, with warps that gather and without.
        tiles(torch.bfloat16, 128, 128, 128, False)
        qkv = make_qkv(q_len=100, head_dim=64, dtype=torch.bfloat16)
        pyramid_attention(*qkv, random_levels(BlockLayout(100, 100, num_levels=4)), num_levels=4, impl="triton")
    kernels = ("forward", "order", "positions", "logits", "reduce", "groups", "scores", "plan", "pool", "similarity")
    kernels += ("directions", "tree", "permute", "coarser", "rank", "share")
    kernels += ("assign", "mean", "delta", "query", "key_value", "turn", "readers")
    expected = {f"_{name}_kernel" for name in kernels}
    assert compiled == expected | ({"gluon_forward_kernel"} if capability == 90 else set()), compiled


if __name__ == "__main__":
    main()
