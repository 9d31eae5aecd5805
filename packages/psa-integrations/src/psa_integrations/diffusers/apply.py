"""Putting a preset on a pipeline or a transformer, and taking it off again."""

import logging
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import TracebackType
from typing import get_args

from torch import nn

from psa_config import Preset
from psa_integrations.attention import check_impl
from psa_integrations.build import find_preset
from psa_integrations.diffusers.adapter import Adapter
from psa_integrations.diffusers.site import OnUnsupported, TransformerSite, UnsupportedError
from psa_integrations.recording import LevelRecorder
from psa_integrations.stats import AttentionStats, StatsRecorder
from psa_integrations.steps import StepFinder
from psa_kernels import checks

_log = logging.getLogger(__name__)


class AppliedAttention:
    """Pyramid sparse attention at work on the transformers of one model.

    As a context manager it removes itself at the end.
    """

    def __init__(self, sites: list[TransformerSite], finder: StepFinder, stats: StatsRecorder) -> None:
        self._sites = sites
        self._finder = finder
        self._stats = stats
        self._removed = False

    @property
    def presets(self) -> dict[str, Preset]:
        """The preset of each transformer that has one, by its name in the pipeline; empty once removed."""
        return {site.name: site.preset for site in self._sites}

    def stats(self) -> AttentionStats:
        """Density per transformer, step and layer since `apply` or `reset_stats()`; waits for the device."""
        return self._stats.read()

    def reset_stats(self) -> None:
        """Starts the statistics anew, for example between two runs."""
        self._stats.reset()

    def record_levels(self, recorder: LevelRecorder | None) -> None:
        """Gives `recorder` the level maps of the sparse calls from now on; None ends it.

        Raises:
            TypeError: if `recorder` is neither.
        """
        if not isinstance(recorder, LevelRecorder | None):
            raise TypeError(f"recorder must be a psa_integrations.LevelRecorder or None, got {type(recorder).__name__}")
        for site in self._sites:
            site.level_recorder = recorder

    def at_step(self, index: int, total: int | None = None) -> AbstractContextManager[None]:
        """Names the denoising step of the calls made inside, for loops that are not a diffusers pipeline.

        Args:
            index: the step, from 0.
            total: the number of steps of the run; needed for presets with `cooldown_steps`.

        Raises:
            TypeError: if one of them is no integer.
            ValueError: on entering, if `index` is negative or not below `total`.
        """
        checks.integer("index", index)
        if total is not None:
            checks.integer("total", total)
        return self._finder.at(index, total)

    def remove(self) -> None:
        """Puts the model back as it was: the output is bit for bit the old one. Statistics stay readable."""
        for site in self._sites:
            site.remove()
            _log.info("%s is as it was", site.name)
        self._sites = []
        self._removed = True

    def __enter__(self) -> "AppliedAttention":
        if self._removed:
            raise RuntimeError("this handle has been removed: call apply_pyramid_sparse_attention again")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()


