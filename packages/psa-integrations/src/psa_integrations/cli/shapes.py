"""What the attention of each model looks like: layers, heads, and tokens for a size in pixels and frames."""

from dataclasses import dataclass

from psa_config import Preset
from psa_masks import VideoGrid


@dataclass(frozen=True)
class AttentionShape:
    """Self-attention of one transformer."""

    layers: int
    heads: int
    head_dim: int

    def dense_flops(self, tokens: int) -> float:
        """Multiplications and additions of dense self-attention in one forward of batch 1."""
        return 4.0 * tokens**2 * self.heads * self.head_dim * self.layers


SHAPES: dict[str, AttentionShape] = {
    "tiny-wan": AttentionShape(6, 4, 64),
    "Wan2.1_1.3b": AttentionShape(30, 12, 128),
    "Wan2.1_14b": AttentionShape(40, 40, 128),
    "Wan2.2_A14B": AttentionShape(40, 40, 128),
    "Wan2.2_5B": AttentionShape(30, 24, 128),
    "CogVideo_5b": AttentionShape(42, 48, 64),
    "CogVideo1.5_5b": AttentionShape(42, 48, 64),
    "HunyuanVideo": AttentionShape(60, 24, 128),
    "LTX-Video": AttentionShape(28, 32, 64),
    "Mochi": AttentionShape(48, 24, 128),
}
"""By the model's name in psa_config."""


_WAN = ("Wan2.1_1.3b", "Wan2.1_14b", "Wan2.2_A14B", "Wan2.2_5B")


def _frames_of_tokens(preset: Preset, frames: int) -> int:
    """How many frames of tokens diffusers' pipeline of the model makes for that many of video.

    The first is encoded by itself. Of those that are too few for one more token the pipelines make nothing; those of
    Wan go to the multiple below and one frame further, which may be more than was asked for.
    """
    taken = frames if preset.model in _WAN else frames - 1
    return taken // preset.video_scale.depth_divisor + 1


def grid_of(preset: Preset, *, width: int, height: int, frames: int) -> VideoGrid:
    """The tokens of a video of this size as the model's pipeline makes it, with the model's text in front.

    Raises:
        ValueError: a side is no multiple of the pixels of a token.
    """
    scale = preset.video_scale
    for name, value, divisor in (("width", width, scale.width_divisor), ("height", height, scale.height_divisor)):
        if value % divisor:
            below = value // divisor * divisor
            nearest = f"the nearest are {below} and {below + divisor}" if below else f"the least is {divisor}"
            raise ValueError(f"--{name} must be a multiple of {divisor} for {preset.model}, got {value}; {nearest}")
    return VideoGrid(
        frames=_frames_of_tokens(preset, frames),
        height=height // scale.height_divisor,
        width=width // scale.width_divisor,
        text=preset.text_length,
        text_first=True,
    )
