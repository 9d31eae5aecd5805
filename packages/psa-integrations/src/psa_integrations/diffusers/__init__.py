"""Pyramid sparse attention for the video transformers of diffusers."""

from psa_integrations.diffusers.apply import AppliedAttention, apply_pyramid_sparse_attention
from psa_integrations.diffusers.site import UnsupportedError

__all__ = ["AppliedAttention", "UnsupportedError", "apply_pyramid_sparse_attention"]
