"""The registered operator behind ``pool_pyramid``: levels 2 and up, one after the other in one buffer."""

from torch import Tensor

from psa_kernels.layout import num_rows
from psa_kernels.registry import register


def pooled_rows(kv_len: int, num_levels: int) -> int:
    """Rows that levels 2 to ``num_levels`` have together."""
    return sum(num_rows(kv_len, level) for level in range(2, num_levels + 1))


def _fake(x: Tensor, kv_lengths: Tensor | None, num_levels: int) -> Tensor:
    batch, heads, kv_len, head_dim = x.shape
    return x.new_empty((batch, heads, pooled_rows(kv_len, num_levels), head_dim))


pyramid_pool = register(
    "psa_kernels.pyramid_pool",
    "pyramid_pool(Tensor x, Tensor? kv_lengths, int num_levels) -> Tensor",
    _fake,
)
