"""The registered operator behind ``block_importance(..., method="antidiagonal")``."""

from torch import Tensor

from psa_kernels.block_importance.ops import importance_dtype
from psa_kernels.registry import register


def _fake(
    query: Tensor,
    key: Tensor,
    kv_lengths: Tensor | None,
    block_q: int,
    block_kv: int,
    stride: int,
    reduction: str,
    is_causal: bool,
    scale: float,
) -> Tensor:
    batch, heads = query.shape[:2]
    shape = (batch, heads, -(-query.shape[2] // block_q), -(-key.shape[2] // block_kv))
    return query.new_empty(shape, dtype=importance_dtype(query))


antidiagonal_importance_op = register(
    "psa_kernels.block_importance.antidiagonal",
    "antidiagonal_importance(Tensor query, Tensor key, Tensor? kv_lengths, int block_q, int block_kv, int stride, "
    "str reduction, bool is_causal, float scale) -> Tensor",
    _fake,
)
