"""The tokens of each head in an order of its own."""

from psa_kernels.permute_tokens.api import permute_tokens

__all__ = ["permute_tokens"]
