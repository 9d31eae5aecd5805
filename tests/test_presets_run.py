"""Every shipped preset, from YAML to an attention output that its oracle confirms."""

import pytest
import torch

from psa_config import load_presets
from psa_integrations.build import mask_policy, token_order
from psa_kernels import BlockLayout, LevelPlan, pyramid_attention
from psa_kernels.testing import assert_within_error_budget, make_qkv
from psa_masks import VideoGrid

BOOK = load_presets()
SPARSE = [
    (model, name)
    for model in BOOK.models
    for name in BOOK.presets(model)
    if BOOK.get(model, name).attention.type == "psa"
]


def run(model, name, grid, device, dtype):
    preset = BOOK.get(model, name)
    policy = mask_policy(preset.attention, grid)
    order = token_order(preset.attention, grid)
    qkv = make_qkv(q_len=grid.seq_len, dtype=dtype, device=device)
    if order is not None:
        qkv = [order.apply(x, 2) for x in qkv]
    levels = policy(*qkv[:2])
    options = {"block_q": policy.block_q, "block_kv": policy.block_kv, "num_levels": policy.num_levels}
    out = pyramid_attention(*qkv, levels, **options)
    exact = pyramid_attention(*(x.double() for x in qkv), levels, impl="reference", **options)
    low = pyramid_attention(*qkv, levels, impl="reference", **options)
    assert_within_error_budget(out, exact, low)
    return LevelPlan.from_levels(levels, BlockLayout(grid.seq_len, grid.seq_len, **options)).density()


@pytest.mark.parametrize(("model", "name"), SPARSE)
def test_on_the_cpu(model, name):
    text = BOOK.get(model, name).text_length
    grid = VideoGrid(frames=5, height=11, width=12, text=text, text_first=text > 0)
    density = run(model, name, grid, "cpu", torch.float32)
    assert ((density > 0) & (density <= 1)).all()


@pytest.mark.gpu
@pytest.mark.parametrize(("model", "name"), SPARSE)
def test_on_the_gpu(model, name):
    text = BOOK.get(model, name).text_length
    grid = VideoGrid(frames=7, height=21, width=19, text=text, text_first=text > 0)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        density = run(model, name, grid, "cuda", dtype)
        assert ((density > 0) & (density < 0.9)).all()
