"""An experiment: the means of skipped blocks weigh what their tokens are estimated to weigh.

A block read as its mean has the weight exp(q . mean) times its tokens, which is never more than what its tokens have
together (Jensen). The sampled logits from which levels are chosen tell by how much it falls short: the log of the mean
of their exponentials less their mean. Here this difference, averaged over the sampled queries of a query block, is
added to the logit of the block's row. No kernel takes such a bias: attention to the other rows is the operator's, and
the means are merged in by their sum of weights, in plain torch.

    python benchmarks/calibrated_tail.py --prompts 2

All are ratios to the error of `quotas + tail` as it is, the geometric mean over layers, steps and prompts, or draws.
Numbers are in results/calibrated_tail.md.
"""

import argparse
import math
from collections.abc import Callable, Mapping

import torch
from options import whole
from quality_capture import Size, capture
from quality_fields import FIELDS, make_inputs
from quality_policies import BLOCK, TAILED, quota
from quality_store import commit_here
from quality_videos import make_pairs
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from psa_integrations.tiny_wan import load_pipeline
from psa_kernels import pyramid_attention
from psa_kernels.block_importance.sampling import draw_positions
from psa_masks import MaskPolicy, TokenOrder, VideoGrid, gilbert_order

TAIL = BLOCK.bit_length()
CAPTURE_STEPS, SEEN_STEPS = 25, (6, 15)

Estimate = Callable[[Tensor, Tensor], Tensor]
"""Query and key ``[B, H, L, D]`` to what the logits of block means gain, ``[B, H, num_q_blocks, num_kv_blocks]``."""


def sampled_logits(query: Tensor, key: Tensor, samples: int) -> Tensor:
    """Of the tokens that the operator draws, ``[B, H, num_q_blocks, samples, num_kv_blocks, samples]``."""
    length = query.shape[2]
    q_at, kv_at = draw_positions(length, length, None, BLOCK, BLOCK, samples, samples, 0, query.device)
    sampled_q, sampled_k = query[:, :, q_at[0].flatten().long()], key[:, :, kv_at[0].flatten().long()]
    logits = sampled_q @ sampled_k.mT * query.shape[3] ** -0.5
    return logits.unflatten(3, (-1, samples)).unflatten(2, (-1, samples))


def shortfall(samples: int) -> Estimate:
    """Log of the mean exponential of the sampled logits, less their mean."""

    def estimate(query: Tensor, key: Tensor) -> Tensor:
        logits = sampled_logits(query, key, samples)
        return (logits.logsumexp(dim=-1) - math.log(samples) - logits.mean(dim=-1)).mean(dim=3)

    return estimate


def half_variance(samples: int) -> Estimate:
    """What the shortfall is of normally distributed logits; its estimate scatters less."""
    return lambda query, key: sampled_logits(query, key, samples).var(dim=-1).mean(dim=3) / 2


def true_shortfall(query: Tensor, key: Tensor) -> Tensor:
    """Of all tokens: the log of the mass of a pair of blocks over the mass that its means have."""
    means = key.unflatten(2, (-1, BLOCK)).mean(dim=3)
    scale = query.shape[3] ** -0.5
    found = []
    for b in range(query.shape[0]):
        logits = query[b] @ key[b].mT * scale
        normaliser = logits.logsumexp(dim=-1, keepdim=True)
        tokens = logits.unflatten(2, (-1, BLOCK)).logsumexp(dim=-1) - normaliser
        rows = query[b] @ means[b].mT * scale + math.log(BLOCK) - normaliser
        found.append(_of_block(tokens) - _of_block(rows))
    return torch.stack(found)


def _of_block(logits: Tensor) -> Tensor:
    """Logarithm of the sum over the queries of a block, ``[H, L, num_kv_blocks]`` to ``[H, num_q_blocks, ..]``."""
    return logits.unflatten(1, (-1, BLOCK)).logsumexp(dim=2)


def guarded(estimate: Estimate, *, at_most: float = math.inf, share: float = 1.0) -> Estimate:
    return lambda query, key: (share * estimate(query, key)).clamp(0.0, at_most)


FORMS: Mapping[str, Estimate] = {
    "16 samples": shortfall(16),
    "8 samples": shortfall(8),
    "32 samples": shortfall(32),
    "16 samples, at most 0.5": guarded(shortfall(16), at_most=0.5),
    "16 samples, at most 0.2": guarded(shortfall(16), at_most=0.2),
    "16 samples, half of it": guarded(shortfall(16), share=0.5),
    "32 samples, half of it": guarded(shortfall(32), share=0.5),
    "16 samples, a quarter of it": guarded(shortfall(16), share=0.25),
    "half the variance of 16 samples": half_variance(16),
    "half of that, at most 0.5": guarded(half_variance(16), at_most=0.5, share=0.5),
    "the truth": true_shortfall,
    "half the truth": guarded(true_shortfall, share=0.5),
}


