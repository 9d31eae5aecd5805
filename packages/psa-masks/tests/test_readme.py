import re
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"


def test_code_in_the_readme_runs() -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", README.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    assert blocks
    exec(compile("\n".join(blocks), str(README), "exec"), {})
