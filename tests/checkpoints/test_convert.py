"""The convert command: what it writes, and what it leaves behind when it fails."""

import json
import os

import jax
import numpy as np
import pytest
from checkpoints.synthetic import MODELS, random_params

from path_jax.checkpoints import load_pretrained, save_pretrained
from path_jax.checkpoints.__main__ import main, max_logit_difference


@pytest.fixture
def source(tmp_path):
    """A FoX model with a tokenizer and keys of config.json that we do not use."""
    format, config = MODELS["fla-fox"]
    extra = dict(bos_token_id=5, fuse_norm=False, transformers_version="4.57.1")
    save_pretrained(tmp_path / "source", config, random_params(config), format, extra=extra)
    (tmp_path / "source" / "tokenizer.json").write_text("{}")
    return tmp_path / "source"


def convert(source, destination, format, *more):
    main(["convert", str(source), str(destination), f"--format={format}", *more])


def test_there_and_back(source, tmp_path, capsys):
    convert(source, tmp_path / "fox", "fox")
    convert(tmp_path / "fox", tmp_path / "run", "native")
    convert(tmp_path / "run", tmp_path / "deep" / "fla", "fla")
    assert capsys.readouterr().out.count("max |logit difference| 0\n") == 3
    files = [(path / "model.safetensors").read_bytes() for path in (source, tmp_path / "deep" / "fla")]
    assert files[0] == files[1]
    fox = json.loads((tmp_path / "fox" / "config.json").read_text())
    assert fox["bos_token_id"] == 5 and "fuse_norm" not in fox  # another format's options mean nothing there
    assert (
        (tmp_path / "fox" / "tokenizer.json").read_text() == (tmp_path / "run" / "tokenizer.json").read_text() == "{}"
    )


def test_options_of_the_same_format_are_kept_and_dtypes_change(source, tmp_path):
    convert(source, tmp_path / "half", "fla", "--dtype=bfloat16")
    raw = json.loads((tmp_path / "half" / "config.json").read_text())
    assert (raw["fuse_norm"], raw["transformers_version"], raw["torch_dtype"]) == (False, "4.57.1", "bfloat16")
    _, params = load_pretrained(tmp_path / "half")
    expected = jax.tree.map(lambda x: x.astype("bfloat16").astype("float32"), load_pretrained(source)[1])
    jax.tree.map(np.testing.assert_array_equal, params, expected)


def test_the_check_sees_another_model(source):
    config, params = load_pretrained(source)
    assert max_logit_difference(config, params, config, params) == 0
    other = params | {"final_norm": {"scale": 2 * params["final_norm"]["scale"]}}
    assert max_logit_difference(config, params, config, other) > 0.1


@pytest.mark.parametrize(
    "arguments, reason",
    [
        (("source", "new/er", "hf"), "format 'hf' holds the mixers"),
        (("absent", "new/er", "fla"), "there is no checkpoint"),
        (("source", "source", "fla"), "exists and is not an empty directory"),
        (("source/tokenizer.json", "new/er", "fla"), "neither a directory with config.json nor a .gguf file"),
    ],
)
def test_failures_are_one_line_and_leave_nothing(arguments, reason, source, tmp_path, capsys):
    before = sorted(os.listdir(tmp_path)), sorted(os.listdir(source))
    start, destination, format = arguments
    with pytest.raises(SystemExit) as finished:
        convert(tmp_path / start, tmp_path / destination, format)
    assert reason in finished.value.code and "\n" not in finished.value.code
    assert (sorted(os.listdir(tmp_path)), sorted(os.listdir(source))) == before
    assert capsys.readouterr().err == ""  # the line is printed by the interpreter as it exits


def test_a_copy_that_computes_something_else_is_not_kept(source, tmp_path, monkeypatch):
    monkeypatch.setattr("path_jax.checkpoints.__main__.max_logit_difference", lambda *_: float("nan"))
    with pytest.raises(SystemExit, match="the copy computes other logits"):
        convert(source, tmp_path / "new", "fla")
    assert os.listdir(tmp_path) == ["source"]


def test_help(capsys):
    for arguments in (["--help"], ["convert", "--help"]):
        with pytest.raises(SystemExit) as finished:
            main(arguments)
        assert finished.value.code == 0
    assert "--format {fla,fox,hf,native}" in " ".join(capsys.readouterr().out.split())
