"""Node by node, in Python's whole numbers."""

import math

import torch
from torch import Tensor

from psa_kernels.kd_tree.ops import GRID_BITS, LARGEST


def _on_grid(block: Tensor) -> list[list[int]]:
    """The float32 coordinates ``[n, m]`` of a block as steps from the lowest of each."""
    from_lowest = block - block.amin(0)
    _, exponent = math.frexp(from_lowest.max().item())
    return (from_lowest * 2.0 ** min(GRID_BITS - exponent, 127)).to(torch.int64).tolist()


def _variance(values: list[int]) -> int:
    """Times the square of their number."""
    return len(values) * sum(x * x for x in values) - sum(values) ** 2


def _leaves(steps: list[list[int]], tokens: list[int]) -> list[int]:
    """The ``tokens`` of a node in their order."""
    if len(tokens) <= 2:
        return tokens
    variances = [_variance(list(values)) for values in zip(*(steps[token] for token in tokens), strict=True)]
    axis = variances.index(max(variances))
    tokens = sorted(tokens, key=lambda token: (steps[token][axis], token))
    half = len(tokens) // 2
    return _leaves(steps, tokens[:half]) + _leaves(steps, tokens[half:])


def forward(points: Tensor) -> Tensor:
    size, num_coordinates = points.shape[-2:]
    blocks = points.float().nan_to_num(nan=0.0).clamp(-LARGEST, LARGEST).reshape(-1, size, num_coordinates)
    orders = [_leaves(_on_grid(block), list(range(size))) for block in blocks]
    return torch.tensor(orders, dtype=torch.int32, device=points.device).reshape(points.shape[:-1])
