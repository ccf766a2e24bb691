"""Saturation of models that do not read text: a ViT's class token, and the text that Whisper decodes from speech.

A row is an image, whose one token is the class token at position 0, or a piece of speech, whose tokens are those that
predict its text. Ranks are classes or tokens by the lens, `model.lens` of the residual stream after each layer. Samples
and pairs made here go to what `saturation`, `transitions` and `implants` have for text.

Source: Lioubashevski et al., "Looking beyond the top-1: Transformers determine top tokens in order", 2024 (arXiv
2410.20210), sections on ViT and Whisper.

Not supported: streams of a ViT's patches and of Whisper's encoder, which the lens does not read; samples that do not
fit into host memory.
"""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from path_jax.checkpoints.whisper import Decoding
from path_jax.interpretability.implant_trials import ImplantReport, Pairs, batches, check_trials, make_trials
from path_jax.interpretability.implants import find_pairs
from path_jax.interpretability.saturation import saturation_layers
from path_jax.interpretability.stream_sample import StreamSample
from path_jax.models.sampling import largest
from path_jax.models.vit import ViT
from path_jax.models.whisper import Whisper, transcribe
from path_jax.nn.taps import is_tap

Inputs = tuple[Array, ...]  # images [N H W C] of a ViT; tokens [N T] and encoded speech [N S D] of Whisper's decoder


def image_sample(
    model: ViT,
    params,
    images: Float[np.ndarray, "N H W C"],
    k: int,
    *,
    batch_size: int = 64,
    as_published: bool = False,
) -> StreamSample:
    """The class token's residual streams of images, in their order, with the layers at which its best classes saturate.

    Args:
      model: ViT; params: its parameters.
      images: as for the model.
      k: best classes to follow, fewer than there are.
      as_published: see `saturation_layers`.

    Returns:
      StreamSample with n = N tokens: rows are numbers of images, positions 0, ids classes.

    Raises:
      ValueError: for images of another shape or none, or a number out of range.
    """
    return _sample(model, params, (images,), np.ones((len(images), 1), bool), k, batch_size, as_published)


def speech_sample(
    model: Whisper,
    params,
    mels: Float[np.ndarray, "N M frames"],
    decoding: Decoding,
    k: int,
    *,
    max_new_tokens: int,
    batch_size: int = 4,
    texts: Int[np.ndarray, "N max_new_tokens"] | None = None,
    as_published: bool = False,
) -> tuple[StreamSample, Int[np.ndarray, "N max_new_tokens"]]:
    """Residual streams of the tokens that predict a transcription, with the layers at which their best ones saturate.

    Speech is transcribed greedily; then the decoder reads prompt and text at once. Its tokens are those from the last
    one of the prompt to the one that predicts the end, or the last token where the text is cut at `max_new_tokens`. The
    lens sees all ids, as published: where the transcription suppresses the best one, the text has another. Logits of
    one layer and batch exist at once, 4 * batch_size * T * V bytes.

    Args:
      model: Whisper; params: its parameters.
      mels: see `Whisper.encode`.
      decoding: special tokens, of `load_decoding`.
      k: best tokens to follow.
      max_new_tokens: of a text, at most.
      texts: as returned, to read these instead of transcribing.
      as_published: see `saturation_layers`.

    Returns:
      StreamSample, whose rows are pieces of speech and whose positions count from the start of the prompt; and the ids
      of the texts, filled with `decoding.eos_id`.

    Raises:
      ValueError: if there is no speech, or as `transcribe`; for a number out of range.
    """
    if texts is None:
        texts = _by_batches(
            lambda mel: transcribe(model, params, mel, max_new_tokens=max_new_tokens, **decoding._asdict()),
            mels, batch_size,
        )  # fmt: skip
    inputs = decoder_inputs(model, params, mels, texts, decoding, batch_size=batch_size)
    start = len(decoding.prompt_ids) - 1
    positions = np.arange(inputs[0].shape[1])
    is_token = (positions >= start) & (positions < start + _num_predicted(texts, decoding)[:, None])
    return _sample(model, params, inputs, is_token, k, batch_size, as_published), texts


