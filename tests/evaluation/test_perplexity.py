"""Strided perplexity: every target once, with the context that is promised."""

import functools

import jax
import numpy as np
import pytest

from path_jax.data import Document
from path_jax.data.text import LazyDocuments
from path_jax.evaluation.perplexity import Perplexity
from path_jax.models import DecoderLM, ModelConfig


@pytest.fixture(scope="module")
def trained():
    model = DecoderLM(ModelConfig(vocab_size=257, num_layers=1, embed_dim=32, num_heads=2, mlp_dim=64))
    params = jax.jit(model.init)(jax.random.key(0), np.zeros((1, 4), np.int32))["params"]
    # Random initial logits are almost flat; larger ones make the context visible in every loss.
    return model, jax.tree.map(lambda x: 8 * x, params)


def make_documents(*lengths):
    rng = np.random.default_rng(0)
    texts = [np.append(256, rng.integers(0, 256, n - 1)).astype(np.int32) for n in lengths]
    return [Document(f"d{i}", text) for i, text in enumerate(texts)]


def direct_losses(model, params, tokens):
    inputs = np.zeros((1, 32), np.int32)  # one compiled shape; the padding comes after what counts
    inputs[0, : len(tokens) - 1] = tokens[:-1]
    logits = forward(model, params, inputs)[0]
    return np.asarray(-jax.nn.log_softmax(logits)[np.arange(len(tokens) - 1), tokens[1:]])


@functools.partial(jax.jit, static_argnums=0)
def forward(model, params, tokens):
    return model.apply({"params": params}, tokens).logits


@pytest.mark.parametrize("window, stride", [(16, 4), (16, 5), (16, 16), (7, 1)])
def test_every_target_has_the_loss_of_its_own_window(trained, window, stride):
    model, params = trained
    documents = make_documents(43, 1, 2, 17, 18)
    evaluator = Perplexity(model, documents, window=window, stride=stride, batch_size=3)
    losses = evaluator.per_token_loss(params)
    texts = [document.tokens for document in documents if len(document.tokens) > 1]
    assert [len(x) for x in losses] == [len(x) - 1 for x in texts]
    for tokens, loss in zip(texts, losses):
        index = np.arange(len(tokens) - 1)
        starts = np.maximum(-(-(index - window + 1) // stride), 0) * stride  # of the first window with the target
        assert (index - starts >= np.minimum(index, window - stride)).all()
        for start in np.unique(starts):
            mine = index[starts == start]
            direct = direct_losses(model, params, tokens[start : start + window + 1])
            np.testing.assert_allclose(loss[mine], direct[mine - start], rtol=2e-5, atol=2e-5)


def test_totals_are_those_of_the_tokens(trained):
    model, params = trained
    evaluator = Perplexity(model, make_documents(40, 23), window=16, stride=8)
    result = evaluator(params)
    losses = np.concatenate(evaluator.per_token_loss(params)).astype(np.float64)
    assert result["tokens"] == len(losses) == 39 + 22
    assert result["loss"] == pytest.approx(losses.mean(), rel=1e-12)
    assert result["perplexity"] == pytest.approx(np.exp(losses.mean()))
    assert result["bits_per_byte"] == pytest.approx(losses.mean() / np.log(2))


def test_a_window_longer_than_the_document_is_the_plain_loss(trained):
    model, params = trained
    (document,) = make_documents(30)
    (losses,) = Perplexity(model, [document], window=64, stride=32).per_token_loss(params)
    np.testing.assert_allclose(losses, direct_losses(model, params, document.tokens), rtol=2e-5, atol=2e-5)


def test_one_shape_compiles(trained):
    model, params = trained
    evaluator = Perplexity(model, make_documents(40, 3, 25), window=16, stride=8, batch_size=4)
    evaluator(params)
    assert evaluator._losses._cache_size() == 1


@pytest.mark.parametrize(
    "lengths, max_tokens, expected",
    [([100, 100, 100], 60, 60), ([100, 5, 100], 61, 61), ([10, 10], 1000, 18), ([4] * 50, 33, 33), ([3, 3, 3], 1, 1)],
)
def test_budget_takes_beginnings(trained, lengths, max_tokens, expected):
    documents = make_documents(*lengths)
    evaluator = Perplexity(trained[0], documents, window=16, stride=8, max_tokens=max_tokens)
    scored = evaluator.scored_tokens()
    assert sum(map(len, scored)) == expected
    starts = [document.tokens[1:] for document in documents]
    places = [next(i for i, x in enumerate(starts) if np.array_equal(x[: len(y)], y)) for y in scored]
    assert places == sorted(places)


def test_budget_reads_few_documents_of_a_lazy_corpus(trained):
    documents, read = make_documents(*[40] * 1000), []
    lazy = LazyDocuments(1000, lambda index: read.append(index) or documents[index])
    Perplexity(trained[0], lazy, window=16, stride=8, max_tokens=160)
    assert len(read) == 10
    assert max(np.diff([0, *sorted(read), 1000])) < 250  # spread over the corpus


@pytest.mark.parametrize(
    "options, message",
    [
        ({"window": 8, "stride": 9}, "stride=9"),
        ({"window": 8, "stride": 0}, "stride=0"),
        ({"window": 0, "stride": 0}, "window=0"),
        ({"window": 8, "stride": 8, "max_tokens": 0}, "max_tokens=0"),
        ({"window": 8, "stride": 8, "batch_size": 0}, "batch_size=0"),
    ],
)
def test_bad_options(trained, options, message):
    with pytest.raises(ValueError, match=message):
        Perplexity(trained[0], make_documents(9), **options)


def test_nothing_to_score(trained):
    with pytest.raises(ValueError, match="nothing to score"):
        Perplexity(trained[0], make_documents(1, 1), window=8, stride=8)
