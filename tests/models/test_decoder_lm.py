"""DecoderLM: one function of its parameters however layers, memory and documents are arranged; and its accounting."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from path_jax.models import DecoderLM, ModelConfig
from path_jax.models.cache import init_cache
from path_jax.models.decoder_lm import Block, count_parameters
from path_jax.models.stacking import stack_layers, unstack_layers
from path_jax.nn.taps import BLOCK_TAPS, is_tap

LENGTHS = (5, 11)  # of the documents that are packed into a row
VOCAB, WIDTH = 13, 32
TOKENS = np.random.default_rng(0).integers(0, VOCAB, (2, sum(LENGTHS)))
TOLERANCE = {"logits": 1e-5, "gradient": 1e-5, "bfloat16": 0.2}  # max abs; the standard deviation of logits is about 1


def tiny(**options):
    return ModelConfig(**dict(vocab_size=VOCAB, num_layers=2, embed_dim=WIDTH, num_heads=2, mlp_dim=48) | options)


def shapes_of(config):
    return jax.eval_shape(DecoderLM(config).init, jax.random.key(0), TOKENS)["params"]


def random_params(config):
    """Kernels and embeddings are N(0, 0.2), about 1 / sqrt(WIDTH), biases too; norm scales are N(1, 0.2)."""
    rng = np.random.default_rng(1)
    is_scale = lambda path: jax.tree_util.keystr(path).endswith("['scale']")
    draw = lambda path, leaf: jnp.asarray(is_scale(path) + 0.2 * rng.standard_normal(leaf.shape), jnp.float32)
    return jax.tree_util.tree_map_with_path(draw, shapes_of(config))


@functools.cache
def forward(config):
    """Compiled (params, tokens, positions, segment_ids) -> LMOutput."""
    return jax.jit(lambda params, *args: DecoderLM(config).apply({"params": params}, *args))


@functools.cache
def logits_and_gradients(config):
    """On the parameters of the scanned model, whatever the config's own tree looks like."""
    params = random_params(dataclasses.replace(config, scan_layers=True, remat="none"))
    params = params if config.scan_layers else unstack_layers(params)

    def loss(params):
        logits = DecoderLM(config).apply({"params": params}, TOKENS).logits
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), TOKENS[..., None], axis=-1).mean(), logits

    (_, logits), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    return logits, gradients if config.scan_layers else stack_layers(gradients)


def assert_close(actual, expected, tolerance):
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert np.abs(np.asarray(a, np.float32) - np.asarray(e, np.float32)).max() <= TOLERANCE[tolerance]


def assert_same_function(config, expected):
    logits, gradients = logits_and_gradients(config)
    expected_logits, expected_gradients = logits_and_gradients(expected)
    assert jax.tree.structure(gradients) == jax.tree.structure(expected_gradients)
    assert_close(logits, expected_logits, "logits")
    assert_close(gradients, expected_gradients, "gradient")


def test_scanned_equals_unrolled():
    assert_same_function(tiny(scan_layers=False), tiny())
    logits, gradients = logits_and_gradients(tiny())
    assert 0.3 < np.std(logits) < 3  # what the absolute tolerances assume
    assert all(np.isfinite(leaf).all() and np.abs(leaf).max() > 1e-5 for leaf in jax.tree.leaves(gradients))


@pytest.mark.parametrize(
    "remat, scan_layers", [("full", True), pytest.param("dots", True, marks=pytest.mark.slow), ("full", False)]
)
def test_remat_changes_nothing(remat, scan_layers):
    config, plain = tiny(mixer="nope", remat=remat, scan_layers=scan_layers), tiny(mixer="nope")
    assert_same_function(config, plain)
    program = lambda config: str(jax.make_jaxpr(forward(config))(shapes_of(config), TOKENS))
    assert "prevent_cse" in program(config) and "prevent_cse" not in program(plain)


def test_stacking_round_trip():
    config = tiny(num_layers=11)  # two-digit layers keep their order
    params = random_params(config)
    unrolled = unstack_layers(params)
    assert set(unrolled) == {"embed", "final_norm", "lm_head", *(f"layers_{i}" for i in range(11))}
    own = shapes_of(dataclasses.replace(config, scan_layers=False))
    assert jax.tree.map(jnp.shape, unrolled) == jax.tree.map(jnp.shape, own)
    jax.tree.map(np.testing.assert_array_equal, stack_layers(unrolled), params)


