"""`python -m psa_config`, and what importing the package loads."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from psa_config.__main__ import main
from psa_config.models import json_schema


def test_check_says_ok(tmp_path: Path, form: str, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(form)
    assert main(["check", str(file)]) == 0
    assert capsys.readouterr().out == f"{file}: ok, models: 1, presets: 2\n"


def test_check_prints_every_error(tmp_path: Path, form: str, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(form.replace("m: 128", "m: 100").replace("226", "x"))
    assert main(["check", str(file)]) == 1
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith(f"{file}:7:16: Wan.text_length: ")
    assert second.startswith(f"{file}:14:12: Wan.attention_configs.balanced.block_size.m: ")


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
