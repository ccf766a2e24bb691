"""Evaluating models that were not trained here, on bytes and on learned vocabularies."""

import dataclasses
import json
import pathlib

import numpy as np
import pytest
from checkpoints.synthetic import MODELS, random_params

from path_jax.checkpoints import save_pretrained
from path_jax.evaluation.pretrained import load_with_text
from path_jax.evaluation.runner import make_evaluators, run

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "models"


def perplexity(loaded):
    length = loaded.config["data"]["sequence_length"]
    section = {"perplexity": {"batch_size": 1, "window": min(length, 192)}}
    evaluators = make_evaluators(section, loaded.model, loaded.corpus, length)
    return run(evaluators, loaded.params)["perplexity"]


@pytest.mark.parametrize("name", ["fla_path", "fox_pro"])
def test_published_token_losses(name, tmp_path):
    """A vocabulary of 256 without a tokenizer is one of bytes, and the first byte is context only."""
    golden = np.load(GOLDEN / name / "golden.npz")
    (tmp_path / "text").write_bytes(bytes(golden["text_ids"].tolist()))
    result = perplexity(load_with_text(GOLDEN / name, str(tmp_path / "text")))
    assert abs(result["loss"] - golden["text_token_loss"].mean()) <= 1e-5
    assert result["tokens"] == len(golden["text_token_loss"])


def test_a_learned_vocabulary(tmp_path):
    _, config = MODELS["gpt2"]
    save_pretrained(tmp_path / "x", config, random_params(config), "hf")
    (tmp_path / "text").write_text("abba" * 30)
    with pytest.raises(ValueError, match="has 40 token ids and no tokenizer.json"):
        load_with_text(tmp_path / "x", str(tmp_path / "text"))
    (tmp_path / "x" / "vocab.json").write_text(json.dumps({"a": 0, "b": 39}))
    (tmp_path / "x" / "merges.txt").write_text("")
    loaded = load_with_text(tmp_path / "x", str(tmp_path / "text"))
    assert loaded.corpus.heldout[0].tokens[:5].tolist() == [0, 39, 39, 0, 0]
    assert loaded.config["data"]["sequence_length"] == config.num_positions  # windows no longer than the positions
    result = perplexity(loaded)
    assert result["tokens"] == 119 and np.isfinite(result["loss"])
    (tmp_path / "x" / "vocab.json").write_text(json.dumps({"a": 0, "b": 40}))
    with pytest.raises(ValueError, match="41 token ids, the model only 40"):
        perplexity(load_with_text(tmp_path / "x", str(tmp_path / "text")))


def test_bytes_with_an_opener_and_the_standard_library(tmp_path):
    config = dataclasses.replace(MODELS["fox-llama"][1], vocab_size=257)
    save_pretrained(tmp_path / "x", config, random_params(config), "native")
    loaded = load_with_text(tmp_path / "x", None)
    assert loaded.corpus.heldout[0].tokens[0] == 256 and len(loaded.corpus.heldout) > 100
    assert loaded.config["evals"] == {"perplexity": {"max_tokens": 50_000}}
