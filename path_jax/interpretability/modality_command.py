"""What `python -m path_jax.interpretability saturation` does with models of images and of speech."""

import argparse
import sys
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Float, Int

from path_jax.checkpoints.folders import member, read_json
from path_jax.checkpoints.vit import load_vit
from path_jax.checkpoints.whisper import load_decoding, load_whisper
from path_jax.data.speech import SAMPLE_RATE, log_mel, read_wav, speak
from path_jax.data.tokenizer import load_tokenizer
from path_jax.interpretability.digits import train_digits
from path_jax.interpretability.implant_trials import CONTROLS, ImplantReport
from path_jax.interpretability.modalities import (
    Inputs,
    decoder_inputs,
    image_sample,
    implant_streams,
    sample_pairs,
    speech_sample,
)
from path_jax.interpretability.stream_sample import StreamSample
from path_jax.models.vit import ViT
from path_jax.models.whisper import Whisper

PRESETS = ("digits",)
# Options that say what a kind of model reads.
_SOURCES = {"vit": ("images",), "whisper": ("audio", "speak"), "text": ("data", "noise", "long")}
_SECONDS = 0.02  # of a position of Whisper's encoder


class Examined(NamedTuple):
    """A model, what it read, and a sample of its streams."""

    model: ViT | Whisper
    params: dict
    inputs: Inputs  # of `implant_streams`; none where there will be no implants
    sample: StreamSample
    targets: Int[np.ndarray, "n"] | None = None  # right classes, where they are known


def add_modality_arguments(parser: argparse.ArgumentParser) -> None:
    """What images and speech need besides what texts do."""
    parser.add_argument("--images", type=Path, help="for a ViT: .npy or .npz of [N, H, W, C] or [N, H, W], scaled")
    parser.add_argument("--audio", type=Path, help="for Whisper: a WAV file, or a directory of them")
    parser.add_argument("--speak", type=Path, help="for Whisper: a text for espeak-ng to speak, a sentence a line")
    parser.add_argument("--language", default="en", help="of the speech, by its code (default %(default)s)")


def model_kind(path: Path) -> str:
    """What a checkpoint reads: "vit", "whisper" or "text".

    Raises:
      ValueError: if its config.json is malformed.
    """
    if not (path / "config.json").is_file():
        return "text"
    found = read_json(member(path, "config.json")).get("model_type")
    if found is None and (path / "model.bin").is_file():
        return "whisper"  # of CTranslate2; whoever loads it finds out
    return found if found in _SOURCES else "text"


def check_sources(args, kinds: Iterable[str]) -> None:
    """Refuses what no model would read, and models without what they need.

    Raises:
      ValueError: naming the option.
    """
    kinds = set(kinds)
    is_given = lambda name: getattr(args, name) is not None and (name != "data" or args.data)
    for kind, names in _SOURCES.items():
        if kind not in kinds and (given := [name for name in names if is_given(name)]):
            raise ValueError(f"--{given[0]} is for a {kind} model, and there is none")
    if "vit" in kinds and not args.images:
        raise ValueError("a ViT reads images: give --images=FILE.npy")
    if "whisper" in kinds and not (args.audio or args.speak):
        raise ValueError("Whisper reads speech: give --audio=FILE_OR_DIRECTORY or --speak=TEXTFILE")


def examine_digits(args) -> Iterator[tuple[str, Examined]]:
    """A ViT trained on digits, and as it was before where that is asked for, on images that it has not seen."""
    found = train_digits(seed=args.seed)
    models = {"digits": found.params} | ({"untrained": found.initial_params} if args.untrained else {})
    images, labels = found.images[: args.num_tokens], found.labels[: args.num_tokens]
    yield from _of_images(ViT(found.config), models, images, args, labels)


