"""Where the tokens of a video (and of its prompt) stand in the sequence."""

from dataclasses import dataclass

from psa_masks import checks


@dataclass(frozen=True, kw_only=True)
class VideoGrid:
    """A sequence of video tokens on a 3-D grid, with text tokens before or after them.

    Everything is counted in tokens, not in pixels or latents. Video token (t, y, x) is the
    ``(t * height + y) * width + x``-th of the video.

    Args:
        frames, height, width: tokens along each axis, each at least 1.
        text: number of text tokens in the same sequence.
        text_first: the text stands before the video instead of after it.

    Raises:
        TypeError, ValueError: a size is no int or too small, or ``text_first`` is no bool.
    """

    frames: int
    height: int
    width: int
    text: int = 0
    text_first: bool = False

    def __post_init__(self) -> None:
        for name, low in (("frames", 1), ("height", 1), ("width", 1), ("text", 0)):
            checks.integer(name, getattr(self, name), low)
        checks.boolean("text_first", self.text_first)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(frames, height, width)."""
        return self.frames, self.height, self.width

    @property
    def video_len(self) -> int:
        """Number of video tokens."""
        return self.frames * self.height * self.width

    @property
    def seq_len(self) -> int:
        """Number of tokens in all, text included."""
        return self.video_len + self.text

    @property
    def text_range(self) -> tuple[int, int]:
        """(start, stop) of the text in the sequence."""
        start = 0 if self.text_first else self.video_len
        return start, start + self.text

    @property
    def video_range(self) -> tuple[int, int]:
        """(start, stop) of the video in the sequence."""
        start = self.text if self.text_first else 0
        return start, start + self.video_len


def check_grid(value: object) -> None:
    """The argument ``grid`` is a VideoGrid."""
    if not isinstance(value, VideoGrid):
        raise TypeError(f"grid must be a psa_masks.VideoGrid, got {type(value).__name__}")


def video_range_of(grid: VideoGrid | None, length: int, name: str) -> tuple[int, int]:
    """Where the video tokens of a sequence of ``length`` start and end; without a grid all are.

    Raises:
        TypeError, ValueError: ``grid`` is no grid of so many tokens as the argument ``name`` has.
    """
    if grid is None:
        return 0, length
    check_grid(grid)
    if grid.seq_len != length:
        raise ValueError(f"grid must have the {length} tokens of {name}, got {grid.seq_len} in {grid}")
    return grid.video_range
