"""What hypothesis may choose: shapes, grids, bounds, policies, presets and seeds, never the elements of a tensor.

Everything shrinks to one block of one token in one head.
"""

import torch
from hypothesis import strategies as st
from lib.cases import Case, Stack
from lib.presets import make_preset

from psa_config import Preset, SimThresholds
from psa_masks import MaskPolicy, TokenOrder, VideoGrid, cube_order, gilbert_order

BLOCKS = (1, 2, 4, 8, 16, 32, 64, 128)


def seeds() -> st.SearchStrategy[int]:
    """Seeds of a tensor or of a sample."""
    return st.integers(0, 2**16)


def shares() -> st.SearchStrategy[float]:
    """Whole hundredths in [0, 1], so that binary rounding of a share is met too."""
    return st.integers(0, 100).map(lambda hundredths: hundredths / 100)


def bounds(*, most: int, least: int = 1) -> st.SearchStrategy[tuple[float, ...]]:
    """Cumulative upper ends of ``least`` to ``most`` levels."""
    return st.lists(shares(), min_size=least, max_size=most).map(lambda ends: tuple(sorted(ends)))


def similarity_thresholds(*, most: int, least: int = 1) -> st.SearchStrategy[tuple[float, ...]]:
    """Caps of levels 2, 3, ..: always, never, and cosines in between."""
    limits = st.sampled_from([-1.0, 0.0, 0.3, 0.6, 0.9, 1.0])
    return st.lists(limits, min_size=least, max_size=most).map(tuple)


def ranges(*, length: int) -> st.SearchStrategy[tuple[tuple[int, int], ...]]:
    """Up to two ranges of the token positions in [0, length], empty ones among them."""
    position = st.integers(0, length)
    one = st.tuples(position, position).map(lambda ends: (min(ends), max(ends)))
    return st.lists(one, max_size=2).map(tuple)


