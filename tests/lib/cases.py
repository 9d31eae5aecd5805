"""What the strategies draw: all that fixes a call, with tensors made from a seed."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from psa_config import Preset
from psa_kernels import BlockLayout, pyramid_attention
from psa_kernels.testing import assert_within_error_budget, make_qkv
from psa_masks import MaskPolicy, VideoGrid


@dataclass(frozen=True, kw_only=True)
class Case:
    """An attention call whose level map a ``MaskPolicy`` makes."""

    batch: int
    kv_heads: int
    group: int
    q_len: int
    kv_len: int
    head_dim: int
    is_causal: bool
    kv_lengths: tuple[int, ...] | None
    policy: MaskPolicy
    dtype: torch.dtype
    seed: int

    @property
    def layout(self) -> BlockLayout:
        return BlockLayout(
            self.q_len,
            self.kv_len,
            block_q=self.policy.block_q,
            block_kv=self.policy.block_kv,
            num_levels=self.policy.num_levels,
            is_causal=self.is_causal,
        )

    @property
    def lengths(self) -> Tensor | None:
        return None if self.kv_lengths is None else torch.tensor(self.kv_lengths)

    @cached_property
    def qkv(self) -> tuple[Tensor, Tensor, Tensor]:
        return make_qkv(
            batch=self.batch,
            heads=self.kv_heads * self.group,
            kv_heads=self.kv_heads,
            q_len=self.q_len,
            kv_len=self.kv_len,
            head_dim=self.head_dim,
            dtype=self.dtype,
            seed=self.seed,
        )

    def levels(self, impl: str = "torch") -> Tensor:
        query, key, _ = self.qkv
        return self.policy(query, key, kv_lengths=self.lengths, impl=impl)

    def options(self) -> dict[str, object]:
        """Keyword arguments of ``pyramid_attention`` that say what the level map means."""
        return {
            "block_q": self.policy.block_q,
            "block_kv": self.policy.block_kv,
            "num_levels": self.policy.num_levels,
            "is_causal": self.is_causal,
            "kv_lengths": self.lengths,
        }


@dataclass(frozen=True, kw_only=True)
class Stack:
    """A call of ``PyramidAttention``: a preset on a video."""

    preset: Preset
    grid: VideoGrid
    batch: int
    kv_heads: int
    group: int
    head_dim: int
    dtype: torch.dtype
    seed: int

    @cached_property
    def qkv(self) -> tuple[Tensor, Tensor, Tensor]:
        return make_qkv(
            batch=self.batch,
            heads=self.kv_heads * self.group,
            kv_heads=self.kv_heads,
            q_len=self.grid.seq_len,
            head_dim=self.head_dim,
            dtype=self.dtype,
            seed=self.seed,
        )


def oracle(qkv: tuple[Tensor, Tensor, Tensor], levels: Tensor, **options: object) -> tuple[list[Tensor], list[Tensor]]:
    """Out and lse of the oracle, in float64 and in the dtype of ``qkv``."""
    exact, low = (
        list(pyramid_attention(*tensors, levels, impl="reference", return_lse=True, **options))
        for tensors in ([x.double() for x in qkv], qkv)
    )
    return exact, low


def assert_is_oracle(
    qkv: tuple[Tensor, Tensor, Tensor], levels: Tensor, *, impl: str, **options: object
) -> tuple[Tensor, Tensor]:
    """Out and lse of ``impl`` lie within the error budget of the oracle; returns them."""
    got = pyramid_attention(*qkv, levels, impl=impl, return_lse=True, **options)
    for out, exact, low in zip(got, *oracle(qkv, levels, **options), strict=True):
        assert_within_error_budget(out, exact, low, input_dtype=qkv[0].dtype)
    return got
