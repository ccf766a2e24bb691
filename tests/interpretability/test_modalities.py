"""Samples of images and speech against the models' own streams, implants against one edited run for each, commands."""

import csv
import dataclasses
import functools
import json
import sys
import wave

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from path_jax.checkpoints.whisper import Decoding
from path_jax.evaluation.task_accuracy import wilson_interval
from path_jax.interpretability import __main__ as command
from path_jax.interpretability import modality_command
from path_jax.interpretability.digits import Digits
from path_jax.interpretability.modalities import (
    decoder_inputs,
    image_sample,
    implant_streams,
    sample_pairs,
    speech_sample,
)
from path_jax.interpretability.modality_command import load_images, model_kind
from path_jax.models.vit import ViT, ViTConfig
from path_jax.models.vit import abstract_params as vit_params
from path_jax.models.whisper import Whisper, WhisperConfig
from path_jax.models.whisper import abstract_params as whisper_params
from path_jax.nn.taps import is_tap

LAYERS = 3
IMAGES = np.random.default_rng(0).normal(size=(30, 4, 4, 1)).astype(np.float32)
MELS = np.random.default_rng(1).normal(size=(5, 6, 16)).astype(np.float32)
DECODING = Decoding((1, 2), 3, (4,), (5,))
SIZES = dict(
    vocab_size=30, num_mel_bins=6, embed_dim=16, encoder_layers=1, encoder_heads=2, encoder_mlp_dim=24,
    decoder_layers=LAYERS, decoder_heads=4, decoder_mlp_dim=20, max_source_positions=8, max_target_positions=12,
)  # fmt: skip


def draw(abstract):
    rng = np.random.default_rng(2)
    is_scale = lambda path: path[-1].key == "scale"
    value = lambda path, x: jnp.asarray(rng.normal(size=x.shape) * 0.5 + is_scale(path), x.dtype)
    return jax.tree_util.tree_map_with_path(value, abstract)


@functools.cache
def case(kind):
    """A model, its parameters, what it reads, a sample of three ranks, and pairs of its tokens."""
    if kind == "vit":
        config = ViTConfig(4, 2, 1, 5, LAYERS, 16, 2, 24)
        model, params, inputs = ViT(config), draw(vit_params(config)), (IMAGES,)
        sample = image_sample(model, params, IMAGES, 3, batch_size=8)
    else:
        config = WhisperConfig(**SIZES)
        model, params = Whisper(config), draw(whisper_params(config))
        sample, texts = speech_sample(model, params, MELS, DECODING, 3, max_new_tokens=6, batch_size=2)
        inputs = decoder_inputs(model, params, MELS, texts, DECODING, batch_size=2)
    return model, params, inputs, sample, sample_pairs(sample, max_pairs=6)


def apply(model, params, *inputs):
    return model.apply({"params": params}, *inputs, method="decode" if isinstance(model, Whisper) else "__call__")


def slow_layer(ids):
    """From which on all are as the last."""
    return next(layer for layer in range(len(ids)) if (ids[layer:] == ids[-1]).all())


@pytest.mark.parametrize("kind", ["vit", "whisper"])
def test_samples_are_the_models_streams(kind):
    model, params, inputs, sample, _ = case(kind)
    out = jax.jit(apply, static_argnums=0)(model, params, *inputs)
    at = (sample.rows, sample.positions) if kind == "whisper" else (sample.rows,)
    streams = np.stack([x[at] for x in out.streams])
    np.testing.assert_allclose(sample.streams, streams, atol=1e-5)
    lens = model.apply({"params": params}, streams, method="lens")
    ids = np.argsort(-lens, axis=-1)[..., :3]
    np.testing.assert_array_equal(sample.ids, ids[-1])
    slow = [[slow_layer(ids[:, i, rank]) for i in range(len(sample.rows))] for rank in range(3)]
    np.testing.assert_array_equal(sample.layers, slow)
    np.testing.assert_array_equal(np.asarray(out.logits)[at].argmax(axis=-1), sample.ids[:, 0])
    if kind == "vit":
        assert sample.rows.tolist() == list(range(30)) and not sample.positions.any()


