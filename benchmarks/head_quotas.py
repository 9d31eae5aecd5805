"""An experiment: quotas of each head's own, tuned on one prompt.

Heads differ in how much error a density leaves them with. On the first prompt the error of every head is measured at
several scales of `quotas + tail`; then each layer's density is shared out among its heads, at each step alone, so that
the squared errors of the layer add up to the least, and the shares are kept for the other prompts. Beside it stand
shares tuned on each prompt itself, which no preset could know, and budget mode, whose heads may share what a layer
spends.

    python benchmarks/head_quotas.py --prompts 4

All are geometric means over layers, steps and all prompts but the first. Numbers are in results/head_quotas.md.
"""

import argparse
from collections.abc import Sequence
from itertools import pairwise

import torch
from quality_capture import Inputs, Size, capture
from quality_metrics import geometric_mean, interval
from quality_policies import BLOCK, TAILED, budget, tailed
from quality_store import commit_here
from quality_videos import make_pairs
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from psa_integrations.tiny_wan import load_pipeline
from psa_kernels import BlockLayout, pyramid_attention
from psa_masks import MaskPolicy, density, gilbert_order

CAPTURE_STEPS, SEEN_STEPS = 25, (6, 15)
SCALES = (0.3, 0.45, 0.6, 0.8, 1.0, 1.25, 1.5, 2.0, 2.5)
EVEN = SCALES.index(1.0)


class Case:
    """One attention with all scales of the quotas tried, ``[B, H]`` each."""

    def __init__(self, inputs: Inputs) -> None:
        order = gilbert_order(Size().grid)
        self._tensors = [order.apply(x.float(), dim=2) for x in (inputs.query, inputs.key, inputs.value)]
        self._layout = BlockLayout(Size().grid.seq_len, Size().grid.seq_len, block_q=BLOCK, block_kv=BLOCK)
        self._dense = scaled_dot_product_attention(*self._tensors)
        scaled = [tuple(min(1.0, scale * bound) for bound in TAILED) for scale in SCALES]
        tried = [self._measured(MaskPolicy(**tailed(bounds, block_q=BLOCK, block_kv=BLOCK))) for bounds in scaled]
        self.squares, self.densities = (torch.stack(each, dim=-1) for each in zip(*tried, strict=True))

    def _measured(self, policy: MaskPolicy) -> tuple[Tensor, Tensor]:
        """Squared error and density of each head."""
        query, key, value = self._tensors
        levels = policy(query, key)
        out = pyramid_attention(query, key, value, levels, block_q=BLOCK, block_kv=BLOCK)
        assert isinstance(out, Tensor)
        return (out - self._dense).square().sum(dim=(2, 3)), density(levels, self._layout)

    def error(self, squares: Tensor) -> Tensor:
        """Relative, of the layer, ``[B]``."""
        return (squares.sum(dim=1) / self._dense.square().sum(dim=(1, 2, 3))).sqrt()

    def by_policy(self, policy: MaskPolicy) -> tuple[Tensor, Tensor]:
        """Error and density, ``[B]``."""
        squares, spent = self._measured(policy)
        return self.error(squares), spent.mean(dim=1)

    def at(self, scales: Tensor) -> tuple[Tensor, Tensor]:
        """The same with heads at these places of ``SCALES``, ``[H]`` or ``[B, H]``."""
        place = scales.expand(self.squares.shape[:2])[..., None]
        return self.error(self.squares.gather(2, place)[..., 0]), self.densities.gather(2, place)[..., 0].mean(dim=1)


def shared_out(squares: Tensor, densities: Tensor, even: int = EVEN) -> Tensor:
    """Places of scales of least squared error that cost no more together than the even ones.

    Args:
        squares, densities: ``[H, scales]`` of one layer.
        even: place of the scale that all heads have otherwise.

    Returns:
        int64 ``[H]``, by the price of density at which the heads keep to it: each head takes the scale that minimises
        its squared error and the price of what it spends.
    """
    allowed = densities[:, even].sum() * (1 + 1e-6)
    steps = [
        (a - b) / (y - x)
        for errors, spent in zip(squares.tolist(), densities.tolist(), strict=True)
        for (a, x), (b, y) in pairwise(zip(errors, spent, strict=True))
    ]
    best = torch.full((squares.shape[0],), even, device=squares.device)
    least = squares[:, even].sum()
    for price in steps:
        choice = (squares + price * densities).argmin(dim=1)
        spent = densities.gather(1, choice[:, None]).sum()
        error = squares.gather(1, choice[:, None]).sum()
        if spent <= allowed and error < least:
            best, least = choice, error
    return best


def compared(cases: Sequence[Case]) -> dict[str, tuple[Tensor, float]]:
    """Errors ``[B - 1]`` of the prompts after the first, and density."""
    kinds: dict[str, list[tuple[Tensor, Tensor]]] = {}
    of_budget = {"block_q": BLOCK, "block_kv": BLOCK, "skip": "mean", "reduction": "error"}
    for case in cases:
        even = torch.tensor(EVEN, device=case.squares.device)
        tuned = shared_out(case.squares[0], case.densities[0])
        own = torch.stack([shared_out(*each) for each in zip(case.squares, case.densities, strict=True)])
        found = {
            "the same for all heads": case.at(even),
            "tuned on the first prompt": case.at(tuned),
            "tuned on each prompt": case.at(own),
            "budget + tail": case.by_policy(MaskPolicy(**budget(**of_budget))),
            "budget + tail, heads share": case.by_policy(MaskPolicy(**budget(**of_budget, share="layer"))),
        }
        for name, measured in found.items():
            kinds.setdefault(name, []).append(measured)
    return {
        name: (geometric_mean([error[1:] for error, _ in each]), float(torch.stack([d[1:] for _, d in each]).mean()))
        for name, each in kinds.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=4, help="the first is tuned on, the others are measured")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    if options.prompts < 2:
        parser.error(f"--prompts must be at least 2, got {options.prompts}")
    on_gpu = torch.device(options.device).type == "cuda"
    device = torch.cuda.get_device_name(options.device) if on_gpu else "CPU"
    pipeline = load_pipeline(options.device)
    pipeline.set_progress_bar_config(disable=True)
    with torch.no_grad():
        caught = capture(pipeline, make_pairs(options.prompts), SEEN_STEPS, size=Size(), steps=CAPTURE_STEPS)
        found = compared([Case(one) for one in caught.values()])
    print(f"{device}, float32, torch {torch.__version__}, commit {commit_here()}. {options.prompts} prompts.\n")
    print("| quotas of heads | density | error | error / that of the same for all |\n|---|---|---|---|")
    base = found["the same for all heads"][0]
    for name, (errors, spent) in found.items():
        ratio = (errors / base).log()
        mean, low, high = interval(ratio.tolist())
        ends = f" ({torch.tensor(low).exp():.2f} to {torch.tensor(high).exp():.2f})" if low < high else ""
        print(f"| {name} | {spent:.3f} | {errors.log().mean().exp():.3f} | {torch.tensor(mean).exp():.2f}{ends} |")


if __name__ == "__main__":
    main()
