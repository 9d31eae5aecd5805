"""The sparse format: a level map as the list of blocks that each query block reads."""

from dataclasses import dataclass

import torch
from torch import Tensor

from psa_kernels import checks
from psa_kernels.layout import BlockLayout
from psa_kernels.level_plan.ops import level_plan


@dataclass(frozen=True, eq=False)
class LevelPlan:
    """Which KV blocks each query block reads at which level, ready for the kernels.

    For sample b, head h and query block i the plan stands for the loop ::

        for level in range(1, layout.num_levels + 1):
            for slot in range(offsets[b, h, i, level - 1], offsets[b, h, i, level]):
                read block indices[b, h, i, slot] at this level

    so entries are sorted by level, then by position, and skipped blocks have none. Entries of ``indices`` past
    ``offsets[..., -1]`` mean nothing. With ``layout.is_causal`` the plan holds what is executed, see
    :meth:`BlockLayout.executed_levels`.

    Attributes:
        indices: int32 ``[B, H, num_q_blocks, num_kv_blocks]``.
        offsets: int32 ``[B, H, num_q_blocks, num_levels + 1]``.
        layout: lengths, block sizes and level count.

    Raises:
        TypeError, ValueError: a tensor is not int32, not of the layout's shape, or on another device than the other.
            Nobody waits for their values.
    """

    indices: Tensor
    offsets: Tensor
    layout: BlockLayout

    def __post_init__(self) -> None:
        check_layout(self.layout)
        layout = self.layout
        for name, x, last in (
            ("indices", self.indices, layout.num_kv_blocks),
            ("offsets", self.offsets, layout.num_levels + 1),
        ):
            if not isinstance(x, Tensor) or x.dtype != torch.int32:
                kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
                raise TypeError(f"{name} must be an int32 tensor, got {kind}")
            checks.strided(name, x)
            if x.dim() != 4 or x.shape[2] != layout.num_q_blocks or x.shape[3] != last:
                raise ValueError(
                    f"{name} must have shape [B, H, {layout.num_q_blocks}, {last}] with {layout}, got {list(x.shape)}"
                )
        if self.offsets.shape[:2] != self.indices.shape[:2]:
            raise ValueError(
                f"offsets must have indices' batch and heads {list(self.indices.shape[:2])}, "
                f"got {list(self.offsets.shape[:2])}"
            )
        if self.offsets.device != self.indices.device:
            raise ValueError(f"offsets must be on indices' device {self.indices.device}, got {self.offsets.device}")

    @classmethod
    def from_levels(cls, levels: Tensor, layout: BlockLayout, *, impl: str | None = None) -> "LevelPlan":
        """Sort a level map into a plan, on its own device and without waiting for it.

        Args:
            levels: int8 ``[B, H, num_q_blocks, num_kv_blocks]``; 0 skips a block, h reads it at level h.
            layout: what the map's blocks cover.
            impl: ``"triton"``, ``"torch"`` or ``"reference"``; None is Triton on a GPU, torch elsewhere.

        Raises:
            TypeError: ``levels`` is not an int8 tensor.
            ValueError: its shape does not fit the layout, or, on the CPU, a value is outside
                ``0..num_levels``. A map on a GPU, or traced by torch.compile, a FakeTensorMode or torch.func.vmap, is
                not looked at: values outside count as 0.
        """
        check_levels(levels, layout)
        executed = layout.executed_levels(levels)
        indices, offsets = level_plan(executed, layout.num_levels, checks.resolve_impl(impl, levels))
        return cls(indices, offsets, layout)

    def to_levels(self) -> Tensor:
        """The map as int8 ``[B, H, num_q_blocks, num_kv_blocks]``; what ``from_levels`` was given, or with a
        causal layout what is executed of it."""
        num_kv_blocks = self.layout.num_kv_blocks
        slot = torch.arange(num_kv_blocks, device=self.indices.device)
        level = (slot[:, None] >= self.offsets[..., None, 1:]).sum(dim=-1) + 1
        # Slots past the end go to a spare column.
        block = self.indices.to(torch.int64).where(level <= self.layout.num_levels, num_kv_blocks)
        levels = level.new_zeros((*level.shape[:-1], num_kv_blocks + 1), dtype=torch.int8)
        return levels.scatter(-1, block, level.to(torch.int8))[..., :-1]

    def density(self) -> Tensor:
        """Executed work over dense work, float32 ``[B, H]`` in [0, 1].

        Work is query tokens times rows read, so short blocks count by their size; under a causal layout dense
        work is that of the block pairs with anything to see.
        """
        layout, device = self.layout, self.indices.device
        q_sizes, kv_sizes = layout.q_sizes(device), layout.kv_sizes(device)
        pools = 2 ** torch.arange(layout.num_levels, device=device)
        rows, last_rows = layout.block_kv // pools, -(-kv_sizes[-1] // pools)
        read = (self.offsets.diff(dim=-1) * rows).sum(dim=-1)
        # All blocks counted as whole ones so far: correct where the last, which may be short, is read.
        slot = torch.arange(layout.num_kv_blocks, device=device)
        is_last = (self.indices == layout.num_kv_blocks - 1) & (slot < self.offsets[..., -1:])
        last_slot = (is_last * slot).sum(dim=-1, keepdim=True)
        level = (last_slot >= self.offsets[..., 1:]).sum(dim=-1).clamp(max=layout.num_levels - 1)
        read = read - (rows - last_rows)[level] * is_last.any(dim=-1)
        dense = (layout.visible(device) * kv_sizes).sum(dim=-1)
        return ((read * q_sizes).sum(-1).double() / (dense * q_sizes).sum().double()).float()

    def __repr__(self) -> str:
        batch, heads, num_q_blocks, num_kv_blocks = self.indices.shape
        return (
            f"LevelPlan(batch={batch}, heads={heads}, q_blocks={num_q_blocks}, kv_blocks={num_kv_blocks}, "
            f"num_levels={self.layout.num_levels}, device={str(self.indices.device)!r})"
        )


def check_layout(layout: object) -> None:
    """``layout`` is a BlockLayout."""
    if not isinstance(layout, BlockLayout):
        raise TypeError(f"layout must be a BlockLayout, got {type(layout).__name__}")


def check_levels(levels: Tensor, layout: BlockLayout) -> None:
    """``levels`` is an int8 map whose last two dimensions, and on the CPU whose values, fit ``layout``."""
    check_layout(layout)
    if not isinstance(levels, Tensor):
        raise TypeError(f"levels must be an int8 tensor or a LevelPlan, got {type(levels).__name__}")
    checks.strided("levels", levels)
    if levels.dtype != torch.int8:
        raise TypeError(f"levels must be int8, got {levels.dtype}")
    expected = (layout.num_q_blocks, layout.num_kv_blocks)
    if levels.dim() != 4 or tuple(levels.shape[2:]) != expected:
        raise ValueError(
            f"levels must have shape [B, H, {expected[0]}, {expected[1]}] (num_q_blocks, num_kv_blocks) for "
            f"q_len {layout.q_len}, kv_len {layout.kv_len} and blocks {layout.block_q}/{layout.block_kv}, "
            f"got {list(levels.shape)}"
        )
    checks.level_values(levels, layout.num_levels)