def examine(path: Path, kind: str, args) -> Iterator[tuple[str, Examined]]:
    """{name: what was found} of a checkpoint, on each source.

    Raises:
      FileNotFoundError: if a file is missing.
      ImportError: if a package is.
      ValueError: for a model or a file that cannot be read, or that do not fit.
    """
    if kind == "vit":
        config, params = load_vit(path)
        images, models = load_images(args.images)[: args.num_tokens], {args.images.stem: params}
        if args.untrained:
            models["untrained"] = jax.jit(ViT(config).init)(jax.random.key(args.seed), images[:1])["params"]
        yield from _of_images(ViT(config), models, images, args)
        return
    config, params = load_whisper(path)
    model, decoding, tokenizer = Whisper(config), load_decoding(path, args.language), load_tokenizer(path)
    ranks = min(args.ranks, config.vocab_size - 1)
    size = round(config.max_source_positions * _SECONDS * SAMPLE_RATE)
    sources = [(args.audio, _recorded)] if args.audio else []
    sources += [(args.speak, lambda path: _spoken(path, args.language))] if args.speak else []
    for source, read in sources:
        say(f"reading {source.stem}")
        pieces = [samples[i : i + size] for samples in read(source) for i in range(0, len(samples), size)]
        mels = np.stack([log_mel(x, config.num_mel_bins, config.max_source_positions * _SECONDS) for x in pieces])
        # Half of the positions, as in OpenAI's program.
        left = config.max_target_positions - len(decoding.prompt_ids)
        limit = min(args.length, config.max_target_positions // 2, left)
        options = dict(max_new_tokens=limit, batch_size=args.batch_size, as_published=args.as_published)
        say(f"transcribing {len(mels)} pieces of {source.stem}")
        models, texts = {source.stem: params}, None
        if args.untrained and source == sources[0][0]:
            tokens = np.zeros((1, 1), np.int32)
            models["untrained"] = jax.jit(model.init)(jax.random.key(args.seed), mels[:1], tokens)["params"]
        for label, params_of in models.items():  # the second one reads what the first one wrote
            sample, texts = speech_sample(model, params_of, mels, decoding, ranks, texts=texts, **options)
            if label == source.stem and tokenizer:
                for text in texts:
                    say(f"  {tokenizer.decode(text[text != decoding.eos_id]).strip()}")
            inputs = ()
            if args.pairs:
                inputs = decoder_inputs(model, params_of, mels, texts, decoding, batch_size=args.batch_size)
            yield label, Examined(model, params_of, inputs, sample)


def implants_of(found: Examined, args) -> dict[str, ImplantReport]:
    """Of the switch to deciding on the second class or token, and of the controls."""
    pairs = sample_pairs(found.sample, max_pairs=args.pairs, seed=args.seed)
    if not len(pairs.early_row):
        say("no implants: no two tokens with one best class or token saturate far enough apart")
        return {}
    return with_controls(lambda control: implant_streams(
        found.model, found.params, found.inputs, found.sample, pairs, reach=args.reach, control=control,
        seed=args.seed, as_published=args.as_published,
    ))  # fmt: skip


def with_controls(implant: Callable[[str | None], ImplantReport]) -> dict[str, ImplantReport]:
    """{"switch" or the name of a control: what implanting came to}."""
    reports = {}
    for control in (None, *CONTROLS):
        name = control or "switch"
        say(f"implanting {name}")
        reports[name] = implant(control)
    return reports


def load_images(path: Path) -> Float[np.ndarray, "N H W C"]:
    """The array of a .npy file, or the one of a .npz file: the only one, or that called images; float32, as it is.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: for another file, or an array that is not of images.
    """
    try:
        found = np.load(path, allow_pickle=False)
        if isinstance(found, np.lib.npyio.NpzFile):
            with found:
                names = found.files
                if len(names) != 1 and "images" not in names:
                    raise ValueError(f"it has the arrays {', '.join(names) or 'none'}, and none is called images")
                found = found["images" if "images" in names else names[0]]
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"--images={path} is no .npy or .npz file of images: {str(error)[:200]}") from error
    if found.dtype.kind not in "fiub" or found.ndim not in (3, 4) or not found.size:
        raise ValueError(f"--images={path} has {found.dtype} {found.shape}; it must be [N, H, W, C] or [N, H, W]")
    return (found if found.ndim == 4 else found[..., None]).astype(np.float32)


def _of_images(model: ViT, models, images, args, labels=None) -> Iterator[tuple[str, Examined]]:
    ranks = min(args.ranks, model.config.num_classes - 1)
    for label, params in models.items():
        sample = image_sample(model, params, images, ranks, as_published=args.as_published)
        yield label, Examined(model, params, (images,), sample, labels)


def _recorded(path: Path) -> list[Float[np.ndarray, "n"]]:
    files = [path] if path.is_file() else sorted(path.rglob("*.wav"))
    if not files:
        raise FileNotFoundError(f"there is no .wav file at {path}")
    return [read_wav(file) for file in files]


def _spoken(path: Path, language: str) -> list[Float[np.ndarray, "n"]]:
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not lines:
        raise ValueError(f"{path} has no text to speak")
    return [speak(line, language) for line in lines]


def say(text: str) -> None:
    """A line on stderr, at once."""
    print(text, file=sys.stderr, flush=True)
