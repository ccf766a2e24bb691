"""Best tokens of every layer, against the residual streams read by hand and against the model's own logits."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from interpretability.tiny import BASE, BATCH, LENGTH, SOURCE, VOCAB, tiny

from path_jax.checkpoints import load_pretrained
from path_jax.data import Batch
from path_jax.interpretability import run, stream_top_tokens, top_tokens
from path_jax.models import DecoderLM
from path_jax.models.stacking import stack_layers

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "models" / "fla_path"
K = 4
MODELS = {
    "path, tied": ("path", {"tie_embeddings": True}),
    "nope, layer norm, untied": ("nope", {"tie_embeddings": False, "norm": "layer", "mlp": "gelu"}),
    "hybrid of two mixers": ("base_conv+fox", {}),
}


def residuals(model, params, tokens, **inputs):
    """The model's output and both layers' residual streams."""
    capture = ["0.resid_post", "1.resid_post"]
    return jax.jit(lambda params, tokens, inputs: run(model, params, tokens, capture=capture, **inputs))(
        params, tokens, inputs
    )


def slow_lens(model, params, values):
    """Logits [L, B, T, V] in float64, by formulas, from captured values."""
    norm = {name: np.asarray(x, np.float64) for name, x in params["final_norm"].items()}
    logits = []
    for x in (np.asarray(x, np.float64) for _, x in sorted(values.items())):
        x = x - x.mean(axis=-1, keepdims=True) if model.config.norm == "layer" else x
        x = x / np.sqrt(np.square(x).mean(axis=-1, keepdims=True) + model.config.norm_eps)
        x = x * norm["scale"] + norm.get("bias", 0)
        head = params["embed"]["embedding"].T if model.config.tie_embeddings else params["lm_head"]["kernel"]
        logits.append(x @ np.asarray(head, np.float64))
    return np.stack(logits)


def assert_best_of(top, logits):
    """The ids are those of the largest logits, best first, but for near ties."""
    order = np.argsort(-logits, axis=-1, kind="stable")[..., : top.logits.shape[-1]]
    best = np.take_along_axis(logits, order, axis=-1)
    np.testing.assert_allclose(top.logits, best, atol=1e-4)
    clear = np.abs(np.diff(best, axis=-1)).min(axis=-1) > 1e-3
    assert clear.mean() > 0.9
    np.testing.assert_array_equal(np.asarray(top.ids)[clear], order[..., :-1][clear])


@pytest.mark.parametrize("name", MODELS)
def test_lens_of_every_layer(name):
    mixer, config = MODELS[name]
    model, params = tiny(mixer, **config)
    top = top_tokens(model, params, BASE, K)
    assert top.ids.shape == (2, BATCH, LENGTH, K) and top.logits.shape == (2, BATCH, LENGTH, K + 1)
    assert top.ids.dtype == jnp.int32 and top.logits.dtype == jnp.float32
    out, values = residuals(model, params, BASE)
    assert_best_of(top, slow_lens(model, params, values))
    assert_best_of(jax.tree.map(lambda x: x[-1], top), np.asarray(out.logits, np.float64))
    assert (np.asarray(top.ids[0]) != top.ids[1]).any()  # layers differ
    last = model.apply({"params": params}, values[1, "resid_post"], method="lens")
    np.testing.assert_allclose(last, out.logits, atol=1e-5)


def test_scanned_models_chunks_and_compilation_change_nothing():
    model, params = tiny("fox")
    top = top_tokens(model, params, BASE, K)
    scanned = DecoderLM(dataclasses.replace(model.config, scan_layers=True, remat="full"))
    stacked = stack_layers(params)
    others = {
        "scanned": top_tokens(scanned, stacked, BASE, K),
        "parameters of the other shape": top_tokens(model, stacked, BASE, K),
        "ragged chunks": top_tokens(model, params, BASE, K, chunk_size=4),
        "compiled": jax.jit(lambda params, tokens: top_tokens(model, params, tokens, K, chunk_size=9))(params, BASE),
    }
    for name, other in others.items():
        np.testing.assert_allclose(other.logits, top.logits, atol=1e-5, err_msg=name)
        np.testing.assert_array_equal(other.ids, top.ids, err_msg=name)


def test_ties_go_to_the_lower_id():
    model, params = tiny("nope", tie_embeddings=False)
    head = jnp.zeros_like(params["lm_head"]["kernel"]).at[:, 6].set(1.0)
    top = top_tokens(model, params | {"lm_head": {"kernel": head}}, BASE, K)
    logit = np.asarray(top.logits[..., 0])
    expected = np.where((logit > 0)[..., None], [6, 0, 1, 2], [0, 1, 2, 3])
    assert 0 < (logit > 0).mean() < 1
    np.testing.assert_array_equal(top.ids, expected)


def test_logits_of_all_tokens_never_exist_at_once():
    model, params = tiny("nope", vocab_size=4096)
    tokens = jnp.zeros((4, 64), jnp.int32)

    def temporary_bytes(chunk_size):
        program = jax.jit(lambda params, tokens: top_tokens(model, params, tokens, K, chunk_size=chunk_size))
        return program.lower(params, tokens).compile().memory_analysis().temp_size_in_bytes

    logits = tokens.size * 4096 * 4
    assert temporary_bytes(tokens.size) > logits
    assert temporary_bytes(16) < logits / 4


def test_streams_read_one_batch_at_a_time_and_leave_padding_out():
    model, params = tiny("rope")
    segment_ids = np.ones((BATCH, LENGTH), np.int32)
    segment_ids[0, 5:], segment_ids[1, 3:], segment_ids[2, 7:] = 0, 2, 0
    positions = np.broadcast_to(2 * np.arange(LENGTH, dtype=np.int32), (BATCH, LENGTH))  # not those by default
    packed = Batch(SOURCE, SOURCE, np.ones((BATCH, LENGTH), np.float32), segment_ids, positions)
    read = []

    def batches():
        for i, batch in enumerate((BASE, packed)):
            read.append(i)
            yield batch

    stream = stream_top_tokens(model, params, batches(), K, chunk_size=8)
    assert not read
    first = next(stream)
    assert read == [0]
    assert isinstance(first.ids, np.ndarray) and isinstance(first.logits, np.ndarray)
    np.testing.assert_array_equal(first.ids, top_tokens(model, params, BASE, K).ids.reshape(2, -1, K))

    (second,) = stream
    assert second.ids.shape == (2, (segment_ids > 0).sum(), K) and second.logits.shape[-1] == K + 1
    _, values = residuals(model, params, SOURCE, segment_ids=segment_ids, positions=positions)
    assert_best_of(second, slow_lens(model, params, values)[:, segment_ids > 0])
    # The second document of a row does not see the first.
    alone = top_tokens(model, params, SOURCE[1:2, 3:], K, positions=positions[:1, :6])
    np.testing.assert_array_equal(second.ids[:, 8:14], alone.ids[:, 0])


def test_published_checkpoint():
    """The last layer's best tokens are those of the published logits, of every third token."""
    golden = np.load(GOLDEN / "golden.npz")
    config, params = load_pretrained(GOLDEN)
    top = top_tokens(DecoderLM(config), params, golden["input_ids"], 5, chunk_size=64)
    assert_best_of(jax.tree.map(lambda x: x[-1, :, ::3], top), golden["logits"].astype(np.float64))


def test_what_does_not_fit():
    model, params = tiny("nope")
    for k in (0, VOCAB):
        with pytest.raises(ValueError, match=f"k={k} must be at least 1 and less than the vocabulary of {VOCAB}"):
            top_tokens(model, params, BASE, k)
    with pytest.raises(ValueError, match="chunk_size=0 must be at least 1"):
        next(stream_top_tokens(model, params, [BASE], K, chunk_size=0))
    for tokens in (BASE[0], BASE[:, :0]):
        with pytest.raises(ValueError, match="not some rows of some tokens"):
            top_tokens(model, params, tokens, K)
