"""Evaluating a model that was not trained here: what a run's configuration would have said, from the checkpoint."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from path_jax.checkpoints import load_pretrained
from path_jax.checkpoints.folders import read_json
from path_jax.checkpoints.gguf import GgufFile
from path_jax.data import (
    ByteTokenizer,
    Corpus,
    DataConfig,
    LearnedTokenizer,
    encoding_of,
    file_documents,
    load_tokenizer,
    opened_bytes,
    standard_library_documents,
    vocabulary_tokenizer,
)
from path_jax.evaluation.text_codec import TextCodec
from path_jax.models import DecoderLM, ModelConfig
from path_jax.models.stacking import stack_layers

_LENGTH = 1024  # tokens of a window, unless the model has fewer positions
_MAX_TOKENS = 50_000  # scored of the standard library, which has millions


class Pretrained(NamedTuple):
    """A model and a text, as evaluators need them; `config` has the sections `data` and `evals` of a run."""

    config: dict[str, Any]
    model: DecoderLM
    params: dict[str, Any]
    corpus: Corpus
    codec: TextCodec


def load_with_text(path: Path, data: str | None) -> Pretrained:
    """Loads a published checkpoint, and tokenizes a text with its vocabulary.

    Args:
      path: See `load_pretrained`.
      data: A file or directory of text; by default beginnings of the standard library's modules.

    Raises:
      FileNotFoundError: if either path does not exist.
      ValueError: if the checkpoint is not supported, or has neither a vocabulary that is nor one of bytes.
    """
    config, params = load_pretrained(path)
    tokenizer = vocabulary_of(path, config).tokenizer
    encode, is_bytes = _encoder(tokenizer, config)
    documents = standard_library_documents(encode) if data is None else file_documents(data, encode)
    num_ids = 1 + max((int(document.tokens.max()) for document in documents if len(document.tokens)), default=-1)
    length = min(_LENGTH, config.num_positions or _LENGTH)
    section = DataConfig(source="stdlib", sequence_length=length)
    if not is_bytes:  # the source of numbers that are per token, not per byte
        section = DataConfig(
            source="tokens", path=str(path), sequence_length=length, vocab_size=config.vocab_size, bos_id=0
        )
    run = dict(
        data=dataclasses.asdict(section), evals=dict(perplexity=dict(max_tokens=_MAX_TOKENS)) if data is None else {}
    )
    # Scanned, because a compilation of every layer would take longer than many an evaluation.
    model = DecoderLM(dataclasses.replace(config, scan_layers=True))
    codec = TextCodec.of(tokenizer, config.vocab_size)
    return Pretrained(run, model, stack_layers(params), Corpus((), documents, num_ids), codec)


def codec_of_run(config: Mapping[str, Any]) -> TextCodec | None:
    """How a run of train.py turns text into ids: as its data do, or with a vocabulary that lies beside its token files,
    or with that of the checkpoint that it started from. None where it has no text, or nothing says which vocabulary.
    """
    data, model = DataConfig(**config["data"]), ModelConfig(**config["model"])
    if data.source == "task":
        return None
    if (encoding := encoding_of(data)) is not None:
        return TextCodec.of(encoding.tokenizer, model.vocab_size, encoding.bos_id)
    for path in filter(None, (data.path, config.get("conversion", {}).get("start"))):
        if Path(path).exists():
            try:
                return TextCodec.of(vocabulary_of(Path(path), model).tokenizer, model.vocab_size, data.bos_id)
            except (ValueError, OSError):  # of token files alone
                continue
    return None


class Vocabulary(NamedTuple):
    """Text to ids and back; `end_ids` end a text."""

    tokenizer: ByteTokenizer | LearnedTokenizer
    end_ids: tuple[int, ...]


def vocabulary_of(path: Path, config: ModelConfig) -> Vocabulary:
    """The vocabulary of a checkpoint, or bytes where the model has 256 ids, or 257 with a document opener.

    `eos_token_id` of the checkpoint's configuration ends a text, and the opener of a byte-level model does.

    Raises:
      ValueError: if it has neither vocabulary, or an end outside of it.
    """
    if path.is_dir():
        tokenizer, found = load_tokenizer(path), read_json(path / "config.json").get("eos_token_id")
    else:
        with GgufFile(path) as file:
            vocabulary, found = file.vocabulary(), file.config().get("eos_token_id")
        tokenizer = vocabulary and vocabulary_tokenizer(**vocabulary)
    opener = ByteTokenizer().bos_id
    if not tokenizer:
        if config.vocab_size not in (opener, opener + 1):
            raise ValueError(
                f"{path} has {config.vocab_size} token ids and no tokenizer.json (or vocab.json with merges.txt)"
            )
        tokenizer = ByteTokenizer()
        found = opener if found is None and config.vocab_size > opener else found
    ids = [] if found is None else found if isinstance(found, list) else [found]
    if not all(isinstance(i, int) and 0 <= i < config.vocab_size for i in ids):
        raise ValueError(f"{path}: eos_token_id={found} is not in the vocabulary of {config.vocab_size}")
    return Vocabulary(tokenizer, tuple(ids))


def _encoder(tokenizer, config: ModelConfig) -> tuple[Callable[[bytes], np.ndarray], bool]:
    """Bytes -> ids, and whether those are bytes."""
    if not isinstance(tokenizer, ByteTokenizer):
        return tokenizer.encode, False
    has_opener = config.vocab_size == tokenizer.vocab_size
    return opened_bytes if has_opener else tokenizer.encode, True
