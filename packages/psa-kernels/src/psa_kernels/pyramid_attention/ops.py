"""The registered operator behind ``pyramid_attention``."""

import torch
from torch import Tensor

from psa_kernels.registry import register


def lse_dtype(query: Tensor) -> torch.dtype:
    return torch.promote_types(query.dtype, torch.float32)


def _fake(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    indices: Tensor,
    offsets: Tensor,
    kv_lengths: Tensor | None,
    block_q: int,
    block_kv: int,
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    return query.new_empty(query.shape), query.new_empty(query.shape[:3], dtype=lse_dtype(query))


pyramid_attention_op = register(
    "psa_kernels.pyramid_attention",
    "pyramid_attention(Tensor query, Tensor key, Tensor value, Tensor indices, Tensor offsets, Tensor? kv_lengths, "
    "int block_q, int block_kv, bool is_causal, float scale) -> (Tensor, Tensor)",
    _fake,
)
