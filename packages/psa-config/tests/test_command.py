"""`python -m psa_config`, and what importing the package loads."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from psa_config import Problem, load_presets
from psa_config.__main__ import main
from psa_config.errors import excerpt
from psa_config.models import json_schema


def test_check_says_ok(tmp_path: Path, form: str, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(form)
    assert main(["check", str(file)]) == 0
    assert capsys.readouterr().out == f"{file}: ok, models: 1, presets: 2\n"


def test_check_prints_every_error_with_its_line(tmp_path: Path, form: str, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(form.replace("m: 128", "m: 100").replace("226", "x"))
    assert main(["check", str(file)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 7
    assert lines[0].startswith(f"{file}:7:16: Wan.text_length: ")
    assert lines[1:3] == ["    7 |   text_length: x", "      |                ^"]
    assert lines[3].startswith(f"{file}:14:12: Wan.attention_configs.balanced.block_size.m: ")
    assert lines[4:6] == ["    14 |         m: 100", "       |            ^"]
    assert lines[6] == "2 errors"


@pytest.mark.parametrize(
    "data", [b"\xef\xbb\xbfa: \xff", b"a: !x 1", b"\x00", b"a:\r\n  b: [\r\n", b"", b"\n\n"], ids=repr
)
def test_check_of_what_is_hardly_text(tmp_path: Path, capsys: pytest.CaptureFixture[str], data: bytes) -> None:
    file = tmp_path / "a.yaml"
    file.write_bytes(data)
    assert main(["check", str(file)]) == 1
    assert capsys.readouterr().out.startswith(f"{file}:")


def test_the_caret_stands_below_its_column() -> None:
    text = "a: 1\u2028" + "日本" + "x" * 200 + "\n"
    assert excerpt(Problem("f", 2, 3, "", "."), text).splitlines()[1] == "  |     ^"
    line, caret = excerpt(Problem("f", 2, 190, "", "."), text).splitlines()
    assert len(line) <= 115
    assert len(caret) - 1 < len(line)
    assert excerpt(Problem("f", None, None, "", "."), text) == ""
    assert excerpt(Problem("f", 9, 1, "", "."), text) == ""


def test_list_names_every_preset(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    book = load_presets()
    assert len(lines) == len(book.models) + sum(len(book.presets(model)) for model in book.models)
    assert "  psa_balanced (default)  The published balanced setting." in lines


def test_check_shows_the_lines_of_a_pipe(tmp_path: Path, form: str, capsys: pytest.CaptureFixture[str]) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_text, args=(form.replace("226", "x"),), daemon=True)
    writer.start()
    assert main(["check", str(pipe)]) == 1
    writer.join()
    assert "    7 |   text_length: x" in capsys.readouterr().out.splitlines()


def test_names_and_descriptions_stay_on_their_line(
    tmp_path: Path, form: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(form.replace('"..."', r'"a\nb\e[31m\u202e"').replace(" balanced", r' "bal\nanced"'))
    assert main(["list", "--presets", str(file)]) == 0
    assert capsys.readouterr().out.splitlines()[1] == r"  bal\nanced (default)  a b\x1b[31m\u202e"


def test_output_that_cannot_say_everything(tmp_path: Path, form: str) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(form.replace('"..."', "日本"), encoding="utf-8")
    command = [sys.executable, "-m", "psa_config", "list", "--presets", str(file)]
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    run = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert (run.returncode, run.stderr) == (0, "")
    assert r"\u65e5\u672c" in run.stdout


def test_a_reader_that_goes_away_is_told_nothing() -> None:
    read, write = os.pipe()
    os.close(read)
    run = subprocess.run(
        [sys.executable, "-m", "psa_config", "list"], stdout=write, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(write)
    assert (run.returncode, run.stderr) == (1, "")


def test_schema_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schema"]) == 0
    assert json.loads(capsys.readouterr().out) == json_schema()


def test_the_module_runs(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "psa_config", "check", str(tmp_path / "no.yaml")]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (run.returncode, run.stderr) == (1, "")
    assert "no.yaml: cannot be read" in run.stdout


def test_importing_loads_neither_torch_nor_a_sibling_and_prints_nothing() -> None:
    code = (
        "import sys, psa_config; psa_config.load_presets()\n"
        "heavy = {'torch', 'triton', 'diffusers', 'psa_kernels', 'psa_masks', 'psa_integrations'}\n"
        "sys.exit(str(heavy & sys.modules.keys()) if heavy & sys.modules.keys() else 0)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")