def decoder_inputs(
    model: Whisper,
    params,
    mels: Float[np.ndarray, "N M frames"],
    texts: Int[np.ndarray, "N n"],
    decoding: Decoding,
    *,
    batch_size: int = 4,
) -> tuple[Int[np.ndarray, "N T"], Float[np.ndarray, "N S D"]]:
    """What Whisper's decoder reads: prompt and text but for what it predicts last, and the encoder's output.

    The encoder's output is in host memory, S * D numbers a row.

    Raises:
      ValueError: if there is no speech, or another number of texts.
    """
    if len(texts) != len(mels):
        raise ValueError(f"{len(texts)} texts are not those of {len(mels)} pieces of speech")
    prompt = np.broadcast_to(np.asarray(decoding.prompt_ids, np.int32), (len(texts), len(decoding.prompt_ids)))
    length = prompt.shape[1] - 1 + _num_predicted(texts, decoding).max(initial=1)
    encoded = _by_batches(lambda mel: _encode(model, params, mel), mels, batch_size)
    return np.concatenate([prompt, texts], axis=1)[:, :length], encoded


def sample_pairs(sample: StreamSample, **options) -> Pairs:
    """Random pairs of a sample's tokens for `implant_streams`; options are those of `find_pairs`."""
    num_layers, at = len(sample.streams), (sample.rows, sample.positions)
    layers, ids, is_token = np.zeros((3, sample.rows.max() + 1, sample.positions.max() + 1), int)
    layers[at], ids[at], is_token[at] = sample.layers[0], sample.ids[:, 0], 1
    return find_pairs(layers, ids, num_layers, is_token=is_token > 0, **options)


def implant_streams(
    model: ViT | Whisper,
    params,
    inputs: Inputs,
    sample: StreamSample,
    pairs: Pairs,
    *,
    reach: int = 3,
    batch_size: int = 16,
    control: str | None = None,
    seed: int = 0,
    as_published: bool = False,
) -> ImplantReport:
    """Implants early's residual stream into late, in late's own image or speech; `implants.implant` for other models.

    Args:
      inputs: of the model, whose rows the sample's are: (images,), or `decoder_inputs`.
      sample: of `image_sample` or `speech_sample`; random tokens of the controls are of it.
      pairs: of `sample_pairs`.
      reach, batch_size, control, seed, as_published: see `implants.implant`.

    Raises:
      ValueError: if there are no pairs, they are not of the sample, for an unknown control or a number out of range.
    """
    pairs = check_trials(pairs, reach, batch_size, control)
    number = {place: i for i, place in enumerate(zip(sample.rows.tolist(), sample.positions.tolist()))}
    try:
        early = np.array([number[place] for place in zip(pairs.early_row.tolist(), pairs.early_position.tolist())])
        late = np.array([number[place] for place in zip(pairs.late_row.tolist(), pairs.late_position.tolist())])
    except KeyError as error:
        raise ValueError(f"the sample has no token at row and position {error} of the pairs") from None

    def best_tokens():
        return sample.layers[0] % len(sample.streams), sample.ids[:, 0], sample.positions >= pairs.early_position.min()

    def implanted(late, layer, source):
        ids = np.empty((len(sample.streams), len(late)), np.int32)
        for some, _ in batches(len(late), batch_size):  # of one shape whatever the control, so compiled once
            tokens, after = late[some], layer[some]
            of_rows = tuple(x[sample.rows[tokens]] for x in inputs)
            vectors = sample.streams[after, source[some]]
            ids[:, some] = _implanted(model, params, of_rows, sample.positions[tokens], after, vectors, as_published)
        return ids

    places = np.stack([sample.rows, sample.positions])
    return make_trials(
        pairs, early, late, places, best_tokens, implanted, reach=reach, control=control, seed=seed,
        as_published=as_published,
    )  # fmt: skip


