"""Sites by name; values that are captured and edited under every transformation."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import FrozenDict
from interpretability.tiny import BASE, BATCH, LENGTH, WIDTH, tiny

from path_jax.interpretability import Site, run, selection, site_shapes, sites, with_weights
from path_jax.mixers import MIXERS
from path_jax.models import DecoderLM
from path_jax.models.stacking import stack_layers
from path_jax.nn.taps import BLOCK_TAPS, MIXER_TAPS

# Inside each mixer, in the order of computation.
TAPS = {
    "path": "v q k conv_out w beta head_out",
    "path_fox": "v q k conv_out w beta log_forget head_out",
    "fox": "q k v log_forget head_out",
    "rope": "q k v head_out",
    "nope": "q k v head_out",
    "stick_breaking": "q k v head_out",
    "deltanet": "conv_out q k v beta recurrence",
    "mamba": "conv_out recurrence gate",
    "based": "q k v recurrence",
    "h3": "q k v conv_out recurrence",
    "hyena": "q k v conv_out",
    "base_conv": "conv_out gate",
}


def test_sites_read_and_write_their_names():
    for text, site in (("0.mixer_out", Site(0, "mixer_out")), ("11.mixer.q", Site(11, "q"))):
        assert str(site) == f"{site}" == text
        assert Site.parse(text) == site
    for text in ("mixer_out", "0.q", "0.mixer.mixer_out", "0.mixer", "-1.mlp_in", "0.resid_mid", "00.mlp_in"):
        with pytest.raises(ValueError, match="is not a site"):
            Site.parse(text)


@pytest.mark.parametrize("mixer", MIXERS)
def test_sites_of_every_mixer(mixer):
    model, _ = tiny(mixer)
    block = ["resid_pre", "mixer_in", *TAPS[mixer].split(), "mixer_out", "mlp_in", "mlp_out", "resid_post"]
    expected = [Site(layer, tap) for layer in range(2) for tap in block]
    shapes = site_shapes(dataclasses.replace(model.config, scan_layers=mixer == "fox", remat="full"), 2, 5)
    assert list(shapes) == expected
    assert all(shapes[site].shape == (2, 5, WIDTH) for site in expected if site.tap in BLOCK_TAPS)
    assert all(shapes[site].shape[:2] == (2, 5) for site in expected)
    assert {site.tap for site in expected} <= {*BLOCK_TAPS, *MIXER_TAPS}


def test_captures_and_edits():
    """Edits are seen downstream and in what is captured; a value keeps its dtype."""
    model, params = tiny("nope")
    assert sites(model.config) == tuple(site_shapes(model.config, 1, 1))
    plain, before = run(model, params, BASE, capture=["0.mixer_out", "0.resid_post", "1.mixer.q"])
    assert set(before) == {Site(0, "mixer_out"), Site(0, "resid_post"), Site(1, "q")}
    expected = DecoderLM(model.config).apply({"params": params}, BASE).logits
    np.testing.assert_array_equal(plain.logits, expected)
    double = lambda value: 2 * np.asarray(value, np.float64)
    out, after = run(model, params, BASE, capture=before, edits={"0.mixer_out": double})
    assert after[Site(0, "mixer_out")].dtype == jnp.float32
    np.testing.assert_array_equal(after[Site(0, "mixer_out")], 2 * before[Site(0, "mixer_out")])
    difference = after[Site(0, "resid_post")] - before[Site(0, "resid_post")]
    assert np.abs(difference).max() > 0.01 and np.abs(out.logits - plain.logits).max() > 0.01


@pytest.mark.parametrize("shape", ["scanned", "rematerialised"])
def test_models_and_parameters_of_either_shape(shape):
    model, params = tiny("nope")
    scanned = DecoderLM(dataclasses.replace(model.config, scan_layers=shape == "scanned", remat="full"))
    capture = jax.jit(lambda model, params: run(model, params, BASE, capture=["1.mlp_in"]), static_argnums=0)
    for actual in (capture(scanned, stack_layers(params)), capture(scanned, params)):
        jax.tree.map(np.testing.assert_array_equal, actual, capture(model, params))


def test_under_jit_vmap_and_grad():
    model, params = tiny("fox", num_layers=1, implementation="xla")

    def steered(amount):
        edits = {"0.mixer.head_out": lambda value: value + amount}
        out, values = run(model, params, BASE, capture=["0.mlp_in"], edits=edits)
        return out.logits.sum(), values

    amounts = jnp.array([0.0, 0.5])
    apart = [jax.jit(steered)(amount) for amount in amounts]
    together = jax.jit(jax.vmap(steered))(amounts)
    jax.tree.map(
        lambda actual, *expected: np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5), together, *apart
    )
    slope = jax.jit(jax.grad(lambda amount: steered(amount)[0]))(0.25)
    step = 1e-2
    (above, _), (below, _) = (jax.jit(steered)(0.25 + sign * step) for sign in (1, -1))
    np.testing.assert_allclose(slope, (above - below) / (2 * step), rtol=1e-2)


def test_a_site_that_never_fires_is_an_error():
    model, params = tiny("nope")
    for arguments in (dict(capture=["0.mixer.w"]), dict(edits={"2.mlp_out": lambda value: value})):
        with pytest.raises(ValueError, match=r"no value at (0.mixer.w|2.mlp_out): this model .mixer nope. has 0.resid"):
            jax.eval_shape(lambda params, arguments=arguments: run(model, params, BASE, **arguments)[0].logits, params)
    with pytest.raises(ValueError, match=r"the edit of 0.mlp_out gives \(3, 16\), its value is \(3, 9, 16\)"):
        run(model, params, BASE, edits={"0.mlp_out": lambda value: value[:, 0]})
    with pytest.raises(ValueError, match="the mixer mamba has no attention weights"):
        with_weights(tiny("mamba")[0])
    options = FrozenDict({"nope": {"qkv_bias": True}})
    hybrid = with_weights(tiny("mamba+nope", mixer_options=options)[0]).config
    assert hybrid.mixer_options == {"nope": {"qkv_bias": True, "expose_weights": True}}
    assert [site for site in sites(hybrid) if site.tap == "attn_probs"] == [Site(1, "attn_probs")]


def test_selection_by_position_and_head():
    def chosen(site, shape, *args):
        return np.argwhere(np.broadcast_to(selection(site, jnp.zeros(shape), *args), shape)[..., 0]).tolist()

    v, beta = (BATCH, LENGTH, 2, 4), (BATCH, LENGTH, 2)
    assert np.all(selection("0.mixer_out", jnp.zeros((BATCH, LENGTH, 5))))
    assert chosen("0.mixer_out", (BATCH, LENGTH, 5), jnp.array([2, -1, LENGTH])) == [[0, 2]]
    assert chosen("0.mixer_out", (BATCH, LENGTH, 5), 4) == [[0, 4], [1, 4], [2, 4]]
    assert chosen("0.mixer_out", (BATCH, LENGTH, 5), jnp.array([[2, 0, -1], [2, 3, 1]])) == [
        [0, 2],
        [1, 0],
        [1, 3],
        [2, 1],
    ]
    assert chosen("0.mixer.v", v, jnp.array([2, -1, 1]), [1]) == [[0, 2, 1], [2, 1, 1]]
    mask = np.zeros(beta, bool)
    mask[1, 3, 0] = True
    np.testing.assert_array_equal(selection("0.mixer.beta", jnp.zeros(beta), mask), mask)
    assert chosen("0.mixer.v", v, mask) == [[1, 3, 0]]
    weights = (BATCH, 2, LENGTH, LENGTH)  # heads come first, positions are queries
    assert chosen("0.mixer.attn_probs", weights, jnp.array([2, -1, -1]), [1]) == [[0, 1, 2]]
    np.testing.assert_array_equal(selection("0.mixer.v", jnp.zeros(v), mask.any(2))[..., 0, 0], mask.any(2))
    for message, site, shape, args in (
        ("has no axis of heads", "0.mixer_out", (BATCH, LENGTH, 5), (None, [0])),
        ("are not all among the 2 of", "0.mixer.v", v, (None, [2])),
        ("not one or several for each of 3 rows", "0.mixer.v", v, (jnp.zeros(2, int),)),
        (r"not \(3, 9\) or that with heads", "0.mixer.v", v, (jnp.zeros((3, 8), bool),)),
        ("does not fit the 2 heads", "0.mixer.v", v, (jnp.zeros((3, 9, 4), bool),)),
        ("integers or a mask", "0.mixer.v", v, (jnp.zeros(3),)),
    ):
        with pytest.raises(ValueError, match=message):
            selection(site, jnp.zeros(shape), *args)
