"""Wrong arguments are named, with the rule and what came."""

import dataclasses
import os
import subprocess
import sys

import pytest
import torch

from psa_kernels import (
    BlockLayout,
    LevelPlan,
    block_importance,
    checks,
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
from psa_kernels.checks import MAX_HEAD_DIM
from psa_kernels.testing import make_qkv

Q, K, V = make_qkv(q_len=40, head_dim=16)
LEVELS = torch.ones(1, 2, 2, 2, dtype=torch.int8)
ATTENTION = {"block_q": 32, "block_kv": 32}
ONE_IS_7 = LEVELS + 6 * torch.eye(2, dtype=torch.int8)
SCORES = torch.ones(4)
SQUARE = torch.eye(4)
ORDER = torch.arange(40).expand(1, 2, 40)
WANTS_GRAD = Q.clone().requires_grad_()
PYRAMID = pool_pyramid(K, block_kv=32, num_levels=2)
PLAN = LevelPlan.from_levels(LEVELS, BlockLayout(40, 40, **ATTENTION))


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (TypeError, "query must be a tensor, got list", lambda: attend(query=[1])),
        (ValueError, r"query must have shape \[B, H, L, D\], got \[2, 40, 16\]", lambda: attend(query=Q[0])),
        (TypeError, "query must be float16.*got torch.int64", lambda: attend(query=Q.long())),
        (ValueError, "no empty dimension", lambda: attend(query=Q[:, :, :0])),
        (TypeError, "key must have query's dtype torch.float32, got torch.float16", lambda: attend(key=K.half())),
        (ValueError, "key must be on query's device cpu, got meta", lambda: attend(key=K.to("meta"))),
        (ValueError, "key must have query's batch size 1, got 2", lambda: attend(key=K.repeat(2, 1, 1, 1))),
        (ValueError, "key must have query's head_dim 16, got 8", lambda: attend(key=K[..., :8])),
        (ValueError, "heads must divide", lambda: attend(key=K.repeat(1, 2, 1, 1), value=V.repeat(1, 2, 1, 1))),
        (ValueError, "value must have key's shape", lambda: attend(value=V[:, :, :30])),
        (TypeError, "value must have query's dtype", lambda: attend(value=V.bfloat16())),
        (TypeError, "levels must be an int8 tensor or a LevelPlan, got list", lambda: attend(levels=[1])),
        (TypeError, "levels must be int8, got torch.int64", lambda: attend(levels=LEVELS.long())),
        (ValueError, r"levels must have shape \[B, H, 2, 2\]", lambda: attend(levels=LEVELS[..., :1])),
        (ValueError, "^levels must have query's number of heads 2, got 1$", lambda: attend(levels=LEVELS[:, :1])),
        (ValueError, "^levels must have query's batch size 1, got 2$",
            lambda: attend(levels=LEVELS.repeat(2, 1, 1, 1))),
        (ValueError, "^levels must be on query's device cpu, got meta$", lambda: attend(levels=LEVELS.to("meta"))),
        (TypeError, "query must be a strided tensor, got layout torch.sparse_coo", lambda: attend(query=Q.to_sparse())),
        (TypeError, "levels must be a strided tensor, got", lambda: attend(levels=LEVELS.to_sparse())),
        (TypeError, "kv_lengths must be a strided tensor, got",
            lambda: attend(kv_lengths=torch.tensor([40]).to_sparse())),
        (ValueError, r"levels must lie in 0..num_levels = 6, got values from 1 to 7", lambda: attend(levels=ONE_IS_7)),
        (ValueError, r"levels must lie in 0..num_levels", lambda: attend(levels=-LEVELS)),
        (ValueError, "plan's layout must be that of the call", lambda: attend(levels=PLAN, block_q=64)),
        (ValueError, "block_q must be a power of two of at most 256, got 48", lambda: attend(block_q=48)),
        (TypeError, "block_kv must be an integer, got float 32.0", lambda: attend(block_kv=32.0)),
        (ValueError, "num_levels must be at most log2.block_kv. . 1 = 6", lambda: attend(num_levels=7)),
        (ValueError, "num_levels must be at least 1, got 0", lambda: attend(num_levels=0)),
        (ValueError, "q_len must not exceed kv_len", lambda: attend(query=Q.repeat(1, 1, 2, 1), is_causal=True)),
        (TypeError, "kv_lengths must be an integer tensor", lambda: attend(kv_lengths=[40])),
        (TypeError, "kv_lengths must be int32 or int64", lambda: attend(kv_lengths=torch.ones(1))),
        (ValueError, r"kv_lengths must have shape \[1\]", lambda: attend(kv_lengths=torch.tensor([1, 2]))),
        (ValueError, "impl must be one of 'triton', 'torch', 'reference', got 'cuda'", lambda: attend(impl="cuda")),
        (ValueError, "pool_pyramid has no backward pass", lambda: pool_pyramid(WANTS_GRAD, block_kv=32, num_levels=2)),
        (ValueError, "num_levels must be at most", lambda: pool_pyramid(K, block_kv=32, num_levels=7)),
        (TypeError, "level must be an integer, got bool True", lambda: PYRAMID.counts(True)),
        (TypeError, "level must be an integer, got str '1'", lambda: PYRAMID.level("1")),
        (TypeError, "level must be an integer, got float 1.5", lambda: PYRAMID.level(1.5)),
        (ValueError, "level must lie in 1..2, got 3", lambda: PYRAMID.level(3)),
        (ValueError, "power of two", lambda: key_similarity(K, block_kv=33, num_levels=2)),
        (ValueError, "samples_q must be at most block_q 32, got 33", lambda: importance(samples_q=33)),
        (ValueError, "samples_kv must be at least 1, got 0", lambda: importance(samples_kv=0)),
        (ValueError, "method must be one of 'sampled', 'antidiagonal', got 'exact'",
            lambda: importance(method="exact")),
        (ValueError, "reduction must be one of 'max', 'mean', 'error', got 'sum'", lambda: importance(reduction="sum")),
        (TypeError, "is_causal must be a bool, got str 'no'", lambda: attend(is_causal="no")),
        (TypeError, "scale must be a number, got str 'a'", lambda: attend(scale="a")),
        (ValueError, "scale must be finite, got nan", lambda: importance(scale=float("nan"))),
        (TypeError, "layout must be a BlockLayout, got NoneType", lambda: LevelPlan.from_levels(LEVELS, None)),
        (ValueError, "levels must lie in 0..num_levels = 6", lambda: attend(levels=LEVELS + 8, impl="reference")),
        (ValueError, "levels must lie in 0..num_levels = 6", lambda: attend(levels=LEVELS + 8, is_causal=True)),
        (TypeError, "seed must be an integer", lambda: importance(seed=1.5)),
        (TypeError, "scores must be a tensor, got list", lambda: rank_levels([0.5], [1])),
        (TypeError, "scores must be float16.*got torch.int64", lambda: rank_levels(torch.ones(4).long(), [1])),
        (ValueError, r"scores must have shape \[..., n\].*got \[2, 0\]", lambda: rank_levels(torch.ones(2, 0), [1])),
        (ValueError, r"scores must have shape .*got \[\]", lambda: rank_levels(torch.tensor(1.0), [1])),
        (TypeError, "counts must be a sequence of integers, got int", lambda: rank_levels(SCORES, 3)),
        (ValueError, "counts must hold 1 to 9 integers, got 0", lambda: rank_levels(SCORES, [])),
        (ValueError, "counts must hold 1 to 9 integers, got 10", lambda: rank_levels(SCORES, [1] * 10)),
        (TypeError, r"counts\[1\] must be an integer, got float 2.0", lambda: rank_levels(SCORES, [1, 2.0])),
        (ValueError, "counts must not decrease from 0 on, got 1 after 2", lambda: rank_levels(SCORES, [2, 1])),
        (ValueError, "counts must not decrease from 0 on, got -1 after 0", lambda: rank_levels(SCORES, [-1])),
        (TypeError, "counts must be int32 where they are a tensor, got torch.int64",
            lambda: rank_levels(SCORES[None], torch.ones(1, 1, dtype=torch.int64))),
        (ValueError, r"counts must have shape \[1, 1 to 9\].*got \[2, 1\] with scores \[1, 4\]",
            lambda: rank_levels(SCORES[None], torch.ones(2, 1, dtype=torch.int32))),
        (ValueError, r"first axis of at least two, got \[4, 1\] with scores \[4\]",
            lambda: rank_levels(SCORES, torch.ones(4, 1, dtype=torch.int32))),
        (ValueError, "counts must be on scores' device cpu, got meta",
            lambda: rank_levels(SCORES[None], torch.ones(1, 1, dtype=torch.int32, device="meta"))),
        (ValueError, r"counts must not decrease from 0 on, got \[\[2, 1\]\]",
            lambda: rank_levels(SCORES[None], torch.tensor([[2, 1]], dtype=torch.int32))),
        (ValueError, "impl must be one of 'triton'", lambda: rank_levels(SCORES, [1], impl="numpy")),
        (TypeError, "rank_levels takes float16.*got torch.float64",
            lambda: rank_levels(SCORES.double(), [1], impl="triton")),
        (TypeError, "scores must be a tensor, got list", lambda: share_levels([0.5], [0.5])),
        (TypeError, "scores must be float16.*got torch.int64", lambda: share_levels(torch.ones(4).long(), [0.5])),
        (ValueError, r"scores must have shape \[..., n\] with n from 1 to 4194304, got \[2, 0\]",
            lambda: share_levels(torch.ones(2, 0), [0.5])),
        (ValueError, r"n from 1 to 4194304, got \[4194305\]",
            lambda: share_levels(torch.ones(1).expand(2**22 + 1), [0.5])),
        (TypeError, "shares must be a sequence of numbers, got float", lambda: share_levels(SCORES, 0.5)),
        (ValueError, "shares must hold 1 to 9 numbers, got 0", lambda: share_levels(SCORES, [])),
        (ValueError, "shares must hold 1 to 9 numbers, got 10", lambda: share_levels(SCORES, [0.5] * 10)),
        (TypeError, r"shares\[1\] must be a number, got bool True", lambda: share_levels(SCORES, [0.5, True])),
        (ValueError, r"shares\[0\] must be in \[0, 1\], got nan", lambda: share_levels(SCORES, [float("nan")])),
        (ValueError, "shares must not decrease, got 0.4 after 0.5", lambda: share_levels(SCORES, [0.5, 0.4])),
        (ValueError, r"min_first must be in \[0, 1\], got 1.5", lambda: share_levels(SCORES, [0.5], min_first=1.5)),
        (TypeError, "min_first must be a number, got str 'a'", lambda: share_levels(SCORES, [0.5], min_first="a")),
        (TypeError, "lengths must be an integer tensor or None, got list",
            lambda: share_levels(SCORES[None], [0.5], lengths=[4])),
        (TypeError, "lengths must be int32 or int64, got torch.float32",
            lambda: share_levels(SCORES[None], [0.5], lengths=torch.ones(1))),
        (ValueError, r"lengths must have shape \[scores.shape\[0\]\].*got \[2\] with scores \[1, 4\]",
            lambda: share_levels(SCORES[None], [0.5], lengths=torch.tensor([1, 2]))),
        (ValueError, r"first axis of at least two, got \[4\] with scores \[4\]",
            lambda: share_levels(SCORES, [0.5], lengths=torch.tensor([1] * 4))),
        (ValueError, "lengths must be on scores' device cpu, got meta",
            lambda: share_levels(SCORES[None], [0.5], lengths=torch.tensor([4], device="meta"))),
        (ValueError, "impl must be one of 'triton'", lambda: share_levels(SCORES, [0.5], impl="numpy")),
        (ValueError, r"x must have shape \[B, H, L, D\]", lambda: kmeans(K[0], 2)),
        (ValueError, "num_clusters must be at least 1, got 0", lambda: kmeans(K, 0)),
        (ValueError, "num_clusters must be at most the 40 tokens of x, got 41", lambda: kmeans(K, 41)),
        (TypeError, "num_clusters must be an integer, got float 2.0", lambda: kmeans(K, 2.0)),
        (ValueError, "num_iterations must be at least 1, got 0", lambda: kmeans(K, 2, num_iterations=0)),
        (TypeError, "seed must be an integer", lambda: kmeans(K, 2, seed=0.5)),
        (TypeError, "centroids must be a tensor or None, got list", lambda: kmeans(K, 2, centroids=[1])),
        (TypeError, "centroids must be torch.float32 with x in torch.float16, got torch.float16",
            lambda: kmeans(K.half(), 2, centroids=K[:, :, :2].half())),
        (ValueError, r"centroids must have shape .* = \[1, 2, 2, 16\], got \[1, 2, 3, 16\]",
            lambda: kmeans(K, 2, centroids=K[:, :, :3])),
        (ValueError, "centroids must be on x's device cpu, got meta",
            lambda: kmeans(K, 2, centroids=K[:, :, :2].to("meta"))),
        (ValueError, "kmeans takes float16, .* up to 256, got torch.float64",
            lambda: kmeans(K.double(), 2, impl="triton")),
        (ValueError, "impl must be one of 'triton'", lambda: kmeans(K, 2, impl="numpy")),
        (TypeError, "points must be a tensor, got list", lambda: kd_tree([1])),
        (TypeError, "points must be float16.*got torch.int64", lambda: kd_tree(torch.ones(4, 2).long())),
        (ValueError, r"points must have shape \[..., n, m\] .*got \[4\]", lambda: kd_tree(SCORES)),
        (ValueError, r"points must have shape \[..., n, m\] .*got \[4, 0\]", lambda: kd_tree(torch.ones(4, 0))),
        (ValueError, r"n of points \[..., n, m\] must be a power of two of at most 256, got 40", lambda: kd_tree(K)),
        (ValueError, "n of points .* at most 256, got 512", lambda: kd_tree(torch.ones(512, 2))),
        (ValueError, "kd_tree takes up to 16384 coordinates a block.*got 256 tokens with 65",
            lambda: kd_tree(torch.ones(256, 65), impl="triton")),
        (ValueError, "impl must be one of 'triton'", lambda: kd_tree(torch.ones(4, 2), impl="numpy")),
        (TypeError, "seen must be a tensor, got list", lambda: leading_directions([1], SQUARE, 1)),
        (TypeError, "spread must be float32 or float64, got torch.float16",
            lambda: leading_directions(SQUARE, SQUARE.half(), 1)),
        (ValueError, r"seen must have shape \[..., D, D\] .*got \[1, 2, 40, 16\]",
            lambda: leading_directions(K, SQUARE, 1)),
        (ValueError, r"spread must have seen's shape \[4, 4\], got \[1, 4, 4\]",
            lambda: leading_directions(SQUARE, SQUARE[None], 1)),
        (TypeError, "spread must have seen's dtype torch.float32, got torch.float64",
            lambda: leading_directions(SQUARE, SQUARE.double(), 1)),
        (TypeError, "num_directions must be an integer, got float 2.0",
            lambda: leading_directions(SQUARE, SQUARE, 2.0)),
        (ValueError, "num_directions must be 1 to the 4 features of seen, got 5",
            lambda: leading_directions(SQUARE, SQUARE, 5)),
        (ValueError, "takes float32 of up to 256 features and 32 directions, got torch.float64, 4 and 1",
            lambda: leading_directions(SQUARE.double(), SQUARE.double(), 1, impl="triton")),
        (ValueError, "impl must be one of 'triton'", lambda: leading_directions(SQUARE, SQUARE, 1, impl="numpy")),
        (ValueError, r"x must have shape \[B, H, L, D\]", lambda: permute_tokens(K[0], ORDER)),
        (TypeError, "order must be a tensor, got list", lambda: permute_tokens(K, [1])),
        (TypeError, "order must be int64, got torch.int32", lambda: permute_tokens(K, ORDER.int())),
        (ValueError, r"order must have shape \[B, H, L\] of x, \[1, 2, 40\], got \[1, 1, 40\]",
            lambda: permute_tokens(K, ORDER[:, :1])),
        (ValueError, "order must be on x's device cpu, got meta", lambda: permute_tokens(K, ORDER.to("meta"))),
        (ValueError, "impl must be one of 'triton'", lambda: permute_tokens(K, ORDER, impl="numpy")),
        (ValueError, "q_len must be at least 1, got 0", lambda: BlockLayout(0, 4)),
        (TypeError, "kv_len must be an integer", lambda: BlockLayout(4, 4.0)),
        (TypeError, "levels must be an int8 tensor, got list", lambda: PLAN.layout.executed_levels([[1]])),
        (ValueError, r"levels must have shape \[..., 2, 2\] with BlockLayout.*, got \[1, 2, 2, 1\]",
            lambda: PLAN.layout.executed_levels(LEVELS[..., :1])),
        (TypeError, "indices must be an int32 tensor, got NoneType", lambda: change_plan(indices=None)),
        (TypeError, "indices must be an int32 tensor, got torch.int64",
            lambda: change_plan(indices=PLAN.indices.long())),
        (ValueError, r"indices must have shape \[B, H, 2, 2\] with .*, got \[1, 2, 2, 1\]",
            lambda: change_plan(indices=PLAN.indices[..., :1])),
        (ValueError, r"offsets must have shape \[B, H, 2, 7\] with .*, got \[1, 2, 2, 3\]",
            lambda: change_plan(offsets=PLAN.offsets[..., :3])),
        (ValueError, r"offsets must have indices' batch and heads \[1, 2\], got \[1, 1\]",
            lambda: change_plan(offsets=PLAN.offsets[:, :1])),
        (ValueError, "offsets must be on indices' device cpu, got meta",
            lambda: change_plan(offsets=PLAN.offsets.to("meta"))),
        (TypeError, "layout must be a BlockLayout, got int", lambda: change_plan(layout=3)),
    ],
)  # fmt: skip
def test_message(error, message, call):
    with pytest.raises(error, match=message):
        call()


