"""Whatever level map psa-masks makes, the kernels compute what the oracle says, and all agree on its work."""

import pytest
import torch
from hypothesis import Phase, find, given, settings
from lib.backends import BACKENDS
from lib.cases import assert_is_oracle
from lib.strategies import cases
from lib.work import counted_densities

from psa_kernels import LevelPlan
from psa_masks import density


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_map_gives_the_oracles_output(backend):
    @settings(max_examples=backend.examples)
    @given(case=cases(dtypes=backend.dtypes, longest=backend.longest))
    def run(case):
        assert_is_oracle(case.qkv, case.levels(backend.impl), impl=backend.impl, **case.options())

    run()


@settings(max_examples=150)
@given(case=cases())
def test_density_is_the_work_counted_by_hand(case):
    levels = case.levels()
    counted = torch.tensor(
        [[float(share) for share in sample] for sample in counted_densities(levels, case.layout)], dtype=torch.float32
    )
    assert torch.equal(density(levels, case.layout), counted)
    assert torch.equal(LevelPlan.from_levels(levels, case.layout).density(), counted)


def test_drawn_cases_shrink_to_one_block():
    # The phase that explains comes after the smallest case with others, of which find would return the last.
    case = find(cases(), lambda case: True, settings=settings(phases=(Phase.generate, Phase.shrink)))
    assert (case.q_len, case.kv_len, case.layout.num_q_blocks, case.layout.num_kv_blocks) == (1, 1, 1, 1)
    assert case.kv_lengths is None
    assert case.levels().tolist() == [[[[1]]]]
