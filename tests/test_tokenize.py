"""`python -m path_jax.tokenize`."""

import numpy as np
import pytest
from checkpoints.synthetic import GGUF, random_params, write_gguf

from path_jax.data import token_file_documents
from path_jax.tokenize import main


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A vocabulary of a, b, ab and the end of a text, 3."""
    path = tmp_path_factory.mktemp("tokenize") / "model.gguf"
    return write_gguf(path, random_params(GGUF), change=lambda writer: writer.add_eos_token_id(3))


def test_documents_are_opened_and_read_back(checkpoint, tmp_path, capsys):
    (tmp_path / "texts").mkdir()
    for name, text in (("0.txt", "abba"), ("1.txt", "b")):
        (tmp_path / "texts" / name).write_text(text)
    output = tmp_path / "tokens"
    main(["--checkpoint", str(checkpoint), "--data", str(tmp_path / "texts"), "--output", str(output)])
    printed = capsys.readouterr().out
    assert "2 documents, 6 tokens" in printed and f"--config.data.path={output} --config.data.bos_id=3" in printed
    documents = token_file_documents(output, bos_id=3)
    assert [document.tokens.tolist() for document in documents] == [[3, 2, 1, 0], [3, 1]]
    assert np.load(output / "tokens.npy").dtype == "int32"


def test_bad_input_is_one_line(checkpoint, tmp_path):
    (tmp_path / "text").write_text("a")
    good = {"--checkpoint": str(checkpoint), "--data": str(tmp_path / "text"), "--output": str(tmp_path / "out")}
    for changed, reason in (
        ({"--checkpoint": "/nowhere"}, "no checkpoint /nowhere"),
        ({"--data": "/nowhere"}, "/nowhere"),
        ({"--bos-id": "40"}, "--bos-id=40"),
        ({"--output": str(tmp_path)}, str(tmp_path)),
    ):
        with pytest.raises(SystemExit) as error:
            main([part for pair in (good | changed).items() for part in pair])
        assert reason in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()
