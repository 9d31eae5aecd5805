"""One gather, with an index for every number."""

from torch import Tensor


def forward(x: Tensor, order: Tensor) -> Tensor:
    return x.gather(2, order.unsqueeze(3).expand_as(x))
