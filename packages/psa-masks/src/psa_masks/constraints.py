"""Rules that override what importance alone decided."""

from collections.abc import Sequence

import torch
from torch import Tensor

from psa_kernels import BlockLayout
from psa_kernels import checks as kernel_checks
from psa_kernels.layout import max_levels
from psa_masks import checks


def cap_by_similarity(levels: Tensor, similarity: Tensor, thresholds: Sequence[float]) -> Tensor:
    """Refuse a level too coarse for a KV block whose neighbouring keys differ.

    The coarsest level a block may have is the largest h whose similarity exceeds its threshold, 1 if
    there is none; a kept block gets the finer of that and its level, a skipped block stays skipped.

    Args:
        levels: int8 ``[B, H, num_q_blocks, num_kv_blocks]``.
        similarity: float32 or float64 ``[B, H_kv, num_kv_blocks, >= len(thresholds)]``, as
            ``psa_kernels.key_similarity`` gives it: entry h - 2 of the last axis for level h. H_kv divides H.
            A NaN exceeds nothing.
        thresholds: in [-1, 1], for levels 2, 3, ... A threshold of -1 always passes (a similarity of
            exactly -1 as well) and one of 1 never does, so all -1 leave ``levels`` as they are and all 1
            make every kept block level 1. Levels past the last threshold never pass, unless all are -1.

    Returns:
        int8, shaped like ``levels``; a new tensor.

    Raises:
        TypeError, ValueError: an argument breaks a rule above.

    The rule is the similarity bound of Pyramid Sparse Attention (arXiv 2512.04025).
    """
    checks.levels(levels)
    limits = checks.thresholds("thresholds", thresholds)
    if not isinstance(similarity, Tensor) or similarity.dtype not in (torch.float32, torch.float64):
        kind = similarity.dtype if isinstance(similarity, Tensor) else type(similarity).__name__
        raise TypeError(f"similarity must be a float32 or float64 tensor, got {kind}")
    kernel_checks.strided("similarity", similarity)
    batch, heads, _, num_kv_blocks = levels.shape
    shape = tuple(similarity.shape)
    if len(shape) != 4 or shape[0] != batch or shape[2] != num_kv_blocks or shape[3] < len(limits):
        raise ValueError(
            f"similarity must have shape [{batch}, H_kv, {num_kv_blocks}, >= {len(limits)}] to go with "
            f"levels {list(levels.shape)} and {len(limits)} thresholds, got {list(shape)}"
        )
    if similarity.device != levels.device:
        raise ValueError(f"similarity must be on levels' device {levels.device}, got {similarity.device}")
    if shape[1] == 0 or heads % shape[1]:
        raise ValueError(f"similarity's heads must divide levels' {heads} heads, got {shape[1]}")

    if all(limit == -1.0 for limit in limits):
        return levels.clone()
    cap = torch.ones(shape[:3], dtype=torch.int8, device=levels.device)
    for index, limit in enumerate(limits):
        if limit == -1.0:
            cap.fill_(index + 2)
        elif limit < 1.0:  # a cosine may round to a little over 1, which must not pass a threshold of 1
            cap = torch.where(similarity[..., index] > limit, index + 2, cap)
    return torch.minimum(levels, cap.repeat_interleave(heads // shape[1], dim=1)[:, :, None, :])


def keep_full(
    levels: Tensor,
    layout: BlockLayout,
    *,
    protected: Sequence[tuple[int, int]] = (),
    diagonal: bool = False,
    sinks: int = 0,
) -> Tensor:
    """Set the blocks that must not be coarsened or skipped to level 1.

    Positions are those of the keys; query i stands at position ``i + kv_len - q_len``, so that the last
    query and the last key share one (causal masks align the same way).

    Args:
        levels: int8 ``[B, H, num_q_blocks, num_kv_blocks]``.
        layout: the lengths and block sizes behind ``levels``.
        protected: ranges (start, stop) of token positions, wherever they stand, within [0, kv_len]. A KV
            block with such a token is level 1 for all queries, a query block with one reads all KV blocks
            at level 1.
        diagonal: block pairs with a query and a key of the same position are level 1.
        sinks: KV blocks with one of the first ``sinks`` tokens are level 1 for all queries.

    Returns:
        int8, shaped like ``levels``; a new tensor.

    Raises:
        TypeError, ValueError: an argument breaks a rule above.
    """
    checks.block_layout(layout)  # None is no layout here
    checks.levels(levels, layout)
    ranges = checks.token_ranges("protected", protected)
    for start, stop in ranges:
        if stop > layout.kv_len:
            raise ValueError(f"protected ranges must end by kv_len {layout.kv_len}, got {(start, stop)}")
    checks.boolean("diagonal", diagonal)
    sink_blocks = _blocks(0, checks.integer("sinks", sinks, 0), layout.block_kv)

    full = levels.clone()
    first_query = layout.kv_len - layout.q_len
    full[..., sink_blocks] = 1
    for start, stop in ranges:
        full[..., _blocks(start, stop, layout.block_kv)] = 1
        full[..., _blocks(start - first_query, stop - first_query, layout.block_q), :] = 1
    if diagonal:
        first = torch.arange(layout.num_q_blocks, device=levels.device)[:, None] * layout.block_q
        last = (first + layout.block_q).clamp(max=layout.q_len) - 1
        key = torch.arange(layout.num_kv_blocks, device=levels.device) * layout.block_kv
        meets = (key <= last + first_query) & (key + layout.block_kv > first + first_query)
        full.masked_fill_(meets, 1)
    return full


def skip_to_mean(levels: Tensor, block_kv: int) -> Tensor:
    """Let every skipped block stand in as its mean: level ``log2(block_kv) + 1``, one row for the block.

    This *tail* costs ``1 / block_kv`` of the work of a full block, and nothing is left out of the softmax.

    Args:
        levels: int8 ``[B, H, num_q_blocks, num_kv_blocks]``, none coarser than that.
        block_kv: tokens in a KV block, a power of two up to 256.

    Returns:
        int8, shaped like ``levels``; a new tensor.

    Raises:
        TypeError, ValueError: an argument breaks a rule above.
    """
    checks.levels(levels)
    coarsest = coarsest_level(block_kv)
    kernel_checks.level_values(levels, coarsest)
    return levels.masked_fill(levels == 0, coarsest)


def coarsest_level(block_kv: int) -> int:
    """The level at which a whole KV block is one row, ``log2(block_kv) + 1``."""
    kernel_checks.power_of_two("block_kv", block_kv)
    return max_levels(block_kv)


def _blocks(start: int, stop: int, block: int) -> slice:
    """The blocks that hold a token of [start, stop), which may lie partly or wholly before token 0."""
    start, stop = max(start, 0), max(stop, 0)
    return slice(start // block, -(-stop // block)) if start < stop else slice(0, 0)
