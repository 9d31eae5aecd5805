"""Orders of the tokens of a video: neighbours in space and time, or tokens that are alike, should share a block."""

from psa_masks.order.cubes import cube_order
from psa_masks.order.gilbert import gilbert_order
from psa_masks.order.head_order import AttentionOrder, HeadOrder
from psa_masks.order.hybrid import hybrid_order
from psa_masks.order.kd_tree import kd_tree_order
from psa_masks.order.semantic import SemanticOrder, semantic_order
from psa_masks.order.token_order import TokenOrder

__all__ = [
    "AttentionOrder",
    "HeadOrder",
    "SemanticOrder",
    "TokenOrder",
    "cube_order",
    "gilbert_order",
    "hybrid_order",
    "kd_tree_order",
    "semantic_order",
]
