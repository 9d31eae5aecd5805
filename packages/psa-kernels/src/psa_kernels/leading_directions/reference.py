"""Step by step, each orthogonal to those before it by Gram and Schmidt."""

import torch
from torch import Tensor

from psa_kernels.leading_directions.ops import RIDGE, STEPS, TINY, mean_diagonal, to_unit_length


def forward(seen: Tensor, spread: Tensor, num_directions: int) -> Tensor:
    eye = torch.eye(seen.shape[-1], dtype=seen.dtype, device=seen.device)
    seen, spread = (x / mean_diagonal(x).clamp_min(TINY) + RIDGE * eye for x in (seen, spread))
    vectors = eye[:, :num_directions]
    for _ in range(STEPS):
        vectors = spread @ (seen @ vectors)
        found: list[Tensor] = []
        for x in vectors.unbind(-1):
            for other in found:
                x = x - other * (x * (seen @ other.unsqueeze(-1)).squeeze(-1)).sum(-1, keepdim=True)
            length = (x * (seen @ x.unsqueeze(-1)).squeeze(-1)).sum(-1, keepdim=True)
            found.append(x / length.clamp_min(TINY).sqrt())
        vectors = torch.stack(found, dim=-1)
    return to_unit_length(seen @ vectors)
