"""Mean pooling of a sequence into its pyramid levels."""

from psa_kernels.pyramid_pool.api import Pyramid, pool_pyramid

__all__ = ["Pyramid", "pool_pyramid"]
