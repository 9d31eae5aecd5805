"""`psa generate --presets`: a user's file of presets, on an untrained tiny model."""

import re
from pathlib import Path

import pytest

from psa_integrations.cli import main
from psa_integrations.tiny_wan import build_random_pipeline

FILE = """\
tiny-wan:
  attention_configs:
    half:
      type: psa
      use_rearrange: true
      block_size: {m: 32, n: 32}
      mask_ratios:
        1: [0.0, 0.5]
        0: [0.5, 1.0]
      mask_mode: topk
    dense:
      type: dense
"""


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    build_random_pipeline(num_attention_heads=1, num_layers=1, ffn_dim=32).save_pretrained(folder)
    return folder


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with the preset file `mine.yaml` in it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text(FILE)
    return tmp_path


def generate(weights: Path, *more: str) -> int:
    size = ["--frames", "4", "--width", "32", "--height", "16", "--steps", "1", "--quiet"]
    prompt = ["--prompt", "a red circle moving right", "--weights", str(weights), "--out", "video.mp4"]
    return main(["generate", *prompt, *size, *more])


# 4 frames of 8 by 4 tokens are 4 blocks of 32, of which a row keeps half.
@pytest.mark.parametrize(
    ("arguments", "name", "density"),
    [([], "half", "0.500"), (["--preset", "half"], "half", "0.500"), (["--preset", "dense"], "dense", "1.000")],
    ids=["default", "named", "dense"],
)
def test_the_preset_of_the_file_is_run(
    weights: Path, here: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], name: str, density: str
) -> None:
    assert generate(weights, "--presets", "mine.yaml", *arguments) == 0
    printed = capsys.readouterr().out
    assert re.fullmatch(rf"video\.mp4: 4 frames of 32x16, tiny-wan/{name}, [\d.]+ s, density {density}\n", printed)
    assert (here / "video.mp4").is_file()


@pytest.mark.parametrize(
    ("text", "arguments", "message"),
    [
        (
            FILE,
            ["--preset", "psa_balanced"],
            'mine.yaml: tiny-wan: no preset "psa_balanced", expected "half" or "dense"',
        ),
        (FILE, ["--model", "cogvideox-5b"], 'mine.yaml: no model "CogVideo_5b", expected "tiny-wan"'),
        (
            FILE.replace("m: 32", "m: 48").replace("type: dense", "type: dens"),
            [],
            "mine.yaml:6:23: tiny-wan.attention_configs.half.block_size.m: got 48, expected 32, 64 or 128 "
            'mine.yaml:12:13: tiny-wan.attention_configs.dense.type: got "dens", expected "dense" or "psa", '
            'did you mean "dense"?',
        ),
        (
            FILE.replace(
                "use_rearrange: true", "use_rearrange: true\n      rearrange_method: Semantic\n      num_clusters: 129"
            ),
            [],
            "tiny-wan/half: num_clusters must be at most the 128 video tokens of "
            "VideoGrid(frames=4, height=4, width=8, text=0, text_first=True), got 129",
        ),
        (None, [], "mine.yaml: cannot be read: No such file or directory"),
    ],
    ids=["unknown preset", "unknown model", "two mistakes", "more clusters than tokens", "no file"],
)
def test_an_error_is_one_line_and_leaves_nothing(
    here: Path, capsys: pytest.CaptureFixture[str], text: str | None, arguments: list[str], message: str
) -> None:
    file = here / "mine.yaml"
    file.unlink() if text is None else file.write_text(text)
    before = list(here.iterdir())
    assert generate(here, "--presets", "mine.yaml", *arguments) == 1
    assert capsys.readouterr().err == f"psa: error: {message}\n"
    assert list(here.iterdir()) == before
