"""`psa generate --prompt-file`: a video a line, shared by processes."""

import argparse
import os
import subprocess
import sys
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest

from psa_integrations.cli import generate, main
from psa_integrations.cli.prompts import Share, numbered, read_prompts
from psa_integrations.cli.sample import sample
from psa_integrations.tiny_wan import build_random_pipeline

PROMPTS = ("a red circle moving right", "a blue ring moving up", "a green square moving left")
SIZE = ["--frames", "4", "--width", "32", "--height", "16", "--steps", "6", "--preset", "psa_tail", "--quiet"]


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("weights")
    build_random_pipeline(num_attention_heads=1, num_layers=1, ffn_dim=32).save_pretrained(folder)
    return ["generate", "--weights", str(folder), *SIZE]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.txt"
    file.write_text("\n\n".join(PROMPTS) + "\n", encoding="utf-8")
    return file


def test_two_processes_share_the_prompts(arguments: list[str], file: Path, tmp_path: Path) -> None:
    """In processes of `accelerate launch`; each video is that of its prompt alone."""
    out = tmp_path / "videos"
    out.mkdir()
    launch = [
        "accelerate",
        "launch",
        "--cpu",
        "--num_processes",
        "2",
        "--num_machines",
        "1",
        "--main_process_port",
        "0",
    ]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "-m", "psa_integrations.cli"]
    command = [str(Path(sys.executable).with_name(launch[0])), *launch[1:], *arguments]
    ran = subprocess.run(
        [*command, "--prompt-file", str(file), "--out", str(out / "fox.mp4")],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    names = [f"fox-000{index}.mp4" for index in range(3)]
    assert sorted(path.name for path in out.iterdir()) == names
    assert sorted(Path(line.split(": ")[0]).name for line in ran.stdout.splitlines() if ": 4 frames" in line) == names
    for prompt, name in zip(PROMPTS, names, strict=True):
        alone = tmp_path / f"alone-{name}"
        assert main([*arguments, "--prompt", prompt, "--out", str(alone)]) == 0
        assert np.array_equal(iio.imread(alone), iio.imread(out / name))


def test_a_process_makes_its_share_and_no_more(
    arguments: list[str],
    file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "5")
    for rank, made in ((1, ["fox-0001.mp4"]), (4, [])):
        monkeypatch.setenv("RANK", str(rank))
        folder = tmp_path / str(rank)
        folder.mkdir()
        assert main([*arguments, "--prompt-file", str(file), "--out", str(folder / "fox.mp4")]) == 0
        assert [path.name for path in folder.iterdir()] == made
    capsys.readouterr()
    monkeypatch.setenv("RANK", "5")
    assert main([*arguments, "--prompt-file", str(file), "--out", str(tmp_path / "a.mp4")]) == 1
    assert "the environment's RANK must be below its WORLD_SIZE 5, got 5" in capsys.readouterr().err


def test_a_prompt_that_the_model_refuses_costs_no_video(
    arguments: list[str],
    file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file.write_text("\n".join([*PROMPTS, "an elephant"]))
    monkeypatch.setattr(generate, "sample", lambda *_, **__: pytest.fail("a video was made"))
    for rank in ("0", "1"):  # it is the prompt of one of them
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setenv("RANK", rank)
        assert main([*arguments, "--prompt-file", str(file), "--out", str(tmp_path / "a.mp4")]) == 1
        assert "psa: error: prompt 4 of 4, 'an elephant': prompt has the word" in capsys.readouterr().err


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_videos_finished_before_a_failure_stay(
    arguments: list[str],
    file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: type[BaseException],
) -> None:
    def cut_short(pipeline: object, preset: object, options: argparse.Namespace, *more: object) -> object:
        if options.prompt == PROMPTS[2]:
            raise error
        return sample(pipeline, preset, options, *more)

    monkeypatch.setattr(generate, "sample", cut_short)
    out = tmp_path / "videos"
    out.mkdir()
    assert main([*arguments, "--prompt-file", str(file), "--out", str(out / "fox.mp4")]) > 0
    assert sorted(path.name for path in out.iterdir()) == ["fox-0000.mp4", "fox-0001.mp4"]
    assert f"; 2 of 3 videos were finished before and are in {out}" in capsys.readouterr().err


def test_shares_are_all_prompts_once() -> None:
    for size in (1, 2, 3, 7):
        shares = [Share(rank, size).indices(5) for rank in range(size)]
        assert sorted(index for share in shares for index in share) == list(range(5))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert Share.of({}) == Share(0, 1, 0)
    assert Share.of({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}) == Share(3, 4, 1)
    with pytest.raises(ValueError, match="the environment's WORLD_SIZE must be a number, got 'two'"):
        Share.of({"WORLD_SIZE": "two"})


def test_files_of_prompts(file: Path, tmp_path: Path) -> None:
    assert read_prompts(file) == list(PROMPTS)
    assert numbered(Path("videos/a fox.mp4"), 12) == Path("videos/a fox-0012.mp4")
    file.write_bytes(b"\xef\xbb\xbfa caf\xc3\xa9\r\n  \r\n")
    assert read_prompts(file) == ["a café"]
    file.write_text(" \n\n")
    with pytest.raises(ValueError, match=r"--prompt-file must hold a prompt a line, and .*prompts\.txt has none"):
        read_prompts(file)
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"--prompt-file must be UTF-8 text, and .*prompts\.txt is not"):
        read_prompts(file)
    for path in (tmp_path / "nowhere.txt", tmp_path):
        with pytest.raises(OSError, match=r"--prompt-file must be a file that can be read, got .*: "):
            read_prompts(path)


def test_prompt_and_file_exclude_each_other(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--prompt", "a ring", "--prompt-file", "a.txt"], []):
        with pytest.raises(SystemExit) as exit_:
            main(["generate", *arguments])
        assert exit_.value.code == 2
    assert "not allowed with argument --prompt" in capsys.readouterr().err
