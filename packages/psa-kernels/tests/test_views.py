"""The operators that feed attention, on sequences that lie in memory in other ways."""

import pytest
import torch

from psa_kernels import BlockLayout, block_importance, key_similarity, pool_pyramid, pyramid_attention
from psa_kernels.testing import VIEWS, assert_within_error_budget, make_qkv, random_levels

OPERATORS = {
    "pool_pyramid": lambda query, key, impl: pool_pyramid(key, block_kv=32, num_levels=6, impl=impl).pooled,
    "key_similarity": lambda query, key, impl: key_similarity(key, block_kv=32, num_levels=6, impl=impl),
    "block_importance": lambda query, key, impl: block_importance(
        query, key, block_q=32, block_kv=32, samples_q=8, samples_kv=8, impl=impl
    ),
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("operator", OPERATORS)
def test_strides_do_not_matter(backend, operator, view):
    run = OPERATORS[operator]
    for dtype in backend.dtypes:
        query, key, _ = (VIEWS[view](x) for x in make_qkv(q_len=40, kv_len=75, dtype=dtype, device=backend.device))
        packed = key.clone(memory_format=torch.contiguous_format)
        assert key.stride() != packed.stride() or key.data_ptr() % 16
        exact = run(query.double(), key.double(), "reference")
        low = run(query, key, "reference")
        assert_within_error_budget(run(query, key, backend.impl), exact, low, input_dtype=dtype)


def test_output_lies_as_the_queries_do(backend):
    """Heads that a projection was split into are joined without a copy."""
    query, key, value = make_qkv(q_len=40, heads=3, dtype=torch.float32, device=backend.device)
    levels = random_levels(BlockLayout(40, 40, block_q=16, block_kv=16), heads=3, device=backend.device)
    options = {"block_q": 16, "block_kv": 16, "impl": backend.impl}
    split = VIEWS["transposed"](query)
    plain, joined = (pyramid_attention(q, key, value, levels, **options) for q in (query, split))
    assert plain.is_contiguous()
    assert joined.transpose(1, 2).is_contiguous()
    assert torch.equal(plain, joined)
