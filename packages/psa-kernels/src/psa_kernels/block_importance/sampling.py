"""Which tokens of a block are sampled: stratified, and a pure function of seed, block and slot.

A counter-based hash takes the place of a random generator: it gives the same tokens on every device, and no
random state, ours or the caller's, exists to be moved.
"""

from typing import TypeVar

import torch
from torch import Tensor

from psa_kernels.layout import existing_keys

_Integer = TypeVar("_Integer", int, Tensor)
QUERY_STREAM, KEY_STREAM = 1, 2
SEED_BITS = 30
_WORD = 0xFFFFFFFF


def _mix(x: _Integer) -> _Integer:
    """A 32-bit mixing function: xor-shifts and odd multipliers, on int64 so that nothing overflows."""
    x = (x ^ (x >> 16)) * 0x45D9F3B & _WORD
    x = (x ^ (x >> 15)) * 0x2C1B3C6D & _WORD
    return x ^ (x >> 16)


def sample_positions(lengths: Tensor, num_blocks: int, block: int, samples: int, seed: int, stream: int) -> Tensor:
    """Token positions sampled in each block.

    A block of n tokens is cut into ``samples`` strata as equal as whole tokens allow, and one token is drawn from
    each: all are distinct, and with ``n <= samples`` every token is taken.

    Args:
        lengths: int64 ``[B]`` (or ``[1]`` for all samples alike): tokens that exist.
        num_blocks, block: how the sequence is cut.
        samples: tokens to draw from each block.
        seed, stream: name the draw; query and key streams differ.

    Returns:
        int32 ``[B, num_blocks, samples]`` on the device of ``lengths``; -1 where a stratum is empty.
    """
    device = lengths.device
    first = torch.arange(num_blocks, device=device)[:, None] * block
    slot = torch.arange(samples + 1, device=device)
    count = (lengths[:, None, None] - first).clamp(0, block)
    bounds = slot * count // samples
    low, high = bounds[..., :-1], bounds[..., 1:]
    key = _mix((seed * 4 + stream) & _WORD)  # no more of a seed counts than its low SEED_BITS
    draw = _mix(_mix((first // block + key) & _WORD) ^ (slot[:-1] * 0x9E3779B1 & _WORD))
    position = first + low + (draw * (high - low) >> 32)
    return position.where(high > low, -1).to(torch.int32)


def draw_positions(
    q_len: int,
    kv_len: int,
    kv_lengths: Tensor | None,
    block_q: int,
    block_kv: int,
    samples_q: int,
    samples_kv: int,
    seed: int,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """Positions of the sampled queries and keys of an attention.

    Returns:
        int32 ``[1, num_q_blocks, samples_q]`` and ``[1, num_kv_blocks, samples_kv]``, the latter ``[B, ...]`` with
        ``kv_lengths`` (int32 or int64 ``[B]``; what exceeds ``kv_len`` counts as that). -1 is no token.
    """
    queries = torch.full((1,), q_len, device=device)
    keys = existing_keys(kv_len, kv_lengths, device)
    return (
        sample_positions(queries, -(-q_len // block_q), block_q, samples_q, seed, QUERY_STREAM),
        sample_positions(keys, -(-kv_len // block_kv), block_kv, samples_kv, seed, KEY_STREAM),
    )