def test_tokens_of_speech_are_those_that_predict_text():
    model, params, (tokens, encoded), _, _ = case("whisper")
    texts = np.array([[7, 8, 3, 3], [3, 3, 3, 3], [7, 8, 9, 6], [7, 8, 9, 3], [6, 3, 3, 3]])
    sample, same = speech_sample(model, params, MELS, DECODING, 1, max_new_tokens=4, texts=texts)
    assert same is texts
    counts = [3, 1, 4, 4, 2]
    assert list(zip(sample.rows, sample.positions)) == [(i, 1 + j) for i, n in enumerate(counts) for j in range(n)]
    inputs = decoder_inputs(model, params, MELS, texts, DECODING, batch_size=2)
    assert inputs[0].tolist()[2] == [1, 2, 7, 8, 9]
    np.testing.assert_allclose(inputs[1], encoded, atol=1e-5)
    # What was transcribed is what the model predicts, but for what is suppressed.
    _, _, (tokens, _), sample, _ = case("whisper")
    best = sample.ids[:, 0]
    follows = tokens[sample.rows[:-1], np.minimum(sample.positions[:-1] + 1, tokens.shape[1] - 1)]
    is_inner = np.diff(sample.positions) == 1
    is_free = is_inner & ~np.isin(best[:-1], [4, 5])
    assert is_free.sum() > 5 and (best[:-1] == follows)[is_free].all()


@pytest.mark.parametrize("control", [None, "late", "random"])
@pytest.mark.parametrize("kind", ["vit", "whisper"])
def test_implants_one_by_one(kind, control):
    model, params, inputs, sample, pairs = case(kind)
    report = implant_streams(model, params, inputs, sample, pairs, reach=2, batch_size=5, control=control)
    trials = report.trials
    made = [
        (p, m)
        for p, (early, late) in enumerate(zip(pairs.early_layer, pairs.late_layer))
        for m in range(max(early - 2, 0), min(early + 3, late))
    ]
    assert set(zip(trials.pair, trials.layer)) <= set(made) and len(trials.pair) > 3
    number = {place: i for i, place in enumerate(zip(sample.rows, sample.positions))}

    @functools.partial(jax.jit, static_argnums=0)
    def edited(after, params, inputs, position, vector):
        """Best ids [L] at one position of one row."""
        streams = []

        def intercept(next_function, args, kwargs, context):
            x = next_function(*args, **kwargs)
            if is_tap(context.module, context.method_name) and context.module.name == "resid_post":
                x = x.at[0, position].set(vector) if len(streams) == after else x
                streams.append(x[0, position])
            return x

        with nn.intercept_methods(intercept):
            apply(model, params, *inputs)
        return model.apply({"params": params}, jnp.stack(streams), method="lens").argmax(axis=-1)

    for p, m, row, position, new_layer, new_id in list(zip(*trials))[::2]:
        source, late = number[row, position], (pairs.late_row[p], pairs.late_position[p])
        if control is None:
            assert (row, position) == (pairs.early_row[p], pairs.early_position[p])
        elif control == "late":
            assert sample.ids[source, 0] == pairs.final_id[p] and sample.layers[0, source] > m + 1
        else:
            assert sample.ids[source, 0] != pairs.final_id[p]
        assert control is None or (row, position) != late
        of_row = tuple(x[late[0]][None] for x in inputs)
        best = np.asarray(edited(int(m), params, of_row, late[1], sample.streams[m, source]))
        assert (new_layer, new_id) == (slow_layer(best), best[-1])
    if control is None:
        assert list(zip(trials.pair, trials.layer)) == made
    for d, distance in enumerate(report.distances):
        here = trials.layer - pairs.early_layer[trials.pair] == distance
        is_success = (trials.new_id == pairs.final_id[trials.pair]) & (trials.new_layer == trials.layer) & here
        assert (report.num_trials[d], report.num_successes[d]) == (here.sum(), is_success.sum())
        if here.any():
            interval = wilson_interval(is_success.sum(), here.sum())
            np.testing.assert_allclose((report.lows[d], report.highs[d]), interval, atol=1e-5)
        else:
            assert np.isnan([report.rates[d], report.lows[d], report.mean_moved[d]]).all()


@pytest.mark.parametrize("kind", ["vit", "whisper"])
def test_an_own_stream_changes_nothing(kind):
    model, params, inputs, sample, pairs = case(kind)
    report = implant_streams(model, params, inputs, sample, pairs, control="same")
    np.testing.assert_array_equal(report.trials.new_layer, pairs.late_layer[report.trials.pair])
    assert not report.num_successes.any() and (report.unchanged_shares[report.num_trials > 0] == 1).all()


