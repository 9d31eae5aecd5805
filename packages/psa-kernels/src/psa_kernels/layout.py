"""How a sequence is cut into blocks, and a block into rows of each pyramid level.

Block j of the keys covers tokens ``[j*block_kv, min((j+1)*block_kv, kv_len))``. At level h a row stands for
``pool = 2**(h-1)`` neighbouring tokens, so row r of block j is row ``j*block_kv/pool + r`` of the whole
sequence: the rows of one level lie side by side, and only the last may stand for fewer than ``pool`` tokens.
"""

from dataclasses import KW_ONLY, dataclass
from typing import cast

import torch
from torch import Tensor

from psa_kernels import checks


def pool_size(level: int) -> int:
    """Tokens that a row of ``level`` (1 is the finest) stands for."""
    return 1 << (level - 1)


def max_levels(block_kv: int) -> int:
    """The level count at which a whole block of ``block_kv`` tokens is one row."""
    return block_kv.bit_length()


def num_rows(kv_len: int, level: int) -> int:
    """Rows that ``kv_len`` tokens have at ``level``; a row over no token does not exist."""
    return -(-kv_len // pool_size(level))


def existing_keys(kv_len: int, kv_lengths: Tensor | None, device: torch.device) -> Tensor:
    """How many keys exist: int64 ``[1]``, or ``[B]`` with ``kv_lengths`` (an integer tensor ``[B]``)."""
    if kv_lengths is None:
        return torch.full((1,), kv_len, device=device)
    return kv_lengths.to(torch.int64).clamp(max=kv_len)


def row_counts(kv_len: int, level: int, kv_lengths: Tensor | None, device: torch.device) -> Tensor:
    """How many tokens each row of ``level`` covers.

    Returns int64 ``[1, rows]``, or ``[B, rows]`` with ``kv_lengths`` (an integer tensor ``[B]``), where rows
    wholly past a sample's length count 0.
    """
    first = torch.arange(num_rows(kv_len, level), device=device) * pool_size(level)
    return (existing_keys(kv_len, kv_lengths, device)[:, None] - first).clamp(min=0, max=pool_size(level))


@dataclass(frozen=True)
class BlockLayout:
    """The lengths and block sizes that give a map of levels its meaning.

    Args:
        q_len: query tokens, at least 1.
        kv_len: key tokens, at least 1.
        block_q: query tokens a level decision covers, a power of two.
        block_kv: key tokens a level decision covers, a power of two.
        num_levels: the coarsest level allowed; None is ``log2(block_kv) + 1``, where a block is one row.
        is_causal: a query sees keys up to its own position, with the last query at the last key.

    Raises:
        TypeError: a value is not an integer.
        ValueError: a value is out of range, or ``is_causal`` with ``q_len > kv_len``.
    """

    q_len: int
    kv_len: int
    _: KW_ONLY
    block_q: int = 128
    block_kv: int = 128
    num_levels: int = cast(int, None)
    is_causal: bool = False

    def __post_init__(self) -> None:
        checks.positive_int("q_len", self.q_len)
        checks.positive_int("kv_len", self.kv_len)
        checks.power_of_two("block_q", self.block_q)
        checks.power_of_two("block_kv", self.block_kv)
        if cast(int | None, self.num_levels) is None:
            object.__setattr__(self, "num_levels", max_levels(self.block_kv))
        checks.level_count(self.num_levels, self.block_kv)
        checks.boolean("is_causal", self.is_causal)
        checks.causal(self.is_causal, self.q_len, self.kv_len)

    @property
    def num_q_blocks(self) -> int:
        return -(-self.q_len // self.block_q)

    @property
    def num_kv_blocks(self) -> int:
        return -(-self.kv_len // self.block_kv)

    def q_sizes(self, device: torch.device | str = "cpu") -> Tensor:
        """Tokens in each query block, int64 ``[num_q_blocks]``; the last may be short."""
        return _block_sizes(self.q_len, self.block_q, device)

    def kv_sizes(self, device: torch.device | str = "cpu") -> Tensor:
        """Tokens in each KV block, int64 ``[num_kv_blocks]``; the last may be short."""
        return _block_sizes(self.kv_len, self.block_kv, device)

    def executed_levels(self, levels: Tensor) -> Tensor:
        """The levels that attention really reads under this layout.

        Without ``is_causal`` these are ``levels``. With it, a block in the future of all queries of its query
        block is skipped, and a kept one that reaches past the diagonal of any of them is read at level 1.

        Args:
            levels: int8 ``[..., num_q_blocks, num_kv_blocks]``.

        Raises:
            TypeError, ValueError: ``levels`` is something else.
        """
        if not isinstance(levels, Tensor) or levels.dtype != torch.int8:
            kind = levels.dtype if isinstance(levels, Tensor) else type(levels).__name__
            raise TypeError(f"levels must be an int8 tensor, got {kind}")
        if levels.dim() < 2 or levels.shape[-2] != self.num_q_blocks or levels.shape[-1] != self.num_kv_blocks:
            raise ValueError(
                f"levels must have shape [..., {self.num_q_blocks}, {self.num_kv_blocks}] with {self}, "
                f"got {list(levels.shape)}"
            )
        if not self.is_causal:
            return levels
        shift = self.kv_len - self.q_len
        q_first = torch.arange(self.num_q_blocks, device=levels.device)[:, None] * self.block_q
        q_last = (q_first + self.block_q).clamp(max=self.q_len) - 1
        kv_first = torch.arange(self.num_kv_blocks, device=levels.device)[None, :] * self.block_kv
        kv_last = (kv_first + self.block_kv).clamp(max=self.kv_len) - 1
        future = kv_first > q_last + shift
        crossing = kv_last > q_first + shift
        levels = torch.where(crossing, levels.clamp(max=1), levels)
        return levels.masked_fill(future, 0)

    def visible(self, device: torch.device | str = "cpu") -> Tensor:
        """bool ``[num_q_blocks, num_kv_blocks]``: the block pairs that dense attention computes."""
        full = torch.ones(self.num_q_blocks, self.num_kv_blocks, dtype=torch.int8, device=device)
        return self.executed_levels(full) > 0


def _block_sizes(length: int, block: int, device: torch.device | str) -> Tensor:
    first = torch.arange(0, length, block, device=device)
    return (length - first).clamp(max=block)
