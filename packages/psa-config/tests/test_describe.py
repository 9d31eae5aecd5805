"""A preset in words says each of its decisions."""

import pytest

from psa_config import load_presets
from psa_config.describe import describe


@pytest.mark.parametrize(
    ("model", "preset", "said"),
    [
        ("Wan2.1_1.3b", "baseline", ["Dense attention, unchanged"]),
        (
            "Wan2.1_1.3b",
            "psa_balanced",
            [
                "block of 128 queries",
                "share of the importance: up to 0.5 whole, up to 0.6 as means of 2 keys, up to 0.7 as means of 4, "
                "up to 0.8 as means of 8, the rest skipped.",
                "0.7 for means of 2, 0.65 for 4, 0.6 for 8",
                "Hilbert-like curve",
                "Dense steps: the first 15.",
            ],
        ),
        ("CogVideo_5b", "psa_balanced", ["up to 0.15 as means of 2 keys, up to 0.35 as means of 8", "model's order"]),
        ("CogVideo_5b", "psa_4steps", ["share of the number of blocks", "Every step is sparse."]),
        ("tiny-wan", "psa_tail", ["the rest coarsest", "read as one row, its mean", "16 queries of a block"]),
    ],
)
def test_what_is_said(model: str, preset: str, said: list[str]) -> None:
    text = "\n".join(describe(load_presets().get(model, preset)))
    assert all(words in text for words in said), text


def test_what_is_not_the_default_is_said() -> None:
    preset = load_presets().get("tiny-wan", "psa_balanced")
    changes = {
        "rearrange_method": "Cube",
        "cooldown_steps": 2,
        "dense_layers": (0, 3),
        "min_full": 0.06,
        "importance_method": "antidiagonal",
    }
    attention = preset.attention.model_copy(update=changes)
    text = "\n".join(describe(preset.model_copy(update={"attention": attention})))
    for words in ("cubes of 2 frames, 8 rows", "the last 2", "Dense layers: 0, 3", "At least 0.06", "antidiagonals"):
        assert words in text
