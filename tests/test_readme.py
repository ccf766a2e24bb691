"""The README's examples run as they stand."""

import re
from pathlib import Path

import pytest

BLOCKS = re.findall(r"```python\n(.*?)```", (Path(__file__).parent.parent / "README.md").read_text(), re.S)


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_example(number, capsys):
    exec(compile(BLOCKS[number], f"README.md[{number}]", "exec"), {})
