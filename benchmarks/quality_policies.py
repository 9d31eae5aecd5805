"""The policies that `quality.py` compares: one table, and how a line of it becomes attention.

A new policy is a new `Row`; a new token order is a new entry of `ORDERS`, a new way to choose levels one of `CHOOSERS`.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from quality_choosers import CHOOSERS
from torch import Tensor

from psa_kernels import BlockLayout, pyramid_attention
from psa_masks import (
    MaskPolicy,
    TokenOrder,
    VideoGrid,
    cube_order,
    gilbert_order,
    kd_tree_order,
    semantic_order,
)

BLOCK = 64
PAPER = (0.10, 0.15, 0.15, 0.35)
TAILED = (0.09, 0.14, 0.14, 0.34)
"""The paper's quotas with a level 1 smaller by what the tail costs."""
TAILED_32, TAILED_16 = (0.08, 0.13, 0.13, 0.33), (0.06, 0.11, 0.11, 0.26)
"""The same for smaller blocks, whose tails cost more."""
TREED = (0.02, 0.12, 0.22, 0.60)
"""Less at level 1 and more at the pooled levels, which are worth more where like is pooled with like."""
THRESHOLDS = (0.5, 0.6, 0.7, 0.8)
SIMILARITY = (0.70, 0.65, 0.60)
CLUSTERS = 64

Settings = Mapping[str, Any]
Order = Callable[[VideoGrid, Tensor, Tensor, int], tuple[Tensor, Tensor]]
"""Grid, query and key ``[B, H, L, D]`` and the tokens of a key/value block to the orders of the queries and of the
keys, int64 ``[L]`` or ``[B, H, L]``."""


def fixed(make: Callable[[VideoGrid], TokenOrder]) -> Order:
    """An order that follows from the grid alone, the same for queries and keys."""

    def order(grid: VideoGrid, query: Tensor, key: Tensor, block_kv: int) -> tuple[Tensor, Tensor]:
        index = make(grid).order.to(query.device)
        return index, index

    return order


def semantic(grid: VideoGrid, query: Tensor, key: Tensor, block_kv: int) -> tuple[Tensor, Tensor]:
    """Queries and keys each by their clusters."""
    return semantic_order(query, CLUSTERS, grid=grid).order, semantic_order(key, CLUSTERS, grid=grid).order


def hybrid(grid: VideoGrid, query: Tensor, key: Tensor, block_kv: int) -> tuple[Tensor, Tensor]:
    """Queries along the curve, keys by their clusters."""
    return gilbert_order(grid).order.to(query.device), semantic_order(key, CLUSTERS, grid=grid).order


def kd_tree(along: Callable[[VideoGrid], TokenOrder]) -> Order:
    """Both along an order that follows from the grid, and the keys of each block by a k-d tree."""

    def order(grid: VideoGrid, query: Tensor, key: Tensor, block_kv: int) -> tuple[Tensor, Tensor]:
        base = along(grid)
        keys = kd_tree_order(query, key, block_kv=block_kv, grid=grid, base=base).order
        return base.order.to(query.device), keys

    return order


ORDERS: dict[str, Order] = {
    "as they are": fixed(lambda grid: TokenOrder.identity(grid.seq_len)),
    "Gilbert": fixed(gilbert_order),
    "cubes 4x4x4": fixed(lambda grid: cube_order(grid, (4, 4, 4))),
    "cubes 4x4x4 along Gilbert": fixed(lambda grid: cube_order(grid, (4, 4, 4), along="gilbert")),
    "cubes 1x8x8": fixed(lambda grid: cube_order(grid, (1, 8, 8))),
    "semantic": semantic,
    "hybrid": hybrid,
    "k-d tree": kd_tree(gilbert_order),
    "k-d tree in cubes 4x4x4": kd_tree(lambda grid: cube_order(grid, (4, 4, 4))),
}


