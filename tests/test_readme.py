"""The examples of the README run as they stand, and so does the walk through docs/associative_recall.md."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def python_blocks(path):
    return re.findall(r"```python\n(.*?)```", (ROOT / path).read_text(), re.S)


BLOCKS = python_blocks("README.md")


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_example(number, capsys):
    exec(compile(BLOCKS[number], f"README.md[{number}]", "exec"), {})


@pytest.mark.slow
def test_recall_walk(capsys):
    pytest.importorskip("sklearn")
    session = {}  # one for all blocks, as a reader has
    for number, block in enumerate(python_blocks("docs/associative_recall.md")):
        exec(compile(block, f"docs/associative_recall.md[{number}]", "exec"), session)
    said = capsys.readouterr().out
    assert "induction" in said and "with shuffled labels" in said
