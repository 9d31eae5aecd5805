"""The density that a preset comes to at a size, before anything has run."""

from dataclasses import dataclass

import torch
from torch import Tensor

from psa_config import PyramidSparseAttention
from psa_integrations.build import mask_policy
from psa_kernels import BlockLayout
from psa_masks import VideoGrid, density, keep_full, levels_by_quota, levels_by_threshold, skip_to_mean


@dataclass(frozen=True)
class DensityEstimate:
    """Of one sparse call, in [0, 1].

    `expected` is for importance that falls with rank as 1/rank, `most` for importance that is the same everywhere and
    keys that are too unlike to be pooled where the preset asks about that. Shares of the number of blocks are known
    beforehand, so then the two differ by nothing but such keys.
    """

    expected: float
    most: float


def estimate_density(attention: PyramidSparseAttention, grid: VideoGrid) -> DensityEstimate:
    """Runs the preset's rules on made-up importance over the blocks of `grid`; a budget is what it says."""
    if attention.density is not None:
        return DensityEstimate(expected=attention.density, most=attention.density)
    layout = BlockLayout(grid.seq_len, grid.seq_len, block_q=attention.block_size.m, block_kv=attention.block_size.n)
    # Ranks in random order, so that text and a short last block fall on any of them.
    generator = torch.Generator().manual_seed(0)
    ranks = torch.rand(1, 1, layout.num_q_blocks, layout.num_kv_blocks, generator=generator).argsort(-1) + 1
    falling = 1.0 / ranks
    flat = 1.0 + 1e-4 * falling  # in the same order, as text protects the same blocks then
    return DensityEstimate(
        expected=_density(attention, grid, layout, falling, pooled=True),
        most=_density(attention, grid, layout, flat, pooled=not attention.use_sim_mask),
    )


def run_density(attention: PyramidSparseAttention, sparse_step: float, *, steps: int, layers: int | None) -> float:
    """Mean density of a run whose sparse layers have the density `sparse_step` in sparse steps.

    Args:
        attention: which steps and layers are dense.
        sparse_step: see `estimate_density`.
        steps: of the run.
        layers: of the model, None where they are not known, and its dense layers are then not counted.
    """
    dense = min(steps, attention.warmup_steps + attention.cooldown_steps)
    share = 0.0 if layers is None else len([layer for layer in attention.dense_layers if layer < layers]) / layers
    return (dense + (steps - dense) * (share + (1 - share) * sparse_step)) / steps


def _density(
    attention: PyramidSparseAttention, grid: VideoGrid, layout: BlockLayout, importance: Tensor, *, pooled: bool
) -> float:
    policy = mask_policy(attention, grid)
    if policy.mode == "threshold":
        levels = levels_by_threshold(importance, policy.bounds, min_full=policy.min_full)
    else:
        levels = levels_by_quota(importance, [max(bound, policy.min_full) for bound in policy.bounds])
    if not pooled:
        levels = levels.clamp(max=1)
    levels = keep_full(levels, layout, protected=policy.protected, diagonal=policy.diagonal, sinks=policy.sinks)
    if policy.skip == "mean":
        levels = skip_to_mean(levels, policy.block_kv)
    layout = BlockLayout(
        layout.q_len,
        layout.kv_len,
        block_q=layout.block_q,
        block_kv=layout.block_kv,
        num_levels=policy.num_levels,
    )
    return float(density(levels, layout))
