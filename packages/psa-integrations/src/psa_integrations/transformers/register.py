"""Giving transformers an attention implementation of a preset."""

import inspect
from typing import get_args

from psa_config import Preset
from psa_integrations.attention import check_impl
from psa_integrations.build import find_preset, sparse_attention_of
from psa_integrations.stats import AttentionStats, StatsRecorder
from psa_integrations.transformers.attention import OnUnsupported, PyramidAttentionFunction
from psa_integrations.transformers.masks import mask_maker

# What transformers reads a meaning of its own into.
_TAKEN = ("flash", "sdpa", "flex_attention", "eager", "/", "|")


class RegisteredAttention:
    """A preset that transformers knows by a name."""

    def __init__(self, name: str, preset: Preset, stats: StatsRecorder) -> None:
        self.name = name
        self.preset = preset
        self._stats = stats

    def stats(self) -> AttentionStats:
        """Density per layer of the prefills of all models under this name; waits for the device.

        Calls of fewer than `min_queries` queries, such as decoding, are not counted. There are no steps.
        """
        return self._stats.read()

    def reset_stats(self) -> None:
        """Starts the statistics anew, for example between two prompts."""
        self._stats.reset()


def register_pyramid_attention(
    preset: Preset | str = "Qwen2.5-VL_7b/psa_balanced",
    *,
    name: str = "psa",
    min_queries: int | None = None,
    on_unsupported: OnUnsupported = "raise",
    impl: str | None = None,
) -> RegisteredAttention:
    """Makes a preset an `attn_implementation` of transformers, for the prefill of decoders.

    Causal self-attention with at least `min_queries` queries runs sparse. Decoding, attention that is not causal (a
    vision tower) and `dense_layers` are transformers' own SDPA. Padded batches, caches of any kind and prefill in
    chunks are understood. A name registered again gets the new preset, for loaded models too.

    Args:
        preset: a psa_config.Preset, or `"Model/preset"` from the shipped presets. A dense one is SDPA throughout.
        name: what to pass as `attn_implementation`, alone or for a part of a model, as in `{"text_config": "psa"}`.
        min_queries: the shortest prefill, or part of one, that is worth it; None is the preset's query block.
        on_unsupported: what to do in a prefill with dropout, a sliding window shorter than the keys, a mask that is not
            causal with padding, other additions to the softmax, `output_attentions`, or a head_dim that the
            implementation lacks. `"raise"` raises an UnsupportedError; `"dense"` warns once and leaves it to SDPA,
            which itself refuses soft-capping.
        impl: implementation of the operators, see psa_kernels.pyramid_attention. `"triton"` on tensors that are not on
            a GPU is a ValueError of the first prefill.

    Returns:
        A handle: `.stats()`, `.reset_stats()`, `.preset`.

    Raises:
        TypeError: if `preset`, `name` or `min_queries` is of another type.
        ValueError: if an argument is out of its range, the preset is not found, has denoising steps (`warmup_steps`,
            `cooldown_steps`) or a token order (`use_rearrange`), which no causal text has.
        RuntimeError: if the installed transformers is too old for a mask function of this form.
    """
    if on_unsupported not in get_args(OnUnsupported):
        raise ValueError(f"on_unsupported must be one of {get_args(OnUnsupported)}, got {on_unsupported!r}")
    if not isinstance(name, str):
        raise TypeError(f"name must be a str, got {type(name).__name__}")
    if not name or any(word in name for word in _TAKEN):
        raise ValueError(f"name must not be empty or hold one of {', '.join(_TAKEN)}, got {name!r}")
    check_impl(impl)
    found = find_preset(preset)
    sparse = sparse_attention_of(found)
    if sparse is not None:
        for field in ("warmup_steps", "cooldown_steps", "use_rearrange"):
            if getattr(sparse, field):
                raise ValueError(
                    f"preset must have no {field} for a text model, got {getattr(sparse, field)} "
                    f"in {found.model}/{found.name}"
                )
    if min_queries is None:
        min_queries = 2 if sparse is None else sparse.block_size.m
    if isinstance(min_queries, bool) or not isinstance(min_queries, int):
        raise TypeError(f"min_queries must be an int or None, got {type(min_queries).__name__}")
    if min_queries < 2:
        raise ValueError(f"min_queries must be at least 2, as one query is decoding, got {min_queries}")
    # Imported here because transformers takes seconds to import.
    import transformers
    from transformers.masking_utils import sdpa_mask

    if "q_offset" not in inspect.signature(sdpa_mask).parameters:
        raise RuntimeError(
            "transformers must be as new as its mask functions that take q_length and q_offset (5.24 is), "
            f"got {transformers.__version__}"
        )
    stats = StatsRecorder(("transformer",))
    function = PyramidAttentionFunction(
        sparse, min_queries=min_queries, stats=stats, on_unsupported=on_unsupported, impl=impl
    )
    transformers.AttentionInterface.register(name, function)
    transformers.AttentionMaskInterface.register(name, mask_maker(min_queries))
    return RegisteredAttention(name, found, stats)
