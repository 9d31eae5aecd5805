"""The registered operator behind ``LevelPlan.from_levels``."""

import torch
from torch import Tensor

from psa_kernels.registry import register


def _fake(levels: Tensor, num_levels: int) -> tuple[Tensor, Tensor]:
    indices = torch.empty_like(levels, dtype=torch.int32, memory_format=torch.contiguous_format)
    offsets = levels.new_empty((*levels.shape[:3], num_levels + 1), dtype=torch.int32)
    return indices, offsets


level_plan = register("psa_kernels.level_plan", "level_plan(Tensor levels, int num_levels) -> (Tensor, Tensor)", _fake)
