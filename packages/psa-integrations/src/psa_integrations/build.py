"""Presets to masks: the one place where configuration meets the mask and token-order code."""

from dataclasses import replace
from typing import Literal

from torch import cat

from psa_config import DenseAttention, Preset, PyramidSparseAttention, load_presets
from psa_integrations.clusters import ClusterOrders
from psa_integrations.content_orders import ContentOrders
from psa_integrations.kd_trees import KdTreeOrders
from psa_masks import MaskPolicy, TokenOrder, VideoGrid, cube_order, gilbert_order

_MODES = {"thresholdbound": "threshold", "topk": "quota", "budget": "budget"}
_CUBES_ALONG: dict[str, Literal["raster", "gilbert"]] = {"Raster": "raster", "Gilbert": "gilbert"}


def find_preset(preset: Preset | str, *, model: str | None = None) -> Preset:
    """The preset meant by `preset`.

    Args:
        preset: a Preset, returned as it is; or `"Model/preset"`, looked up in the shipped presets; or, with
            `model`, the preset's name alone.
        model: the shipped model that a name without a model refers to.

    Raises:
        TypeError: if `preset` is neither a Preset nor a str.
        ValueError: if a name is given without a model and `model` is None, or nothing has that name.
    """
    if isinstance(preset, Preset):
        return preset
    if not isinstance(preset, str):
        raise TypeError(f"preset must be a psa_config.Preset or a str, got {type(preset).__name__}")
    named_model, slash, name = preset.rpartition("/")
    if slash:
        return load_presets().get(named_model, name)
    if model is None:
        known = ", ".join(load_presets().models)
        raise ValueError(
            "preset must name its model, as 'Model/preset', where the model cannot be told from its "
            f"configuration; got {preset!r}, known models: {known}"
        )
    return load_presets().get(model, name)


def sparse_attention_of(preset: Preset) -> PyramidSparseAttention | None:
    """The sparse settings of `preset`, None where it is dense."""
    return None if isinstance(preset.attention, DenseAttention) else preset.attention


def mask_policy(
    attention: PyramidSparseAttention, grid: VideoGrid | None = None, *, is_causal: bool = False
) -> MaskPolicy:
    """The rule that gives every block pair its level.

    Text tokens of `grid` are protected: read at level 1 by all, and reading everything at level 1. Without a
    grid no token is known to be text.
    """
    text = () if grid is None or grid.text == 0 else (grid.text_range,)
    return MaskPolicy(
        mode=_MODES[attention.mask_mode],
        bounds=() if attention.mask_ratios is None else attention.mask_ratios.bounds,
        density=attention.density,
        share=attention.budget_per,
        block_q=attention.block_size.m,
        block_kv=attention.block_size.n,
        skip=attention.skip,
        min_full=attention.min_full,
        samples_q=attention.samples.q,
        samples_kv=attention.samples.kv,
        method=attention.importance_method,
        reduction=attention.importance_reduction,
        similarity_thresholds=attention.sim_thresholds.values if attention.use_sim_mask else None,
        protected=text,
        is_causal=is_causal,
        seed=attention.seed,
    )


def token_order(attention: PyramidSparseAttention, grid: VideoGrid, frames_apart: int = 0) -> TokenOrder | None:
    """The order in which `attention` wants the tokens of `grid`, None where they stay as they are.

    With orders by content it is that of the queries, within which clusters keep and in which blocks are cut.

    Args:
        attention: of a preset.
        grid: of the sequence; without text if frames are apart.
        frames_apart: so many of the first frames have an order of their own, and stay first.
    """
    if not attention.use_rearrange:
        return None
    if not 0 < frames_apart < grid.frames:
        return _order(attention, grid)
    first, rest = (replace(grid, frames=frames) for frames in (frames_apart, grid.frames - frames_apart))
    before = _order(attention, first).order
    return TokenOrder(cat([before, _order(attention, rest).order + len(before)]))


def _order(attention: PyramidSparseAttention, grid: VideoGrid) -> TokenOrder:
    if attention.rearrange_method != "Cube":
        return gilbert_order(grid)
    return cube_order(grid, attention.tile_size, along=_CUBES_ALONG[attention.cubes_along])


def orders_by_content(attention: PyramidSparseAttention) -> bool:
    """Whether each attention makes token orders of its own."""
    return attention.use_rearrange and attention.rearrange_method in ("Semantic", "Hybrid", "KdTree")


def check_clusters(attention: PyramidSparseAttention, grid: VideoGrid) -> None:
    """Raises ValueError if `attention` wants more clusters than `grid` has video tokens."""
    by_cluster = attention.use_rearrange and attention.rearrange_method in ("Semantic", "Hybrid")
    if by_cluster and attention.num_clusters > grid.video_len:
        raise ValueError(
            f"num_clusters must be at most the {grid.video_len} video tokens of {grid}, got {attention.num_clusters}"
        )


def content_orders(
    attention: PyramidSparseAttention, grid: VideoGrid, *, base: TokenOrder | None = None
) -> ContentOrders | None:
    """What makes the orders of each attention over `grid`, None where `attention` wants none of its own.

    Args:
        attention: the settings.
        grid: the sequence.
        base: the token order of `grid`, None where the tokens come in it already.

    Raises:
        ValueError: if there are more clusters than video tokens.
    """
    if not orders_by_content(attention):
        return None
    if attention.rearrange_method == "KdTree":
        return KdTreeOrders(block_kv=attention.block_size.n, grid=grid, base=base)
    check_clusters(attention, grid)
    return ClusterOrders(
        num_clusters=attention.num_clusters,
        num_iterations=attention.cluster_iterations,
        seed=attention.seed,
        queries=attention.rearrange_method == "Semantic",
        grid=grid,
        base=base,
    )
