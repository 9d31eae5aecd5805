"""How much of dense attention's work a level map leaves."""

import torch
from torch import Tensor

from psa_kernels import BlockLayout
from psa_masks import checks

# Without a layout every block counts alike; any power of two that all pools divide does for its length.
UNIFORM_BLOCK = 1 << 20


def density(levels: Tensor, layout: BlockLayout | None = None) -> Tensor:
    """Executed work over dense work, in [0, 1]; the sparsity is 1 minus it.

    A block read at level h costs ``2^-(h-1)`` of a full one, a skipped block nothing. Without a layout
    the result is the plain mean of these over all block pairs. With one, each pair counts by its tokens:
    a query block of m tokens that reads a KV block of n tokens at level h executes ``m * ceil(n / 2^(h-1))``
    of ``m * n`` products, so short last blocks weigh what they are. With a causal layout the work is that of
    ``layout.executed_levels(levels)``, and dense work leaves out the pairs wholly in the future. This is the
    number that ``LevelPlan.density`` gives for the same map.

    Args:
        levels: int8 ``[B, H, num_q_blocks, num_kv_blocks]``.
        layout: the lengths and block sizes behind ``levels``.

    Returns:
        float32 ``[B, H]``.

    Raises:
        TypeError, ValueError: an argument breaks a rule above.

    The plain mean is the density of Pyramid Sparse Attention (arXiv 2512.04025).
    """
    checks.levels(levels, layout)
    num_q_blocks, num_kv_blocks = levels.shape[2:]
    device = levels.device
    if layout is None:
        queries = torch.ones(num_q_blocks, dtype=torch.int64, device=device)
        keys = torch.full((num_kv_blocks,), UNIFORM_BLOCK, dtype=torch.int32, device=device)
        visible = torch.ones(num_q_blocks, num_kv_blocks, dtype=torch.bool, device=device)
    else:
        queries, keys = layout.q_sizes(device), layout.kv_sizes(device).int()
        visible = layout.visible(device)
        levels = layout.executed_levels(levels)
    # Whole numbers all the way: the count is exact however many blocks there are.
    halvings = (levels - 1).clamp(min=0).int()
    rows = torch.where(levels > 0, (keys + (1 << halvings) - 1) >> halvings, 0)
    executed = (rows.sum(dim=-1) * queries).sum(dim=-1)
    dense = ((visible * keys).sum(dim=-1) * queries).sum()
    # In float64, as two whole numbers alone are divided in the default dtype.
    return (executed.double() / dense.double()).float()
