"""``pyramid_attention``: checks and dispatch."""

from torch import Tensor

from psa_kernels import checks
from psa_kernels.layout import BlockLayout, max_levels
from psa_kernels.plan import LevelPlan, check_levels
from psa_kernels.pyramid_attention.ops import pyramid_attention_op
from psa_kernels.pyramid_attention.reference import forward as reference
from psa_kernels.registry import without_autocast


def pyramid_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    levels: Tensor | LevelPlan,
    *,
    block_q: int = 128,
    block_kv: int = 128,
    is_causal: bool = False,
    kv_lengths: Tensor | None = None,
    scale: float | None = None,
    num_levels: int | None = None,
    return_lse: bool = False,
    impl: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention in which each query block reads each KV block at its own level, or not at all.

    A row of level h is the mean of ``2**(h-1)`` neighbouring keys (values), fewer at a ragged end; its logit is
    ``q·k*scale + ln(tokens it stands for)``, and one softmax runs over all rows of all kept blocks. With every
    block at level 1 this is scaled dot-product attention.
    Source: Pyramid Sparse Attention (arXiv 2512.04025), multi-level KV attention.

    With ``is_causal`` the last query stands at the last key::

        q_len 2, kv_len 5:   1 1 1 1 0
                             1 1 1 1 1

    and a kept block that reaches past the diagonal of any query of its block is read at level 1 under the mask.

    Args:
        query: ``[B, H, q_len, D]``, float16, bfloat16 or float32 (float64 with ``torch`` and ``reference``), any
            strides. D up to 256 with ``triton``.
        key, value: ``[B, H_kv, kv_len, D]`` of query's dtype; H a multiple of H_kv (grouped-query attention).
        levels: int8 ``[B, H, num_q_blocks, num_kv_blocks]``, 0 skips a block and h in 1..num_levels reads it at
            level h; or a ``LevelPlan``, whose layout must equal that of the call.
        block_q, block_kv: tokens a level decision covers, powers of two up to 256.
        is_causal: mask keys after a query's own position.
        kv_lengths: int32 or int64 ``[B]``, how many keys of each sample exist; None is all. Keys past it have no
            part in rows, counts or softmax, and may be NaN. More than kv_len counts as that, less than 0 as 0.
        scale: of the logits; None is ``1/sqrt(D)``.
        num_levels: the coarsest level that may stand in ``levels``; None is ``log2(block_kv) + 1``, where a whole
            block is one row, or the plan's.
        return_lse: also return the log-sum-exp of each query's logits.
        impl: ``"triton"``, ``"torch"`` or ``"reference"``; None is Triton on a GPU of compute capability 8.0 or
            higher, torch elsewhere, with one warning on an older GPU. One asked for by name never falls back.
            ``"reference"`` rounds logits to the dtype of its inputs: in float16 one above 65,504 gives inf or NaN. It
            multiplies what is skipped by 0, so that inf or NaN among values that nobody reads shows there alone.

    Returns:
        out ``[B, H, q_len, D]`` in query's dtype, and with ``return_lse`` lse ``[B, H, q_len]``, natural
        logarithm, float32 (float64 for float64). A query with nothing to read gets out 0, lse -inf and gradients
        of 0. Both results have gradients with respect to query, key and value; levels are constants. Gradients of
        gradients, derivatives in forward mode and those of torch.func are there with ``reference`` alone.

    Raises:
        TypeError, ValueError: an argument breaks a rule above, before any work.
        NotImplementedError: as torch raises for a derivative that an operator lacks: here those that the
            implementation has not.
    """
    checks.query_and_key(query, key)
    checks.sequence("value", value)
    checks.same("value", value, "query", query)
    if value.shape != key.shape:
        raise ValueError(f"value must have key's shape {list(key.shape)}, got {list(value.shape)}")
    checks.lengths(kv_lengths, query.shape[0], query.device)
    to_run = checks.resolve_impl(impl, query)
    scale = checks.scale(scale, query.shape[3])
    checks.boolean("is_causal", is_causal)
    checks.boolean("return_lse", return_lse)

    if num_levels is None:
        checks.power_of_two("block_kv", block_kv)
        num_levels = levels.layout.num_levels if isinstance(levels, LevelPlan) else max_levels(block_kv)
    layout = BlockLayout(
        query.shape[2],
        key.shape[2],
        block_q=block_q,
        block_kv=block_kv,
        num_levels=num_levels,
        is_causal=is_causal,
    )
    if isinstance(levels, LevelPlan):
        if _differ(levels.layout, layout):
            raise ValueError(f"the plan's layout must be that of the call, {layout}, got {levels.layout}")
        _check_heads(levels.indices, query)
    else:
        check_levels(levels, layout)
        _check_heads(levels, query)

    if impl == "reference":
        level_map = levels.to_levels() if isinstance(levels, LevelPlan) else levels
        with without_autocast(query.device):
            out, lse = reference(query, key, value, level_map, layout, kv_lengths, scale)
    else:
        checks.backward_mode_alone("pyramid_attention", "; impl='reference' has them", query, key, value)
        plan = levels if isinstance(levels, LevelPlan) else LevelPlan.from_levels(levels, layout, impl=impl)
        out, lse = pyramid_attention_op(
            query, key, value, plan.indices, plan.offsets, kv_lengths, block_q, block_kv, is_causal, scale, to_run
        )
    return (out, lse) if return_lse else out


def _differ(layout: BlockLayout, other: BlockLayout) -> bool:
    """``layout != other``, a value at a time: torch.compile does not compare tuples of lengths that it keeps open."""
    names = ("q_len", "kv_len", "block_q", "block_kv", "num_levels", "is_causal")
    return any(getattr(layout, name) != getattr(other, name) for name in names)


def _check_heads(levels: Tensor, query: Tensor) -> None:
    for name, of_levels, of_query in zip(("batch size", "number of heads"), levels.shape, query.shape, strict=False):
        if of_levels != of_query:
            raise ValueError(f"levels must have query's {name} {of_query}, got {of_levels}")
    if levels.device != query.device:
        raise ValueError(f"levels must be on query's device {query.device}, got {levels.device}")
