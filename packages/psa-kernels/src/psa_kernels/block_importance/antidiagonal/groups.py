"""Groups of ``stride`` consecutive tokens, the rows and columns of antidiagonal importance."""

import torch
from torch import Tensor


def group_stride(block_q: int, block_kv: int, samples_q: int, samples_kv: int) -> int:
    """Tokens of a group, where a block of queries has ``samples_q`` groups and one of keys ``samples_kv``.

    An antidiagonal pairs as many queries as keys, so groups are equally long on both sides, and cut a block evenly.

    Raises:
        ValueError: samples do not divide their block, or the groups of queries and keys differ in length.
    """
    for name, block, samples in (("q", block_q, samples_q), ("kv", block_kv, samples_kv)):
        if block % samples:
            raise ValueError(
                f"samples_{name} must divide block_{name} {block} with method 'antidiagonal', got {samples}"
            )
    if block_q // samples_q != block_kv // samples_kv:
        raise ValueError(
            "block_q / samples_q must equal block_kv / samples_kv with method 'antidiagonal', got "
            f"{block_q} / {samples_q} and {block_kv} / {samples_kv}"
        )
    return block_q // samples_q


def group_sizes(length: Tensor, num_groups: int, stride: int) -> Tensor:
    """How many tokens of each group exist.

    Args:
        length: int64 ``[]``, tokens that exist.
        num_groups, stride: how the sequence is cut; the last groups may lie past its end.

    Returns:
        int64 ``[num_groups]``, 0 to ``stride``.
    """
    return (length - torch.arange(num_groups, device=length.device) * stride).clamp(0, stride)
