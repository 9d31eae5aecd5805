"""``pool_pyramid``: the rows that each pyramid level reads."""

from dataclasses import dataclass

from torch import Tensor

from psa_kernels import checks
from psa_kernels.layout import num_rows, row_counts
from psa_kernels.pyramid_pool.ops import pyramid_pool


@dataclass(frozen=True, eq=False)
class Pyramid:
    """A sequence at every level.

    Attributes:
        x: level 1, the sequence itself ``[B, H, L, D]``, read in place.
        pooled: levels 2 to ``num_levels`` one after the other, ``[B, H, rows, D]``; level h has
            ``ceil(L / 2**(h-1))`` rows.
        num_levels: the coarsest level.
        kv_lengths: how many of each sample's tokens exist, or None for all.
    """

    x: Tensor
    pooled: Tensor
    num_levels: int
    kv_lengths: Tensor | None = None

    def level(self, level: int) -> Tensor:
        """The rows of ``level``, ``[B, H, ceil(L / 2**(level-1)), D]``, a view.

        Raises:
            TypeError, ValueError: ``level`` is no integer in 1..num_levels.
        """
        self._check(level)
        if level == 1:
            return self.x
        kv_len = self.x.shape[2]
        first = sum(num_rows(kv_len, finer) for finer in range(2, level))
        return self.pooled[:, :, first : first + num_rows(kv_len, level)]

    def counts(self, level: int) -> Tensor:
        """Tokens that each row of ``level`` is the mean of, int64 ``[1, rows]``, or ``[B, rows]`` with
        ``kv_lengths``; 0 where a sample has no token and the row is 0.

        Raises:
            TypeError, ValueError: ``level`` is no integer in 1..num_levels.
        """
        self._check(level)
        return row_counts(self.x.shape[2], level, self.kv_lengths, self.x.device)

    def _check(self, level: int) -> None:
        if not 1 <= checks.integer("level", level) <= self.num_levels:
            raise ValueError(f"level must lie in 1..{self.num_levels}, got {level}")


def pool_pyramid(
    x: Tensor, *, block_kv: int, num_levels: int, kv_lengths: Tensor | None = None, impl: str | None = None
) -> Pyramid:
    """Pool a sequence of keys or values into its pyramid.

    Row r of level h is the mean over tokens ``[r*2**(h-1), (r+1)*2**(h-1))`` that exist: a short tail is the mean
    of what it has, and nothing is padded. Sums run in float32 (float64 for float64), results have ``x``'s dtype.
    Source: Pyramid Sparse Attention (arXiv 2512.04025), section on the KV pyramid.

    Args:
        x: ``[B, H, L, D]``, float16, bfloat16, float32 or float64, any strides.
        block_kv: tokens a block covers, a power of two; levels pool inside it.
        num_levels: the coarsest level, at most ``log2(block_kv) + 1``.
        kv_lengths: int32 or int64 ``[B]``, how many tokens of each sample exist; None is all.
        impl: ``"triton"``, ``"torch"`` or ``"reference"``; None is Triton on a GPU, torch elsewhere.

    Raises:
        TypeError, ValueError: an argument breaks a rule above, or ``x`` wants a derivative.
    """
    checks.sequence("x", x)
    checks.power_of_two("block_kv", block_kv)
    checks.level_count(num_levels, block_kv)
    checks.lengths(kv_lengths, x.shape[0], x.device)
    checks.no_grad_needed("pool_pyramid", x)
    pooled = pyramid_pool(x, kv_lengths, num_levels, checks.resolve_impl(impl, x))
    return Pyramid(x, pooled, num_levels, kv_lengths)
