"""Inputs and the error budget that tests of the operators share. Needs torch alone."""

from collections.abc import Callable

import torch
from torch import Tensor

from psa_kernels.layout import BlockLayout


def make_qkv(
    *,
    batch: int = 1,
    heads: int = 2,
    kv_heads: int | None = None,
    q_len: int = 128,
    kv_len: int | None = None,
    head_dim: int = 32,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Random query ``[B, H, q_len, D]``, key and value ``[B, H_kv, kv_len, D]``, the same for the same seed.

    Neighbouring tokens are alike, as in video: a slow random walk under the noise.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    kv_len = q_len if kv_len is None else kv_len
    made = []
    for count, length in ((heads, q_len), (kv_heads or heads, kv_len), (kv_heads or heads, kv_len)):
        shape = (2, batch, count, length, head_dim)
        noise, steps = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
        made.append((0.7 * noise + 0.1 * steps.cumsum(dim=2)).to(device=device, dtype=dtype))
    return made[0], made[1], made[2]


def random_levels(
    layout: BlockLayout,
    *,
    batch: int = 1,
    heads: int = 2,
    device: str | torch.device = "cpu",
    seed: int = 0,
) -> Tensor:
    """A level map with every level and skips in it, int8 ``[B, H, num_q_blocks, num_kv_blocks]``."""
    generator = torch.Generator("cpu").manual_seed(seed)
    shape = (batch, heads, layout.num_q_blocks, layout.num_kv_blocks)
    return torch.randint(layout.num_levels + 1, shape, generator=generator, dtype=torch.int8, device="cpu").to(device)


def _at_odd_address(x: Tensor) -> Tensor:
    return x.new_empty(x.numel() + 1)[1:].view(x.shape).copy_(x)


# Ways in which a sequence ``[B, H, L, D]`` may lie in memory. The values stay, but for "expanded", where all heads have
# those of the first.
VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "fused": lambda x: torch.stack([x.transpose(1, 2)] * 3, dim=2)[:, :, 1].transpose(1, 2),
    "expanded": lambda x: x[:, :1].expand(x.shape),
    "features apart": lambda x: x.mT.contiguous().mT,
    # Neither is a whole number of 16 bytes, as copies by descriptor need.
    "padded rows": lambda x: torch.nn.functional.pad(x, (0, 1))[..., :-1],
    "odd address": _at_odd_address,
    # The stride of a dimension of size 1 means nothing.
    "odd stride of one sample": lambda x: x.as_strided(x.shape, (1, *x.stride()[1:])) if x.shape[0] == 1 else x,
}


def error_budget(ref64: Tensor, low: Tensor, eps: float) -> float:
    """``2 * (max|low - ref64| + eps * max|ref64|)``: what rounding to a precision may cost.

    Args:
        ref64: the oracle in float64.
        low: the oracle in the precision under test.
        eps: machine epsilon of that precision.
    """
    finite = ref64.isfinite()
    if not finite.any():
        return 0.0
    reference = ref64[finite]
    assert low[finite].isfinite().all(), "the low-precision oracle is not finite where the exact one is"
    return 2 * ((low.double()[finite] - reference).abs().max() + eps * reference.abs().max()).item()


def assert_within_error_budget(
    out: Tensor, ref64: Tensor, low: Tensor, *, input_dtype: torch.dtype | None = None
) -> None:
    """``out`` is no further from the oracle than rounding explains, and not finite only where the oracle is not.

    Args:
        out: the result under test.
        ref64: the oracle in float64, same shape.
        low: the oracle in the inputs' dtype.
        input_dtype: the inputs' dtype, whose epsilon counts; None is that of ``low``. Give it where a result is
            wider than the inputs, as a log-sum-exp is.
    """
    assert out.shape == ref64.shape, f"shape {list(out.shape)} instead of {list(ref64.shape)}"
    ref64, low = ref64.to(out.device), low.to(out.device)
    finite = ref64.isfinite()
    assert torch.equal(out[~finite].double(), ref64[~finite]), "differs from the oracle where that is not finite"
    assert out[finite].isfinite().all(), "not finite where the oracle is"
    if not finite.any():
        return
    error = (out.double() - ref64)[finite].abs()
    budget = error_budget(ref64, low, torch.finfo(input_dtype or low.dtype).eps)
    where = finite.nonzero()[error.argmax()].tolist()
    assert error.max() <= budget, f"error {error.max():.3e} exceeds the budget {budget:.3e}, worst at {where}"