@dataclass(frozen=True)
class Row:
    """One policy.

    Args:
        name: unique.
        settings: of ``MaskPolicy``; blocks of 64 and a quarter of their tokens as samples unless given.
        section: the table it is reported in.
        order: a key of ``ORDERS``.
        choose: a key of ``CHOOSERS``.
        sweep: settings of its further points, on top of ``settings``; the first point has these as they are.
        reuse: levels are as old as this many steps. In captures all are; in a video they are chosen anew in every
            ``reuse + 1``-th step.
        base: the row that it changes in one thing, whose error its own is held against.
        videos: whole videos are made with it too.
        limits: they are made under other circumstances too.
    """

    name: str
    settings: Settings
    section: str
    order: str = "Gilbert"
    choose: str = "policy"
    sweep: tuple[Settings, ...] = ()
    reuse: int = 0
    base: str | None = None
    videos: bool = False
    limits: bool = False


@dataclass(frozen=True)
class Point:
    """A policy at one setting; ``index`` counts the points of its row."""

    row: Row
    index: int
    policy: MaskPolicy = field(repr=False)


def scaled(bounds: tuple[float, ...], *factors: float) -> tuple[Settings, ...]:
    """A sweep over density: the bounds times each factor, at most 1."""
    return tuple({"bounds": tuple(min(1.0, factor * bound) for bound in bounds)} for factor in factors)


def quota(bounds: tuple[float, ...], **more: object) -> Settings:
    return {"mode": "quota", "bounds": bounds, **more}


def threshold(**more: object) -> Settings:
    return {"mode": "threshold", "bounds": THRESHOLDS, **more}


def budget(**more: object) -> Settings:
    return {"mode": "budget", "density": 0.15, **more}


def tailed(bounds: tuple[float, ...] = TAILED, **more: object) -> Settings:
    return quota(bounds, skip="mean", **more)


FRONTIER, BOUNDS, CHOICES, BLOCKS, STEPS, ORDERING, DRAWS = (
    "Policies", "What no choice of levels could beat by much", "One choice changed", "Block sizes, at equal density",
    "Levels of earlier steps", "Token order", "Other draws of the sample"
)  # fmt: skip
DENSITIES = tuple({"density": density} for density in (0.06, 0.1, 0.3, 0.45))
QUOTAS, WITH_TAIL, BY_THRESHOLD = "the paper's quotas", "quotas + tail", "the paper's thresholds"

