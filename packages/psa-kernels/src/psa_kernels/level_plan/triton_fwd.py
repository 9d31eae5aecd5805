"""The plan by a counting sort, one program a row of the map."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from psa_kernels.triton_device import on_device

_CHUNK = 512


@triton.jit(do_not_specialize=["num_blocks"])
def _plan_kernel(levels_ptr, indices_ptr, offsets_ptr, num_blocks, NUM_LEVELS: tl.constexpr, CHUNK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    levels_ptr += row * num_blocks
    indices_ptr += row * num_blocks
    offsets_ptr += row * (NUM_LEVELS + 1)
    tl.store(offsets_ptr, 0)
    end = 0
    for level in tl.static_range(1, NUM_LEVELS + 1):
        for first in range(0, num_blocks, CHUNK):
            block = first + tl.arange(0, CHUNK)
            value = tl.load(levels_ptr + block, mask=block < num_blocks, other=0)  # [CHUNK]
            match = (value == level).to(tl.int32)
            slot = end + tl.cumsum(match, 0) - match
            tl.store(indices_ptr + slot, block, mask=match == 1)
            end += tl.sum(match, 0)
        tl.store(offsets_ptr + level, end)
    for first in range(0, num_blocks, CHUNK):
        slot = first + tl.arange(0, CHUNK)
        tl.store(indices_ptr + slot, 0, mask=(slot >= end) & (slot < num_blocks))


def forward(levels: Tensor, num_levels: int) -> tuple[Tensor, Tensor]:
    levels = levels.contiguous()
    num_blocks = levels.shape[-1]
    indices = torch.empty_like(levels, dtype=torch.int32)
    offsets = levels.new_empty((*levels.shape[:-1], num_levels + 1), dtype=torch.int32)
    with on_device(levels):
        _plan_kernel[(levels.numel() // num_blocks,)](levels, indices, offsets, num_blocks, num_levels, _CHUNK)
    return indices, offsets
