"""Orders of the tokens of a video: neighbours in space and time should share a block."""

from psa_masks.order.cubes import cube_order
from psa_masks.order.gilbert import gilbert_order
from psa_masks.order.token_order import TokenOrder

__all__ = ["TokenOrder", "cube_order", "gilbert_order"]
