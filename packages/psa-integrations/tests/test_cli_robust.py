"""What goes wrong around the command: disks, damaged files, memory, interrupts. One line, a status, no half file."""

import errno
import json
import os
import re
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tqdm import tqdm

from psa_integrations.cli import main, video
from psa_integrations.tiny_wan import build_random_pipeline
from psa_integrations.tiny_wan.pipeline import TinyWanPipeline

SIZE = ["--frames", "4", "--width", "32", "--height", "16", "--steps", "1", "--preset", "baseline", "--quiet"]
WEIGHTS = "diffusion_pytorch_model.safetensors"
HandledBy = Callable[[signal.Signals, Any], None]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    build_random_pipeline(num_attention_heads=1, num_layers=1, ffn_dim=32).save_pretrained(folder)
    return folder


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """Where the video would be, in a folder of its own."""
    (tmp_path / "out").mkdir()
    return tmp_path / "out" / "video.mp4"


def generate(weights: Path, out: Path, *more: str) -> int:
    prompt = ["--prompt", "a red circle moving right", "--weights", str(weights), "--out", str(out)]
    return main(["generate", *prompt, *SIZE, *more])


def assert_failed(status: int, out: Path, capsys: pytest.CaptureFixture[str], message: str) -> None:
    error = capsys.readouterr().err
    assert status == 1
    lines = [line for line in error.splitlines() if line.startswith("psa: ")]
    assert len(lines) == 1
    assert re.search(message, lines[0]), lines[0]
    assert "Traceback" not in error
    assert not list(out.parent.iterdir())


