"""From queries and keys to a level map in one call."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from psa_kernels import BlockLayout, block_importance, key_similarity
from psa_kernels import checks as kernel_checks
from psa_kernels.block_importance import METHODS, REDUCTIONS, group_stride
from psa_kernels.layout import existing_keys
from psa_masks import checks
from psa_masks.budget import levels_by_budget
from psa_masks.constraints import cap_by_similarity, coarsest_level, keep_full, skip_to_mean
from psa_masks.levels import levels_by_quota, levels_by_threshold


@dataclass(frozen=True, kw_only=True)
class MaskPolicy:
    """How to choose the level of every block pair; call it with the queries and keys of an attention.

    A call scores the block pairs (``psa_kernels.block_importance``), turns scores into levels, refuses levels
    too coarse for the keys, sets what must be kept to level 1, and last decides what becomes of skipped
    blocks. It waits for no device, and neither reads nor moves any random state.

    Args:
        mode: ``"threshold"``, see :func:`levels_by_threshold`, ``"quota"``, see :func:`levels_by_quota`, or
            ``"budget"``, see :func:`levels_by_budget`.
        bounds: cumulative upper ends of levels 1..H in [0, 1], not decreasing; H at most
            ``log2(block_kv) + 1``. Not in budget mode.
        density: of budget mode, and needed there: executed over dense work of a head, in (0, 1], and more than
            ``1 / block_kv`` with ``skip="mean"``. What is protected, on the diagonal or a sink is paid for out of it
            first, and may cost more.
        errors, share: of budget mode, as ``levels_by_budget`` takes them. Levels 1 to ``len(errors) + 1`` are chosen
            from; without ``errors`` 1 to 4, or as many as the block has.
        block_q, block_kv: tokens a level decision covers, powers of two.
        skip: ``"drop"`` leaves skipped blocks out of the attention, ``"mean"`` reads each as its mean, at
            level ``log2(block_kv) + 1`` (:func:`skip_to_mean`).
        min_full: at least this share of each row's blocks is level 1, in [0, 1]; in quota mode as if no bound
            were lower, in budget mode out of the density.
        samples_q, samples_kv: tokens sampled from a block to score it, or with ``method="antidiagonal"`` groups it
            is cut into; None is a quarter of the block.
        method, reduction: as ``block_importance`` takes them. ``"antidiagonal"`` wants groups of as many queries as
            keys. ``"error"`` is made for ``skip="mean"``.
        similarity_thresholds: for levels 2, 3, ..., see :func:`cap_by_similarity`; None or all -1 is no cap.
            No cap in budget mode, where what it refines would cost more than the density.
        protected: token ranges (start, stop) kept at level 1, see :func:`keep_full`.
        diagonal: keep block pairs with a query and a key of the same position at level 1. Always done with
            ``is_causal``, as a query might see no key otherwise.
        sinks: number of tokens at the start whose KV blocks are level 1.
        is_causal: queries see keys up to their own position, the last query at the last key. The map is then
            what attention executes of it: blocks in the future are skipped, kept ones that reach past the
            diagonal are level 1. In quota mode shares are still of all KV blocks, future ones too, though not of
            those past ``kv_lengths``.
        seed: names the sample drawn; equal seeds give equal maps. Antidiagonals draw none.

    Raises:
        TypeError, ValueError: an argument breaks a rule above.
    """

    mode: str
    bounds: Sequence[float] = ()
    density: float | None = None
    errors: Sequence[float] | None = None
    share: str = "head"
    block_q: int = 128
    block_kv: int = 128
    skip: str = "drop"
    min_full: float = 0.0
    samples_q: int | None = None
    samples_kv: int | None = None
    method: str = "sampled"
    reduction: str = "max"
    similarity_thresholds: Sequence[float] | None = None
    protected: Sequence[tuple[int, int]] = ()
    diagonal: bool = False
    sinks: int = 0
    is_causal: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        kernel_checks.choice("mode", self.mode, ("threshold", "quota", "budget"))
        kernel_checks.choice("skip", self.skip, ("drop", "mean"))
        BlockLayout(1, 1, block_q=self.block_q, block_kv=self.block_kv)  # checks the block sizes
        coarsest = coarsest_level(self.block_kv)
        if self.mode == "budget":
            bounds: tuple[float, ...] = ()
            density, errors = self._checked_budget(coarsest)
        else:
            self._check_no_budget()
            density, errors, bounds = None, None, checks.bounds(self.bounds)
            if len(bounds) > coarsest:
                raise ValueError(
                    f"bounds must name at most log2(block_kv) + 1 = {coarsest} levels with block_kv "
                    f"{self.block_kv}, got {len(bounds)}"
                )
        min_full = checks.real("min_full", self.min_full, 0.0, 1.0)
        for name, block in (("samples_q", self.block_q), ("samples_kv", self.block_kv)):
            samples = getattr(self, name)
            if samples is not None and checks.integer(name, samples, 1) > block:
                raise ValueError(f"{name} must be at most the block's {block} tokens, got {samples}")
        limits = None
        if self.similarity_thresholds is not None:
            limits = checks.thresholds("similarity_thresholds", self.similarity_thresholds)
            if len(limits) >= coarsest:
                raise ValueError(
                    f"similarity_thresholds must be at most log2(block_kv) = {coarsest - 1} numbers with "
                    f"block_kv {self.block_kv}, got {len(limits)}"
                )
            if self.mode == "budget" and max(limits) > -1.0:
                raise ValueError(f"similarity_thresholds must be None or all -1 with mode 'budget', got {limits!r}")
        checks.integer("sinks", self.sinks, 0)
        kernel_checks.choice("method", self.method, METHODS)
        kernel_checks.choice("reduction", self.reduction, REDUCTIONS)
        if self.method == "antidiagonal":
            if self.reduction == "error":
                raise ValueError("reduction 'error' needs method 'sampled', got 'antidiagonal'")
            samples_q, samples_kv = _samples(self.samples_q, self.block_q), _samples(self.samples_kv, self.block_kv)
            group_stride(self.block_q, self.block_kv, samples_q, samples_kv)  # checks that they go together
        for name in ("diagonal", "is_causal"):
            checks.boolean(name, getattr(self, name))
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise TypeError(f"seed must be an int, got {self.seed!r}")
        # Tuples and plain numbers, so that equal policies compare equal and hash.
        settled = {
            "bounds": bounds,
            "density": density,
            "errors": errors,
            "min_full": min_full,
            "similarity_thresholds": limits,
            "protected": checks.token_ranges("protected", self.protected),
        }
        for name, value in settled.items():
            object.__setattr__(self, name, value)

    def _checked_budget(self, coarsest: int) -> tuple[float, tuple[float, ...] | None]:
        """``density`` and ``errors`` of budget mode."""
        if len(checks.sequence("bounds", self.bounds)):
            raise ValueError(f"bounds must not be given with mode 'budget', which goes by density, got {self.bounds!r}")
        kernel_checks.choice("share", self.share, ("head", "layer"))
        if self.density is None:
            raise ValueError("density must be given with mode 'budget', got None")
        density = checks.share("density", self.density)
        if self.skip == "mean" and density * self.block_kv <= 1:
            raise ValueError(
                f"density must be more than 1 / block_kv = {1 / self.block_kv:g} with skip='mean', what the means of "
                f"all blocks cost, got {self.density}"
            )
        if self.errors is None:
            return density, None
        errors = checks.errors(self.errors)
        if len(errors) >= coarsest:
            raise ValueError(
                f"errors must be at most log2(block_kv) = {coarsest - 1} numbers with block_kv {self.block_kv}, "
                f"got {len(errors)}"
            )
        return density, errors

    def _check_no_budget(self) -> None:
        for name, default in (("density", None), ("errors", None), ("share", "head")):
            if getattr(self, name) != default:
                raise ValueError(
                    f"{name} must be given with mode 'budget' alone, got {getattr(self, name)!r} with {self.mode!r}"
                )

    @property
    def _chosen_levels(self) -> int:
        """Levels 1 to this are chosen by importance."""
        if self.mode != "budget":
            return len(self.bounds)
        return min(4, coarsest_level(self.block_kv)) if self.errors is None else len(self.errors) + 1

    @property
    def num_levels(self) -> int:
        """The coarsest level a map may hold."""
        return coarsest_level(self.block_kv) if self.skip == "mean" else self._chosen_levels

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        *,
        kv_lengths: Tensor | None = None,
        scale: float | None = None,
        impl: str | None = None,
    ) -> Tensor:
        """The level map for these queries and keys.

        Args:
            query: ``[B, H, q_len, D]``, any dtype and strides that ``psa_kernels.block_importance`` takes.
            key: ``[B, H_kv, kv_len, D]``, H a multiple of H_kv.
            kv_lengths: int32 or int64 ``[B]``, how many keys of each sample exist; None is all. Shares are of the
                blocks that exist, so without causality and diagonal a padded sample gets the levels it gets alone.
                The levels of KV blocks wholly past it mean nothing; attention with the same ``kv_lengths`` ignores
                them.
            scale: of the logits; None is ``1/sqrt(D)``.
            impl: of the operators of psa_kernels; None picks by device.

        Returns:
            int8 ``[B, H, num_q_blocks, num_kv_blocks]``: 0 skipped, h in 1..num_levels level h.

        Raises:
            TypeError, ValueError: the tensors don't go together, or a protected range ends past kv_len.
        """
        importance = block_importance(
            query,
            key,
            block_q=self.block_q,
            block_kv=self.block_kv,
            samples_q=_samples(self.samples_q, self.block_q),
            samples_kv=_samples(self.samples_kv, self.block_kv),
            method=self.method,
            reduction=self.reduction,
            is_causal=self.is_causal,
            kv_lengths=kv_lengths,
            scale=scale,
            seed=self.seed,
            impl=impl,
        )
        layout = BlockLayout(
            query.shape[2],
            key.shape[2],
            block_q=self.block_q,
            block_kv=self.block_kv,
            is_causal=self.is_causal,
        )
        if self.mode == "budget":
            return self._spend(importance, layout, kv_lengths, impl)
        num_blocks = None
        if kv_lengths is not None:
            num_blocks = -(-existing_keys(key.shape[2], kv_lengths, key.device) // self.block_kv)
        if self.mode == "threshold":
            levels = levels_by_threshold(
                importance, self.bounds, min_full=self.min_full, num_blocks=num_blocks, impl=impl
            )
        else:
            bounds = [max(bound, self.min_full) for bound in self.bounds]
            levels = levels_by_quota(importance, bounds, num_blocks=num_blocks, impl=impl)
        limits = self.similarity_thresholds
        if limits is not None and max(limits) > -1.0:
            similarity = key_similarity(
                key, block_kv=self.block_kv, num_levels=len(limits) + 1, kv_lengths=kv_lengths, impl=impl
            )
            levels = cap_by_similarity(levels, similarity, limits)
        levels = keep_full(
            levels,
            layout,
            protected=self.protected,
            diagonal=self.diagonal or self.is_causal,
            sinks=self.sinks,
        )
        if self.skip == "mean":
            levels = skip_to_mean(levels, self.block_kv)
        return layout.executed_levels(levels)

    def _spend(self, importance: Tensor, layout: BlockLayout, kv_lengths: Tensor | None, impl: str | None) -> Tensor:
        """The map of budget mode, which has to know what is kept before it spends the rest."""
        nothing = torch.zeros((1, 1, *importance.shape[2:]), dtype=torch.int8, device=importance.device)
        kept = keep_full(
            nothing,
            layout,
            protected=self.protected,
            diagonal=self.diagonal or self.is_causal,
            sinks=self.sinks,
        )
        assert self.density is not None, "checked at construction"
        return levels_by_budget(
            importance,
            self.density,
            num_levels=self._chosen_levels,
            skip=self.skip,
            errors=self.errors,
            share=self.share,
            min_full=self.min_full,
            full=kept > 0,
            layout=layout,
            kv_lengths=kv_lengths,
            impl=impl,
        )


def _samples(given: int | None, block: int) -> int:
    return max(1, block // 4) if given is None else given
