"""``key_similarity``: what a level may be capped by."""

from torch import Tensor

from psa_kernels import checks
from psa_kernels.key_similarity.ops import key_similarity_op


def key_similarity(
    key: Tensor, *, block_kv: int, num_levels: int, kv_lengths: Tensor | None = None, impl: str | None = None
) -> Tensor:
    """Mean cosine similarity of the keys that each level would merge.

    For level h of a block with n tokens it is the mean of ``cos(k[t], k[t + s])`` over the pairs inside the block
    at stride ``s = min(2**(h-1), n-1)``: where the stride reaches past the block, the first and last token are
    compared, and a block of one token, or none, is 1. A key shorter than 1e-12 is taken for one of that length, so
    a zero key is similar to nothing (0).
    Source: Pyramid Sparse Attention (arXiv 2512.04025), similarity-based constraint.

    Args:
        key: ``[B, H_kv, L, D]``, any strides.
        block_kv: tokens a block covers, a power of two.
        num_levels: the coarsest level, at most ``log2(block_kv) + 1``.
        kv_lengths: int32 or int64 ``[B]``, how many tokens of each sample exist; None is all.
        impl: ``"triton"``, ``"torch"`` or ``"reference"``; None is Triton on a GPU, torch elsewhere.

    Returns:
        float32 ``[B, H_kv, num_kv_blocks, num_levels - 1]`` in [-1, 1], levels 2 and up (float64 for float64
        keys). No gradient flows through it.

    Raises:
        TypeError, ValueError: an argument breaks a rule above.
    """
    checks.sequence("key", key)
    checks.power_of_two("block_kv", block_kv)
    checks.level_count(num_levels, block_kv)
    checks.lengths(kv_lengths, key.shape[0], key.device)
    similarity: Tensor = key_similarity_op(
        key.detach(), kv_lengths, block_kv, num_levels, checks.resolve_impl(impl, key)
    )
    return similarity.clamp(-1, 1)  # a mean of rounded cosines may exceed 1 by a rounding