def test_a_disk_that_fills_while_the_encoder_writes(
    weights: Path, out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from diffusers.utils import export_to_video

    def cut_short(frames: Any, path: str, **options: Any) -> None:
        # ffmpeg ends as if nothing were wrong, and leaves what fitted.
        export_to_video(frames, path, **options)
        os.truncate(path, os.path.getsize(path) // 2)

    monkeypatch.setattr("diffusers.utils.export_to_video", cut_short)
    assert_failed(generate(weights, out), out, capsys, r"the encoder got 0 of 4 frames onto the disk.*bytes free")


def test_frames_that_are_missing_are_noticed(
    weights: Path, out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from diffusers.utils import export_to_video

    monkeypatch.setattr("diffusers.utils.export_to_video", lambda f, path, **o: export_to_video(f[:3], path, **o))
    assert_failed(generate(weights, out), out, capsys, "the encoder got 3 of 4 frames onto the disk")


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_disk_that_is_full_at_the_end(
    weights: Path, out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], call: str
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(*((video.os, "fsync", full) if call == "fsync" else (Path, "replace", full)))
    assert_failed(generate(weights, out), out, capsys, "video.mp4 was not written: .*No space left on device")


def test_a_broken_pipe_to_the_encoder_is_not_taken_for_that_of_the_output(
    weights: Path, out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def died(*_: object, **__: object) -> None:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe\n\nFFMPEG COMMAND: ...")

    monkeypatch.setattr("diffusers.utils.export_to_video", died)
    assert_failed(generate(weights, out), out, capsys, "was not written: .*Broken pipe; its disk has")


def test_an_old_video_survives_a_failed_one(weights: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out.write_bytes(b"old")
    monkeypatch.setattr("diffusers.utils.export_to_video", lambda *_, **__: None)
    assert generate(weights, out) == 1
    assert out.read_bytes() == b"old"


@pytest.mark.parametrize("when", ["generate", "load"])
@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory."),
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried"),
        RuntimeError("Storage size calculation overflowed with sizes=[4, 64]"),
    ],
    ids=["gpu", "host", "torch on the host", "beyond 64 bits"],
)
def test_out_of_memory_says_what_needs_less(
    weights: Path,
    out: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    when: str,
    error: Exception,
) -> None:
    def exhausted(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(TinyWanPipeline, "__call__" if when == "generate" else "to", exhausted)
    assert_failed(generate(weights, out), out, capsys, "out of memory: a smaller --width, --height or --frames")


def test_a_bench_out_of_memory_says_what_needs_less(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("psa_integrations.cli.bench.check_operators", lambda device: [])
    # More than any machine has.
    assert main(["bench", "--lengths", "2147483647", "--heads", "2147483647", "--no-forward"]) == 1
    assert capsys.readouterr().err.startswith("psa: error: out of memory: a smaller --lengths needs less")


def test_values_that_are_no_numbers_make_no_video(weights: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert_failed(
        generate(weights, out, "--guidance", "1e38", "--steps", "3"),
        out,
        capsys,
        "no finite numbers, which make no video",
    )


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def change(file: Path, **fields: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


DAMAGE: dict[str, Callable[[Path], object]] = {
    "weights cut": lambda folder: cut(folder / "transformer" / WEIGHTS),
    "weights empty": lambda folder: os.truncate(folder / "transformer" / WEIGHTS, 0),
    "config cut": lambda folder: cut(folder / "text_encoder" / "config.json"),
    "another shape": lambda folder: change(folder / "transformer" / "config.json", ffn_dim=64),
    "a layer missing": lambda folder: change(folder / "transformer" / "config.json", num_layers=2),
    "a wrong type": lambda folder: change(folder / "transformer" / "config.json", num_layers="x"),
    "no scheduler": lambda folder: shutil.rmtree(folder / "scheduler"),
    "a pickle": lambda folder: (folder / "transformer" / WEIGHTS).rename(
        folder / "transformer" / "diffusion_pytorch_model.bin"
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_an_error_of_one_line(
    weights: Path, out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(weights, folder)
    DAMAGE[damage](folder)
    assert_failed(generate(folder, out), out, capsys, str(folder))


def test_an_interrupt_while_writing_leaves_nothing(
    weights: Path, out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(frames: Any, path: str, **_: Any) -> None:
        Path(path).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr("diffusers.utils.export_to_video", interrupted)
    assert generate(weights, out) == 130
    assert "psa: interrupted" in capsys.readouterr().err
    assert not list(out.parent.iterdir())


@pytest.fixture
def handled_by() -> Iterator[HandledBy]:
    """Sets the handler of a signal until the test ends; what started the tests may have it ignored, as nohup does."""
    inherited: dict[signal.Signals, Any] = {}

    def handled_by(number: signal.Signals, handler: Any) -> None:
        inherited[number] = signal.signal(number, handler)

    yield handled_by
    for number, handler in inherited.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(
    ("number", "status", "message"),
    [
        (signal.SIGINT, 130, "psa: interrupted\n"),
        (signal.SIGTERM, 143, "psa: stopped by SIGTERM\n"),
        (signal.SIGHUP, 129, "psa: stopped by SIGHUP\n"),
    ],
)
def test_a_signal_in_the_middle_of_a_run(
    weights: Path,
    out: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    handled_by: HandledBy,
    number: signal.Signals,
    status: int,
    message: str,
) -> None:
    usual = signal.default_int_handler if number is signal.SIGINT else signal.SIG_DFL
    handled_by(number, usual)
    steps: list[int] = []
    update = tqdm.update

    def pressed(bar: Any, n: float = 1) -> Any:
        steps.append(1)
        if len(steps) == 3:
            signal.raise_signal(number)  # to this process, as a terminal does
        return update(bar, n)

    monkeypatch.setattr(tqdm, "update", pressed)
    assert generate(weights, out, "--steps", "50") == status
    assert signal.getsignal(number) is usual
    assert len(steps) == 3
    assert capsys.readouterr().err.endswith(message)
    assert not list(out.parent.iterdir())


def test_a_signal_that_is_ignored_stays_so(
    weights: Path, out: Path, monkeypatch: pytest.MonkeyPatch, handled_by: HandledBy
) -> None:
    handled_by(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    update = tqdm.update

    def hung_up(bar: Any, n: float = 1) -> Any:
        signal.raise_signal(signal.SIGHUP)
        return update(bar, n)

    monkeypatch.setattr(tqdm, "update", hung_up)
    assert generate(weights, out) == 0
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    assert out.is_file()


def test_an_output_that_is_full(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert main(["presets", "list"]) == 1
        monkeypatch.undo()
        with pytest.raises(OSError, match="No space left"):
            full.flush()
        os.dup2(os.open(os.devnull, os.O_WRONLY), full.fileno())  # so that it can be closed
    assert capsys.readouterr().err == "psa: error: [Errno 28] No space left on device\n"


def test_an_output_that_a_shell_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    assert main(["presets", "list"]) == 0


def test_a_reader_that_leaves(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as gone:
        monkeypatch.setattr(sys, "stdout", gone)
        assert main(["presets", "schema"]) == 1
        monkeypatch.undo()
    assert capsys.readouterr().err == ""
