"""States that change places, against runs of joined sequences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from interpretability.tiny import BASE, LENGTH, SOURCE, tiny

from path_jax.interpretability import run, state_patch, with_weights
from path_jax.mixers import MIXERS

FAST = ("mamba",)  # caches of attention are in the next test
CUT = 5


@pytest.mark.parametrize(
    "mixer", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in MIXERS]
)
def test_all_states_are_the_whole_past(mixer):
    model, params = tiny(mixer)
    patch = lambda params, layers: state_patch(model, params, BASE, SOURCE, CUT, layers).logits
    both, one = jax.jit(lambda params: (patch(params, (0, 1)), patch(params, (1,))))(params)
    full = jax.jit(lambda tokens: run(model, params, tokens)[0].logits)
    joined, plain = full(jnp.concatenate([SOURCE[:, :CUT], BASE[:, CUT:]], axis=1)), full(BASE)
    np.testing.assert_allclose(both[:, CUT:], joined[:, CUT:], atol=1e-4)
    np.testing.assert_allclose(both[:, :CUT], plain[:, :CUT], atol=1e-4)
    assert np.abs(one[:, CUT:] - joined[:, CUT:]).max() > 1e-3 and np.abs(one[:, CUT:] - plain[:, CUT:]).max() > 1e-3


@pytest.mark.parametrize("mixer", ["rope", pytest.param("path_fox", marks=pytest.mark.slow)])
def test_rows_are_cut_where_they_want(mixer):
    model, params = tiny(mixer)
    at = jnp.array([2, 5, 8])
    out = jax.jit(lambda at: state_patch(model, params, BASE, SOURCE, at, (0, 1)).logits)(at)
    is_source = np.arange(LENGTH) < np.asarray(at)[:, None]
    joined, plain = (run(model, params, tokens)[0].logits for tokens in (jnp.where(is_source, SOURCE, BASE), BASE))
    np.testing.assert_allclose(out, jnp.where(is_source[..., None], plain, joined), atol=1e-4)


def test_parts_of_a_state():
    """A recurrent layer's past is in its convolution and in its recurrence."""
    model, params = tiny("mamba", num_layers=1)
    patch = lambda params, parts: state_patch(model, params, BASE, SOURCE, CUT, (0,), parts=parts).logits
    choices = (("memory", "history"), ("memory",), ("history",))
    both, memory, history = jax.jit(lambda params: [patch(params, parts) for parts in choices])(params)
    joined = run(model, params, jnp.concatenate([SOURCE[:, :CUT], BASE[:, CUT:]], axis=1))[0].logits
    np.testing.assert_allclose(both[:, CUT:], joined[:, CUT:], atol=1e-4)
    assert min(np.abs(both - part).max() for part in (memory, history)) > 1e-3


def test_states_that_there_are_not():
    model, params = tiny("nope")
    for at, layers, options, message in (
        (0, (0,), {}, "at=0 must be between 0 and the length 9"),
        (9, (0,), {}, "at=9 must be between"),
        (3, (0, 2), {}, r"layers \(0, 2\) are not all among the model's 2"),
        (3, (0,), dict(parts=("memory",)), r"a state has no \['memory'\]; its parts are \['attention', 'history'\]"),
    ):
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(
                lambda params, args=(at, layers), options=options: (
                    state_patch(model, params, BASE, SOURCE, *args, **options).logits
                ),
                params,
            )
    with pytest.raises(ValueError, match="differ in shape"):
        state_patch(model, params, BASE, SOURCE[:, :4], 3, (0,))
    with pytest.raises(NotImplementedError, match="decode with expose_weights=False"):
        state_patch(with_weights(model), params, BASE, SOURCE, 3, (0,))
