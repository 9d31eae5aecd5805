"""How alike the neighbouring keys of a block are."""

from psa_kernels.key_similarity.api import key_similarity

__all__ = ["key_similarity"]
