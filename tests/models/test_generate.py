"""Generation against the plain forward pass."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from path_jax.interpretability.exit_rules import GapRule
from path_jax.mixers import MIXERS
from path_jax.models import DecoderLM, ModelConfig
from path_jax.models.generate import _decode, generate, prefill
from path_jax.models.sampling import restrict

VOCAB = 23


@pytest.fixture(scope="module")
def trained():
    return make_model("rope")


def make_model(mixer):
    model = DecoderLM(ModelConfig(VOCAB, num_layers=2, embed_dim=32, num_heads=2, mlp_dim=64, mixer=mixer))
    params = jax.jit(model.init)(jax.random.key(0), np.zeros((1, 4), np.int32))["params"]
    return model, jax.tree.map(lambda x: 5 * x, params)  # distinct enough that no two logits tie


PROMPT = np.random.default_rng(0).integers(0, VOCAB, (3, 5))


SLOW = {"path", "fox", "rope", "nope", "deltanet", "based", "h3", "hyena", "base_conv"}


@pytest.mark.parametrize(
    "mixer", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in MIXERS]
)
def test_greedy_is_the_argmax_of_every_step(mixer):
    model, params = make_model(mixer)
    out = generate(model, params, PROMPT, max_new_tokens=7)
    logits = jax.jit(model.apply)({"params": params}, out).logits  # causal: row t is the forward pass over out[: t + 1]
    np.testing.assert_array_equal(out[:, :5], PROMPT)
    np.testing.assert_array_equal(out[:, 5:], jnp.argmax(logits[:, 4:-1], axis=-1))
    assert out.dtype == jnp.int32


def test_prompts_of_one_batch_differ_in_length(trained):
    prompts = [PROMPT[0, :2], PROMPT[1], PROMPT[2, :1]]
    out = np.asarray(generate(*trained, prompts, max_new_tokens=6))
    assert out.shape == (3, 11)
    for row, prompt in zip(out, prompts):
        alone = generate(*trained, prompt, max_new_tokens=6)
        np.testing.assert_array_equal(row[: len(prompt) + 6], alone[0])


def test_tokens_are_reported_as_they_come(trained):
    reported = []
    out = generate(*trained, PROMPT, max_new_tokens=6, on_token=lambda tokens, running: reported.append(tokens))
    np.testing.assert_array_equal(out, generate(*trained, PROMPT, max_new_tokens=6))
    np.testing.assert_array_equal(np.stack(reported, 1), out[:, 5:])
    stopped = generate(*trained, PROMPT, max_new_tokens=6, on_token=lambda tokens, running: True)
    np.testing.assert_array_equal(stopped[:, :6], out[:, :6])
    assert not np.asarray(stopped[:, 6:]).any()


def test_a_prompt_without_rows_is_one_row(trained):
    one, many = (generate(*trained, prompt, max_new_tokens=7) for prompt in (PROMPT[1], PROMPT))
    np.testing.assert_array_equal(one, many[1:2])


def test_sampling_is_reproducible_and_in_range(trained):
    model, params = trained
    sample = lambda seed, **options: np.asarray(
        generate(model, params, PROMPT, max_new_tokens=12, temperature=1.0, rng=jax.random.key(seed), **options)
    )
    first = sample(1)
    np.testing.assert_array_equal(first, sample(1))
    assert (first != sample(2)).any()
    assert first.min() >= 0 and first.max() < VOCAB
    greedy = generate(model, params, PROMPT, max_new_tokens=12)
    np.testing.assert_array_equal(sample(3, top_k=1), greedy)
    np.testing.assert_array_equal(sample(3, top_p=1e-6), greedy)


def test_another_key_does_not_compile_again(trained):
    model, params = trained
    sample = lambda seed: generate(model, params, PROMPT, max_new_tokens=4, temperature=0.7, rng=jax.random.key(seed))
    sample(0)
    sizes = prefill._cache_size(), _decode._cache_size()
    sample(1)
    assert (prefill._cache_size(), _decode._cache_size()) == sizes


def test_rows_are_filled_after_their_stop_token(trained):
    model, params = trained
    free = np.asarray(generate(model, params, PROMPT, max_new_tokens=8))
    stop = int(free[0, 7])
    out = np.asarray(generate(model, params, PROMPT, max_new_tokens=8, stop_token=stop))
    for row, plain in zip(out, free):
        ends = np.flatnonzero(plain[5:] == stop)
        end = 5 + ends[0] if len(ends) else 13
        np.testing.assert_array_equal(row[:end], plain[:end])
        assert (row[end:] == stop).all()


def test_restrict_keeps_the_likeliest():
    logits = jnp.log(jnp.array([[0.4, 0.3, 0.2, 0.1], [0.1, 0.2, 0.3, 0.4]]))
    kept = lambda **options: np.isfinite(restrict(logits, options.get("top_k"), options.get("top_p")))[0].tolist()
    assert kept(top_k=2) == [True, True, False, False]
    assert kept(top_k=9) == [True] * 4
    assert kept(top_p=0.65) == [True, True, False, False]
    assert kept(top_p=0.75) == [True, True, True, False]
    assert kept(top_p=1.0) == [True] * 4
    assert kept(top_k=3, top_p=0.4) == [True, False, False, False]  # 0.4 / 0.9 of what top-k left


@pytest.mark.parametrize(
    "function",
    [
        lambda logits: restrict(logits, 4, None),
        lambda logits: GapRule(jnp.zeros(1)).scores(0, logits, None, lambda x: x),
    ],
    ids=["top-k sampling", "exit by gap"],
)
def test_the_likeliest_tokens_are_not_found_by_sorting_the_vocabulary(function):
    assert " sort(" not in jax.jit(function).lower(jnp.zeros((1, 4096))).compile().as_text()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"temperature": -0.5}, "temperature=-0.5"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"temperature": 1.0}, "needs rng"),
        ({"top_k": 0}, "top_k=0"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"top_p": 1.5}, "top_p=1.5"),
        ({"stop_token": VOCAB}, "stop_token=23"),
        ({"prompt": np.zeros((2, 0), int)}, "at least one integer per row"),
        ({"prompt": np.zeros(3)}, "prompt is float64"),
        ({"prompt": np.array([VOCAB])}, "prompt has ids 23"),
    ],
)
def test_bad_arguments(trained, options, message):
    arguments = {"prompt": PROMPT, "max_new_tokens": 2} | options
    with pytest.raises(ValueError, match=message):
        generate(*trained, **arguments)
