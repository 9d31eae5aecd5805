"""`psa doctor` and `psa bench` on a GPU."""

import json

import pytest

from psa_integrations.cli import main

pytestmark = pytest.mark.gpu


def test_the_kernels_are_right_on_this_card(capsys: pytest.CaptureFixture[str]) -> None:
    main(["doctor", "--json"])
    report = json.loads(capsys.readouterr().out)
    # Whether this machine can write videos is another matter.
    wrong = [finding for finding in report["findings"] if finding["status"] == "fail" and finding["name"] != "video"]
    assert wrong == []
    assert report["device"] == "cuda"
    operators = [finding for finding in report["findings"] if finding["name"].endswith(("float32", "bfloat16"))]
    assert len(operators) == 26
    assert all(finding["detail"].startswith("triton: ") for finding in operators)


def test_bench_times_the_back_ends_of_torch(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--lengths", "2048", "4096", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["dtype"] == "bfloat16"
    assert (report["heads"], report["head_dim"]) == (12, 128)
    for row in report["rows"]:
        assert {"flash", "efficient"} <= set(row["dense"])
        assert all(0 < seconds < 1 for seconds in (*row["dense"].values(), *row["sparse"].values()))
