"""Ways to choose levels that no policy of psa-masks offers: bounds, and what was tried and left out."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from quality_oracle import levels_by_block_error, levels_by_true_error
from torch import Tensor

from psa_kernels import BlockLayout
from psa_kernels.block_importance.sampling import draw_positions
from psa_masks import MaskPolicy, levels_by_quota, skip_to_mean

Chooser = Callable[[MaskPolicy, BlockLayout, Tensor, Tensor, Tensor], Tensor]
"""Policy, layout, query, key and value ``[B, H, L, D]`` in the order of their blocks to levels. All but "policy" want a
whole number of blocks."""


def by_error(levels_by: Callable[[Tensor, Tensor, Tensor, BlockLayout, float], Tensor]) -> Chooser:
    """Levels by the error that they make, which takes dense attention to know: a bound, and no policy."""

    def choose(policy: MaskPolicy, layout: BlockLayout, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        assert policy.density is not None, "rows of a bound have a density"
        return levels_by(query, key, value, layout, policy.density)

    return choose


def samples_of(policy: MaskPolicy) -> tuple[int, int]:
    """Samples of a query and of a KV block."""
    assert policy.samples_q is not None, "these rows say how many samples"
    assert policy.samples_kv is not None, "these rows say how many samples"
    return policy.samples_q, policy.samples_kv


def by_quota(scores: Tensor, policy: MaskPolicy) -> Tensor:
    levels = levels_by_quota(scores, policy.bounds)
    return skip_to_mean(levels, policy.block_kv) if policy.skip == "mean" else levels


def by_plain_sample(policy: MaskPolicy, layout: BlockLayout, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Quotas by the max of the softmax over samples drawn from a whole block each, not from strata of it."""
    generator = torch.Generator().manual_seed(policy.seed)
    samples_q, samples_kv = samples_of(policy)

    def drawn(x: Tensor, block: int, samples: int) -> Tensor:
        """``[B, H, blocks * samples, D]``."""
        within = torch.rand(x.shape[2] // block, block, generator=generator).argsort(dim=1)[:, :samples]
        first = torch.arange(0, x.shape[2], block)[:, None]
        return x.index_select(2, (first + within).flatten().to(x.device)).float()

    sampled_q, sampled_k = drawn(query, layout.block_q, samples_q), drawn(key, layout.block_kv, samples_kv)
    weights = (sampled_q @ sampled_k.mT * query.shape[3] ** -0.5).softmax(dim=-1)
    pairs = weights.unflatten(3, (-1, samples_kv)).unflatten(2, (-1, samples_q))
    return by_quota(pairs.amax(dim=(3, 5)), policy)


@dataclass(frozen=True)
class Sampled:
    """One head's attention among the tokens that the operator draws.

    Shapes: value ``[K, D]``, weights ``[Q, K]``, and ``of_means`` ``[Q, num_kv_blocks]``, what a
    block's samples would weigh with their mean logit each.
    """

    value: Tensor
    weights: Tensor
    of_means: Tensor
    samples_q: int
    samples_kv: int

    @cached_property
    def mean_values(self) -> Tensor:
        return self.value.unflatten(0, (-1, self.samples_kv)).mean(dim=1)

    @cached_property
    def out(self) -> Tensor:
        return self.weights @ self.value

    def by_q_block(self, squares: Tensor) -> Tensor:
        """Means over the sampled queries of a block, of the last axis."""
        return squares.unflatten(-1, (-1, self.samples_q)).mean(dim=-1)


def samples(
    policy: MaskPolicy, layout: BlockLayout, query: Tensor, key: Tensor, value: Tensor
) -> Iterator[tuple[tuple[int, int], Sampled]]:
    """Of every sample of the batch and head."""
    samples_q, samples_kv = samples_of(policy)
    blocks = layout.block_q, layout.block_kv
    q_at, kv_at = draw_positions(
        layout.q_len, layout.kv_len, None, *blocks, samples_q, samples_kv, policy.seed, query.device
    )
    for b, h in itertools.product(range(query.shape[0]), range(query.shape[1])):
        keys, values = (x[b, h, kv_at[0].flatten().long()].float() for x in (key, value))
        logits = query[b, h, q_at[0].flatten().long()].float() @ keys.mT * query.shape[3] ** -0.5
        mean_logits = logits.unflatten(1, (-1, samples_kv)).mean(dim=-1)
        of_means = samples_kv * (mean_logits - logits.logsumexp(dim=-1, keepdim=True)).exp()
        yield (b, h), Sampled(values, logits.softmax(dim=-1), of_means, samples_q, samples_kv)


def by_error_of_values(policy: MaskPolicy, layout: BlockLayout, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Quotas by the error that a block's mean makes in the output, estimated from samples of values too.

    A block's score is the root mean square, over its sampled queries, of the norm of its sampled values less the
    output, by the weights that they have less those that they would have with their mean logit and mean value.
    """
    scores = torch.empty(*query.shape[:2], layout.num_q_blocks, layout.num_kv_blocks, device=query.device)
    for at, seen in samples(policy, layout, query, key, value):
        of_block = seen.weights.unflatten(1, (-1, seen.samples_kv)).transpose(0, 1)  # [kv blocks, Q, samples]
        total = of_block @ seen.value.unflatten(0, (-1, seen.samples_kv))
        total = total - seen.of_means.mT[..., None] * seen.mean_values[:, None]
        surplus = of_block.sum(dim=-1) - seen.of_means.mT
        error = total - surplus[..., None] * seen.out
        scores[at] = seen.by_q_block(error.square().sum(dim=-1)).sqrt().mT
    return by_quota(scores, policy)


def by_mean_or_drop(policy: MaskPolicy, layout: BlockLayout, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The policy's map, but in a row of blocks whose means lead further astray than dropping, these are dropped.

    Both are tried on the samples: attention to those of kept blocks, with the means of the others' and without. Blocks
    of levels between count as kept.
    """
    levels = policy(query, key)
    for at, seen in samples(policy, layout, query, key, value):
        kept = (levels[at] != layout.num_levels).repeat_interleave(seen.samples_q, dim=0)
        weights = seen.weights * kept.repeat_interleave(seen.samples_kv, dim=1)
        of_means = seen.of_means * ~kept
        total, mass = weights @ seen.value, weights.sum(dim=1, keepdim=True)
        without = total / mass
        with_means = (total + of_means @ seen.mean_values) / (mass + of_means.sum(dim=1, keepdim=True))
        errors = [seen.by_q_block((out - seen.out).square().sum(dim=1)) for out in (without, with_means)]
        dropped = (levels[at] == layout.num_levels) & (errors[0] < errors[1])[:, None]
        levels[at] = levels[at].masked_fill(dropped, 0)
    return levels


CHOOSERS: dict[str, Chooser] = {
    "policy": lambda policy, layout, query, key, value: policy(query, key),
    "plain sample": by_plain_sample,
    "error of values": by_error_of_values,
    "mean or drop": by_mean_or_drop,
    "true error": by_error(levels_by_true_error),
    "true error of blocks": by_error(levels_by_block_error),
}
