"""The registered operator behind ``block_importance(..., method="antidiagonal")``."""

from torch import Tensor

from psa_kernels.block_importance.ops import empty_scores
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
    return empty_scores(query, key, block_q, block_kv)


antidiagonal_importance_op = register(
    "psa_kernels.block_importance.antidiagonal",
    "antidiagonal_importance(Tensor query, Tensor key, Tensor? kv_lengths, int block_q, int block_kv, int stride, "
    "str reduction, bool is_causal, float scale) -> Tensor",
    _fake,
)