@pytest.mark.parametrize("kind", ["vit", "whisper"])
def test_published_hook_skips_the_next_layer(kind):
    """Which is what a model without that layer computes."""
    model, params, inputs, sample, pairs = case(kind)
    trials = implant_streams(model, params, inputs, sample, pairs, control="same", as_published=True).trials
    stem, size = ("layers_", "num_layers") if kind == "vit" else ("decoder_layers_", "decoder_layers")
    shorter = type(model)(dataclasses.replace(model.config, **{size: LAYERS - 1}))
    run = jax.jit(functools.partial(apply, shorter))
    changed = 0
    for after in range(LAYERS - 1):
        rest = [layer for layer in range(LAYERS) if layer != after + 1]
        others = {name: value for name, value in params.items() if not name.startswith(stem)}
        without = others | {f"{stem}{new}": params[f"{stem}{old}"] for new, old in enumerate(rest)}
        ids = np.asarray(model.apply({"params": params}, run(without, *inputs).streams, method="lens").argmax(axis=-1))
        ids = np.insert(ids, after, ids[after], axis=0)  # the skipped layer shows the one before it
        for p, m, row, position, new_layer, new_id in zip(*trials):
            if m == after:
                best = ids[:, row] if kind == "vit" else ids[:, row, position]
                assert (new_layer, new_id) == (slow_layer(best), best[-1])
                changed += new_layer != pairs.late_layer[p]
    assert changed


def test_what_does_not_fit():
    model, params, inputs, sample, pairs = case("vit")
    with pytest.raises(ValueError, match="k=5 must be at least 1 and less than the 5 ids"):
        image_sample(model, params, IMAGES, 5)
    with pytest.raises(ValueError, match="there are no tokens"):
        image_sample(model, params, IMAGES[:0], 2)
    with pytest.raises(ValueError, match="resize them"):
        image_sample(model, params, IMAGES[:, :2], 2)
    with pytest.raises(ValueError, match="control='none' is unknown; choose from same, late, random"):
        implant_streams(model, params, inputs, sample, pairs, control="none")
    with pytest.raises(ValueError, match="reach=-1 must be at least 0"):
        implant_streams(model, params, inputs, sample, pairs, reach=-1)
    with pytest.raises(ValueError, match="there are no pairs"):
        implant_streams(model, params, inputs, sample, type(pairs)(*(x[:0] for x in pairs)))
    with pytest.raises(ValueError, match=r"no token at row and position \(99, 0\)"):
        implant_streams(model, params, inputs, sample, pairs._replace(early_row=pairs.early_row * 0 + 99))
    model, params = case("whisper")[:2]
    with pytest.raises(ValueError, match="1 texts are not those of 5 pieces"):
        speech_sample(model, params, MELS, DECODING, 2, max_new_tokens=4, texts=np.full((1, 4), 7))
    with pytest.raises(ValueError, match="there are 0 rows"):
        speech_sample(model, params, MELS[:0], DECODING, 2, max_new_tokens=4)


def numbers(path):
    with path.open() as file:
        return {(row["source"], row["quantity"]): row["value"] for row in csv.DictReader(file)}


def saturation(*arguments, out):
    command.main(["saturation", "--ranks=9", "--pairs=3", "--reach=1", "--untrained", f"--output={out}", *arguments])
    return numbers(out / "saturation.csv")


