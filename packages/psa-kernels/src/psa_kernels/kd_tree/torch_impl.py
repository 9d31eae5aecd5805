"""All nodes of a depth by one sort."""

import torch
from torch import Tensor

from psa_kernels.kd_tree.ops import GRID_BITS, LARGEST


def _on_grid(blocks: Tensor) -> Tensor:
    """The float32 coordinates ``[blocks, n, m]`` as steps from the lowest of each in its block, int64."""
    from_lowest = blocks - blocks.amin(1, keepdim=True)
    _, exponent = torch.frexp(from_lowest.amax((1, 2), keepdim=True))
    power = (GRID_BITS - exponent).clamp(max=127)
    return (from_lowest * (power + 127 << 23).view(torch.float32)).to(torch.int64)  # by 2**power, exactly


def forward(points: Tensor) -> Tensor:
    size, num_coordinates = points.shape[-2:]
    blocks = points.float().nan_to_num(nan=0.0).clamp(-LARGEST, LARGEST).reshape(-1, size, num_coordinates)
    tokens = torch.arange(size, device=points.device).expand(len(blocks), size)
    if not blocks.numel():
        return tokens.to(torch.int32).reshape(points.shape[:-1])
    steps = _on_grid(blocks)  # [nodes, size, m]
    while size > 2:
        axis = (size * steps.square().sum(1) - steps.sum(1).square()).argmax(-1)  # [nodes], the first of equals
        along = steps.gather(2, axis[:, None, None].expand(-1, size, 1)).squeeze(2)
        # The earlier of equals first, by the token itself: no two keys are alike.
        ranks = (along * points.shape[-2] + tokens).argsort(dim=1)
        tokens = tokens.gather(1, ranks).reshape(-1, size // 2)
        steps = steps.gather(1, ranks[..., None].expand_as(steps)).reshape(-1, size // 2, num_coordinates)
        size //= 2
    return tokens.to(torch.int32).reshape(points.shape[:-1])