class Merged:
    """Attention of one map, the means of its tail weighed anew by a bias."""

    def __init__(self, query: Tensor, key: Tensor, value: Tensor, levels: Tensor) -> None:
        self._out, self._lse = pyramid_attention(
            query, key, value, levels.masked_fill(levels == TAIL, 0), block_q=BLOCK, block_kv=BLOCK, return_lse=True
        )
        key_means, self._values = (x.unflatten(2, (-1, BLOCK)).mean(dim=3) for x in (key, value))
        logits = query @ key_means.mT * query.shape[3] ** -0.5 + math.log(BLOCK)
        self._logits = logits.masked_fill(levels.repeat_interleave(BLOCK, 2) != TAIL, -torch.inf)

    def out(self, bias: Tensor | None = None) -> Tensor:
        """``[B, H, L, D]``, with ``bias`` ``[B, H, num_q_blocks, num_kv_blocks]`` added to the logits of means."""
        logits = self._logits if bias is None else self._logits + bias.repeat_interleave(BLOCK, 2)
        normaliser = torch.logaddexp(self._lse, logits.logsumexp(dim=-1))[..., None]
        return (self._lse[..., None] - normaliser).exp() * self._out + (logits - normaliser).exp() @ self._values


def ratios(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Logarithm of the error as it is, and that of each form's over it, ``[B]``."""
    levels = MaskPolicy(**quota(TAILED, skip="mean", block_q=BLOCK, block_kv=BLOCK))(query, key)
    dense = scaled_dot_product_attention(query, key, value)
    merged = Merged(query, key, value, levels)

    def log_error(out: Tensor) -> Tensor:
        return ((out - dense).flatten(1).norm(dim=1) / dense.flatten(1).norm(dim=1)).log()

    plain = log_error(merged.out())
    return plain, {name: log_error(merged.out(form(query, key))) - plain for name, form in FORMS.items()}


def columns(prompts: int, draws: int, device: str) -> dict[str, list[tuple[Tensor, Tensor, Tensor]]]:
    """Attentions in the order of the curve, by where they come from: the tiny model, and each of the fields."""
    pipeline = load_pipeline(device)
    pipeline.set_progress_bar_config(disable=True)
    size, grid = Size(), VideoGrid(frames=16, height=16, width=16)
    caught = capture(pipeline, make_pairs(prompts), SEEN_STEPS, size=size, steps=CAPTURE_STEPS)
    found = {"tiny-wan": [(one.query, one.key, one.value) for one in caught.values()]}
    for number, field in enumerate(FIELDS):
        made = make_inputs(grid, field, batch=draws)
        found[chr(ord("A") + number)] = [(made.query.to(device), made.key.to(device), made.value.to(device))]
    order = gilbert_order(grid)
    return {name: [_ordered(*one, order) for one in each] for name, each in found.items()}


def _ordered(query: Tensor, key: Tensor, value: Tensor, order: TokenOrder) -> tuple[Tensor, Tensor, Tensor]:
    return order.apply(query, dim=2), order.apply(key, dim=2), order.apply(value, dim=2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=whole, default=2)
    parser.add_argument("--draws", type=whole, default=1, help="of each field")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    on_gpu = torch.device(options.device).type == "cuda"
    device = torch.cuda.get_device_name(options.device) if on_gpu else "CPU"
    print(
        f"{device}, float32, torch {torch.__version__}, commit {commit_here()}. {options.prompts} prompts, "
        f"{options.draws} draws of each field.\n"
    )
    with torch.no_grad():
        found = {
            name: [ratios(*one) for one in each]
            for name, each in columns(options.prompts, options.draws, options.device).items()
        }
    print(f"| | {' | '.join(found)} |\n|---|{'---|' * len(found)}")
    plain = [torch.stack([log for log, _ in each]).mean().exp() for each in found.values()]
    print(f"| error as it is | {' | '.join(f'{one:.3f}' for one in plain)} |")
    for form in FORMS:
        cells = [torch.stack([logs[form] for _, logs in each]).mean().exp() for each in found.values()]
        print(f"| {form} | {' | '.join(f'{one:.2f}' for one in cells)} |")


if __name__ == "__main__":
    main()
