"""Whisper's own properties; what it computes is compared in checkpoints/test_whisper_checkpoint.py."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from path_jax.models.whisper import Whisper, WhisperConfig, abstract_params, sinusoids, transcribe
from path_jax.nn.taps import is_tap

CONFIG = WhisperConfig(
    vocab_size=30,
    num_mel_bins=6,
    embed_dim=16,
    encoder_layers=1,
    encoder_heads=2,
    encoder_mlp_dim=24,
    decoder_layers=2,
    decoder_heads=4,
    decoder_mlp_dim=20,
    max_source_positions=8,
    max_target_positions=12,
)
MODEL = Whisper(CONFIG)
RNG = np.random.default_rng(0)
MEL = RNG.normal(size=(2, 6, 16)).astype(np.float32)
TOKENS = RNG.integers(0, 30, (2, 7))
run = jax.jit(lambda params, *args: MODEL.apply({"params": params}, *args))
encode = jax.jit(lambda params, mel: MODEL.apply({"params": params}, mel, method="encode"))
decode = jax.jit(lambda params, *args: MODEL.apply({"params": params}, *args, method="decode").logits)


@pytest.fixture(scope="module")
def params():
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape) * 0.3, x.dtype), abstract_params(CONFIG))


def test_lens_and_taps_show_the_streams(params):
    apply = jax.jit(lambda params: MODEL.apply({"params": params}, MEL, TOKENS, capture_intermediates=is_tap))
    out, seen = apply(params)
    assert (out.logits.shape, out.streams.shape) == ((2, 7, 30), (2, 2, 7, 16))
    lens = MODEL.apply({"params": params}, out.streams, method="lens")
    assert lens.dtype == "float32" and np.abs(lens[0] - lens[1]).max() > 0.1
    np.testing.assert_allclose(lens[1], out.logits, atol=1e-5)
    taps = seen["intermediates"]
    assert set(taps) == {"encoder_layers_0", "decoder_layers_0", "decoder_layers_1"}
    for layer in range(2):
        np.testing.assert_array_equal(taps[f"decoder_layers_{layer}"]["resid_post"]["__call__"][0], out.streams[layer])
    shapes = {name: taps["decoder_layers_0"][name]["attn_probs"]["__call__"][0].shape for name in ("mixer", "cross")}
    assert shapes == {"mixer": (2, 4, 7, 7), "cross": (2, 4, 7, 8)}


def test_text_sees_its_past_and_all_of_the_speech(params):
    encoded = encode(params, MEL)
    logits = decode(params, TOKENS, encoded)
    changed = TOKENS.copy()
    changed[:, 4] = (changed[:, 4] + 1) % 30
    other = decode(params, changed, encoded)
    np.testing.assert_allclose(other[:, :4], logits[:, :4], atol=1e-6)
    assert np.abs(other[:, 4:] - logits[:, 4:]).max(axis=(0, 2)).min() > 1e-3
    other = decode(params, TOKENS, encoded.at[:, -1].add(jnp.arange(16.0)))
    assert np.abs(other - logits).max(axis=(0, 2)).min() > 1e-3
    late = MEL.copy()
    late[:, :, -1] += 1
    assert np.abs(encode(params, late) - encoded)[:, 0].max() > 1e-4
    assert encode(params, MEL[:, :, :8]).shape == (2, 4, 16)  # half as long is legal


def test_positions_are_sinusoids():
    table = sinusoids(5, 8)
    assert table.shape == (5, 8)
    for position in range(5):
        for i in range(4):
            angle = position / 10000 ** (i / 3)
            np.testing.assert_allclose(table[position, [i, 4 + i]], [math.sin(angle), math.cos(angle)], atol=1e-6)
    initial = jax.jit(lambda key: MODEL.init(key, MEL, TOKENS)["params"]["source_positions"])(jax.random.key(0))
    np.testing.assert_allclose(initial, sinusoids(8, 16), atol=1e-6)


def greedy(params, prompt, steps, eos_id, suppress_ids, begin_suppress_ids):
    """One token of every row at a time, the loop on the host."""
    tokens = np.full((2, len(prompt) + steps), 29)  # whatever is behind the text
    tokens[:, : len(prompt)] = prompt
    for step in range(steps):
        logits = np.array(run(params, MEL, tokens).logits[:, len(prompt) + step - 1])
        logits[:, list(suppress_ids) + (list(begin_suppress_ids) if step == 0 else [])] = -np.inf
        tokens[:, len(prompt) + step] = logits.argmax(axis=-1)
    rows = tokens[:, len(prompt) :].tolist()
    ends = [row.index(eos_id) if eos_id in row else steps for row in rows]
    return [row[:end] + [eos_id] * (steps - end) for row, end in zip(rows, ends)]


def test_transcription_takes_the_likeliest_tokens(params):
    free = transcribe(MODEL, params, MEL, [3, 7], max_new_tokens=8, eos_id=0)
    assert free.dtype == "int32" and free.shape == (2, 8)
    assert free.tolist() == greedy(params, [3, 7], 8, 0, [], [])
    first = sorted({int(x) for x in free[:, 0]})
    others = [int(x) for x in free[0] if x not in first][:1]
    options = dict(eos_id=int(free[1, -1]), suppress_ids=others, begin_suppress_ids=first)
    ids = transcribe(MODEL, params, MEL, [3, 7], max_new_tokens=8, **options)
    assert ids.tolist() == greedy(params, [3, 7], 8, **options)
    np.testing.assert_array_equal(transcribe(MODEL, params, MEL[::-1], [3, 7], max_new_tokens=8, **options), ids[::-1])


def test_arguments_out_of_range(params):
    with pytest.raises(ValueError, match="decoder_layers=0 must be positive"):
        dataclasses.replace(CONFIG, decoder_layers=0)
    with pytest.raises(ValueError, match="not a multiple of encoder_heads=3"):
        dataclasses.replace(CONFIG, encoder_heads=3)
    with pytest.raises(ValueError, match="embed_dim=2 must be even and at least 4"):
        dataclasses.replace(CONFIG, embed_dim=2, encoder_heads=1, decoder_heads=1)
    for mel, reason in (
        (MEL[0], "the model takes"),
        (MEL[:, :5], r"the model takes \[B, 6, frames\]"),
        (MEL[:, :, :5], "5 frames must be an even number of at most 16"),
        (np.zeros((1, 6, 18), np.float32), "18 frames"),
    ):
        with pytest.raises(ValueError, match=reason):
            encode(params, mel)
    with pytest.raises(ValueError, match="13 tokens are more than the model's 12 positions"):
        run(params, MEL, np.zeros((2, 13), int))
    good = dict(prompt_ids=[3], max_new_tokens=4, eos_id=0)
    for change, reason in (
        (dict(max_new_tokens=0), "max_new_tokens=0"),
        (dict(prompt_ids=[]), "the prompt's 0 tokens"),
        (dict(max_new_tokens=12), "more than 12 positions"),
        (dict(eos_id=30), r"ids \[30\] must be in \[0, vocab_size=30\)"),
        (dict(suppress_ids=[-1]), r"ids \[-1\]"),
    ):
        with pytest.raises(ValueError, match=reason):
            transcribe(MODEL, params, MEL, **good | change)
