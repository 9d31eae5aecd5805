"""The examples run in their tiny form."""

import importlib.util
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_qwen2_5_vl(capsys: pytest.CaptureFixture[str]) -> None:
    spec = importlib.util.spec_from_file_location("qwen2_5_vl", EXAMPLES / "qwen2_5_vl.py")
    assert spec is not None
    assert spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        example.main(["--tiny", "--max-new-tokens", "4"])
    answer, summary = capsys.readouterr().out.splitlines()
    assert 1 <= len(answer.split(",")) <= 4
    assert summary.startswith("2566 tokens of prompt, density of their attention 0.")
    with pytest.raises(SystemExit):
        example.main([])
    assert "a video is needed, or --tiny" in capsys.readouterr().err
