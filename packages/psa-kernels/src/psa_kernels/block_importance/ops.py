"""The registered operator behind ``block_importance``."""

import torch
from torch import Tensor

from psa_kernels.registry import register


def importance_dtype(query: Tensor) -> torch.dtype:
    return torch.promote_types(query.dtype, torch.float32)


def empty_scores(query: Tensor, key: Tensor, block_q: int, block_kv: int) -> Tensor:
    """Room for the scores ``[B, H, num_q_blocks, num_kv_blocks]``, not set."""
    batch, heads = query.shape[:2]
    shape = (batch, heads, -(-query.shape[2] // block_q), -(-key.shape[2] // block_kv))
    return query.new_empty(shape, dtype=importance_dtype(query))


def _fake(
    query: Tensor,
    key: Tensor,
    kv_lengths: Tensor | None,
    block_q: int,
    block_kv: int,
    samples_q: int,
    samples_kv: int,
    reduction: str,
    is_causal: bool,
    scale: float,
    seed: int,
) -> Tensor:
    return empty_scores(query, key, block_q, block_kv)


block_importance_op = register(
    "psa_kernels.block_importance",
    "block_importance(Tensor query, Tensor key, Tensor? kv_lengths, int block_q, int block_kv, int samples_q, "
    "int samples_kv, str reduction, bool is_causal, float scale, int seed) -> Tensor",
    _fake,
)
