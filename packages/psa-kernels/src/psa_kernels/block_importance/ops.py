"""The registered operator behind ``block_importance``."""

import torch
from torch import Tensor

from psa_kernels.registry import register


def importance_dtype(query: Tensor) -> torch.dtype:
    return torch.promote_types(query.dtype, torch.float32)


def _fake(
    query: Tensor,
    key: Tensor,
    q_positions: Tensor,
    kv_positions: Tensor,
    reduction: str,
    is_causal: bool,
    scale: float,
) -> Tensor:
    batch, heads = query.shape[:2]
    shape = (batch, heads, q_positions.shape[1], kv_positions.shape[1])
    return query.new_empty(shape, dtype=importance_dtype(query))


block_importance_op = register(
    "psa_kernels.block_importance",
    "block_importance(Tensor query, Tensor key, Tensor q_positions, Tensor kv_positions, str reduction, "
    "bool is_causal, float scale) -> Tensor",
    _fake,
)
