"""`psa compare` on an untrained tiny model: what it writes, what it refuses, what it leaves behind."""

import json
import re
from pathlib import Path
from typing import Any

import imageio.v3 as iio
import pytest

from psa_config import Preset
from psa_integrations.cli import build_parser, compare, main
from psa_integrations.cli.sample import sample
from psa_integrations.tiny_wan import build_random_pipeline

SIZE = ["--frames", "4", "--width", "32", "--height", "16", "--steps", "7", "--quiet"]
PROMPT = ["--prompt", "a red circle moving right"]
DEEP = """
tiny-wan:
  attention_configs:
    mine:
      type: psa
      use_rearrange: false
      block_size: {m: 64, n: 64}
      mask_ratios: {1: [0.0, 0.5]}
      mask_mode: topk
      dense_layers: [2]
"""


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("weights")
    build_random_pipeline(num_attention_heads=2, num_layers=2, ffn_dim=32).save_pretrained(folder)
    return str(folder)


def error_line(capsys: pytest.CaptureFixture[str]) -> str:
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("psa: "))
    return line


def test_prompts_and_presets_give_videos_numbers_and_a_page(
    weights: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = tmp_path / "prompts.txt", tmp_path / "out"
    file.write_text("\ufeff\na blue ring\n\n", encoding="utf-8")
    out.mkdir()
    presets = ["--preset", "psa_balanced", "--preset", "psa_tail"]
    more = ["--prompt-file", str(file), "--weights", weights, "--out", str(out), "--seed", "3", "--map-heads", "1"]
    assert main(["compare", *PROMPT, *presets, *more, *SIZE]) == 0

    names = [f"{n}-{i}-{name}.mp4" for n in (1, 2) for i, name in enumerate(("dense", "psa_balanced", "psa_tail"))]
    assert sorted(path.name for path in out.iterdir()) == sorted([*names, "metrics.json", "report.html"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "prompts.txt"]
    assert iio.imread(out / names[-1]).shape == (4, 16, 32, 3)
    metrics: dict[str, Any] = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
    assert (metrics["model"], metrics["seed"], metrics["steps"]) == ("tiny-wan", 3, 7)
    assert metrics["missing_videos"] == 0
    # Steps 0 to 4 are dense in both presets.
    assert metrics["maps"] == {"layers": [0, 1], "steps": [5, 6], "heads": [1]}
    assert [entry["prompt"] for entry in metrics["prompts"]] == ["a red circle moving right", "a blue ring"]
    runs = [run for entry in metrics["prompts"] for run in entry["runs"]]
    assert [run["video"] for run in runs] == names
    for run in runs:
        assert len(run["step_seconds"]) == 7
        assert 0 < sum(run["step_seconds"]) <= run["seconds"]
        assert len(run["psnr_per_frame"]) == len(run["ssim_per_frame"]) == 4
        assert {(entry["step"], entry["layer"]) for entry in run["layers"]} == {
            (s, n) for s in range(7) for n in (0, 1)
        }
        dense = [entry["step"] for entry in run["layers"] if entry["layer"] == 0 and entry["density"] == 1]
        assert dense == list(range(7 if run["dense"] else 5))

    page = (out / "report.html").read_text(encoding="utf-8")
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert found is not None
    shown = json.loads(found[1])["shown"]
    maps = [[(one["step"], one["layer"], one["heads"]) for one in run["maps"]] for prompt in shown for run in prompt]
    kept = [(step, layer, [1]) for step in (5, 6) for layer in (0, 1)]
    assert maps == [[], kept, kept] * 2
    printed = capsys.readouterr().out
    assert printed.count("psa_tail: ") == 2
    assert f"{out}/report.html" in printed


def test_the_default_preset_is_the_models(weights: str, tmp_path: Path) -> None:
    assert main(["compare", *PROMPT, "--weights", weights, "--out", str(tmp_path / "a"), *SIZE]) == 0
    metrics = json.loads((tmp_path / "a" / "metrics.json").read_text(encoding="utf-8"))
    assert [run["name"] for run in metrics["prompts"][0]["runs"]] == ["dense", "psa_balanced"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--prompt or --prompt-file must be given, got neither"),
        (["--prompt-file", "empty.txt"], "--prompt-file must hold a prompt a line, and empty.txt has none"),
        (["--prompt-file", "bytes.txt"], "--prompt-file must be UTF-8 text, and bytes.txt is not"),
        ([*PROMPT, "--preset", "baseline"], "--preset must be a sparse one, as dense attention always runs; got base"),
        ([*PROMPT, "--preset", "psa_tail", "--preset", "psa_tail"], "once for each preset, got psa_tail, psa_tail"),
        ([*PROMPT, "--preset", "psa_tial"], 'no preset "psa_tial"'),
        ([*PROMPT, "--width", "8"], "--width and --height must be at least 12 to compare by SSIM, got 8 and 16"),
        ([*PROMPT, "--width", "34"], "--width must be a multiple of 4 for tiny-wan, got 34; the nearest are 32 and 36"),
        (
            [*PROMPT, "--model", "cogvideox1.5-5b", "--steps", "50", "--height", "24"],
            "--height must be a multiple of 16 for CogVideo1.5_5b, got 24; the nearest are 16 and 32",
        ),
        ([*PROMPT, "--steps", "5"], "warmup_steps 5 and cooldown_steps 0, got 5"),
        ([*PROMPT, "--out", "full"], "--out must be a new or an empty folder, and full is neither"),
        ([*PROMPT, "--out", "empty.txt"], "--out must be a new or an empty folder, and empty.txt is neither"),
        ([*PROMPT, "--out", "/proc/x"], "--out must lie in a folder that can be written, got /proc/x: No such file"),
        (["--prompt-file", "nope.txt"], "--prompt-file must be a file that can be read, got nope.txt: No such file"),
        ([*PROMPT, "--out", "nowhere/out"], "--out must lie in a folder that exists, got nowhere/out"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_can_be_known_is_refused_before_the_model_is_loaded(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty.txt").write_text("\n \n")
    Path("bytes.txt").write_bytes(b"\xff\xfe\xfd")
    Path("full").mkdir()
    Path("full/file").touch()
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr(compare, "load_model", lambda *_, **__: pytest.fail("the model was loaded"))
    assert main(["compare", "--out", "out", *SIZE, *arguments]) == 1
    assert message in error_line(capsys)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--map-layers", "0,2"], "--map-layers must be below 2, the number of layers, got 2"),
        (["--map-heads", "5"], "--map-heads must be below 2, the number of heads, got 5"),
        (["--map-steps", "7"], "--map-steps must be below 7, the number of steps, got 7"),
        (["--prompt", "a red elephant"], "prompt 2 of 2, 'a red elephant': prompt has the word 'elephant'"),
        (["--negative-prompt", "elephants"], "prompt has the word 'elephants'"),
        (["--presets", "deep.yaml", "--preset", "mine"], "dense_layers must be below the 2 layers"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_the_model_refuses_costs_no_video_and_leaves_nothing(
    weights: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "deep.yaml"
    file.write_text(DEEP)
    monkeypatch.setattr(compare, "sample", lambda *_, **__: pytest.fail("a video was made"))
    command = ["compare", *PROMPT, "--weights", weights, "--out", str(tmp_path / "out"), *SIZE]
    assert main([*command, *arguments]) == 1
    assert message in error_line(capsys)
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize(
    ("made", "kept"),
    [
        (1, []),
        (2, ["1-0-dense.mp4", "1-1-psa_balanced.mp4"]),
        (4, ["1-0-dense.mp4", "1-1-psa_balanced.mp4", "1-2-psa_tail.mp4"]),
    ],
    ids=["dense alone", "a preset is missing", "the second prompt has dense alone"],
)
@pytest.mark.parametrize(
    ("error", "status", "line"),
    [(KeyboardInterrupt(), 130, "psa: interrupted"), (MemoryError(), 1, "psa: error: out of memory: ")],
    ids=["interrupted", "memory"],
)
def test_what_was_finished_before_a_failure_is_kept_under_another_name(
    weights: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    made: int,
    kept: list[str],
    error: BaseException,
    status: int,
    line: str,
) -> None:
    done: list[str] = []

    def cut_short(pipeline: Any, preset: Preset, *arguments: Any, **options: Any) -> Any:
        if len(done) == made:
            raise type(error)
        done.append(preset.name)
        return sample(pipeline, preset, *arguments, **options)

    monkeypatch.setattr(compare, "sample", cut_short)
    (tmp_path / "out-unfinished").mkdir()  # of another run
    command = ["compare", *PROMPT, "--prompt", "a blue ring", "--preset", "psa_balanced", "--preset", "psa_tail"]
    assert main([*command, "--weights", weights, "--out", str(tmp_path / "out"), *SIZE]) == status
    said = error_line(capsys)
    assert said.startswith(line)
    folder = tmp_path / "out-unfinished-2"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out-unfinished", *([folder.name] if kept else [])]
    assert said.endswith(f"; what was finished before is in {folder}") == bool(kept)
    if kept:
        assert sorted(path.name for path in folder.iterdir()) == [*kept, "metrics.json", "report.html"]
        metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
        assert metrics["missing_videos"] == 6 - len(kept)
        assert [[run["video"] for run in entry["runs"]] for entry in metrics["prompts"]] == [kept]


@pytest.mark.parametrize("out", ["link", "."])
def test_an_empty_folder_stays_and_is_filled(
    weights: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out: str
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    monkeypatch.chdir(folder if out == "." else tmp_path)
    (tmp_path / "link").symlink_to("folder")
    before = folder.stat().st_ino
    command = ["compare", *PROMPT, "--preset", "psa_balanced", "--weights", weights, "--out", out]
    assert main([*command, *SIZE]) == 0
    assert sorted(path.name for path in folder.iterdir()) == [
        "1-0-dense.mp4",
        "1-1-psa_balanced.mp4",
        "metrics.json",
        "report.html",
    ]
    assert folder.stat().st_ino == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "link"]


def test_two_commands_that_write_one_folder(tmp_path: Path) -> None:
    out = tmp_path / "out"

    def write() -> None:
        with compare._folder(out) as folder:
            (folder / "ours").touch()
            out.mkdir()
            (out / "theirs").touch()

    with pytest.raises(FileExistsError, match=r"made by another meanwhile; the report is in .*out-2$"):
        write()
    assert {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")} == {
        "out",
        "out/theirs",
        "out-2",
        "out-2/ours",
    }


def test_names_as_long_as_names_can_be(
    weights: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(DEEP.replace("mine", "d" * 300).replace("[2]", "[]"))
    monkeypatch.chdir(tmp_path)
    command = ["compare", *PROMPT, "--weights", weights, "--presets", str(file), *SIZE, "--quiet"]
    assert main([*command, "--out", "o" * 255]) == 0
    names = sorted(path.name for path in (tmp_path / ("o" * 255)).iterdir())
    assert names[1] == f"1-1-{'d' * 64}.mp4"
    capsys.readouterr()
    assert main([*command, "--out", "o" * 256]) == 1
    assert "--out must be a name that can be made" in error_line(capsys)


@pytest.mark.parametrize("option", ["--prompt", "--negative-prompt"])
def test_bytes_that_are_no_text_are_wrong_usage(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        build_parser().parse_args(["compare", option, "red \udcff"])
    assert exit_.value.code == 2
    assert f"argument {option}: must be text in UTF-8, got 'red \\udcff'" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", "1,", "-1", "a", "1.5", "2147483648", "9" * 5000])
def test_what_is_no_list_of_numbers_is_wrong_usage(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        build_parser().parse_args(["compare", f"--map-layers={text}"])
    assert exit_.value.code == 2
    rule = "argument --map-layers: must be whole numbers from 0 to 2147483647 with commas or spaces between them"
    assert f"{rule}, got {text!r}" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["3,0,3"], ["0", "3"], ["3,", "0"], ["0, 3"]], ids=str)
@pytest.mark.parametrize("option", ["--map-steps", "--lengths"])
def test_lists_of_numbers_have_commas_or_spaces(words: list[str], option: str) -> None:
    if option == "--map-steps":
        assert build_parser().parse_args(["compare", option, *words]).map_steps == (0, 3)
        return
    words = [word.replace("0", "512") for word in words]
    assert build_parser().parse_args(["bench", option, *words]).lengths == (3, 512)


def test_places_are_spread_from_the_first_to_the_last() -> None:
    assert compare._spread(range(40), 3) == (0, 20, 39)
    assert compare._spread((5, 6, 9), 2) == (5, 9)
    assert compare._spread((4,), 3) == (4,)
