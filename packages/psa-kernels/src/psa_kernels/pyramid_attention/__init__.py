"""Attention that reads each KV block at one of several resolutions."""

from psa_kernels.pyramid_attention.api import pyramid_attention

__all__ = ["pyramid_attention"]