ROWS: tuple[Row, ...] = (
    Row("everything at level 1", quota((1.0,)), FRONTIER, videos=True),
    Row("level 1 alone", quota((0.15,)), FRONTIER, sweep=scaled((0.15,), 0.3, 0.6, 2, 3), videos=True, limits=True),
    Row(QUOTAS, quota(PAPER), FRONTIER, sweep=scaled(PAPER, 0.3, 0.6, 2, 3), videos=True, limits=True),
    Row(BY_THRESHOLD, threshold(), FRONTIER, sweep=scaled(THRESHOLDS, 0.4, 0.7, 1.2), videos=True),
    Row("level 1 + tail", quota((0.14,), skip="mean"), FRONTIER, sweep=scaled((0.14,), 0.3, 0.6, 2, 3), videos=True),
    Row(WITH_TAIL, tailed(), FRONTIER, sweep=scaled(TAILED, 0.3, 0.6, 2, 3), videos=True, limits=True),
    Row("k-d tree", tailed(TREED), FRONTIER, "k-d tree", sweep=scaled(TREED, 0.3, 0.6, 2), videos=True, limits=True),
    Row("thresholds + tail", threshold(skip="mean"), FRONTIER, sweep=scaled(THRESHOLDS, 0.4, 0.7, 1.2), videos=True),
    Row("budget", budget(reduction="mean"), FRONTIER, sweep=DENSITIES, videos=True),
    Row("budget + tail", budget(reduction="error", skip="mean"), FRONTIER, sweep=DENSITIES, videos=True),
    Row("levels by the true error", budget(skip="mean"), BOUNDS, choose="true error", base=WITH_TAIL),
    *(
        Row(
            f"levels by each block's true error{more}",
            budget(skip="mean", **blocks),
            BOUNDS,
            choose="true error of blocks",
            base=WITH_TAIL,
        )
        for more, blocks in (("", {}), (", 16 queries by 16 keys", {"block_q": 16, "block_kv": 16}))
    ),
    Row("quotas + tail, every token", tailed(samples_q=BLOCK, samples_kv=BLOCK), BOUNDS, base=WITH_TAIL),
    Row("level 1 for 4% + tail", quota((0.04,), skip="mean"), CHOICES, base=QUOTAS, videos=True),
    Row("quotas, mean", quota(PAPER, reduction="mean"), CHOICES, base=QUOTAS, videos=True),
    Row("quotas + tail, mean", tailed(reduction="mean"), CHOICES, base=WITH_TAIL, videos=True),
    Row("quotas, 8 samples", quota(PAPER, samples_q=8, samples_kv=8), CHOICES, base=QUOTAS),
    Row("quotas, 32 samples", quota(PAPER, samples_q=32, samples_kv=32), CHOICES, base=QUOTAS),
    Row("quotas + tail, error", tailed(reduction="error"), CHOICES, base=WITH_TAIL, videos=True),
    *(
        Row(
            f"quotas + tail, error of values, {n} samples",
            tailed(samples_q=n, samples_kv=n),
            CHOICES,
            choose="error of values",
            base=WITH_TAIL,
            videos=n == 16,
        )
        for n in (16, 32)
    ),
    *(
        Row(
            f"quotas + tail or drop, {how}",
            tailed(samples_q=16, samples_kv=16, reduction=how),
            CHOICES,
            choose="mean or drop",
            base=WITH_TAIL,
            videos=True,
        )
        for how in ("max", "error")
    ),
    Row("quotas + tail, 8 samples", tailed(samples_q=8, samples_kv=8), CHOICES, base=WITH_TAIL, videos=True),
    Row("quotas + tail, 32 samples", tailed(samples_q=32, samples_kv=32), CHOICES, base=WITH_TAIL, videos=True),
    Row("quotas + tail, antidiagonals", tailed(method="antidiagonal"), CHOICES, base=WITH_TAIL, videos=True),
    Row("quotas + tail, blocks of 32", tailed(block_q=32, block_kv=32), CHOICES, base=WITH_TAIL, videos=True),
    Row("quotas + tail, blocks of 128", tailed(block_q=128, block_kv=128), CHOICES, base=WITH_TAIL, videos=True),
    *(
        Row(f"k-d tree, {what}", settings, CHOICES, "k-d tree", base="k-d tree", videos=True)
        for what, settings in (
            ("mean", tailed(TREED, reduction="mean")),
            ("error", tailed(TREED, reduction="error")),
            ("32 samples", tailed(TREED, samples_q=32, samples_kv=32)),
            ("budget", budget(reduction="error", skip="mean", density=0.158)),
            ("level 1 for 1%", tailed((0.01, 0.13, 0.23, 0.61))),
            ("level 1 for 4%", tailed((0.04, 0.11, 0.20, 0.53))),
            ("blocks of 128", tailed(TREED, block_q=128, block_kv=128)),
            ("blocks of 32", tailed((0.01, 0.11, 0.21, 0.56), block_q=32, block_kv=32)),
        )
    ),
    Row("quotas, similarity cap", quota(PAPER, similarity_thresholds=SIMILARITY), CHOICES, base=QUOTAS, videos=True),
    Row("thresholds, min_full .06", threshold(min_full=0.06), CHOICES, base=BY_THRESHOLD),
    Row("thresholds, similarity cap", threshold(similarity_thresholds=SIMILARITY), CHOICES, base=BY_THRESHOLD),
    *(
        Row(
            f"quotas + tail, {q} queries by {kv} keys",
            tailed(bounds, block_q=q, block_kv=kv),
            BLOCKS,
            base=WITH_TAIL,
            videos=True,
        )
        for q, kv, bounds in (
            (32, 64, TAILED),
            (16, 64, TAILED),
            (64, 32, TAILED_32),
            (32, 32, TAILED_32),
            (16, 32, TAILED_32),
            (64, 16, TAILED_16),
            (32, 16, TAILED_16),
            (16, 16, TAILED_16),
        )
    ),
    Row("quotas + tail, 1 step old", tailed(), STEPS, reuse=1, base=WITH_TAIL, videos=True),
    Row("quotas + tail, 3 steps old", tailed(), STEPS, reuse=3, base=WITH_TAIL, videos=True),
    Row("quotas, 1 step old", quota(PAPER), STEPS, reuse=1, base=QUOTAS),
    *(
        Row(f"{base}, {order}", settings, ORDERING, order, base=base, videos=base == WITH_TAIL)
        for base, settings in ((QUOTAS, quota(PAPER)), (WITH_TAIL, tailed()))
        for order in ORDERS
        if order != "Gilbert"
    ),
    *(
        Row(f"{base}, seed {seed}", {**settings, "seed": seed}, DRAWS, base=base, videos=base == WITH_TAIL)
        for base, settings in ((QUOTAS, quota(PAPER)), (WITH_TAIL, tailed()))
        for seed in (1, 2, 3)
    ),
    *(
        Row(
            f"{base}, plain sample of {n}",
            {**settings, "samples_q": n, "samples_kv": n},
            DRAWS,
            choose="plain sample",
            base=base,
        )
        for base, settings in ((QUOTAS, quota(PAPER)), (WITH_TAIL, tailed()))
        for n in (16, 8)
    ),
)


