"""Reading through the decode cache: the losses and answers of the full forward pass, in bounded memory."""

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

from path_jax.data import Document
from path_jax.evaluation import streaming
from path_jax.evaluation.length_extrapolation import LossByPosition
from path_jax.evaluation.streaming import Reader, capacity
from path_jax.models import DecoderLM, ModelConfig
from path_jax.models.cache import init_cache, unrolled

SHAPE = dict(vocab_size=50, embed_dim=32, num_heads=2, mlp_dim=64)
ROWS = [np.random.default_rng(n).integers(0, 50, n).astype(np.int32) for n in (150, 131, 2, 64, 65)]


def make(mixer, **options):
    model = DecoderLM(ModelConfig(**SHAPE, **{"num_layers": 1, "mixer": mixer} | options))
    params = jax.jit(model.init)(jax.random.key(0), np.zeros((1, 4), np.int32))["params"]
    return model, jax.tree.map(lambda x: 4 * x, params)  # what the context is must show


@pytest.fixture(scope="module")
def rope():
    return make("rope", num_layers=2)  # compiles in a fraction of the time of PaTH


def forward(model, params, rows):
    """Log-probabilities of the full forward pass."""
    tokens = np.zeros((len(rows), max(map(len, rows))), np.int32)
    for row, source in zip(tokens, rows):
        row[: len(source)] = source
    log_p = jax.jit(lambda p, x: jax.nn.log_softmax(model.apply({"params": p}, x).logits))(params, tokens)
    return np.asarray(log_p)


@pytest.mark.parametrize("mixer", ["path_fox", pytest.param("deltanet", marks=pytest.mark.slow)])
def test_losses_are_those_of_the_full_forward_pass(mixer):
    model, params = make(mixer)
    losses = Reader(model, params, batch_size=2, max_length=200, chunk=48).losses(ROWS)
    for row, found, log_p in zip(ROWS, losses, forward(model, params, ROWS)):
        np.testing.assert_allclose(found, -log_p[np.arange(len(row) - 1), row[1:]], atol=1e-4)


def test_answers_are_scored_and_generated_after_ragged_prompts(rope):
    model, params = rope
    reader = Reader(model, params, batch_size=3, max_length=264, chunk=48)
    prompts, answers = [ROWS[0][:100], ROWS[1][:31]], [ROWS[0][100:103], ROWS[1][31:100]]
    prefix = reader.read(prompts)
    for (loss, is_greedy), prompt, answer, log_p in zip(
        reader.score(prefix, answers), prompts, answers, forward(model, params, ROWS[:2])
    ):
        log_p = log_p[len(prompt) - 1 :][: len(answer)]
        np.testing.assert_allclose(loss, -log_p[np.arange(len(answer)), answer], atol=1e-4)
        np.testing.assert_array_equal(is_greedy, log_p.argmax(-1) == answer)
    new = reader.generate(prefix, 6)
    whole = [np.concatenate(pair) for pair in zip(prompts, new)]
    for row, prompt, log_p in zip(new, prompts, forward(model, params, whole)):
        np.testing.assert_array_equal(row, log_p[len(prompt) - 1 :][:6].argmax(-1))


def test_one_program_reads_texts_of_all_lengths(rope):
    model, params = rope
    before = streaming._read_losses._cache_size()
    reader = Reader(model, jax.device_put(params, jax.devices()[1]), batch_size=2, max_length=190, chunk=40)
    for length in (3, 41, 120):
        reader.losses([ROWS[0][:length]])
    assert streaming._read_losses._cache_size() == before + 1


def test_memory_does_not_grow_with_the_length():
    model, params = make("path_fox")
    config, params = unrolled(model.config, params)
    model, chunk, sizes = DecoderLM(config), 64, []
    tokens, count = jnp.zeros((1, chunk), jnp.int32), jnp.zeros(1, jnp.int32)
    for length in (2048, 16384):
        cache = jax.eval_shape(lambda length=length: init_cache(config, 1, length))
        arguments = (params, cache, tokens, tokens, count)
        shapes = [
            variable.aval.shape
            for equation in _equations(jax.make_jaxpr(lambda *x: streaming._read_losses(model, *x))(*arguments).jaxpr)
            for variable in equation.outvars
        ]
        assert not [x for x in shapes if sum(size >= length for size in x) > 1 or {length, 50} <= set(x)]
        # As users compile it, unlike the rest of the suite.
        program = streaming._read_losses.lower(model, *arguments).compile({"xla_cpu_use_fusion_emitters": True})
        memory = program.memory_analysis()
        sizes.append(memory.temp_size_in_bytes)
    assert sizes[1] < 1.2 * sizes[0] + 2**16, sizes


def _equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from _equations(inner)


def test_loss_by_position_streams(rope):
    model, params = rope
    documents = [Document(f"{i}", np.tile(row, 4)[:257]) for i, row in enumerate(ROWS[:2])]
    options = dict(train_length=4, multiple=64, batch_size=2)
    full, chunks = (LossByPosition(model, documents, **options, chunk=chunk) for chunk in (None, 100))
    assert chunks(params) == pytest.approx(full(params), abs=1e-4)
    assert chunks.losses.shape == (256,)
    np.testing.assert_allclose(chunks.losses, full.losses, atol=1e-4)
    with pytest.raises(ValueError, match="chunk=-1"):
        LossByPosition(model, documents, **options, chunk=-1)


def test_limits(rope):
    model, params = rope
    assert capacity(model.config, 10_000) == 10_000
    assert capacity(ModelConfig(**SHAPE, num_layers=1, mixer="nope", num_positions=33), 10_000) == 33
    assert capacity(ModelConfig(**SHAPE, num_layers=1, mixer="hyena"), 3000) == 2048
    with pytest.raises(ValueError, match="chunk=0"):
        Reader(model, params, batch_size=1, max_length=9, chunk=0)
    reader = Reader(model, params, batch_size=1, max_length=100)
    with pytest.raises(ValueError, match="130 tokens, more than max_length=100"):
        reader.losses([ROWS[1]])
    with pytest.raises(ValueError, match="at least one token"):
        reader.read([ROWS[0][:0]])
