"""Attention that reads each KV block at one of several resolutions."""

from psa_kernels.pyramid_attention.api import pyramid_attention
from psa_kernels.pyramid_attention.kernels import AttentionKernels, attention_kernels

__all__ = ["AttentionKernels", "attention_kernels", "pyramid_attention"]
