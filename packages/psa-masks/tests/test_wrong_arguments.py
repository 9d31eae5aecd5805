"""Arguments of another type or out of range are named, with the rule and what came."""

from collections.abc import Callable

import pytest
import torch

from psa_kernels import BlockLayout
from psa_masks import (
    AttentionOrder,
    HeadOrder,
    MaskPolicy,
    SemanticOrder,
    TokenOrder,
    VideoGrid,
    cap_by_similarity,
    density,
    keep_full,
    levels_by_quota,
    levels_by_threshold,
    skip_to_mean,
)
from psa_masks.plot import level_image

LEVELS = torch.ones(1, 1, 2, 2, dtype=torch.int8)
LAYOUT = BlockLayout(16, 16, block_q=8, block_kv=8)
ORDER = TokenOrder.identity(4)
HEADS = HeadOrder(torch.arange(4).view(1, 1, 4))
GRID = VideoGrid(frames=1, height=2, width=2)
X = torch.zeros(1, 1, 4, 2)


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (TypeError, "text_first must be a bool, got 'no'",
            lambda: VideoGrid(frames=1, height=1, width=1, text_first="no")),
        (TypeError, "diagonal must be a bool, got 1", lambda: keep_full(LEVELS, LAYOUT, diagonal=1)),
        (ValueError, "levels must lie in 0..num_levels = 9, got values from -1 to -1", lambda: density(-LEVELS)),
        (ValueError, "levels must lie in 0..num_levels = 9, got values from 100 to 100", lambda: density(100 * LEVELS)),
        (ValueError, "levels must lie in 0..num_levels = 9", lambda: skip_to_mean(-LEVELS, 8)),
        (ValueError, "levels must lie in 0..num_levels = 9",
            lambda: cap_by_similarity(-LEVELS, torch.ones(1, 1, 2, 1), [0.5])),
        (TypeError, "importance must be float16, .* got torch.float8_e4m3fn",
            lambda: levels_by_threshold(torch.ones(4).to(torch.float8_e4m3fn), [0.5])),
        (TypeError, "importance must be a strided tensor, got layout torch.sparse_coo",
            lambda: levels_by_quota(torch.ones(4).to_sparse(), [0.5])),
        (TypeError, "levels must be a strided tensor, got", lambda: density(LEVELS.to_sparse())),
        (TypeError, "levels must be a strided tensor, got", lambda: level_image(LEVELS.to_sparse())),
        (TypeError, "bounds must be a sequence, got 0.3", lambda: MaskPolicy(mode="budget", density=0.5, bounds=0.3)),
        (TypeError, "bounds must be a sequence, got None", lambda: MaskPolicy(mode="budget", density=0.5, bounds=None)),
        (TypeError, "dim must be an integer, got float 1.0", lambda: ORDER.apply(X, 1.0)),
        (TypeError, "dim must be an integer, got str '0'", lambda: ORDER.undo(X, "0")),
        (TypeError, "x must be a strided tensor, got", lambda: ORDER.apply(X.to_sparse(), 2)),
        (TypeError, "dim must be an integer, got str '2'", lambda: HEADS.apply(X, "2")),
        (TypeError, "query must be a TokenOrder, a HeadOrder or None, got str", lambda: AttentionOrder("x", "y")),
        (TypeError, "key must be a TokenOrder, a HeadOrder or None, got list", lambda: AttentionOrder(None, [0])),
        (TypeError, "centroids must be a tensor, got list", lambda: SemanticOrder(HEADS.order, [0])),
        (TypeError, "grid must be a psa_masks.VideoGrid, got int", lambda: TokenOrder.of_video(4, torch.arange(4))),
        (TypeError, "video must be an int64 tensor, got torch.float32",
            lambda: TokenOrder.of_video(GRID, torch.arange(4.0))),
        (ValueError, r"video must have shape \[4\] for VideoGrid.*got \[1\]",
            lambda: TokenOrder.of_video(GRID, torch.zeros(1, dtype=torch.int64))),
    ],
)  # fmt: skip
def test_message(error: type[Exception], message: str, call: Callable[[], object]) -> None:
    with pytest.raises(error, match=message):
        call()
