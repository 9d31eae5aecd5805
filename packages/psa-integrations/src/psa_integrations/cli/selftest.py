"""Every operator and its gradients against its oracle, on the device that a run would use."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from psa_kernels import (
    BlockLayout,
    KMeans,
    LevelPlan,
    block_importance,
    kd_tree,
    key_similarity,
    kmeans,
    leading_directions,
    permute_tokens,
    pool_pyramid,
    pyramid_attention,
    rank_levels,
    share_levels,
)
from psa_kernels import checks as kernel_checks
from psa_kernels.testing import assert_within_error_budget, make_qkv, random_levels

_LENGTH, _BLOCK, _LEVELS, _SAMPLES, _CLUSTERS, _DIRECTIONS = 600, 64, 4, 16, 40, 8  # the last block is short


@dataclass(frozen=True)
class OperatorCheck:
    """One operator on one device; `problem` is empty where it agrees with the oracle."""

    operator: str
    impl: str
    dtype: str
    problem: str


def check_operators(device: torch.device) -> list[OperatorCheck]:
    """Runs each operator, and the gradients of attention, as `impl=None` would, against the oracle on the CPU.

    In float32, and on a GPU in bfloat16 too; compiles what Triton has to. What goes wrong, whatever it is, is said in
    the results and not raised.
    """
    impl = kernel_checks.impl_to_run(kernel_checks.AUTO, device)
    found = []
    for dtype in (torch.float32,) if device.type == "cpu" else (torch.float32, torch.bfloat16):
        for operator, check in _checks(device, dtype):
            problem = ""
            try:
                check()
            except Exception as error:  # a compiler may fail in any way, and a doctor has to say how
                problem = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            found.append(OperatorCheck(operator, impl, str(dtype).removeprefix("torch."), problem))
    return found


def _checks(device: torch.device, dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], None]]]:
    """Name and check of each operator; a check raises where the operator is wrong."""
    query, key, value = make_qkv(heads=4, kv_heads=2, q_len=_LENGTH, head_dim=64, dtype=dtype)
    layout = BlockLayout(_LENGTH, _LENGTH, block_q=_BLOCK, block_kv=_BLOCK, num_levels=_LEVELS)
    levels = random_levels(layout, heads=4)

    def pool(x: Tensor, impl: str | None) -> Tensor:
        return pool_pyramid(x, block_kv=_BLOCK, num_levels=_LEVELS, impl=impl).pooled

    def similarity(x: Tensor, impl: str | None) -> Tensor:
        return key_similarity(x, block_kv=_BLOCK, num_levels=_LEVELS, impl=impl)

    def directions(seen: Tensor, spread: Tensor, impl: str | None) -> Tensor:
        return leading_directions(seen, spread, _DIRECTIONS, impl=impl)

    def importance(q: Tensor, k: Tensor, impl: str | None, method: str = "sampled") -> Tensor:
        return block_importance(
            q,
            k,
            block_q=_BLOCK,
            block_kv=_BLOCK,
            samples_q=_SAMPLES,
            samples_kv=_SAMPLES,
            method=method,
            impl=impl,
        )

    def attention(q: Tensor, k: Tensor, v: Tensor, at: Tensor, impl: str | None) -> tuple[Tensor, Tensor]:
        both = pyramid_attention(
            q, k, v, at, block_q=_BLOCK, block_kv=_BLOCK, num_levels=_LEVELS, return_lse=True, impl=impl
        )
        assert isinstance(both, tuple)
        return both

    def check_rank() -> None:
        scores = torch.rand(4, 100, generator=torch.Generator().manual_seed(0))
        counts = (5, 10, 10, 40)
        _assert_equal(rank_levels(scores.to(device), counts), rank_levels(scores, counts, impl="reference"))

    def check_share() -> None:
        scores = torch.rand(4, 100, generator=torch.Generator().manual_seed(0))
        shares = (0.2, 0.5, 0.5, 0.9)
        _assert_equal(share_levels(scores.to(device), shares), share_levels(scores, shares, impl="reference"))

    def check_plan() -> None:
        plan, exact = (
            LevelPlan.from_levels(levels.to(device), layout),
            LevelPlan.from_levels(levels, layout, impl="reference"),
        )
        _assert_equal(plan.offsets, exact.offsets)
        _assert_equal(plan.to_levels(), levels)

    def check_attention() -> None:
        got = attention(query.to(device), key.to(device), value.to(device), levels.to(device), None)
        exact = attention(query.double(), key.double(), value.double(), levels, "reference")
        low = attention(query, key, value, levels, "reference")
        for out, ref64, rounded in zip(got, exact, low, strict=True):
            assert_within_error_budget(out, ref64, rounded, input_dtype=dtype)

    def gradients(q: Tensor, k: Tensor, v: Tensor, at: Tensor, impl: str | None) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(0)
        with torch.enable_grad():
            q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
            results = attention(q, k, v, at, impl)
            # The same gradients of the results in every precision.
            given = [torch.randn(x.shape, generator=generator).to(dtype).to(x) for x in results]
            return torch.autograd.grad(results, (q, k, v), given)

    def check_gradients() -> None:
        got = gradients(query.to(device), key.to(device), value.to(device), levels.to(device), None)
        exact = gradients(query.double(), key.double(), value.double(), levels, "reference")
        low = gradients(query, key, value, levels, "reference")
        for gradient, ref64, rounded in zip(got, exact, low, strict=True):
            assert_within_error_budget(gradient, ref64, rounded)

    def check_kmeans() -> None:
        # Small whole numbers, among which distances are exact, so that clusters are equal and not only alike.
        drawn = torch.randint(-1, 2, key.shape, generator=torch.Generator().manual_seed(0))
        start = drawn[:, :, :_CLUSTERS].float()

        def cluster(x: Tensor, centroids: Tensor, impl: str | None) -> KMeans:
            return kmeans(x, _CLUSTERS, centroids=centroids, num_iterations=1, impl=impl)

        got = cluster(drawn.to(device, dtype), start.to(device), None)
        exact = cluster(drawn.double(), start.double(), "reference")
        low = cluster(drawn.to(dtype), start, "reference")
        _assert_equal(got.assignments, exact.assignments)
        _assert_equal(got.counts, exact.counts)
        assert_within_error_budget(got.centroids, exact.centroids, low.centroids)

    def check_tree() -> None:
        points = key[:, :, : 2 * _BLOCK, :_DIRECTIONS].unflatten(2, (2, _BLOCK))
        _assert_equal(kd_tree(points.to(device)), kd_tree(points, impl="reference"))

    def check_permutation() -> None:
        order = key[..., 0].argsort(dim=2, stable=True)
        got = permute_tokens(value.to(device), order.to(device))
        _assert_equal(got, permute_tokens(value, order, impl="reference"))

    yield "pool_pyramid", lambda: _check(pool, [key], device)
    yield "key_similarity", lambda: _check(similarity, [key], device)
    yield "block_importance", lambda: _check(importance, [query, key], device)
    antidiagonal = partial(importance, method="antidiagonal")
    yield "block_importance antidiagonal", lambda: _check(antidiagonal, [query, key], device)
    yield "rank_levels", check_rank
    yield "share_levels", check_share
    yield "LevelPlan", check_plan
    yield "pyramid_attention", check_attention
    yield "pyramid_attention gradients", check_gradients
    yield "kmeans", check_kmeans
    drawn = torch.randn(2, 3 * _BLOCK, _BLOCK, generator=torch.Generator().manual_seed(0))
    moments = list(drawn.mT @ drawn)
    yield "leading_directions", lambda: _check(directions, moments, device)
    yield "kd_tree", check_tree
    yield "permute_tokens", check_permutation


def _check(operator: Callable[..., Tensor], inputs: list[Tensor], device: torch.device) -> None:
    got = operator(*(x.to(device) for x in inputs), None)
    exact = operator(*(x.double() for x in inputs), "reference")
    low = operator(*inputs, "reference")
    assert_within_error_budget(got, exact, low, input_dtype=inputs[0].dtype)


def _assert_equal(got: Tensor, exact: Tensor) -> None:
    if not torch.equal(got.cpu(), exact):
        raise AssertionError(f"{int((got.cpu() != exact).sum())} of {exact.numel()} values differ from the oracle")
