"""Raw operators of Pyramid Sparse Attention: multi-resolution block-sparse attention and what feeds it."""

from psa_kernels.__about__ import __version__
from psa_kernels.block_importance import block_importance
from psa_kernels.kd_tree import kd_tree
from psa_kernels.key_similarity import key_similarity
from psa_kernels.kmeans import KMeans, kmeans
from psa_kernels.layout import BlockLayout
from psa_kernels.leading_directions import leading_directions
from psa_kernels.permute_tokens import permute_tokens
from psa_kernels.plan import LevelPlan
from psa_kernels.pyramid_attention import AttentionKernels, attention_kernels, pyramid_attention
from psa_kernels.pyramid_pool import Pyramid, pool_pyramid
from psa_kernels.rank_levels import rank_levels
from psa_kernels.share_levels import share_levels

__all__ = [
    "AttentionKernels",
    "BlockLayout",
    "KMeans",
    "LevelPlan",
    "Pyramid",
    "__version__",
    "attention_kernels",
    "block_importance",
    "kd_tree",
    "key_similarity",
    "kmeans",
    "leading_directions",
    "permute_tokens",
    "pool_pyramid",
    "pyramid_attention",
    "rank_levels",
    "share_levels",
]
