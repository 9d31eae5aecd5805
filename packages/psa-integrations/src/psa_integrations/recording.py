"""Level maps of chosen layers, steps and heads, kept while a model runs."""

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace

from torch import Tensor, stack

from psa_integrations.stats import Key
from psa_kernels import checks
from psa_masks import MaskPolicy, TokenOrder, VideoGrid


@dataclass(frozen=True)
class LevelMap:
    """The levels that one layer executed in one step.

    `levels` is int8 [len(heads), num_q_blocks, num_kv_blocks] on the CPU. Blocks are of `block_q` and `block_kv`
    tokens of the sequence of `grid`, whose video tokens are in `order` (None: as they stand in the video).
    """

    transformer: str
    step: int | None
    layer: int
    heads: tuple[int, ...]
    levels: Tensor
    grid: VideoGrid
    order: TokenOrder | None
    block_q: int
    block_kv: int
    num_levels: int


class LevelRecorder:
    """Keeps the level maps of chosen layers, steps and heads.

    Of several calls in one step, the first is kept, and of its batch the last sample: with guidance, in a call of
    its own or as half of a batch, that is the one with the prompt.

    Args:
        layers, steps, heads: which to keep.
        max_bytes: of all maps together; those that would go beyond it are counted in `left_out`.

    Raises:
        TypeError: if one of the first three is no collection of integers, or `max_bytes` is none.
        ValueError: if one of the first three is empty or negative, or `max_bytes` is below 1.
    """

    def __init__(
        self, *, layers: Collection[int], steps: Collection[int], heads: Collection[int], max_bytes: int = 1 << 28
    ) -> None:
        for name, chosen in (("layers", layers), ("steps", steps), ("heads", heads)):
            if isinstance(chosen, str | bytes) or not isinstance(chosen, Collection):
                raise TypeError(f"{name} must be a collection of integers, got {type(chosen).__name__} {chosen!r}")
            for number in chosen:
                checks.integer(f"a number of {name}", number)
            if not chosen or min(chosen) < 0:
                raise ValueError(f"{name} must hold at least one number, none negative, got {list(chosen)}")
        checks.positive_int("max_bytes", max_bytes)
        self.layers, self.steps = frozenset(layers), frozenset(steps)
        self.heads = tuple(sorted(set(heads)))
        self.max_bytes = max_bytes
        self._left_out: set[Key] = set()
        self._kept: dict[Key, LevelMap] = {}
        self._bytes = 0

    @property
    def left_out(self) -> int:
        """Number of maps that would have gone beyond `max_bytes`."""
        return len(self._left_out)

    def taker(
        self, key: Key, *, grid: VideoGrid, order: TokenOrder | None, policy: MaskPolicy
    ) -> Callable[[Tensor], None] | None:
        """What to call with the levels [B, H, num_q_blocks, num_kv_blocks] of a call; None where they are not kept."""
        transformer, step, layer = key
        if layer not in self.layers or step not in self.steps or key in self._kept:
            return None

        def take(levels: Tensor) -> None:
            if self.heads[-1] >= levels.shape[1]:
                raise ValueError(f"heads must be below the {levels.shape[1]} heads of a layer, got {self.heads[-1]}")
            one = levels[-1, 0]
            size = one.numel() * len(self.heads)
            if self._bytes + size > self.max_bytes:
                self._left_out.add(key)
                return
            self._bytes += size
            # Kept where they are: bringing them to the host would wait for the device in the middle of a step.
            kept = stack([levels[-1, head] for head in self.heads])
            self._kept[key] = LevelMap(
                transformer,
                step,
                layer,
                self.heads,
                kept,
                grid,
                order,
                policy.block_q,
                policy.block_kv,
                policy.num_levels,
            )

        return take

    def maps(self) -> tuple[LevelMap, ...]:
        """The maps kept so far, in order of their calls; waits for the device."""
        return tuple(replace(kept, levels=kept.levels.cpu()) for kept in self._kept.values())