def chosen(parts: list[str] | None, names: list[str] | None = None) -> list[Row]:
    """The rows whose name holds one of ``parts`` or is one of ``names``, all of them without either.

    Raises:
        ValueError: no row's name holds one of the parts, or is one of the names.
    """
    everything = [row.name for row in ROWS]
    for part in parts or ():
        if not any(part in name for name in everything):
            raise ValueError(f"--policies must be part of a policy's name, got {part!r}; names: {everything}")
    for name in names or ():
        if name not in everything:
            raise ValueError(f"--rows must be a policy's name, got {name!r}; names: {everything}")
    wanted = {name for name in everything if any(part in name for part in parts or ())} | set(names or ())
    return [row for row in ROWS if row.name in wanted or not (parts or names)]


def points(row: Row) -> Iterator[Point]:
    """The row's points: its settings as they are, then those of its sweep."""
    for index, settings in enumerate(({}, *row.sweep)):
        policy = MaskPolicy(**{"block_q": BLOCK, "block_kv": BLOCK, **row.settings, **settings})
        yield Point(row, index, policy)


@dataclass(frozen=True)
class Decision:
    """In which order tokens are taken, and at which level blocks of them are read."""

    q_index: Tensor
    kv_index: Tensor
    levels: Tensor
    layout: BlockLayout


def take(x: Tensor, index: Tensor) -> Tensor:
    """``x`` ``[B, H, L, D]`` with its tokens in the order ``index``, int64 ``[L]`` or ``[B, H, L]``."""
    return x.index_select(2, index) if index.ndim == 1 else x.gather(2, index[..., None].expand_as(x))


def decide(point: Point, grid: VideoGrid, query: Tensor, key: Tensor, value: Tensor) -> Decision:
    """What the policy does with these queries, keys and values, ``[B, H, L, D]``; only a bound looks at values."""
    policy = point.policy
    q_index, kv_index = ORDERS[point.row.order](grid, query, key, policy.block_kv)
    layout = BlockLayout(
        query.shape[2],
        key.shape[2],
        block_q=policy.block_q,
        block_kv=policy.block_kv,
        num_levels=policy.num_levels,
    )
    taken = take(query, q_index), take(key, kv_index), take(value, kv_index)
    return Decision(q_index, kv_index, CHOOSERS[point.row.choose](policy, layout, *taken), layout)


def attend(decision: Decision, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention as decided, in the tokens' own order."""
    layout = decision.layout
    out = pyramid_attention(
        take(query, decision.q_index),
        take(key, decision.kv_index),
        take(value, decision.kv_index),
        decision.levels,
        block_q=layout.block_q,
        block_kv=layout.block_kv,
        num_levels=layout.num_levels,
    )
    assert isinstance(out, Tensor)
    return take(out, torch.argsort(decision.q_index, dim=-1))
