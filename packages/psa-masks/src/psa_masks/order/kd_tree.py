"""Tokens within each key/value block in the order of a k-d tree: what a pooled row averages is alike."""

import torch
from torch import Tensor

from psa_kernels import checks as kernel_checks
from psa_kernels import kd_tree, leading_directions
from psa_kernels.registry import without_autocast
from psa_masks.grid import VideoGrid, video_range_of
from psa_masks.order.head_order import HeadOrder
from psa_masks.order.semantic import check_base
from psa_masks.order.token_order import TokenOrder

_SAMPLES = 4096  # of a head at most, and more than half as many where there are that many tokens
_PARTS = 8
_DIRECTIONS = 8


def kd_tree_order(
    query: Tensor,
    key: Tensor,
    *,
    block_kv: int,
    grid: VideoGrid | None = None,
    base: TokenOrder | None = None,
    num_directions: int | None = None,
    impl: str | None = None,
) -> HeadOrder:
    """Reorder keys inside their blocks, so that tokens which are averaged together have nearly the same logits.

    Each block keeps its tokens. They are halved at the median of the direction in which they differ most, each half
    again, and so on: level h of the pyramid averages runs of 2**(h-1) tokens, which are the nodes of this tree. Which
    block a query block reads, and at which level, is as good a question as before; what it reads when that is not
    level 1 is nearer to the truth.

    Tokens differ by their logits: the directions are those of largest variance of the keys as the queries see them, the
    leading eigenvectors of ``C_q C_k`` with a head's second moments of queries and covariance of keys, as
    ``psa_kernels.leading_directions`` finds them from samples of both. Blocks that are not whole, or hold text, stay as
    they are. Nothing waits for the device.

    Args:
        query: ``[B, H, q_len, D]``, H a multiple of H_kv, on the device of ``key``.
        key: ``[B, H_kv, L, D]``.
        block_kv: tokens of a key/value block, a power of two.
        grid: the sequence, ``grid.seq_len == L``: its text tokens stay where they are. None takes all for video.
        base: the order in which the blocks are cut, which keeps text where it is; None is the order of ``key``.
        num_directions: how many directions there are to choose from, 1 to D; None is 8, or D where that is less.
        impl: of the operators of psa_kernels that it calls, as these take it.

    Returns:
        The order of the keys and of their values, for each head.

    Raises:
        TypeError, ValueError: an argument breaks a rule above.

    The balanced k-d tree is that of Friedman, Bentley and Finkel (1977); to pool along it is ours.
    """
    kernel_checks.sequence("key", key)
    kernel_checks.sequence("query", query)
    batch, heads, length, head_dim = key.shape
    if query.shape[0] != batch or query.shape[3] != head_dim or query.shape[1] % heads:
        raise ValueError(
            f"query must have the batch and head_dim of key {list(key.shape)} and a multiple of its heads, "
            f"got {list(query.shape)}"
        )
    if query.device != key.device:
        raise ValueError(f"query must be on key's device {key.device}, got {query.device}")
    kernel_checks.power_of_two("block_kv", block_kv)
    if num_directions is None:
        num_directions = min(_DIRECTIONS, head_dim)
    kernel_checks.integer("num_directions", num_directions)
    if not 1 <= num_directions <= head_dim:
        raise ValueError(f"num_directions must be 1 to the head_dim {head_dim}, got {num_directions}")
    start, stop = video_range_of(grid, length, "key")
    if base is not None:
        check_base(base, start, stop, length, "key")

    order = torch.arange(length, device=key.device) if base is None else base.index(key.device)
    first, last = -(-start // block_kv) * block_kv, stop // block_kv * block_kv
    if first >= last or block_kv == 1:
        return HeadOrder(order.expand(batch, heads, length))
    inside = order[first:last]
    with without_autocast(key.device), torch.no_grad():
        moments = sampled_moments(query, key[:, :, start:stop])
        directions = leading_directions(*moments, num_directions, impl=impl)
        places = (key @ directions.to(key.dtype)).index_select(2, inside)  # what moves is the smaller
        within = kd_tree(places.unflatten(2, (-1, block_kv)), impl=impl)  # [B, H_kv, blocks, block_kv]
    moved = within + torch.arange(0, last - first, block_kv, device=key.device)[:, None]
    before, after = (part.expand(batch, heads, -1) for part in (order[:first], order[last:]))
    return HeadOrder(torch.cat([before, inside[moved.flatten(2)], after], dim=2))


def sampled_moments(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """Second moments of the queries that read a head of keys, and covariance of these, float32 ``[B, H_kv, D, D]``.

    Either times a number of its own, which leading directions do not care about.
    """
    queries = even_samples(query).unflatten(1, (key.shape[1], -1))  # [B, H_kv, those that read a head of keys, ...]
    keys = even_samples(key)
    keys = keys - keys.mean((2, 3), keepdim=True)
    return (queries.mT @ queries).sum((2, 3)), (keys.mT @ keys).sum(2)


def even_samples(x: Tensor) -> Tensor:
    """float32 ``[B, H, parts, tokens, D]``, evenly from ``x`` ``[B, H, L, D]``.

    In parts, because the product of one long matrix with itself has too few tiles to keep a GPU busy.
    """
    sampled = x[:, :, :: -(-x.shape[2] // _SAMPLES)]  # to the end, whatever the length
    parts = _PARTS if sampled.shape[2] >= _PARTS else 1
    count = sampled.shape[2] // parts * parts
    samples: Tensor = sampled[:, :, :count].float().unflatten(2, (parts, -1))
    return samples
