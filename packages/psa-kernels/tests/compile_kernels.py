"""Compile the kernels that the operators launch, to machine code for a GPU that need not be there.

Usage: TRITON_INTERPRET=0 python compile_kernels.py CAPABILITY, for example 90

Launches are caught with their arguments and compiled instead. The interpreter runs Python, so it takes code that the
compiler refuses.
"""

import sys
from contextlib import nullcontext

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from psa_kernels import (
    BlockLayout,
    LevelPlan,
    block_importance,
    key_similarity,
    pool_pyramid,
    pyramid_attention,
    rank_levels,
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
_LAUNCH_OPTIONS = ("num_warps", "num_stages")


def type_of(value):
    if isinstance(value, torch.Tensor):
        return _TYPES[value.dtype]
    if isinstance(value, TensorDescriptor):
        return f"tensordesc<{_TYPES[value.base.dtype][1:]}{value.block_shape}>".replace(" ", "")
    if isinstance(value, tuple):
        return tuple("i64" for _ in value)
    return "fp32" if isinstance(value, float) else "i32"


def compile_instead(target, compiled):
    """A stand-in for a launch."""

    def run(kernel, *args, grid, warmup, **kwargs):
        options = {name: kwargs.pop(name) for name in _LAUNCH_OPTIONS if name in kwargs}
        given = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
        constants = {p.name: given[p.name] for p in kernel.params if p.is_constexpr or given[p.name] is None}
        signature = {name: "constexpr" if name in constants else type_of(given[name]) for name in kernel.arg_names}
        source = ASTSource(
            kernel, signature, constexprs={(kernel.arg_names.index(name),): constants[name] for name in constants}
        )
        binary = triton.compile(source, target=target, options=options)
        assert binary.asm["cubin"]
        compiled.add(kernel.fn.__name__)

    return run


def main() -> None:
    capability = int(sys.argv[1])
    compiled = set()
    JITFunction.run = compile_instead(GPUTarget("cuda", capability, 32), compiled)
    # Imported when an operator first runs, so they are there to be changed only after a first call.
    operators = ("pyramid_attention", "pyramid_pool", "block_importance", "key_similarity", "level_plan", "rank_levels")
    for module in operators:
        __import__(f"psa_kernels.{module}.triton_fwd", fromlist=["on_device"]).on_device = lambda tensor: nullcontext()

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
        samples = {"samples_q": 16, "samples_kv": 8, "reduction": "mean" if is_causal else "max"}
        block_importance(query, key, **blocks, **samples, is_causal=is_causal, **options)
        for row_len, counts in ((50, [1, 5, 5]), (20_000, [9])):
            rank_levels(torch.zeros(2, row_len, dtype=dtype), counts, impl="triton")
        pyramid_attention(query, key, value, plan, **blocks, is_causal=is_causal, **options)
    kernels = ("forward", "positions", "logits", "reduce", "plan", "pool", "similarity", "rank")
    assert compiled == {f"_{name}_kernel" for name in kernels}, compiled


if __name__ == "__main__":
    main()
