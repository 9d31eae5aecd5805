"""Writes the support table into the README: `python packages/psa-integrations/tests/lib/write_support_table.py`."""

import importlib.util
from pathlib import Path

from feature_matrix import with_table

TESTS = Path(__file__).parents[1]


def main() -> None:
    """Imports the tests, which enter the table, and writes it."""
    spec = importlib.util.spec_from_file_location("matrix", TESTS / "test_diffusers_matrix.py")
    assert spec is not None
    assert spec.loader is not None
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    readme = TESTS.parent / "README.md"
    readme.write_text(with_table(readme.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