def test_stacking_errors():
    layer = {"scale": jnp.ones(3)}
    with pytest.raises(ValueError, match="without gaps"):
        stack_layers({"layers_0": layer, "layers_2": layer})
    with pytest.raises(ValueError, match="without gaps"):
        stack_layers({"layers": layer})
    with pytest.raises(ValueError, match="expected a scanned tree"):
        unstack_layers({"layers_0": layer})


def test_tied_embeddings():
    config = tiny(mixer="nope", tie_embeddings=True)
    params = random_params(config)
    assert "lm_head" not in params
    out = forward(config)(params, TOKENS)
    assert_close(out.logits, out.hidden @ params["embed"]["embedding"].T, "logits")
    assert count_parameters(tiny(mixer="nope")) - count_parameters(config) == VOCAB * WIDTH


def test_unembed_turns_hidden_states_into_logits():
    config = tiny(mixer="nope")
    params = random_params(config)
    out = forward(config)(params, TOKENS)
    assert_close(DecoderLM(config).apply({"params": params}, out.hidden, method="unembed"), out.logits, "logits")


@pytest.mark.parametrize("mixer", ["path_fox", "rope"])
def test_causality_and_packed_documents(mixer):
    """Later tokens change no bit of earlier logits; documents in one row, in both orders, equal separate rows."""
    config = tiny(mixer=mixer)
    params = random_params(config)
    run = lambda *args: np.asarray(forward(config)(params, *args).logits)
    alone = run(TOKENS)
    changed = TOKENS.copy()
    changed[:, 7:] = (changed[:, 7:] + 1) % VOCAB
    np.testing.assert_array_equal(run(changed)[:, :7], alone[:, :7])
    assert (run(changed)[:, 7:] != alone[:, 7:]).any(-1).all()

    def swap(rows):  # [first ...], [second ...] -> [first second], [second first]
        first, second = rows[0, : LENGTHS[0]], rows[1, : LENGTHS[1]]
        return np.stack([np.concatenate([first, second]), np.concatenate([second, first])])

    segment_ids = np.stack([np.repeat([1, 2], LENGTHS), np.repeat([1, 2], LENGTHS[::-1])])
    assert_close(run(swap(TOKENS), None, jnp.asarray(segment_ids)), swap(alone), "logits")


