"""Pyramid sparse attention for the prefill of transformers' decoders."""

from psa_integrations.transformers.register import RegisteredAttention, register_pyramid_attention

__all__ = ["RegisteredAttention", "register_pyramid_attention"]
