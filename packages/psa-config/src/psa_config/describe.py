"""A preset in words."""

from collections.abc import Iterator

from .models import Preset, PyramidSparseAttention

_POOLS = ("whole", "as means of 2 keys", "as means of 4", "as means of 8")


def describe(preset: Preset) -> tuple[str, ...]:
    """What a preset does, one sentence or two for each of its decisions."""
    attention = preset.attention
    if not isinstance(attention, PyramidSparseAttention):
        return ("Dense attention, unchanged: every query reads every key.",)
    return tuple(_sentences(attention))


def _sentences(attention: PyramidSparseAttention) -> Iterator[str]:
    block = attention.block_size
    yield f"Each block of {block.m} queries reads each block of {block.n} keys at a level of its own."
    yield _levels(attention)
    if attention.skip == "mean":
        yield "A block that would be skipped is read as one row, its mean."
    if attention.min_full:
        yield f"At least {attention.min_full:.4g} of the blocks of a row are read whole."
    if attention.use_sim_mask:
        x2, x4, x8 = attention.sim_thresholds.values
        yield (
            "A block is pooled only as far as neighbouring keys are alike: a mean cosine above "
            f"{x2:.4g} for means of 2, {x4:.4g} for 4, {x8:.4g} for 8."
        )
    yield _importance(attention)
    yield _order(attention)
    yield from _dense_parts(attention)


def _levels(attention: PyramidSparseAttention) -> str:
    if attention.mask_ratios is None:
        who = "each head" if attention.budget_per == "head" else "each layer"
        return f"In {who} they spend a density of {attention.density:.4g}, where finer levels save most error."
    parts, start = [], 0.0
    for pool, end in zip(_POOLS, attention.mask_ratios.bounds, strict=True):
        if end > start:
            parts.append(f"up to {end:.4g} {pool}")
            start = end
    if start < 1:
        parts.append("the rest skipped" if attention.skip == "drop" else "the rest coarsest")
    unit = "share of the importance" if attention.mask_mode == "thresholdbound" else "share of the number of blocks"
    return f"Most important first, by cumulative {unit}: {', '.join(parts)}."


def _importance(attention: PyramidSparseAttention) -> str:
    q = attention.samples.q or attention.block_size.m // 4
    kv = attention.samples.kv or attention.block_size.n // 4
    if attention.importance_method == "antidiagonal":
        return f"Importance comes from the antidiagonals of {q} groups of queries and {kv} groups of keys a block."
    what = {
        "max": "the largest attention",
        "mean": "the mean attention",
        "error": "how wrong the block's mean would be for the attention",
    }[attention.importance_reduction]
    return f"Importance is {what} of {q} queries of a block to {kv} keys of each block."


def _order(attention: PyramidSparseAttention) -> str:
    if not attention.use_rearrange:
        return "Tokens stay in the model's order."
    if attention.rearrange_method == "Gilbert":
        return "Tokens are put in order along a Hilbert-like curve, so that a block is compact in space and time."
    if attention.rearrange_method in ("Semantic", "Hybrid"):
        what = "Queries and keys" if attention.rearrange_method == "Semantic" else "Keys"
        rest = "" if attention.rearrange_method == "Semantic" else ", queries along a Hilbert-like curve"
        return f"{what} are put in order by {attention.num_clusters} clusters in each head of each layer{rest}."
    if attention.rearrange_method == "KdTree":
        return (
            "Tokens are put in order along a Hilbert-like curve, and the keys of each block by a k-d tree in each head "
            "of each layer, so that like is pooled with like."
        )
    frames, rows, columns = attention.tile_size
    along = "row by row" if attention.cubes_along == "Raster" else "along a Hilbert-like curve"
    return f"Tokens are put in order by cubes of {frames} frames, {rows} rows and {columns} columns, {along}."


def _dense_parts(attention: PyramidSparseAttention) -> Iterator[str]:
    ends = [
        f"the {which} {count}"
        for which, count in (("first", attention.warmup_steps), ("last", attention.cooldown_steps))
        if count
    ]
    yield f"Dense steps: {' and '.join(ends)}." if ends else "Every step is sparse."
    if attention.dense_layers:
        yield f"Dense layers: {', '.join(map(str, attention.dense_layers))}."
