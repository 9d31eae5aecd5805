"""Caches of diffusers: what carries activations from one forward of a transformer into another."""

from torch import nn


def has_cache(transformer: nn.Module) -> bool:
    """Whether a cache is on, by `enable_cache` or by a function of its own, which `is_cache_enabled` does not know."""
    # Through __dict__: modules are slow to say that they lack an attribute.
    registries = (module.__dict__.get("_diffusers_hook") for module in transformer.modules())
    return any(hook._is_stateful for registry in registries if registry is not None for hook in registry.hooks.values())
