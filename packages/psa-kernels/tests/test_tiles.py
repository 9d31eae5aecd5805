"""Tiles are chosen by the shared memory that a device has, and every choice runs and is right."""

import importlib
from itertools import product

import pytest
import torch

from psa_kernels import BlockLayout, block_importance, pyramid_attention
from psa_kernels.pyramid_attention.tiles import choose_backward_tiles, choose_tile
from psa_kernels.testing import assert_within_error_budget, make_qkv, random_levels

# KiB that a program may have where there is little, on sm_86, sm_89 and sm_120, on sm_80, and on sm_90.
SHARED_MEMORY = (64, 99, 163, 227)


@pytest.mark.parametrize("kib", SHARED_MEMORY)
def test_a_chosen_tile_fits(kib):
    dims, blocks = (16, 32, 64, 128, 256), (16, 32, 64, 128, 256)
    for head_dim, block_q, dtype in product(dims, blocks, (torch.float16, torch.bfloat16, torch.float32)):
        tile = choose_tile(block_q=block_q, head_dim=head_dim, dtype=dtype, shared_memory=kib * 1024)
        assert tile.shared_memory(head_dim, dtype.itemsize) <= kib * 1024
        assert tile.tile_m <= block_q


@pytest.mark.parametrize("kib", SHARED_MEMORY[1:])
def test_chosen_backward_tiles_fit(kib):
    dims, blocks = (16, 32, 64, 128, 256), (16, 32, 64, 128, 256)
    for head_dim, block_q, dtype in product(dims, blocks, (torch.float16, torch.bfloat16, torch.float32)):
        of_queries, of_rows = choose_backward_tiles(
            block_q=block_q, head_dim=head_dim, dtype=dtype, shared_memory=kib * 1024
        )
        assert of_queries.shared_memory(head_dim, dtype.itemsize) <= kib * 1024
        assert of_rows.shared_memory(head_dim, dtype.itemsize) <= kib * 1024
        assert of_queries.held <= block_q


def test_no_tile_fits():
    with pytest.raises(ValueError, match=r"no tile for head_dim 256 in torch\.float32 fits 16384 bytes"):
        choose_tile(block_q=64, head_dim=256, dtype=torch.float32, shared_memory=16 * 1024)
    with pytest.raises(ValueError, match=r"no backward tile for head_dim 256 in torch\.float32 fits 65536 bytes"):
        choose_backward_tiles(block_q=64, head_dim=256, dtype=torch.float32, shared_memory=64 * 1024)


@pytest.fixture
def limit_shared_memory(monkeypatch):
    """A function that makes the kernels find so many bytes of shared memory for a program."""
    attention, importance = (
        importlib.import_module(f"psa_kernels.{x}.triton_fwd") for x in ("pyramid_attention", "block_importance")
    )
    modules = [attention, importance, *filter(None, [attention._hopper])]

    def limit(size):
        for module in modules:
            monkeypatch.setattr(module, "shared_memory_limit", lambda device: size)

    return limit


@pytest.fixture
def launched(monkeypatch):
    """Every kernel launched on a GPU, compiled as it ran."""
    from triton.runtime.jit import JITFunction

    kernels = []
    launch = JITFunction.run

    def run(self, *args, **kwargs):
        kernels.append(launch(self, *args, **kwargs))
        return kernels[-1]

    monkeypatch.setattr(JITFunction, "run", run)
    return kernels


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("head_dim", [16, 64, 128, 256])
@pytest.mark.parametrize("kib", SHARED_MEMORY[:-1])
def test_little_shared_memory_is_enough(triton_backend, limit_shared_memory, launched, kib, head_dim, dtype):
    """Whole blocks and the rest of them, so that every loop of the kernel runs with its tile."""
    limit_shared_memory(kib * 1024)
    device, impl = triton_backend.device, triton_backend.impl
    qkv = make_qkv(heads=1, q_len=140, kv_len=300, head_dim=head_dim, dtype=dtype, device=device)
    levels = random_levels(BlockLayout(140, 300), heads=1, device=device)
    exact, low, got = (
        pyramid_attention(*inputs, levels, return_lse=True, impl=which)
        for inputs, which in (([x.double() for x in qkv], "reference"), (qkv, "reference"), (qkv, impl))
    )
    for a, b, c in zip(got, exact, low, strict=True):
        assert_within_error_budget(a, b, c, input_dtype=dtype)
    # Many heads: over few scores the oracle's own rounding, which the budget is made of, may be small by chance.
    lengths = {"q_len": 140, "kv_len": 300} if device == "cuda" else {"q_len": 70, "kv_len": 150}  # where it is slow
    query, key, _ = make_qkv(heads=16, **lengths, head_dim=head_dim, dtype=dtype, device=device)
    for samples in (16, 32):
        options = {"block_q": 64, "block_kv": 64, "samples_q": samples, "samples_kv": samples}
        exact = block_importance(query.double(), key.double(), impl="reference", **options)
        low, got = (block_importance(query, key, impl=which, **options) for which in ("reference", impl))
        assert_within_error_budget(got, exact, low, input_dtype=dtype)
    if device == "cuda":
        assert len(launched) >= 4
        assert max(kernel.metadata.shared for kernel in launched) <= kib * 1024
