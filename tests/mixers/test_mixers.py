"""The contract of a mixer, over every entry of MIXERS and every option of the two classes."""

import dataclasses
import functools
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from path_jax.mixers import MIXERS, DeltaNet, ForgettingAttention, Mamba, PathAttention, StickBreakingAttention
from path_jax.mixers.attention import timescale_biases
from path_jax.mixers.path_attention import rounded_directions, unit_directions
from path_jax.nn.taps import is_tap

WIDTH, HEADS, KV_HEADS, HEAD_DIM = 32, 4, 2, 8
LENGTHS = (9, 15)  # of the two documents that are packed into a row
LENGTH = sum(LENGTHS)

fox = functools.partial(ForgettingAttention, gate_timescales=(2.0, 20.0))
pro = functools.partial(ForgettingAttention, kv_shift=True, output_norm=True, output_gate=True)
VARIANTS = MIXERS | {
    "path_fox, full w, no conv, clipped beta": functools.partial(
        PathAttention, forget_gate=True, w_rank=None, conv_size=0, beta_max=1.9
    ),
    "path_fox, qk_norm, gate times scale": functools.partial(
        PathAttention, forget_gate=True, qk_norm=True, gate_scale=None
    ),
    "fox pro": functools.partial(pro, qk_norm="head"),
    "fox pro, shared norm, rotary": functools.partial(pro, qk_norm="shared", rope_theta=100.0),
    "fox, bias_only": functools.partial(fox, gate="bias_only"),
    "fox, fixed, window": functools.partial(fox, gate="fixed", window=5),
    "deltanet, no conv, gate, wide values, beta to 2": functools.partial(
        DeltaNet, conv_size=0, output_gate=True, value_head_dim=11, allow_neg_eigval=True
    ),
    "mamba, no conv": functools.partial(Mamba, conv_size=0, expand=3, state_size=5, dt_rank=3),
    "stick_breaking, itself, remainder": functools.partial(StickBreakingAttention, attend_current=True, remainder=True),
}
# Of outputs, whose standard deviation is about 1: largest absolute error in float32, relative L2 error in bfloat16.
TOLERANCE = {"float32": 1e-5, "bfloat16": 0.02}


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def inputs(seed=0, batch=2, length=LENGTH):
    return normal(seed, batch, length, WIDTH)


@dataclasses.dataclass(frozen=True, eq=False)
class Mixer:
    """A small instance of a variant with random parameters."""

    make: functools.partial  # the entry of VARIANTS
    module: nn.Module
    params: dict
    apply: object  # compiled

    def __call__(self, x):
        return self.apply(self.params, x)[0]


def fields(make):
    return {field.name for field in dataclasses.fields(getattr(make, "func", make))}


def make_small(make, **options):
    """An instance with those of the small sizes that are fields of its module."""
    sizes = dict(num_heads=HEADS, num_kv_heads=KV_HEADS, implementation="xla")
    return make(**{name: value for name, value in sizes.items() if name in fields(make)}, **options)


def apply_to(module):
    return jax.jit(lambda params, x, **kwargs: module.apply({"params": params}, x, **kwargs))


@functools.cache
def build(make, **options):
    """Kernels [fan-in, ...] have the standard deviation 1 / sqrt(fan-in), others 0.2; norm scales have the mean 1."""
    module = make_small(make, **options)
    shapes = jax.eval_shape(module.init, jax.random.key(0), inputs())["params"]
    seeds = iter(range(100))

    def draw(path, leaf):
        name = path[-1].key
        deviation = leaf.shape[0] ** -0.5 if name == "kernel" else 0.2
        return jnp.asarray((name == "scale") + deviation * normal(next(seeds), *leaf.shape), leaf.dtype)

    return Mixer(make, module, jax.tree_util.tree_map_with_path(draw, shapes), apply_to(module))


# Every mixer, and of the options those that change the most.
FAST = (*MIXERS, "fox pro")


@pytest.fixture(
    scope="module", params=[pytest.param(name, marks=[] if name in FAST else pytest.mark.slow) for name in VARIANTS]
)
def mixer(request):
    return build(VARIANTS[request.param])


def assert_close(actual, expected, tolerance=TOLERANCE["float32"]):
    assert np.abs(np.asarray(actual, np.float32) - np.asarray(expected, np.float32)).max() <= tolerance


def test_shape_and_dtype(mixer):
    x = inputs()
    out, cache = jax.eval_shape(mixer.module.apply, {"params": mixer.params}, x)
    assert (out.shape, out.dtype, cache) == (x.shape, jnp.float32, None)
    assert 0.3 < np.std(mixer(x)) < 3  # what the absolute tolerances assume