@pytest.fixture
def directory(monkeypatch, tmp_path):
    """Of a model whose files cannot be read but for the configuration: the model is `case`'s. Nothing is drawn."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for kind in ("vit", "whisper"):
        model, params, *_ = case(kind)
        monkeypatch.setattr(modality_command, f"load_{kind}", lambda path, found=(model.config, params): found)
    monkeypatch.setattr(modality_command, "load_decoding", lambda path, language: DECODING)

    def make(model_type):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type} if model_type else {}))
        return tmp_path

    return make


def test_command_on_images(directory, tmp_path):
    np.savez(tmp_path / "squares.npz", images=IMAGES[..., 0], labels=np.zeros(30))
    found = saturation(f"--checkpoint={directory('vit')}", f"--images={tmp_path / 'squares.npz'}", out=tmp_path / "out")
    assert found["squares", "num_tokens"] == found["untrained", "num_tokens"] == "30"
    assert ("squares", "implant_switch_rates") in found and ("squares", "second_z") not in found


def test_command_on_digits(monkeypatch, tmp_path):
    pytest.importorskip("matplotlib", reason="needs the extra [plot]")
    model, params, *_ = case("vit")
    digits = Digits(model.config, params, params, IMAGES, np.arange(30) % 5, 0.2)
    monkeypatch.setattr(modality_command, "train_digits", lambda seed: digits)
    found = saturation("--preset=digits", "--num-tokens=20", out=tmp_path)
    assert found["digits", "num_tokens"] == "20" and found["digits", "tau"] == found["untrained", "tau"]
    assert ("digits", "second_num_late") in found and (tmp_path / "report.html").exists()


def test_command_on_speech(directory, tmp_path, monkeypatch):
    for i, seconds in enumerate((0.1, 0.4)):  # the model hears 0.16 seconds at a time: 1 + 3 pieces
        with wave.open(str(tmp_path / f"{i}.wav"), "wb") as file:
            file.setparams((1, 2, 16000, 0, "NONE", ""))
            file.writeframes(np.random.default_rng(i).integers(-999, 999, int(16000 * seconds), np.int16).tobytes())
    (tmp_path / "said.txt").write_text("one\n\ntwo\nthree\nfour")
    monkeypatch.setattr(modality_command, "speak", lambda text, voice: np.ones(9, np.float32) * len(text))
    (tmp_path / "model.bin").touch()
    found = saturation(
        f"--checkpoint={directory(None)}", f"--audio={tmp_path}", f"--speak={tmp_path / 'said.txt'}", "--length=6",
        "--ranks=3", "--batch-size=2", out=tmp_path / "out",  # shapes that are compiled already
    )  # fmt: skip
    assert {source for source, _ in found} == {tmp_path.stem, "said", "untrained"}
    assert 4 <= int(found[tmp_path.stem, "num_tokens"]) == int(found["untrained", "num_tokens"]) <= 24
    assert ("said", "tau") in found


def test_kinds_of_checkpoints(directory, tmp_path):
    assert model_kind(tmp_path / "x.gguf") == model_kind(directory("llama")) == model_kind(directory(None)) == "text"
    assert (model_kind(directory("vit")), model_kind(directory("whisper"))) == ("vit", "whisper")


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        ("vit", "", "a ViT reads images: give --images"),
        ("vit", "--images=a.npy --noise", "--noise is for a text model"),
        ("vit", "--images=/nowhere.npy", "No such file"),
        ("whisper", "", "Whisper reads speech: give --audio"),
        ("whisper", "--audio=/nowhere", "there is no .wav file at /nowhere"),
        ("whisper", "--audio=a --images=b", "--images is for a vit model"),
        ("llama", "--speak=a", "--speak is for a whisper model"),
    ],
)
def test_wrong_arguments_are_one_line(directory, tmp_path, kind, arguments, message):
    with pytest.raises(SystemExit, match=message):
        command.main(f"saturation --checkpoint={directory(kind)} --output={tmp_path} {arguments}".split())


@pytest.mark.parametrize(
    "arguments", ["saturation", "saturation --checkpoint=a --preset=digits", "early-exit --preset=a"]
)
def test_a_checkpoint_or_a_preset(arguments, tmp_path, capsys):
    with pytest.raises(SystemExit):
        command.main([*arguments.split(), f"--output={tmp_path}"])
    assert "--checkpoint" in capsys.readouterr().err


def test_files_of_images(tmp_path):
    path = tmp_path / "x.npy"
    np.save(path, np.ones((2, 3, 3), np.uint8))
    assert (load_images(path) == np.ones((2, 3, 3, 1))).all() and load_images(path).dtype == np.float32
    for value, message in (
        (np.ones((2, 3)), r"has float64 \(2, 3\); it must be \[N, H, W, C\] or \[N, H, W\]"),
        (np.ones((0, 3, 3)), "it must be"),
        (np.array([[["a"]]]), "it must be"),
        (np.array([None]), "is no .npy or .npz file of images"),
    ):
        np.save(path, value)
        with pytest.raises(ValueError, match=message):
            load_images(path)
    for data in (b"", b"PK\3\4", b"text"):
        path.write_bytes(data)
        with pytest.raises(ValueError, match="is no .npy or .npz file of images"):
            load_images(path)
    np.savez(tmp_path / "y.npz", a=np.ones(2), b=np.ones(2))
    with pytest.raises(ValueError, match="has the arrays a, b, and none is called images"):
        load_images(tmp_path / "y.npz")
