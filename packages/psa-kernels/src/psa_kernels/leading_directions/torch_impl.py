"""All matrices at once, a vector and its shares in the others at a time."""

import torch
from torch import Tensor

from psa_kernels.leading_directions.ops import LEAST_PIVOT, RIDGE, STEPS, TINY, mean_diagonal, to_unit_length


def _make_orthonormal(vectors: Tensor, images: Tensor) -> None:
    """``vectors.mT @ images`` becomes the identity, by Gram and Schmidt; ``images`` are a matrix times the vectors."""
    before = (vectors * images).sum(-2, keepdim=True)
    for i in range(vectors.shape[-1]):
        vector, image = vectors[..., i : i + 1], images[..., i : i + 1]
        square = (vector * image).sum(-2, keepdim=True)
        length = square.maximum(LEAST_PIVOT * before[..., i : i + 1]).clamp_min(TINY).sqrt()
        vector /= length
        image /= length
        shares = image.mT @ vectors[..., i + 1 :]
        vectors[..., i + 1 :] -= vector @ shares
        images[..., i + 1 :] -= image @ shares


def forward(seen: Tensor, spread: Tensor, num_directions: int) -> Tensor:
    moments = torch.stack([seen, spread])
    moments /= mean_diagonal(moments).clamp_min(TINY)
    moments.diagonal(dim1=-2, dim2=-1).add_(RIDGE)
    seen, spread = moments
    images = seen[..., :num_directions].clone()  # of the first unit vectors
    for _ in range(STEPS):
        vectors = spread @ images
        images = seen @ vectors
        _make_orthonormal(vectors, images)
    return to_unit_length(images)