def test_causality(mixer):
    """Outputs do not change by a single bit when later tokens do."""
    x, changed, cut = inputs(), inputs(), 11
    changed[:, cut:] = inputs(1)[:, cut:]
    before, after = np.asarray(mixer(x)), np.asarray(mixer(changed))
    np.testing.assert_array_equal(before[:, :cut], after[:, :cut])
    assert (before[:, cut:] != after[:, cut:]).any(-1).all()


def swap(rows):
    """[first ...], [second ...] -> [first second], [second first]."""
    first, second = rows[0, : LENGTHS[0]], rows[1, : LENGTHS[1]]
    return np.stack([np.concatenate([first, second]), np.concatenate([second, first])])


@functools.cache
def packed_output_and_gradients(mixer):
    """Of two documents in one row, in both orders; gradients with respect to parameters and inputs."""
    segment_ids = np.stack([np.repeat([1, 2], LENGTHS), np.repeat([1, 2], LENGTHS[::-1])])

    def loss(params, x):
        out, _ = mixer.module.apply({"params": params}, x, segment_ids=jnp.asarray(segment_ids))
        return jnp.mean(inputs(1) * out), out

    (_, out), gradients = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(mixer.params, swap(inputs()))
    return out, gradients


def test_packed_documents_equal_separate_ones(mixer):
    """Alone means with arbitrary tokens after it: these cannot matter, by causality."""
    alone = np.asarray(mixer(inputs()))
    assert_close(packed_output_and_gradients(mixer)[0], swap(alone))


def test_gradients_reach_every_parameter(mixer):
    for path, gradient in jax.tree_util.tree_leaves_with_path(packed_output_and_gradients(mixer)[1]):
        assert np.isfinite(gradient).all(), path
        assert np.abs(gradient).max() > 1e-6, path


def test_bfloat16_compute(mixer):
    low, x = build(mixer.make, dtype=jnp.bfloat16), inputs()
    shapes = jax.eval_shape(low.module.init, jax.random.key(0), x)["params"]
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {np.dtype("float32")}
    out = low(x.astype(jnp.bfloat16))
    assert out.dtype == jnp.bfloat16
    expected = np.asarray(mixer(x))
    error = np.linalg.norm(np.asarray(out, np.float32) - expected) / np.linalg.norm(expected)
    assert error <= TOLERANCE["bfloat16"]


@pytest.mark.parametrize("name", [name for name, make in VARIANTS.items() if "implementation" in fields(make)])
def test_reference_equals_xla(name):
    mixer = build(VARIANTS[name])
    reference = mixer.module.clone(implementation="reference")
    assert_close(apply_to(reference)(mixer.params, inputs())[0], mixer(inputs()))