@st.composite
def policies(
    draw: st.DrawFn,
    *,
    kv_len: int,
    is_causal: bool = False,
    blocks: tuple[int, ...] = BLOCKS,
    skips: tuple[str, ...] = ("drop", "mean"),
) -> MaskPolicy:
    """Every kind of ``MaskPolicy`` for ``kv_len`` keys.

    Args:
        is_causal: whether the policy knows that attention will be causal.
        blocks: block sizes to choose from, smallest first.
        skips: what may become of skipped blocks.
    """
    block_q, block_kv = draw(st.sampled_from(blocks)), draw(st.sampled_from(blocks))
    coarsest = block_kv.bit_length()
    samples_q, samples_kv = st.none() | st.integers(1, block_q), st.none() | st.integers(1, block_kv)
    method = draw(st.sampled_from(["sampled", "antidiagonal"]))
    reductions = ["max", "mean"] if method == "antidiagonal" else ["max", "mean", "error"]
    if method == "antidiagonal":  # groups of as many queries as keys
        group = 1 << draw(st.integers(0, min(block_q, block_kv).bit_length() - 1))
        samples_q, samples_kv = st.just(block_q // group), st.just(block_kv // group)
    caps = st.none() if coarsest == 1 else st.none() | similarity_thresholds(most=coarsest - 1)
    skip = draw(st.sampled_from(skips))
    mode = draw(st.sampled_from(["threshold", "quota", "budget"]))
    if mode == "budget" and (skip == "drop" or block_kv > 1):
        caps = st.none()
        least = 0.0 if skip == "drop" else -(-kv_len // block_kv) / kv_len  # what the means cost
        density = min(1.0, max(draw(shares()), least) + 0.01)
        rule = {"density": density, "share": draw(st.sampled_from(["head", "layer"]))}
    else:
        mode = "quota" if mode == "budget" else mode
        rule = {"bounds": draw(bounds(most=coarsest))}
    return MaskPolicy(
        mode=mode,
        **rule,
        block_q=block_q,
        block_kv=block_kv,
        skip=skip,
        min_full=draw(st.just(0.0) | shares()),
        samples_q=draw(samples_q),
        samples_kv=draw(samples_kv),
        method=method,
        reduction=draw(st.sampled_from(reductions)),
        similarity_thresholds=draw(caps),
        protected=draw(ranges(length=kv_len)),
        diagonal=draw(st.booleans()),
        sinks=draw(st.just(0) | st.integers(0, kv_len)),
        is_causal=is_causal,
        seed=draw(seeds()),
    )


@st.composite
def cases(
    draw: st.DrawFn,
    *,
    dtypes: tuple[torch.dtype, ...] = (torch.float32,),
    longest: int = 300,
    blocks: tuple[int, ...] = BLOCKS,
    causal: bool = True,
    skips: tuple[str, ...] = ("drop", "mean"),
) -> Case:
    """Attention calls of every shape: ragged, causal, with grouped heads and lengths, under every policy.

    Args:
        dtypes: of the tensors.
        longest: most keys; there are at most half as many queries.
        blocks: block sizes to choose from, smallest first.
        causal: whether calls may be causal. The policy of a causal call may know of it or not.
        skips: what may become of skipped blocks.
    """
    # Blocks of a few tokens make maps of many blocks, which the oracle reads densely.
    kv_len = draw(st.integers(1, longest))
    is_causal = causal and draw(st.booleans())
    q_len = draw(st.integers(1, min(kv_len, longest // 2) if is_causal else longest // 2))
    batch = draw(st.integers(1, 2))
    lengths = st.lists(st.integers(0, kv_len), min_size=batch, max_size=batch).map(tuple)
    return Case(
        batch=batch,
        kv_heads=draw(st.integers(1, 2)),
        group=draw(st.integers(1, 2)),
        q_len=q_len,
        kv_len=kv_len,
        head_dim=draw(st.integers(16, 48)),
        is_causal=is_causal,
        kv_lengths=draw(st.none() | lengths),
        policy=draw(policies(kv_len=kv_len, is_causal=is_causal and draw(st.booleans()), blocks=blocks, skips=skips)),
        dtype=draw(st.sampled_from(dtypes)),
        seed=draw(seeds()),
    )


def grids(*, text: int = 20) -> st.SearchStrategy[VideoGrid]:
    """Small videos of any form, with up to ``text`` tokens of text before or after them."""
    return st.builds(
        VideoGrid,
        frames=st.integers(1, 5),
        height=st.integers(1, 9),
        width=st.integers(1, 9),
        text=st.integers(0, text),
        text_first=st.booleans(),
    )


@st.composite
def orders(draw: st.DrawFn, *, grid: VideoGrid) -> TokenOrder:
    """Every kind of order of a grid's tokens, and permutations that keep no text in place."""
    kind = draw(st.sampled_from(["identity", "curve", "cubes", "any"]))
    if kind == "identity":
        return TokenOrder.identity(grid.seq_len)
    if kind == "curve":
        return gilbert_order(grid)
    if kind == "cubes":
        cube = draw(st.tuples(*[st.integers(1, 4)] * 3))
        return cube_order(grid, cube, along=draw(st.sampled_from(["raster", "gilbert"])))
    return TokenOrder(torch.randperm(grid.seq_len, generator=torch.Generator().manual_seed(draw(seeds()))))


@st.composite
def presets(
    draw: st.DrawFn, *, ends: st.SearchStrategy[tuple[float, ...]] | None = None, most_clusters: int = 1
) -> Preset:
    """Presets of every kind, without dense steps or layers.

    Args:
        ends: strategy of the upper ends of levels 1 to 4; None draws any that keep something.
        most_clusters: no more than the videos have tokens.
    """
    if ends is None:
        ends = bounds(least=4, most=4).filter(lambda drawn: drawn[-1] > 0)
    return make_preset(
        draw(ends),
        block_q=draw(st.sampled_from([32, 64])),
        block_kv=draw(st.sampled_from([32, 64])),
        use_rearrange=draw(st.booleans()),
        rearrange_method=draw(st.sampled_from(["Gilbert", "Cube", "Semantic", "Hybrid"])),
        num_clusters=draw(st.integers(1, most_clusters)),
        cluster_iterations=draw(st.integers(1, 2)),
        tile_size=draw(st.tuples(*[st.integers(1, 4)] * 3)),
        cubes_along=draw(st.sampled_from(["Raster", "Gilbert"])),
        mask_mode=draw(st.sampled_from(["thresholdbound", "topk"])),
        use_sim_mask=draw(st.booleans()),
        sim_thresholds=draw(
            similarity_thresholds(least=3, most=3).map(lambda t: SimThresholds(x2=t[0], x4=t[1], x8=t[2]))
        ),
        min_full=draw(st.just(0.0) | shares()),
        skip=draw(st.sampled_from(["drop", "mean"])),
        importance_method=draw(st.sampled_from(["sampled", "antidiagonal"])),
        seed=draw(seeds()),
    )


@st.composite
def stacks(
    draw: st.DrawFn,
    *,
    ends: st.SearchStrategy[tuple[float, ...]] | None = None,
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16),
    batch: int = 2,
) -> Stack:
    """Calls of ``PyramidAttention``: presets on small videos.

    Args:
        ends: as in :func:`presets`.
        dtypes: of the tensors.
        batch: most samples.
    """
    grid = draw(grids())
    return Stack(
        preset=draw(presets(ends=ends, most_clusters=grid.video_len)),
        grid=grid,
        batch=draw(st.integers(1, batch)),
        kv_heads=draw(st.integers(1, 2)),
        group=draw(st.integers(1, 2)),
        head_dim=draw(st.integers(16, 48)),
        dtype=draw(st.sampled_from(dtypes)),
        seed=draw(seeds()),
    )
