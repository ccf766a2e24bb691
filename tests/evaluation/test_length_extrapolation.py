"""Loss by position, and the long texts it reads."""

import jax
import numpy as np
import pytest

from path_jax.data import Document
from path_jax.evaluation.length_extrapolation import LossByPosition, long_rows
from path_jax.evaluation.perplexity import Perplexity
from path_jax.models import DecoderLM, ModelConfig


def make_documents(*lengths):
    rng = np.random.default_rng(0)
    return [Document(f"d{n}", np.append(256, rng.integers(0, 256, n - 1)).astype(np.int32)) for n in lengths]


@pytest.fixture(scope="module")
def trained():
    model = DecoderLM(ModelConfig(vocab_size=257, num_layers=1, embed_dim=32, num_heads=2, mlp_dim=64))
    return model, jax.jit(model.init)(jax.random.key(0), np.zeros((1, 4), np.int32))["params"]


def test_curve_is_the_direct_loss(trained):
    model, params = trained
    documents = make_documents(40, 33, 60)
    result = LossByPosition(model, documents, train_length=8, num_buckets=4, batch_size=2)(params)
    cut = [Document(document.name, document.tokens[:33]) for document in documents]
    losses = np.mean(Perplexity(model, cut, window=32, stride=32).per_token_loss(params), axis=0)
    expected = {f"loss_at_{8 * i + 8:05d}": losses[8 * i : 8 * i + 8].mean() for i in range(4)}
    expected |= {"loss_within_train_length": losses[:8].mean(), "loss_beyond_train_length": losses[8:].mean()}
    assert result == pytest.approx(expected, rel=1e-5)
    assert list(result) == list(expected)


def test_buckets_of_a_length_that_they_do_not_divide(trained):
    model, params = trained
    result = LossByPosition(model, make_documents(40), train_length=5, multiple=2, num_buckets=4)(params)
    assert [int(key[-5:]) for key in result if "_at_" in key] == [2, 5, 8, 10]


def test_long_documents_come_before_joined_ones():
    documents = make_documents(4, 12, 5, 6, 3)
    rows = long_rows(documents, 10, 3)
    assert rows.shape == (2, 10)
    np.testing.assert_array_equal(rows[0], documents[1].tokens[:10])
    short = [documents[i].tokens for i in (0, 2, 3)]
    np.testing.assert_array_equal(rows[1], np.concatenate([short[0], short[1][1:], short[2][1:]])[:10])
    assert (rows == 256).sum(axis=1).tolist() == [1, 1]


def test_no_more_rows_than_asked_for():
    assert long_rows(make_documents(12, 13, 14), 10, 2).shape == (2, 10)
    assert long_rows(make_documents(*[6] * 20), 10, 2).shape == (2, 10)


@pytest.mark.parametrize("name, value", [("train_length", 0), ("multiple", 1), ("num_buckets", 0), ("num_buckets", 99)])
def test_bad_options(trained, name, value):
    with pytest.raises(ValueError, match=f"{name}={value}"):
        LossByPosition(trained[0], make_documents(100), **({"train_length": 8} | {name: value}))


def test_too_little_text(trained):
    with pytest.raises(ValueError, match="hold 20 tokens, too few for one text of 33"):
        LossByPosition(trained[0], make_documents(10, 10), train_length=8)
