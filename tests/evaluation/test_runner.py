"""Evaluators from a configuration section, and the report of a run."""

import json

import jax
import numpy as np
import pytest

from path_jax.data import Corpus, Document
from path_jax.evaluation.byte_baselines import gzip_bits_per_byte, order3_bits_per_byte
from path_jax.evaluation.run_report import finish, summary_rows, summary_table, write_run_report
from path_jax.evaluation.runner import EVALUATORS, make_all_evaluators, make_evaluators, run
from path_jax.models import DecoderLM, ModelConfig


def make_documents(*lengths):
    rng = np.random.default_rng(len(lengths))
    return tuple(Document(f"d{n}", np.append(256, rng.integers(97, 103, n - 1)).astype(np.int32)) for n in lengths)


CORPUS = Corpus(make_documents(300, 200), make_documents(90, 70, 80), 257)


def text(tokens):
    return bytes(tokens.tolist())


@pytest.fixture(scope="module")
def trained():
    model = DecoderLM(ModelConfig(vocab_size=257, num_layers=1, embed_dim=32, num_heads=2, mlp_dim=64))
    return model, jax.jit(model.init)(jax.random.key(0), np.zeros((1, 4), np.int32))["params"]


@pytest.fixture(scope="module")
def results(trained):
    started = []
    names = ["perplexity", "length", "gates", "byte_baselines"]
    results = run(make_evaluators({}, trained[0], CORPUS, 16, names=names), trained[1], on_progress=started.append)
    assert started == list(results) == names
    return results


def test_every_evaluator_gives_numbers(results):
    for metrics in results.values():
        assert metrics and all(type(value) is float and np.isfinite(value) for value in metrics.values())
    assert results["perplexity"]["tokens"] == 89 + 69 + 79
    assert "loss_at_00064" in results["length"]


def test_all_are_those_that_apply(trained):
    """These texts are too short for most questions."""
    made, reasons = make_all_evaluators({"needle": {"max_length": 20}}, trained[0], CORPUS, 16)
    assert list(made) == ["perplexity", "length", "gates", "byte_baselines", "phonebook"]
    assert list(reasons) == ["task", "needle", "ruler", "babilong"]
    assert "longest prompt" in reasons["needle"] and "synthetic task" in reasons["task"]
    with pytest.raises(ValueError, match="no option 'depth'"):
        make_all_evaluators({"needle": {"depth": 3}}, trained[0], CORPUS, 16)
    assert set(made) | set(reasons) == set(EVALUATORS)


def test_baselines_see_the_bytes_that_perplexity_scores(trained):
    section = {"perplexity": {"max_tokens": 50, "window": 8}, "byte_baselines": {}}
    for names in (None, ["byte_baselines"]):
        evaluators = make_evaluators(section, trained[0], CORPUS, 16, names=names)
        result = evaluators["byte_baselines"]({})
        scored = make_evaluators(section, trained[0], CORPUS, 16)["perplexity"].scored_tokens()
        heldout = b"".join(map(text, scored))
        train = b"".join(text(document.tokens[1:]) for document in CORPUS.train)
        assert len(heldout) == 50
        assert result == {
            "gzip_bits_per_byte": gzip_bits_per_byte(heldout),
            "order3_bits_per_byte": order3_bits_per_byte(train, heldout),
        }


def test_defaults_follow_the_sequence_length(trained):
    model, params = trained
    default = make_evaluators({"perplexity": {"max_tokens": None}}, model, CORPUS, 16)
    given = make_evaluators({"perplexity": {"window": 16, "stride": 8, "batch_size": 2}}, model, CORPUS, 99)
    assert run(default, params)["perplexity"] == pytest.approx(run(given, params)["perplexity"], rel=1e-6)


@pytest.mark.parametrize(
    "section, message",
    [
        ({"perplexty": {}}, "unknown evaluator 'perplexty'; choose from perplexity, length"),
        ({"perplexity": {"strid": 1}}, "perplexity has no option 'strid'; choose from window, stride"),
        ({"perplexity": {"stride": "8"}}, "stride='8' must be an integer"),
        ({"perplexity": {"stride": 17}}, "evaluator perplexity: stride=17"),
        ({"perplexity": 3}, "give a mapping"),
        ({"length": {"train_length": 1000}}, "evaluator length: .* too few"),
        ({"byte_baselines": {"order": 3}}, "no option 'order'"),
    ],
)
def test_bad_sections(trained, section, message):
    with pytest.raises(ValueError, match=message):
        make_evaluators(section, trained[0], CORPUS, 16)


