"""Files that the commands write: they load, they mean what they were made of, they are whole or absent."""

import os
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from psa_config import PresetError, PyramidSparseAttention, load_presets
from psa_config.__main__ import main
from psa_config.convert import Conversion, convert
from psa_config.positions import parse
from psa_config.template import template
from psa_config.writing import write

# In the form of the reference project's attention_config.yaml, with every key that it knows.
REFERENCE = """\
# a comment
Wan2.1_1.3b:
  default_attention: psa_balanced
  video_scale:
    width_divisor: 16
    height_divisor: 16
    depth_divisor: 4
  text_length: 0
  attention_configs:
    psa_balanced:
      type: psa
      description: "Balanced: #1"
      use_rearrange: true
      block_size:
        m: 128
        n: 128
        tile_n: 32
      mask_ratios:
        1: [0.0, 0.5]
        2: [0.5, 0.6]
        4: [0.6, 0.7]
        8: [0.7, 0.8]
        0: [0.8, 1.0]
      mask_mode: thresholdbound
      warmup_steps: 15
      rearrange_method: Gilbert
      tile_size: [2, 8, 8]
      use_sim_mask: true
      sim_thresholds: {x2: 0.7, x4: 0.65, x8: 0.6}
    baseline:
      type: dense
      description: "Dense"
CogVideo_5b:
  default_attention: few
  video_scale: {width_divisor: 16, height_divisor: 16, depth_divisor: 4}
  text_length: 226
  attention_configs:
    few:
      type: psa
      use_rearrange: false
      block_size: {m: 128, n: 32}
      mask_ratios: {8: [0.1, 0.35], 0: [0.35, 1.0], 1: [0.0, 0.1]}
      mask_mode: topk
      min_full_attn_ratio: 0.06
"""


@pytest.fixture
def converted(tmp_path: Path) -> Conversion:
    file = tmp_path / "attention_config.yaml"
    file.write_text(REFERENCE)
    return convert(file)


def test_a_converted_file_loads_and_means_the_same(converted: Conversion, tmp_path: Path) -> None:
    new = tmp_path / "new.yaml"
    new.write_text(converted.text)
    before, after = load_presets(tmp_path / "attention_config.yaml"), load_presets(new)
    assert after.models == before.models == ("Wan2.1_1.3b", "CogVideo_5b")
    for model in before.models:
        assert after.get(model) == before.get(model)
        assert after.presets(model) == before.presets(model)
        assert all(after.get(model, name) == before.get(model, name) for name in before.presets(model))


def test_every_field_that_changed_meaning_has_a_note(converted: Conversion) -> None:
    wan, cog = ("Wan2.1_1.3b",), ("CogVideo_5b",)
    balanced, few = (*wan, "attention_configs", "psa_balanced"), (*cog, "attention_configs", "few")
    assert {note.path for note in converted.notes} == {
        (*wan, "video_scale"),
        (*balanced, "use_rearrange"),
        (*balanced, "block_size", "tile_n"),
        (*balanced, "mask_ratios"),
        (*balanced, "warmup_steps"),
        (*cog, "video_scale"),
        (*cog, "text_length"),
        (*few, "block_size", "n"),
        (*few, "mask_ratios"),
        (*few, "min_full"),
    }
    notes = {note.path: note.text for note in converted.notes}
    assert "min_full: 0.06" in notes[(*balanced, "mask_ratios")]
    assert "A level left out (here 2, 4)" in notes[(*few, "mask_ratios")]
    assert "at level 8;" in notes[(*few, "block_size", "n")]
    comments = " ".join(line.strip(" #") for line in converted.text.splitlines() if line.strip().startswith("#"))
    assert all(note.text in comments for note in converted.notes)


def test_convert_refuses_what_check_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, out = tmp_path / "a.yaml", tmp_path / "out.yaml"
    file.write_text(REFERENCE.replace("mask_mode: topk", "mask_mode: top"))
    assert main(["convert", str(file), "--out", str(out)]) == 1
    assert f"{file}:43:18: CogVideo_5b.attention_configs.few.mask_mode" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize("model", load_presets().models)
def test_a_new_file_is_the_shipped_default_with_every_key(model: str, tmp_path: Path) -> None:
    file = tmp_path / "new.yaml"
    assert main(["new", str(file), "--model", model]) == 0
    book = load_presets(file)
    ours, shipped = book.get(model).attention, load_presets().get(model).attention
    same = {"description": "", "samples": None}
    assert ours.model_copy(update=same) == shipped.model_copy(update=same)
    text = file.read_text()
    with_budget = {"density", "budget_per"}
    assert all(f"`{name}: " in text for name in with_budget)
    assert all(f"      {name}:" in text for name in set(PyramidSparseAttention.model_fields) - with_budget)
    described = [name for name, field in PyramidSparseAttention.model_fields.items() if field.description]
    lines = text.splitlines()
    for name in set(described) - with_budget:
        at = next(i for i, line in enumerate(lines) if line.startswith(f"      {name}:"))
        assert lines[at - 1].startswith("      #")


def test_new_leaves_a_file_that_is_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "new.yaml"
    file.write_text("mine")
    assert main(["new", str(file)]) == 1
    message = f"file must be a file that is not there yet, and {file} is left as it is\n"
    assert capsys.readouterr().err == message
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("new.yaml", "mine")]


def test_new_leaves_a_link_to_nowhere_and_files_of_like_names(tmp_path: Path) -> None:
    link, part = tmp_path / "link.yaml", tmp_path / ".new.yaml.part"
    link.symlink_to("nowhere")
    part.write_text("mine")
    assert main(["new", str(link)]) == 1
    assert link.is_symlink()
    assert main(["new", str(tmp_path / "new.yaml")]) == 0
    assert part.read_text() == "mine"


def test_a_pipe_is_converted(tmp_path: Path, form: str, capsys: pytest.CaptureFixture[str]) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_text, args=(form,), daemon=True)
    writer.start()
    assert main(["convert", str(pipe)]) == 0
    writer.join()
    assert "# Converted from pipe." in capsys.readouterr().out


def test_a_full_disk_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(path: Path, text: str, encoding: str) -> None:
        path.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    file = tmp_path / "new.yaml"
    assert main(["new", str(file)]) == 1
    assert capsys.readouterr().err == f"file {file} was not written: No space left on device\n"
    assert not list(tmp_path.iterdir())


def test_new_without_a_file_prints(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["new"]) == 0
    assert capsys.readouterr().out == template("Wan2.1_1.3b")
    with pytest.raises(PresetError, match=r'did you mean "Wan2\.1_14b"'):
        template("wan2.1-14b")


NAMES = st.text(min_size=1, max_size=6).filter(lambda name: name != "<<" and name.isprintable()) | st.sampled_from(
    ["1", "1.0", "true", "null", "~", "-", "a: b", "#", "é\\u0085\\"]
)
VALUES = st.recursive(
    NAMES | st.booleans() | st.integers(-(10**6), 10**6) | st.floats(allow_nan=False, allow_infinity=False),
    lambda below: st.lists(below, max_size=3) | st.dictionaries(NAMES, below, max_size=3),
    max_leaves=8,
)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(values=st.dictionaries(NAMES, VALUES, min_size=1, max_size=4))
def test_what_is_written_reads_back(values: dict[str, object]) -> None:
    node, problems = parse(write(values, {}), "x")
    assert node is not None
    assert not problems
    assert node.plain() == tuples(values)


def tuples(value: object) -> object:
    if isinstance(value, dict):
        return {key: tuples(item) for key, item in value.items()}
    return tuple(map(tuples, value)) if isinstance(value, list) else value