@functools.partial(jax.jit, static_argnames=("model", "as_published"))
def _implanted(model, params, inputs, positions, layers, vectors, as_published) -> Int[Array, "L B"]:
    """Best ids of every layer at one position of each row, where the stream after one layer is the row's vector."""
    rows, streams, read = jnp.arange(len(positions)), [], {}
    is_after = lambda layer: (layers == layer)[:, None, None]  # [B, 1, 1]

    def put(layer, x):
        is_here = (jnp.arange(x.shape[1]) == positions[:, None])[..., None]
        return jnp.where(is_here & is_after(layer), vectors[:, None].astype(x.dtype), x)

    def intercept(next_function, args, kwargs, context):
        x = next_function(*args, **kwargs)
        tap = context.module.name
        if not is_tap(context.module, context.method_name) or tap not in ("resid_pre", "resid_post"):
            return x
        layer = int(context.module.path[0].rpartition("_")[2])
        if tap == "resid_pre":  # as published, what the layer behind the implant reads is also what it returns
            read[layer] = put(layer - 1, x) if as_published else x
            return read[layer]
        x = jnp.where(is_after(layer - 1), read[layer], x) if as_published else put(layer, x)
        streams.append(x[rows, positions])
        return x

    with nn.intercept_methods(intercept):
        model.apply({"params": params}, *inputs, method=_method(model))
    return jax.lax.map(lambda x: model.apply({"params": params}, x, method="lens").argmax(axis=-1), jnp.stack(streams))


@functools.partial(jax.jit, static_argnames=("model", "k"))
def _read(model, params, inputs, k) -> tuple[Float[Array, "L B T D"], Int[Array, "L B T k"]]:
    """Residual streams after every layer, and the best ids."""
    x = model.apply({"params": params}, *inputs, method=_method(model)).streams
    x = x.reshape(len(x), len(inputs[0]), -1, x.shape[-1])  # a class token is at the one position
    ids = jax.lax.map(lambda x: largest(model.apply({"params": params}, x, method="lens"), k)[1], x)
    return x.astype(jnp.float32), ids


_encode = jax.jit(lambda model, params, mel: model.apply({"params": params}, mel, method="encode"), static_argnums=0)


def _method(model) -> str:
    return "decode" if isinstance(model, Whisper) else "__call__"


def _sample(model, params, inputs: Inputs, is_token: Bool[np.ndarray, "N T"], k, batch_size, as_published):
    config = model.config
    size = config.vocab_size if isinstance(model, Whisper) else config.num_classes
    if not 1 <= k < size or batch_size < 1:
        raise ValueError(f"{k=} must be at least 1 and less than the {size} ids, {batch_size=} at least 1")
    if not is_token.any():
        raise ValueError("there are no tokens")
    streams, ids = [], []
    for rows, count in batches(len(is_token), min(batch_size, len(is_token))):
        found = _read(model, params, tuple(x[rows] for x in inputs), k)
        for parts, x in zip((streams, ids), found):
            parts.append(np.asarray(x)[:, :count][:, is_token[rows[:count]]])
    streams, ids = (np.concatenate(parts, axis=1) for parts in (streams, ids))
    layers = saturation_layers(ids, as_published=as_published)
    return StreamSample(streams, layers, ids[-1], *np.nonzero(is_token))


def _num_predicted(texts, decoding) -> Int[np.ndarray, "N"]:
    """Tokens that predict a row's text, the end included where it is reached."""
    return np.minimum(1 + np.logical_and.accumulate(texts != decoding.eos_id, axis=1).sum(axis=1), texts.shape[1])


def _by_batches(function: Callable, array, batch_size) -> np.ndarray:
    if not len(array) or batch_size < 1:
        raise ValueError(f"there are {len(array)} rows; {batch_size=} must be at least 1")
    return np.concatenate(
        [np.asarray(function(array[rows]))[:count] for rows, count in batches(len(array), min(batch_size, len(array)))]
    )
