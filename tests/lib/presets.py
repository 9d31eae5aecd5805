"""Presets built in code."""

from psa_config import BlockSize, MaskRatios, Preset, PyramidSparseAttention, VideoScale

FULL = (1.0, 1.0, 1.0, 1.0)
"""Bounds under which every block is level 1."""

SPARSE = (0.25, 0.4, 0.6, 0.75)
"""As quotas: a quarter of the blocks at level 1, half of them at levels 2 to 4, a quarter skipped."""


def make_preset(bounds: tuple[float, ...], *, block_q: int = 32, block_kv: int = 32, **changes: object) -> Preset:
    """A preset with these upper ends of levels 1 to 4, quotas in the order of the curve unless changed."""
    edges = (0.0, *bounds)
    ratios = {str(1 << i): (edges[i], edges[i + 1]) for i in range(4)}
    settings: dict[str, object] = {
        "use_rearrange": True,
        "block_size": BlockSize(m=block_q, n=block_kv),
        "mask_ratios": MaskRatios(**ratios),
        "mask_mode": "topk",
    }
    return Preset(
        model="test",
        name="test",
        text_length=0,
        video_scale=VideoScale(width_divisor=16, height_divisor=16, depth_divisor=4),
        attention=PyramidSparseAttention(type="psa", **settings | changes),
    )
