"""The registered operator behind ``key_similarity``."""

import torch
from torch import Tensor

from psa_kernels.registry import register


def similarity_dtype(key: Tensor) -> torch.dtype:
    return torch.promote_types(key.dtype, torch.float32)


def _fake(key: Tensor, kv_lengths: Tensor | None, block_kv: int, num_levels: int) -> Tensor:
    batch, heads, kv_len, _ = key.shape
    num_blocks = -(-kv_len // block_kv)
    return key.new_empty((batch, heads, num_blocks, num_levels - 1), dtype=similarity_dtype(key))


key_similarity_op = register(
    "psa_kernels.key_similarity",
    "key_similarity(Tensor key, Tensor? kv_lengths, int block_kv, int num_levels) -> Tensor",
    _fake,
)
