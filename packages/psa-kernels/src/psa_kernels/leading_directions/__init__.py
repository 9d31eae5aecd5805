"""The projections of keys that matter most to the logits of their queries."""

from psa_kernels.leading_directions.api import leading_directions

__all__ = ["leading_directions"]
