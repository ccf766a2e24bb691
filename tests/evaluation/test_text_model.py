"""Scoring and completing texts, against the plain forward pass."""

import dataclasses
import functools
import json
import pathlib

import jax
import numpy as np
import pytest
from checkpoints.synthetic import GGUF, MODELS, random_params, write_gguf

from path_jax.checkpoints import save_pretrained
from path_jax.data import ByteTokenizer
from path_jax.evaluation.text_model import TextModel
from path_jax.models import DecoderLM, ModelConfig
from path_jax.models.generate import generate

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "models"
BYTES = ModelConfig(vocab_size=257, num_layers=2, embed_dim=16, num_heads=2, mlp_dim=24, mixer="fox", scan_layers=False)


def make(**options):
    return TextModel(BYTES, random_params(BYTES), ByteTokenizer(), end_ids=(256,), **{"batch_size": 3} | options)


@functools.partial(jax.jit, static_argnums=0)
def all_logits(config, params, tokens):
    return DecoderLM(config).apply({"params": params}, tokens).logits


def direct(model, context, continuation):
    """The log-likelihood by the definition: one forward pass of the whole, softmax in float64."""
    ids = np.array([*context, *continuation])[-(model.max_length + 1) :]
    size, padded = len(continuation), np.zeros((1, model.config.num_positions or 128), np.int32)
    padded[0, : len(ids) - 1] = ids[:-1]
    logits = np.asarray(all_logits(model.config, model.params, padded))[0, : len(ids) - 1].astype(np.float64)
    log_p = (logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True))[-size:]
    return log_p[np.arange(size), ids[-size:]].sum(), bool((log_p.argmax(-1) == ids[-size:]).all())


def some_pairs():
    rng = np.random.default_rng(0)
    draw = lambda size: rng.integers(0, 256, size).tolist()
    long, short = draw(37), draw(5)
    pairs = [(long, draw(size)) for size in (3, 1, 7, 1)] + [(short, draw(4)), (draw(70), draw(20)), (draw(1), draw(1))]
    first, second = [1, 2, 3], [1, 2, 4]  # differ in their last token
    return [*pairs, (short, first), (short, second), pairs[0], (draw(20), draw(40))]


@pytest.mark.parametrize(
    "share, max_length",
    [
        ("worth it", 50),
        pytest.param("never", 2048, marks=pytest.mark.slow),
        pytest.param("always", 50, marks=pytest.mark.slow),
    ],
)
def test_scores_equal_the_forward_pass(share, max_length, monkeypatch):
    model = make(max_length=max_length)
    if share != "worth it":
        monkeypatch.setattr(model, "_is_worth_sharing", lambda context, tails: share == "always")
    pairs, done = some_pairs(), []
    for pair, score in zip(pairs, model.score(pairs, done.append)):
        expected, is_greedy = direct(model, *pair)
        assert abs(score.log_likelihood - expected) <= 1e-4 and score.is_greedy == is_greedy
    assert sum(done) == len(pairs)


def test_greedy_continuations_are_seen():
    model = make()
    context = [5, 6, 7]
    found = np.asarray(generate(DecoderLM(BYTES), model.params, context, max_new_tokens=4))[0, 3:].tolist()
    other = [*found[:-1], (found[-1] + 1) % 257]
    assert [score.is_greedy for score in model.score([(context, found), (context, other)])] == [True, False]


def test_a_shared_context_is_read_once(monkeypatch):
    from path_jax.evaluation import text_model

    reads, scores = [], []
    read, score = text_model._read, text_model._score
    monkeypatch.setattr(text_model, "_read", lambda *args: (reads.append(args[2].shape), read(*args))[1])
    monkeypatch.setattr(text_model, "_score", lambda *args: (scores.append(args[2].shape), score(*args))[1])
    context = list(range(60))
    make().score([(context, [1, 2, i]) for i in range(3)] + [(context, [i, 2]) for i in range(4, 8)])
    # Continuations that differ in the last token alone are one row, so there are five.
    assert reads == [(3, 64)] and scores == [(3, 16)] * 5


