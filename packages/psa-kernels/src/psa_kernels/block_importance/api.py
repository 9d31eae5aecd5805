"""``block_importance``: scores that level decisions are made from."""

from torch import Tensor

from psa_kernels import checks
from psa_kernels.block_importance.antidiagonal.groups import group_stride
from psa_kernels.block_importance.antidiagonal.ops import antidiagonal_importance_op
from psa_kernels.block_importance.ops import block_importance_op
from psa_kernels.block_importance.sampling import SEED_BITS

METHODS = ("sampled", "antidiagonal")
REDUCTIONS = ("max", "mean", "error")


def block_importance(
    query: Tensor,
    key: Tensor,
    *,
    block_q: int,
    block_kv: int,
    samples_q: int,
    samples_kv: int,
    method: str = "sampled",
    reduction: str = "max",
    is_causal: bool = False,
    kv_lengths: Tensor | None = None,
    scale: float | None = None,
    seed: int = 0,
    impl: str | None = None,
) -> Tensor:
    """Score block pairs by attention between a few tokens, or groups of tokens, of each block.

    ``method="sampled"``: ``samples_q`` tokens of each query block and ``samples_kv`` of each KV block are drawn, one
    from each of as many strata (all tokens of a block with fewer). The sampled queries attend by softmax to all
    sampled keys, and a block pair scores the maximum or the mean over its sampled token pairs, or the error of reading
    the block as its mean: the root mean square, over its sampled queries, of the weight of its sampled keys less what
    they would weigh with their mean logit each, for each of these keys. The draw is a pure function of ``seed``: equal
    on every device and implementation, and no random state is touched.
    Source: Pyramid Sparse Attention (arXiv 2512.04025), block importance for video generation; the error is ours.

    ``method="antidiagonal"``: a query block is ``samples_q`` groups of s = block_q / samples_q consecutive tokens, a
    KV block ``samples_kv`` groups of as many. The logit of two groups is the mean logit along their antidiagonal:
    last query with first key, the one before with the second, and so on for as long as both groups have tokens. Groups
    attend to groups by softmax, and a block pair scores the maximum or the mean over its pairs of groups. Every token
    of whole groups counts, at 1/s of the cost of attention's scores, and nothing is drawn.
    Source: XAttention (arXiv 2503.16428), which Pyramid Sparse Attention takes for video understanding.

    Args:
        query: ``[B, H, q_len, D]``, float16, bfloat16, float32 or float64, any strides.
        key: ``[B, H_kv, kv_len, D]``, H a multiple of H_kv.
        block_q, block_kv: tokens a block covers, powers of two.
        samples_q, samples_kv: tokens drawn from a block, at most the block. Groups in a block with
            ``"antidiagonal"``: both divide their block, and block_q / samples_q equals block_kv / samples_kv.
        method: ``"sampled"`` or ``"antidiagonal"``.
        reduction: ``"max"`` or ``"mean"`` over the pairs of samples, or of groups, that exist in a block pair, or with
            ``"sampled"`` the ``"error"`` of the block's mean.
        is_causal: a sampled query sees sampled keys up to its own position, the last query at the last key. A
            query that sees none scores 0. A group of queries sees the groups of keys that end no later than it does.
        kv_lengths: int32 or int64 ``[B]``, how many keys of each sample exist; None is all. Blocks past it score 0.
        scale: of the logits; None is ``1/sqrt(D)``.
        seed: an integer that names the draw; seeds that agree in their low 30 bits name the same. Changes nothing with
            ``"antidiagonal"``.
        impl: ``"triton"``, ``"torch"`` or ``"reference"``; None is Triton on a GPU, torch elsewhere.

    Returns:
        float32 ``[B, H, num_q_blocks, num_kv_blocks]``, at least 0 (float64 for float64 inputs). No gradient
        flows through it.

    Raises:
        TypeError, ValueError: an argument breaks a rule above.
    """
    checks.query_and_key(query, key)
    for name, block, samples in (("q", block_q, samples_q), ("kv", block_kv, samples_kv)):
        checks.power_of_two(f"block_{name}", block)
        checks.positive_int(f"samples_{name}", samples)
        if samples > block:
            raise ValueError(f"samples_{name} must be at most block_{name} {block}, got {samples}")
    checks.choice("method", method, METHODS)
    checks.choice("reduction", reduction, REDUCTIONS)
    checks.lengths(kv_lengths, query.shape[0], query.device)
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed must be an integer, got {type(seed).__name__} {seed!r}")
    checks.boolean("is_causal", is_causal)
    checks.causal(is_causal, query.shape[2], key.shape[2])
    logit_scale = checks.scale(scale, query.shape[3])

    importance: Tensor
    if method == "antidiagonal":
        if reduction == "error":
            raise ValueError("reduction='error' of block_importance needs method 'sampled', got 'antidiagonal'")
        stride = group_stride(block_q, block_kv, samples_q, samples_kv)
        importance = antidiagonal_importance_op(
            query.detach(),
            key.detach(),
            kv_lengths,
            block_q,
            block_kv,
            stride,
            reduction,
            is_causal,
            logit_scale,
            checks.resolve_impl(impl, query),
        )
        return importance

    importance = block_importance_op(
        query.detach(),
        key.detach(),
        kv_lengths,
        block_q,
        block_kv,
        samples_q,
        samples_kv,
        reduction,
        is_causal,
        logit_scale,
        seed % (1 << SEED_BITS),  # an operator's integers have 64 bits, a seed may have more
        checks.resolve_impl(impl, query),
    )
    return importance