def apply_pyramid_sparse_attention(
    pipeline_or_transformer: object,
    preset: Preset | str,
    *,
    preset_2: Preset | str | None = None,
    on_unsupported: OnUnsupported = "raise",
    impl: str | None = None,
) -> AppliedAttention:
    """Gives the self-attention of a diffusers video model the preset's pyramid sparse attention.

    Cross-attention, text encoder and VAE stay as they are. In steps that the preset keeps dense the model
    computes exactly what it did before.

    Args:
        pipeline_or_transformer: a pipeline with a `transformer`, perhaps a `transformer_2`, or a transformer
            itself, of Wan, CogVideoX, HunyuanVideo, LTX-Video or Mochi. Given a transformer alone, the
            denoising step is known inside a cache context that carries it or `handle.at_step`; elsewhere a
            preset with `warmup_steps` or `cooldown_steps` raises a StepError, and one without runs sparse.
        preset: a psa_config.Preset, `"Model/preset"` from the shipped presets, or a preset's name alone where
            the model is recognised by its configuration.
        preset_2: the preset of the second transformer (Wan 2.2 A14B); by default the same. Steps count over
            both.
        on_unsupported: what to do where a layer cannot be served: an unknown attention processor, a head_dim
            above 256, an attention mask, context parallelism other than by Ulysses on Wan, a diffusers cache
            across dense and reordered steps. `"raise"` raises an UnsupportedError, at once where it can be known
            before a step; `"dense"` warns once and runs dense, without statistics where nothing could be put on
            at all.
        impl: implementation of the operators, see psa_kernels.pyramid_attention. `"triton"` on tensors that are
            not on a GPU is a ValueError of the first self-attention, whatever its step.

    Returns:
        A handle: `.stats()`, `.at_step(index, total)`, `.remove()`; a context manager.

    Raises:
        TypeError: if the model is of another class.
        ValueError: if an argument is out of its range, or a preset is not found.
        RuntimeError: if the model has pyramid sparse attention already, or is compiled.
        UnsupportedError: see `on_unsupported`.
    """
    if on_unsupported not in get_args(OnUnsupported):
        raise ValueError(f"on_unsupported must be one of {get_args(OnUnsupported)}, got {on_unsupported!r}")
    check_impl(impl)
    pipeline, transformers = _transformers(pipeline_or_transformer)
    if preset_2 is not None and "transformer_2" not in transformers:
        raise ValueError("preset_2 is for a second transformer, which this model does not have")
    finder, stats = StepFinder(pipeline), StatsRecorder(tuple(transformers))
    sites = []
    for name, transformer in transformers.items():
        adapter = _adapter(transformer)
        wanted = preset if name == "transformer" or preset_2 is None else preset_2
        found = find_preset(wanted, model=adapter.model(transformer, pipeline))
        sites.append(
            TransformerSite(
                name,
                transformer,
                adapter,
                found,
                finder=finder,
                stats=stats,
                on_unsupported=on_unsupported,
                impl=impl,
            )
        )
    served = []
    for site in sites:
        try:
            site.check()
        except UnsupportedError as error:
            if on_unsupported == "raise":
                raise
            warnings.warn(f"{error}; this transformer stays dense", stacklevel=2)
        else:
            served.append(site)
    for site in served:
        site.install()
        _log.info("%s has %s/%s", site.name, site.preset.model, site.preset.name)
    return AppliedAttention(served, finder, stats)


def _transformers(given: object) -> tuple[object | None, dict[str, nn.Module]]:
    if isinstance(given, nn.Module):
        return None, {"transformer": given}
    found: dict[str, nn.Module] = {}
    for name in ("transformer", "transformer_2"):
        module = getattr(given, name, None)
        # One module may serve both stages.
        if isinstance(module, nn.Module) and module not in found.values():
            found[name] = module
    if not found:
        raise TypeError(
            "pipeline_or_transformer must be a diffusers pipeline with a transformer, or a transformer, "
            f"got {type(given).__name__}"
        )
    return given, found


def _served_class(module: nn.Module) -> str | None:
    """The class of `ADAPTERS` that a module is of, None where it is of none."""
    names = {cls.__name__ for cls in type(module).__mro__ if cls.__module__.startswith("diffusers.")}
    return next((name for name in ADAPTERS if name in names), None)


def _adapter(transformer: nn.Module) -> Adapter:
    name = _served_class(transformer)
    if name is not None:
        return ADAPTERS[name]()
    if type(transformer).__name__ == "OptimizedModule":
        raise RuntimeError("the transformer is compiled: apply pyramid sparse attention first, then compile")
    # As peft.PeftModel and DistributedDataParallel hold one.
    held = ((path, _served_class(module)) for path, module in transformer.named_modules())
    hint = next((f", which holds a {name}: give that, its `.{path}`" for path, name in held if name), "")
    raise TypeError(f"the transformer must be one of {', '.join(ADAPTERS)}, got {type(transformer).__name__}{hint}")


# Each imports its adapter itself: diffusers takes seconds to import, and every model more.
def _wan() -> Adapter:
    from psa_integrations.diffusers.wan import WanAdapter

    return WanAdapter()


def _cogvideox() -> Adapter:
    from psa_integrations.diffusers.cogvideox import CogVideoXAdapter

    return CogVideoXAdapter()


def _hunyuan_video() -> Adapter:
    from psa_integrations.diffusers.hunyuan_video import HunyuanVideoAdapter

    return HunyuanVideoAdapter()


def _ltx() -> Adapter:
    from psa_integrations.diffusers.ltx import LTXAdapter

    return LTXAdapter()


def _mochi() -> Adapter:
    from psa_integrations.diffusers.mochi import MochiAdapter

    return MochiAdapter()


ADAPTERS: dict[str, Callable[[], Adapter]] = {
    "WanTransformer3DModel": _wan,
    "CogVideoXTransformer3DModel": _cogvideox,
    "HunyuanVideoTransformer3DModel": _hunyuan_video,
    "LTXVideoTransformer3DModel": _ltx,
    "MochiTransformer3DModel": _mochi,
}
"""Transformer classes of diffusers that can be served."""