@pytest.mark.parametrize("name", ["path_fox", "fox pro", "stick_breaking, itself, remainder"])
def test_grouped_heads_share_keys(name):
    """Fewer key heads compute what as many key heads as queries do whose parameters are repeated in each group."""
    grouped, x = build(VARIANTS[name]), inputs()
    full = grouped.module.clone(num_kv_heads=HEADS)
    shapes = jax.eval_shape(full.init, jax.random.key(0), x)["params"]

    def repeat(leaf, expected):
        if leaf.shape == expected.shape:
            return leaf
        heads = leaf.reshape(*leaf.shape[:-1], KV_HEADS, -1)
        return jnp.repeat(heads, HEADS // KV_HEADS, axis=-2).reshape(expected.shape)

    assert_close(apply_to(full)(jax.tree.map(repeat, grouped.params, shapes), x)[0], grouped(x))


def test_head_dim_is_free():
    for make in (MIXERS["path_fox"], VARIANTS["fox pro"], MIXERS["deltanet"], MIXERS["stick_breaking"]):
        module, x = make(num_heads=HEADS, head_dim=5), inputs()
        (out, _), variables = jax.eval_shape(module.init_with_output, jax.random.key(0), x)
        assert out.shape == x.shape
        assert variables["params"]["q_proj"]["kernel"].shape == (WIDTH, HEADS * 5)


def taps(module, params, x):
    options = dict(capture_intermediates=is_tap, mutable="intermediates")
    state = jax.jit(lambda params, x: module.apply({"params": params}, x, **options)[1])(params, x)
    return {name: np.asarray(value["__call__"][0]) for name, value in state["intermediates"].items()}


@pytest.mark.parametrize(
    "name, expected",
    [
        ("deltanet", {"q", "k", "v", "beta", "conv_out", "recurrence"}),
        ("mamba", {"conv_out", "recurrence", "gate"}),
        ("stick_breaking", {"q", "k", "v", "head_out"}),
    ],
)
def test_taps(name, expected):
    mixer = build(MIXERS[name])
    assert set(taps(mixer.module, mixer.params, inputs())) == expected


@pytest.mark.parametrize("beta_max", [2.0, 1.9])
def test_path_reflections(beta_max):
    """Directions have norm 1 (less the epsilon under the root) and strengths lie in [0, beta_max], both in float32."""
    mixer = build(MIXERS["path_fox"], beta_max=beta_max, dtype=jnp.bfloat16)
    beta_proj = mixer.params["beta_proj"] | {"bias": jnp.array([20.0, 0.0])}
    values = taps(mixer.module, mixer.params | {"beta_proj": beta_proj}, inputs().astype(jnp.bfloat16))
    assert set(values) == {"q", "k", "v", "w", "beta", "log_forget", "conv_out", "head_out"}
    w, beta, log_forget = values["w"], values["beta"], values["log_forget"]
    assert w.shape == (2, LENGTH, KV_HEADS, HEAD_DIM) and beta.shape == (2, LENGTH, KV_HEADS)
    assert log_forget.shape == (2, LENGTH, HEADS) and log_forget.max() <= 0
    assert {w.dtype, beta.dtype, log_forget.dtype} == {np.dtype("float32")}
    np.testing.assert_allclose(np.linalg.norm(w, axis=-1), 1, atol=1e-4)
    assert beta.min() >= 0 and beta.max() == np.float32(beta_max)
    assert beta[..., 1].min() < 0.9 and beta[..., 1].max() > 1.1  # depends on the token


def test_directions_of_zeros_are_finite():
    gradient = jax.grad(lambda w: jnp.sum(unit_directions(w)))(jnp.zeros((1, 4, 2, HEAD_DIM)))
    assert np.isfinite(gradient).all()


def test_rounded_directions_are_exact_reflections():
    """`beta |w|^2` is kept, so that beta = 2 stays orthogonal and beta = 1 a projection."""
    w = jax.random.normal(jax.random.key(0), (1, 5, 2, HEAD_DIM))
    w = w / jnp.linalg.norm(w, axis=-1, keepdims=True)  # `unit_directions` falls short of 1 by its epsilon
    beta = jnp.full((1, 5, 2), 2.0)
    rounded, scaled = rounded_directions(w, beta, jnp.bfloat16)
    assert rounded.dtype == jnp.bfloat16
    wide = rounded.astype(jnp.float32)
    reflection = jnp.eye(HEAD_DIM) - scaled[..., None, None] * wide[..., :, None] * wide[..., None, :]
    np.testing.assert_allclose(
        reflection @ reflection, jnp.broadcast_to(jnp.eye(HEAD_DIM), reflection.shape), atol=1e-6
    )
    np.testing.assert_allclose(wide, w, atol=4e-3)


def test_rounding_does_nothing_to_float32_and_to_no_direction():
    w, beta = jax.random.normal(jax.random.key(0), (1, 5, 2, HEAD_DIM)).at[0, 0].set(0.0), jnp.full((1, 5, 2), 1.5)
    for dtype, expected in ((jnp.float32, (w, beta)), (jnp.bfloat16, (w[:, :1], beta[:, :1]))):
        rounded, scaled = rounded_directions(w, beta, dtype)
        np.testing.assert_array_equal(rounded[:, : expected[0].shape[1]], expected[0])
        np.testing.assert_array_equal(scaled[:, : expected[1].shape[1]], expected[1])
    gradient = jax.grad(lambda w: jnp.sum(rounded_directions(w, beta, jnp.bfloat16)[1]))(jnp.zeros_like(w))
    assert np.isfinite(gradient).all()


def test_timescale_biases():
    biases = timescale_biases(3, 4.0, 400.0)
    np.testing.assert_allclose(jax.nn.log_sigmoid(biases), [-1 / 4, -1 / 40, -1 / 400], rtol=1e-4)


def test_constant_gates_start_from_the_timescales():
    expected, x = timescale_biases(HEADS, 2.0, 20.0), inputs()
    learned = jax.jit(fox(num_heads=HEADS, gate="bias_only").init)(jax.random.key(0), x)["params"]
    np.testing.assert_array_equal(learned["forget_bias"], expected)
    fixed = build(fox, gate="fixed")
    assert not [name for name in fixed.params if "forget" in name]
    log_forget = taps(fixed.module, fixed.params, x)["log_forget"]
    np.testing.assert_allclose(log_forget[1, 3], jax.nn.log_sigmoid(expected), rtol=1e-6)


def test_a_window_hides_what_lies_before_it():
    mixer = build(fox, gate="none", window=5)  # a gate would round its sums differently
    x, changed = inputs(), inputs()
    changed[:, 3] = 0
    differs = (np.asarray(mixer(x)) != np.asarray(mixer(changed))).any(-1)
    np.testing.assert_array_equal(differs, [[3 <= t < 3 + 5 for t in range(LENGTH)]] * 2)


def test_explicit_positions_reach_the_rotary_embedding():
    """Shifting all positions changes nothing, stretching them does."""
    mixer, x = build(MIXERS["rope"]), inputs()
    at = lambda positions: mixer.apply(mixer.params, x, positions=positions)[0]
    positions = np.tile(np.arange(LENGTH), (2, 1))
    assert_close(at(positions + 100), mixer(x), 1e-4)
    assert np.abs(at(3 * positions) - mixer(x)).max() > 0.01


@pytest.mark.parametrize("option", ["gate", "qk_norm"])
def test_unknown_names_are_errors(option):
    with pytest.raises(ValueError, match=f"{option}='sideways' is unknown; choose from"):
        ForgettingAttention(num_heads=2, **{option: "sideways"})


def test_pieces_equal_the_whole(mixer):
    """Ragged pieces and single steps, with rubbish in the padding; both rows pass a closed superchunk."""
    length, width = 150, 40
    x = inputs(length=length)
    cache = mixer.module.init_state(2, length, WIDTH, superchunk=64)
    starts, outputs, rng = np.zeros(2, int), np.zeros_like(x), np.random.default_rng(0)
    for step in itertools.count():
        if (starts == length).all():
            break
        lengths = np.minimum(rng.integers(0, 2 if step % 3 else width + 1, 2), length - starts)
        piece = np.full((2, width, WIDTH), 9.0, np.float32)
        for row in range(2):
            piece[row, : lengths[row]] = x[row, starts[row] : starts[row] + lengths[row]]
        out, cache = mixer.apply(mixer.params, piece, cache=cache, lengths=jnp.asarray(lengths))
        for row in range(2):
            outputs[row, starts[row] : starts[row] + lengths[row]] = out[row, : lengths[row]]
        starts += lengths
    assert_close(outputs, mixer(x), 1e-4)


def test_documents_and_lengths_do_not_mix():
    mixer = build(VARIANTS["path"])
    cache = mixer.module.init_state(2, LENGTH, WIDTH)
    with pytest.raises(ValueError, match="instead of segment_ids"):
        mixer.apply(mixer.params, inputs(), cache=cache, segment_ids=jnp.ones((2, LENGTH), jnp.int32))
    with pytest.raises(ValueError, match="belong to a cache"):
        mixer.apply(mixer.params, inputs(), lengths=jnp.ones(2, jnp.int32))


@pytest.mark.parametrize("name", ["deltanet", "mamba", "stick_breaking"])
def test_options_of_a_cache_without_pages(name):
    mixer = build(MIXERS[name])
    init_state = functools.partial(mixer.module.init_state, 2, LENGTH, WIDTH)
    state = init_state(dtype=jnp.bfloat16)
    assert {x.dtype for x in jax.tree.leaves(state.history)} <= {jnp.dtype("bfloat16")}
    assert {x.dtype for x in jax.tree.leaves(state.memory)} == {jnp.dtype("float32")}
    with pytest.raises(ValueError, match="has no pages"):
        init_state(num_pages=4)
    with pytest.raises(TypeError):
        init_state(pages=4)


def test_rows_that_outgrow_the_keys_of_stick_breaking_become_nan():
    mixer = build(MIXERS["stick_breaking"])
    state = mixer.module.init_state(2, 5, WIDTH)
    out, state = mixer.apply(mixer.params, inputs()[:, :6], cache=state, lengths=jnp.array([6, 5]))
    assert np.isnan(out[0]).all() and np.isfinite(out[1]).all()
    out, state = mixer.apply(mixer.params, inputs()[:, :1], cache=state, lengths=jnp.array([0, 0]))
    assert np.isnan(out[0]).all() and np.isfinite(out[1]).all()
    np.testing.assert_array_equal(state.length, [6, 5])
