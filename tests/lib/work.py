"""The work of a level map, counted token by token."""

from fractions import Fraction

from torch import Tensor

from psa_kernels import BlockLayout


def counted_densities(levels: Tensor, layout: BlockLayout) -> list[list[Fraction]]:
    """Executed over dense work of each sample and head, from the meaning of a level alone."""
    return [[_density(head, layout) for head in sample] for sample in levels.tolist()]


def _density(level_map: list[list[int]], layout: BlockLayout) -> Fraction:
    executed = dense = 0
    for i, row in enumerate(level_map):
        queries = range(i * layout.block_q, min((i + 1) * layout.block_q, layout.q_len))
        for j, chosen in enumerate(row):
            keys = range(j * layout.block_kv, min((j + 1) * layout.block_kv, layout.kv_len))
            level = chosen
            if layout.is_causal:
                sees = [query + layout.kv_len - layout.q_len for query in queries]
                if keys[0] > max(sees):
                    continue
                if keys[-1] > min(sees):
                    level = min(chosen, 1)
            dense += len(queries) * len(keys)
            if level:
                executed += len(queries) * len({key >> (level - 1) for key in keys})
    return Fraction(executed, dense)
