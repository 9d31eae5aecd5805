"""Multi-level masks for Pyramid Sparse Attention: policies, levels, constraints, density, token order."""

from psa_masks.__about__ import __version__
from psa_masks.budget import levels_by_budget
from psa_masks.constraints import cap_by_similarity, keep_full, skip_to_mean
from psa_masks.density import density
from psa_masks.grid import VideoGrid
from psa_masks.levels import levels_by_quota, levels_by_threshold
from psa_masks.order import (
    AttentionOrder,
    HeadOrder,
    SemanticOrder,
    TokenOrder,
    cube_order,
    gilbert_order,
    hybrid_order,
    kd_tree_order,
    semantic_order,
)
from psa_masks.policy import MaskPolicy

__all__ = [
    "AttentionOrder",
    "HeadOrder",
    "MaskPolicy",
    "SemanticOrder",
    "TokenOrder",
    "VideoGrid",
    "__version__",
    "cap_by_similarity",
    "cube_order",
    "density",
    "gilbert_order",
    "hybrid_order",
    "kd_tree_order",
    "keep_full",
    "levels_by_budget",
    "levels_by_quota",
    "levels_by_threshold",
    "semantic_order",
    "skip_to_mean",
]