@pytest.mark.slow
def test_learned_positions_bound_every_length():
    _, config = MODELS["gpt2"]
    model = TextModel(config, random_params(config), ByteTokenizer(), batch_size=2)
    assert model.max_length == config.num_positions == 32
    pairs = [(list(range(30)), [i, 1]) for i in range(3)] + [(list(range(9)), [i, 1, 2]) for i in range(3)]
    for pair, score in zip(pairs, model.score(pairs)):
        assert abs(score.log_likelihood - direct(model, *pair)[0]) <= 1e-4
    assert len(model.complete([[1] * 31, [2]], 5)) == 2
    with pytest.raises(ValueError, match="at most the model's 32 positions"):
        TextModel(config, random_params(config), ByteTokenizer(), max_length=33)


def test_completions_stop():
    model = make(batch_size=2)
    prompts = [[1, 2, 3, 4, 5], [9], [7, 7]]
    out = np.asarray(generate(DecoderLM(BYTES), model.params, prompts, max_new_tokens=12))
    free = [model.decode(row[len(prompt) : len(prompt) + 12]) for row, prompt in zip(out, prompts)]
    assert model.complete(prompts, 12) == free
    stops = [text[3:5] for text in free]
    expected = [text[: min(text.find(s) for s in stops if s in text)] for text in free]
    assert model.complete(prompts, 12, stop=[*stops, ""]) == expected
    end = int(out[1, 3])  # a token that ends texts
    stopping = TextModel(BYTES, model.params, ByteTokenizer(), end_ids=(end,), batch_size=2)
    cut = out[1, 1:13].tolist()
    assert stopping.complete([prompts[1]], 12) == [model.decode(cut[: cut.index(end)])]
    key = jax.random.key(1)
    assert model.complete(prompts, 6, temperature=1.0, rng=key) == model.complete(prompts, 6, temperature=1.0, rng=key)
    with pytest.raises(ValueError, match="leaves no room"):
        make(max_length=12).complete(prompts, 12)


def test_openings_of_bytes(tmp_path):
    assert make().encode("ab") == [256, 97, 98] and make().prefix_id == 256
    assert make(add_bos=False).encode("ab") == [97, 98] == make().encode("ab", add_bos=False)
    model = TextModel.load(GOLDEN / "fla_path")  # 256 ids; its config.json names token 1
    assert model.encode("ab") == [97, 98] and model.prefix_id == 1
    assert TextModel.load(GOLDEN / "fla_path", add_bos=True).encode("ab") == [1, 97, 98]
    save_pretrained(tmp_path / "x", BYTES, random_params(BYTES), "native", extra=dict(data=dict(sequence_length=99)))
    model = TextModel.load(tmp_path / "x", prefix_id=3)
    assert model.max_length == 99 and model.prefix_id == 3 and model.encode("a") == [256, 97]


def test_openings_of_learned_vocabularies(tmp_path):
    opened = lambda writer: (writer.add_add_bos_token(True), writer.add_bos_token_id(3))
    config = dataclasses.replace(GGUF, vocab_size=4)
    params = random_params(config)
    path = write_gguf(tmp_path / "x.gguf", params, config=config, change=opened)
    model = TextModel.load(path)
    assert model.encode("ab") == [3, 2] and model.encode("ab", add_bos=False) == [2] and model.prefix_id == 3
    assert model.encode("<|end|>ab") == [3, 2]  # a text that opens itself
    model = TextModel.load(path, add_bos=False)
    assert model.encode("ab") == [2] and model.encode("ab", add_bos=True) == [3, 2]
    save_pretrained(tmp_path / "hf", config, params, "hf", extra=dict(bos_token_id=0, max_position_embeddings=77))
    model.tokenizer.save(tmp_path / "hf" / "tokenizer.json")
    assert TextModel.load(tmp_path / "hf").prefix_id == 0 and TextModel.load(tmp_path / "hf").max_length == 77
    settings = dict(bos_token=None, eos_token={"content": "<|end|>"})
    (tmp_path / "hf" / "tokenizer_config.json").write_text(json.dumps(settings))
    assert TextModel.load(tmp_path / "hf").prefix_id == 3


def test_input_that_cannot_be_scored():
    model = make(max_length=8)
    for pair, message in (
        (([1], []), "0 tokens after 1"),
        (([], [1]), "1 tokens after 0"),
        (([1], [1] * 9), "9 tokens"),
    ):
        with pytest.raises(ValueError, match=message):
            model.score([pair])
    with pytest.raises(ValueError, match="batch_size=0"):
        make(batch_size=0)
    with pytest.raises(ValueError, match="names no token"):
        TextModel(dataclasses.replace(BYTES, vocab_size=256), random_params(BYTES), ByteTokenizer()).need_prefix()