def test_bfloat16_compute_keeps_parameters_and_logits_in_float32():
    config = tiny(mixer="nope", dtype="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes_of(config))} == {np.dtype("float32")}
    params = random_params(config)
    out = forward(config)(params, TOKENS)
    assert (out.logits.dtype, out.hidden.dtype) == (jnp.float32, jnp.bfloat16)
    assert_close(out.logits, logits_and_gradients(tiny(mixer="nope"))[0], "bfloat16")


@pytest.mark.parametrize("scan_layers", [True, False])
def test_taps_of_every_layer_can_be_captured(scan_layers):
    config = tiny(scan_layers=scan_layers)
    apply = functools.partial(DecoderLM(config).apply, capture_intermediates=is_tap, mutable="intermediates")
    _, state = jax.eval_shape(apply, {"params": shapes_of(config)}, TOKENS)
    layer = state["intermediates"]["layers" if scan_layers else "layers_1"]
    assert set(layer) == {*BLOCK_TAPS, "mixer"}
    assert layer["mixer_out"]["__call__"][0].shape == (2,) * scan_layers + (*TOKENS.shape, WIDTH)
    assert set(layer["mixer"]) == {"q", "k", "v", "w", "beta", "log_forget", "conv_out", "head_out"}


def test_layers_take_the_mixers_in_turn():
    options = {"mamba": {"conv_size": 2}}
    config = tiny(num_layers=3, mixer="mamba+rope", mixer_options=options, scan_layers=False, mlp="none")
    params = random_params(config)
    assert [set(params[f"layers_{i}"]) for i in range(3)] == [{"mixer", "mixer_norm"}] * 3
    assert ["q_proj" in params[f"layers_{i}"]["mixer"] for i in range(3)] == [False, True, False]
    assert params["layers_0"]["mixer"]["conv"]["kernel"].shape == params["layers_2"]["mixer"]["conv"]["kernel"].shape
    alone = {name: tiny(num_layers=1, mixer=name, scan_layers=False, mlp="none") for name in ("rope", "mamba")}
    alone["mamba"] = dataclasses.replace(alone["mamba"], mixer_options=options["mamba"])
    x = jnp.asarray(np.random.default_rng(2).standard_normal((2, 9, WIDTH)), jnp.float32)
    expected = x
    for i in range(3):
        layer = params[f"layers_{i}"]
        mixer = alone[config.mixers[i % 2]].make_mixer()
        scaled = expected * jax.lax.rsqrt(jnp.mean(expected**2, axis=-1, keepdims=True) + 1e-6)
        expected += mixer.apply({"params": layer["mixer"]}, scaled * layer["mixer_norm"]["scale"])[0]
    actual = x
    for i in range(3):
        actual, _ = Block(config, i).apply({"params": params[f"layers_{i}"]}, actual, None, None)
    assert_close(actual, expected, "logits")
    without = tiny(mixer="mamba").train_flops_per_token(0, 7)
    assert config.train_flops_per_token(0, 7) - without == 12 * WIDTH * 4  # one layer compares, with 4 keys on average


def test_a_scan_does_not_decode():
    config = tiny()
    with pytest.raises(ValueError, match="unrolled"):
        jax.eval_shape(DecoderLM(config).apply, {"params": shapes_of(config)}, TOKENS, cache=init_cache(config, 1, 8))


def test_count_parameters_of_the_real_tree():
    config = tiny(scan_layers=False, num_layers=1)
    params = jax.jit(DecoderLM(config).init)(jax.random.key(0), TOKENS)["params"]
    assert count_parameters(config) == sum(leaf.size for leaf in jax.tree.leaves(params))
    assert count_parameters(tiny()) == count_parameters(tiny(scan_layers=False))


def test_760m_shapes():
    """Shapes only; the count is written out by hand."""
    vocab, layers, width, heads, rank = 50257, 24, 1536, 24, 32
    config = ModelConfig(vocab, layers, width, heads)
    assert (config.head_dim, config.mlp_dim) == (64, 4096)
    attention = 4 * width**2 + 2 * rank * width + 3 * width + 2 * (width + 1) * heads
    layer = attention + 3 * width * config.mlp_dim + 2 * width
    assert count_parameters(config) == 2 * vocab * width + layers * layer + width
    shapes = shapes_of(config)
    assert shapes["layers"]["mixer"]["q_proj"]["kernel"].shape == (layers, width, width)
    assert shapes["layers"]["mlp"]["down_proj"]["kernel"].shape == (layers, 4096, width)
    out = jax.eval_shape(DecoderLM(config).apply, {"params": shapes}, jnp.zeros((2, 128), jnp.int32))
    assert (out.logits.shape, out.hidden.shape) == ((2, 128, vocab), (2, 128, width))


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(num_layers=0), "num_layers=0 must be positive"),
        (dict(vocab_size=-1), "vocab_size=-1 must be positive"),
        (dict(mixer="rope+mamba"), "mixer=rope.mamba needs scan_layers=False"),
        (dict(mixer="rope+fourier", scan_layers=False), "mixer='fourier' is unknown"),
        (
            dict(mixer="rope+mamba", scan_layers=False, mixer_options={"conv_size": 0}),
            "by the name of a mixer, got conv_size=0",
        ),
        (dict(mixer="fourier"), "mixer='fourier' is unknown; choose from path, path_fox, fox"),
        (dict(remat="some"), "remat='some' is unknown; choose from none, full, dots"),
        (dict(dtype="int8"), "dtype='int8' is unknown"),
        (dict(num_heads=3), "embed_dim=32 is not a multiple of num_heads=3"),
        (dict(num_heads=4, num_kv_heads=3), "num_heads=4 is not a multiple of num_kv_heads=3"),
    ],
)
def test_config_errors(options, message):
    with pytest.raises(ValueError, match=message):
        tiny(**options)


def test_config_fills_in_defaults_and_is_hashable():
    config = ModelConfig(vocab_size=5, num_layers=1, embed_dim=96, num_heads=4, mixer_options={"w_rank": 8})
    assert (config.num_kv_heads, config.head_dim, config.mlp_dim) == (4, 24, 256)
    assert hash(config) == hash(dataclasses.replace(config))
    with pytest.raises(TypeError, match="heads"):
        ModelConfig(vocab_size=5, num_layers=1, embed_dim=96, heads=4)


@pytest.mark.parametrize("tie_embeddings", [True, False])
def test_train_flops_per_token(tie_embeddings):
    """Six per weight that multiplies; per layer and visible key, q k^T and weights v are 2 N H multiply-adds."""
    config, length = tiny(mixer="nope", tie_embeddings=tie_embeddings), 7
    weights = VOCAB * WIDTH + 2 * (4 * WIDTH**2 + 3 * WIDTH * 48 + 2 * WIDTH) + WIDTH
    visible = np.mean([t + 1 for t in range(length)])
    expected = 6 * weights + 2 * 6 * 2 * WIDTH * visible
    assert config.train_flops_per_token(count_parameters(config), length) == expected
