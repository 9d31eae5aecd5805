from collections.abc import Callable
from pathlib import Path

import pytest

from psa_config import PresetBook, PresetError, Problem, load_presets

FORM = """\
Wan:
  default_attention: balanced
  video_scale:
    width_divisor: 16
    height_divisor: 16
    depth_divisor: 4
  text_length: 226
  attention_configs:
    balanced:
      type: psa
      description: "..."
      use_rearrange: true
      block_size:
        m: 128
        n: 64
        tile_n: 32
      mask_ratios:
        1: [0.0, 0.4]
        2: [0.4, 0.5]
        4: [0.5, 0.6]
        8: [0.6, 0.8]
        0: [0.8, 1.0]
      mask_mode: thresholdbound
      warmup_steps: 12
    baseline:
      type: dense
"""

Load = Callable[[str | bytes], PresetBook]
Problems = Callable[[str | bytes], tuple[Problem, ...]]


@pytest.fixture
def form() -> str:
    """A valid file; tests change a line of it."""
    return FORM


@pytest.fixture
def load(tmp_path: Path) -> Load:
    """Reads a text as a preset file."""

    def load(text: str | bytes) -> PresetBook:
        file = tmp_path / "attention_config.yaml"
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
        return load_presets(file)

    return load


@pytest.fixture
def problems(load: Load) -> Problems:
    """Everything wrong with a text, which must be refused."""

    def problems(text: str | bytes) -> tuple[Problem, ...]:
        with pytest.raises(PresetError) as caught:
            load(text)
        return caught.value.errors

    return problems