def change_plan(**fields):
    return dataclasses.replace(PLAN, **fields)


def attend(query=Q, key=K, value=V, levels=LEVELS, **options):
    return pyramid_attention(query, key, value, levels, **(ATTENTION | options))


def importance(query=Q, **options):
    sizes = {"block_q": 32, "block_kv": 32, "samples_q": 8, "samples_kv": 8}
    return block_importance(query, query, **(sizes | options))


def test_triton_asked_for_by_name_never_falls_back():
    """In a process of its own: whether kernels are interpreted is settled when Triton is first imported."""
    code = (
        "import torch; from psa_kernels import pyramid_attention; x = torch.zeros(1, 1, 16, 16); "
        "pyramid_attention(x, x, x, torch.ones(1, 1, 1, 1, dtype=torch.int8), impl='triton')"
    )
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert run.returncode != 0
    assert "ValueError: impl='triton' needs tensors on a GPU, got cpu" in run.stderr


def test_triton_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match=f"takes float16, bfloat16 or float32 with head_dim up to {MAX_HEAD_DIM}"):
        pyramid_attention(Q.double(), K.double(), V.double(), PLAN, **ATTENTION, impl="triton")


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("argument", "call"),
    [
        ("query", lambda x: pyramid_attention(x, x, x, PLAN, **ATTENTION, impl="triton")),
        ("query", lambda x: importance(query=x, impl="triton")),
        ("query", lambda x: importance(query=x, method="antidiagonal", impl="triton")),
        ("key", lambda x: key_similarity(x, block_kv=32, num_levels=2, impl="triton")),
        ("x", lambda x: pool_pyramid(x, block_kv=32, num_levels=2, impl="triton")),
        ("x", lambda x: kmeans(x, 2, impl="triton")),
        ("scores", lambda x: rank_levels(x, [1], impl="triton")),
        ("scores", lambda x: share_levels(x, [0.5], impl="triton")),
        ("x", lambda x: permute_tokens(x, ORDER, impl="triton")),
        ("points", lambda x: kd_tree(x[:, :, :32], impl="triton")),
    ],
)
def test_the_interpreter_refuses_bfloat16(argument, call):
    rule = f"{argument} must be float16 or float32 with impl='triton' in Triton's interpreter.*got torch.bfloat16"
    with pytest.raises(TypeError, match=rule):
        call(Q.bfloat16())


@pytest.mark.interpreter
def test_an_open_choice_is_torch_for_bfloat16_in_the_interpreter(monkeypatch):
    """As on a GPU whose kernels are interpreted: the CPU passes for one."""
    monkeypatch.setattr(checks, "gpu_capability", lambda device: checks.MIN_CAPABILITY)
    monkeypatch.setattr(checks, "resolve_impl", lambda impl, tensor: impl or checks.AUTO)
    x = Q.bfloat16()
    assert torch.equal(importance(query=x), importance(query=x, impl="torch"))


def test_bfloat16_is_for_triton_where_nothing_is_interpreted(monkeypatch):
    triton_device = pytest.importorskip("psa_kernels.triton_device", reason="Triton is not published for this platform")
    monkeypatch.setattr(triton_device, "is_interpreted", lambda: False)
    assert checks.impl_for_dtype("triton", True, "x", Q.bfloat16()) == "triton"
