"""The commands that analyse a model on texts, with a random model that reads bytes."""

import argparse
import csv

import jax
import numpy as np
import pytest

from path_jax.data import ByteTokenizer
from path_jax.evaluation.text_model import TextModel
from path_jax.interpretability import __main__ as command
from path_jax.interpretability import exit_command, saturation_command
from path_jax.interpretability.exit_rules import load_rule
from path_jax.interpretability.second_rank import second_rank
from path_jax.interpretability.strata import add_noise, file_texts, standard_texts, text_batches
from path_jax.models import DecoderLM, ModelConfig


@pytest.fixture
def loaded(monkeypatch):
    config = ModelConfig(257, 3, 16, 2, mlp_dim=32, mixer="rope", scan_layers=False)
    params = jax.jit(DecoderLM(config).init)(jax.random.key(0), np.zeros((1, 4), np.int32))["params"]
    model = TextModel(config, jax.tree.map(lambda x: 5 * x, params), ByteTokenizer())
    for module in (saturation_command, exit_command):
        monkeypatch.setattr(module, "load", lambda path, length: model)
    return model


@pytest.fixture
def text(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "text.txt").write_text(" ".join(rng.choice(["one", "two", "three", "four"], 900)))
    return str(tmp_path / "text.txt")


def numbers(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def test_saturation(loaded, text, tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="needs the extra [plot]")
    out = tmp_path / "report"
    command.main(
        f"saturation --checkpoint=any --data=words={text} --noise=0.5 --untrained --num-tokens=300 --length=64 "
        f"--ranks=3 --pairs=3 --reach=1 --output={out}".split()
    )
    found = {(row["source"], row["quantity"]): row["value"] for row in numbers(out / "saturation.csv")}
    assert {source for source, _ in found} == {"words", "words, 50% noise", "untrained"}
    assert float(found["words", "num_tokens"]) == 300 and -1 <= float(found["words", "tau"]) <= 1
    same = [row["value"] for row in numbers(out / "saturation.csv") if row["quantity"] == "implant_same_rates"]
    assert set(same) <= {"0", "nan"} and "0" in same
    assert "words" in capsys.readouterr().out
    assert (out / "report.html").exists()


def test_early_exit(loaded, text, tmp_path):
    pytest.importorskip("matplotlib", reason="needs the extra [plot]")
    pytest.importorskip("sklearn", reason="needs the extra [interp]")
    out = tmp_path / "report"
    command.main(
        f"early-exit --checkpoint=any --data={text} --num-tokens=400 --length=32 --batch-size=4 --target=0.3 "
        f"--rules=settled,similarity --exit-layers=0,1 --new-tokens=3 --output={out}".split()
    )
    found = {(row["text"], row["rule"], row["quantity"]): row["value"] for row in numbers(out / "early_exit.csv")}
    assert float(found["text", "settled", "disagreement"]) < 0.4
    assert float(found["text", "oracle", "disagreement"]) == 0
    assert float(found["generated", "full depth", "mean_depth_batch_1"]) == 3
    rule, layers = load_rule(out / "settled.npz")
    assert layers == [0, 1] and rule.weights.shape == (2, 16)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("early-exit --rules=guess", "--rules=guess"),
        ("early-exit --exit-layers=a", "--exit-layers=a"),
        ("early-exit --data=/nowhere", "no text at /nowhere"),
        ("saturation --noise=2", "--noise=2"),
    ],
)
def test_wrong_arguments_are_one_line(loaded, tmp_path, arguments, message):
    with pytest.raises(SystemExit, match=message):
        command.main([*arguments.split(), "--checkpoint=any", f"--output={tmp_path}"])


def test_windows_hold_every_token_once():
    encode = lambda text: [ord(x) for x in text]
    batches = text_batches(["abcdefg", "hij"], encode, num_tokens=100, length=4, batch_size=2, opening=[1])
    rows = [
        (row.tolist(), target.tolist(), weight.tolist())
        for batch in batches
        for row, target, weight in zip(batch.tokens, batch.targets, batch.weights)
    ]
    ids = lambda text: [1, *map(ord, text)]
    assert rows == [
        (ids("abc"), [*map(ord, "abcd")], [1] * 4),
        (ids("def"), [*map(ord, "defg")], [1] * 4),
        (ids("hi") + [0], [*map(ord, "hij"), 0], [1, 1, 1, 0]),
        ([0] * 4, [0] * 4, [0] * 4),
    ]
    cut = text_batches(["abcdefg", "hij"], encode, num_tokens=6, length=4, batch_size=2)
    assert sum(int(batch.weights.sum()) for batch in cut) == 6
    with pytest.raises(ValueError, match="no tokens"):
        text_batches(["a", ""], encode, num_tokens=6, length=4, batch_size=2)


def test_noise_and_standard_texts(tmp_path):
    text = "Some words\nin lines " * 200
    noisy = add_noise(text, 0.1, seed=1)
    different = np.mean([a != b for a, b in zip(text, noisy)])
    assert 0.07 < different < 0.11 and noisy.count("\n") == text.count("\n") and add_noise(text, 0.0) == text
    assert {name: len(next(texts)) > 100 for name, texts in standard_texts().items()} == {"prose": True, "code": True}
    with pytest.raises(FileNotFoundError):
        file_texts(tmp_path)


def test_every_share_of_noise_is_a_text_of_its_own(tmp_path):
    """They are read one after the other, long after the loop over the shares has ended."""
    path = tmp_path / "a.txt"
    path.write_text("0" * 4000)
    args = argparse.Namespace(data=[f"x={path}"], noise=[0.1, 0.5], long=64, length=32, seed=3)
    found = saturation_command.strata(args)
    assert list(found) == ["x", "x, 10% noise", "x, 50% noise", "x, 64 tokens"]
    shares = {name: np.mean([letter != "0" for text in texts for letter in text]) for name, (texts, _) in found.items()}
    assert shares["x"] == shares["x, 64 tokens"] == 0
    assert 0.08 < shares["x, 10% noise"] < 0.12 and 0.47 < shares["x, 50% noise"] < 0.53


def test_second_rank_by_hand():
    layers = np.array([[1] * 6, [3, 3, 3, 0, 1, 1]])
    ids = np.array([[7, 8]] * 6)
    found = second_rank(layers, ids, np.array([8, 8, 7, 8, 9, -1]), 4)
    assert (found.num_late, found.late_accuracy, found.num_early, found.early_accuracy) == (2, 1, 2, 0.5)
    assert found.z == pytest.approx(0.5 / np.sqrt(0.75 * 0.25 * (1 / 2 + 1 / 2)))
    with pytest.raises(ValueError, match="not"):
        second_rank(layers[:1], ids[:, :1], np.zeros(6, int), 4)
