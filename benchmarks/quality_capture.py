"""The tiny model's self-attention in other hands: caught at chosen steps, or done by something else.

A mode stands between the model and `scaled_dot_product_attention`; hooks on the model say whose call it is.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from psa_integrations.steps import StepFinder
from psa_integrations.tiny_wan.model import PATCH
from psa_integrations.tiny_wan.pipeline import TinyWanPipeline
from psa_masks import VideoGrid


@dataclass(frozen=True)
class Size:
    """Of a video, in frames and pixels."""

    frames: int = 16
    height: int = 64
    width: int = 64

    @property
    def grid(self) -> VideoGrid:
        return VideoGrid(frames=self.frames, height=self.height // PATCH, width=self.width // PATCH)


@dataclass(frozen=True)
class Site:
    """Where a call comes from. The first forward of a step, 0, is that with the prompt, 1 that without."""

    step: int
    forward: int
    layer: int


@dataclass(frozen=True)
class Inputs:
    """One self-attention, ``[B, H, L, D]`` each; of a capture the samples are prompts."""

    step: int
    layer: int
    query: Tensor
    key: Tensor
    value: Tensor


Attend = Callable[[Site, Tensor, Tensor, Tensor, Callable[[], Tensor]], Tensor]
"""Site, query, key, value, and what computes the model's own attention, to the output."""


class SelfAttention(TorchFunctionMode):
    """While active, every self-attention of the pipeline's transformer is what ``attend`` makes of it."""

    def __init__(self, pipeline: TinyWanPipeline, attend: Attend) -> None:
        self._transformer: nn.Module = pipeline.transformer
        self._finder = StepFinder(pipeline)
        self._attend = attend
        self._step, self._forward = -1, -1
        self._layer: int | None = None
        self._hooks: list[Any] = []

    def __enter__(self) -> "SelfAttention":
        self._hooks = [self._transformer.register_forward_pre_hook(self._begin, with_kwargs=True)]
        for layer, block in enumerate(self._transformer.blocks):
            self._hooks += [
                block.attn1.register_forward_pre_hook(lambda *_, layer=layer: self._enter_layer(layer)),
                block.attn1.register_forward_hook(lambda *_: self._enter_layer(None)),
            ]
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        for hook in self._hooks:
            hook.remove()
        super().__exit__(*error)

    def _begin(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        found = self._finder.find(kwargs["timestep"])
        assert found is not None, "the pipeline's schedule tells no step"
        self._forward = self._forward + 1 if found.index == self._step else 0
        self._step = found.index

    def _enter_layer(self, layer: int | None) -> None:
        self._layer = layer

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is not scaled_dot_product_attention or self._layer is None:
            return func(*args, **kwargs)
        named = dict(zip(("query", "key", "value"), args, strict=False)) | kwargs
        site = Site(self._step, self._forward, self._layer)
        return self._attend(site, named["query"], named["key"], named["value"], lambda: func(*args, **kwargs))


class _Enough(Exception):  # noqa: N818 - it ends a run, and is no error
    pass


def sample(
    pipeline: TinyWanPipeline,
    pairs: Sequence[tuple[str, int]],
    *,
    size: Size,
    steps: int,
    guidance: float = 3.0,
    attend: Attend | None = None,
    last_step: int | None = None,
) -> Tensor | None:
    """Videos ``[B, F, 3, H, W]`` in [0, 1] of pairs of prompt and seed, made together.

    Args:
        guidance: strength of classifier-free guidance; at most 1 is none.
        attend: in place of the model's self-attention; None leaves it dense.
        last_step: stop after this step, without a video.
    """

    def on_step_end(pipeline: Any, step: int, timestep: Tensor, values: dict[str, Any]) -> dict[str, Any]:
        if step == last_step:
            raise _Enough
        return values

    mode = SelfAttention(pipeline, attend or (lambda site, query, key, value, dense: dense()))
    try:
        with mode:
            return pipeline(
                [prompt for prompt, _ in pairs],
                num_frames=size.frames,
                height=size.height,
                width=size.width,
                num_inference_steps=steps,
                guidance_scale=guidance,
                # On the CPU, so that the noise of a seed is the same on every device.
                generator=[torch.Generator().manual_seed(seed) for _, seed in pairs],
                output_type="pt",
                callback_on_step_end=on_step_end,
            ).frames
    except _Enough:
        return None


def capture(
    pipeline: TinyWanPipeline, pairs: Sequence[tuple[str, int]], wanted: Iterable[int], *, size: Size, steps: int
) -> dict[tuple[int, int], Inputs]:
    """Self-attentions of the forwards with the prompt at the steps ``wanted``, by step and layer."""
    kept = frozenset(wanted)
    caught: dict[tuple[int, int], Inputs] = {}

    def keep(site: Site, query: Tensor, key: Tensor, value: Tensor, dense: Callable[[], Tensor]) -> Tensor:
        if site.step in kept and site.forward == 0:
            at = site.step, site.layer
            query, key = query.to(value.dtype), key.to(value.dtype)  # as psa_integrations does
            caught[at] = Inputs(*at, query.clone(), key.clone(), value.clone())
        return dense()

    sample(pipeline, pairs, size=size, steps=steps, attend=keep, last_step=max(kept))
    return caught