def test_bad_corpora(trained):
    with pytest.raises(ValueError, match="300 token ids"):
        make_evaluators({}, trained[0], Corpus(CORPUS.train, CORPUS.heldout, 300), 16)
    with pytest.raises(ValueError, match="leave the evaluator out"):
        make_evaluators({"byte_baselines": {}}, trained[0], Corpus((), CORPUS.heldout, 257), 16)


def test_run_report(tmp_path, results):
    pytest.importorskip("matplotlib")
    config = {
        "model": {"vocab_size": 257, "num_layers": 1, "embed_dim": 32, "num_heads": 2, "mixer": "path_fox"},
        "data": {"sequence_length": 16},
        "evals": {"length": {}},
    }
    summary = {"parameters": 12345, "train_bits_per_byte": 2.5, "seconds": 1.0, "checkpoint": "/run/checkpoints/5"}
    metrics = [{"step": i, "tokens": 128 * i, "loss": 5.0 / i} for i in range(1, 6)]
    write_run_report(
        tmp_path, config=config, summary=summary, results=results, metrics=metrics, sample="<script>x & y</script>"
    )
    names = {path.name for path in tmp_path.iterdir()}
    curves = {"loss_over_training.csv", "loss_by_position.csv", "mean_forget_gate.csv", "mean_beta.csv"}
    assert names == curves | {"report.html", "report.png"}
    page = (tmp_path / "report.html").read_text()
    assert "12,345" in page and "&lt;script&gt;x &amp; y" in page and "<script>" not in page
    lines = (tmp_path / "loss_over_training.csv").read_text().splitlines()
    assert lines[1] == f"train,128,{5 / np.log(2)}"
    assert len([line for line in lines if line.startswith("gzip")]) == 2


@pytest.mark.parametrize("stage, key", [("mse", "train_imitation_error"), ("kl", "train_divergence")])
def test_reports_of_conversions_do_not_take_their_loss_for_bits(tmp_path, stage, key):
    pytest.importorskip("matplotlib")
    model = dict(vocab_size=40, num_layers=2, embed_dim=8, num_heads=2)
    config = {"model": model, "data": {"source": "tokens", "path": "x", "sequence_length": 4, "batch_size": 2}}
    records = [{"step": i, "tokens": 8 * i, "loss": 5.0 / i, "step_seconds": 1.0} for i in range(1, 6)]
    if stage == "mse":
        records = [record | {"layer_0": 0.5, "layer_1": 9.5 / record["step"]} for record in records]
    summary = finish(
        tmp_path, config=config | {"evals": {}, "conversion": {"stage": stage}}, model=None, params={}, records=records,
        results={}, checkpoint=tmp_path, start=0.0,
    )  # fmt: skip
    assert summary[key] == 1.0 and "train_bits_per_token" not in summary
    assert (tmp_path / "loss_over_training.csv").read_text().splitlines()[-1] == "train,40,1.0"
    layers = tmp_path / "imitation_error_by_layer.csv"
    assert layers.exists() == (stage == "mse")
    if stage == "mse":
        assert layers.read_text().splitlines()[-1] == "layer 1,40,1.9"


def test_run_report_without_results(tmp_path):
    config = {"model": {"vocab_size": 257, "num_layers": 1, "embed_dim": 32, "num_heads": 2}, "data": {}, "evals": {}}
    write_run_report(tmp_path, config=config, summary={}, results={}, metrics=[], sample="")
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_tables(results):
    rows = summary_rows({"checkpoint": "/x", "heldout_bits_per_byte": 2.5, "parameters": 5, "device": "cpu"})
    assert list(rows.items()) == [
        ("parameters", 5), ("held-out bits/byte", 2.5), ("checkpoint", "/x"), ("device", "cpu")
    ]  # fmt: skip
    assert summary_table({"parameters": 5, "seconds": 1.0}).row_count == 2
    json.dumps(results, allow_nan=False)
