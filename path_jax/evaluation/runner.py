"""From a configuration section to evaluators, and from evaluators to numbers.

An evaluator is a callable `(params) -> {metric: float}`. Everything else it needs, it holds.
"""

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from path_jax.data import ByteTokenizer, Corpus, Document, TaskStream
from path_jax.evaluation.byte_baselines import gzip_bits_per_byte, order3_bits_per_byte
from path_jax.evaluation.gates import GateStatistics
from path_jax.evaluation.length_extrapolation import LossByPosition
from path_jax.evaluation.long_context import Babilong, LongContext, NeedleInHaystack, PhoneBookLookup, Ruler
from path_jax.evaluation.perplexity import Perplexity
from path_jax.evaluation.task_accuracy import TaskAccuracy
from path_jax.evaluation.text_codec import TextCodec
from path_jax.models import DecoderLM

Evaluator = Callable[[Mapping[str, Any]], dict[str, float]]


class ByteBaselines:
    """Bits per byte of gzip -9 and of an order-3 byte model, on the bytes that a perplexity evaluator scores.

    Documents are joined, which gives gzip the contexts of earlier documents. Neither number depends on parameters, so
    they are computed once.

    Args:
      documents: Texts that the byte model counts.
      perplexity: Chooses the bytes that are predicted.
      max_train_bytes: The byte model counts the first so many bytes; it takes about 20 bytes of memory for each.

    Raises:
      ValueError: There is no training text.
    """

    def __init__(self, documents: Sequence[Document], perplexity: Perplexity, *, max_train_bytes: int = 2**26):
        if max_train_bytes < 1:
            raise ValueError(f"max_train_bytes={max_train_bytes} must be at least 1")
        if not len(documents):
            raise ValueError("byte_baselines counts training text, and this corpus has none; leave the evaluator out")
        self._documents, self._perplexity, self._max_train_bytes = documents, perplexity, max_train_bytes

    def __call__(self, params: Mapping[str, Any]) -> dict[str, float]:
        """Returns gzip_bits_per_byte and order3_bits_per_byte."""
        del params
        return dict(self._result)

    @functools.cached_property
    def _result(self) -> dict[str, float]:
        train, size = [], 0
        for document in self._documents:
            train.append(_as_bytes(document.tokens[1:]))
            size += len(train[-1])
            if size >= self._max_train_bytes:
                break
        heldout = b"".join(map(_as_bytes, self._perplexity.scored_tokens()))
        return {
            "gzip_bits_per_byte": gzip_bits_per_byte(heldout),
            "order3_bits_per_byte": order3_bits_per_byte(b"".join(train)[: self._max_train_bytes], heldout),
        }


EVALUATORS = {
    "perplexity": Perplexity,
    "length": LossByPosition,
    "gates": GateStatistics,
    "byte_baselines": ByteBaselines,
    "task": TaskAccuracy,
    "needle": NeedleInHaystack,
    "ruler": Ruler,
    "babilong": Babilong,
    "phonebook": PhoneBookLookup,
}


def make_evaluators(
    section: Mapping[str, Mapping[str, int | None]],
    model: DecoderLM,
    corpus: Corpus,
    sequence_length: int,
    *,
    names: Iterable[str] | None = None,
    codec: TextCodec | None = None,
) -> dict[str, Evaluator]:
    """Builds evaluators on the held-out side of a corpus.

    Args:
      section: {evaluator: {option: integer}}. An option that is missing or None takes its default: perplexity reads
        windows of `sequence_length` at half that stride, length and those that ask questions have `sequence_length` as
        their training length, and gates reads `sequence_length` tokens.
      model: The language model.
      corpus: The text, or the task; its train side is used by byte_baselines only.
      sequence_length: Of training.
      names: Evaluators to build, those of `section` by default. Others in `section` still count: byte_baselines scores
        the bytes of the section's perplexity options, listed here or not.
      codec: The tokenizer, for those that ask questions; by default bytes, for models with 256 or 257 ids.

    Returns:
      {name: evaluator} in the order of `names`.

    Raises:
      ValueError: for an unknown evaluator or option, or a value that does not fit.
    """
    names = list(dict.fromkeys(section if names is None else names))
    options = {name: _checked_options(name, section.get(name, {})) for name in dict.fromkeys([*names, *section])}
    if corpus.vocab_size > model.config.vocab_size:
        raise ValueError(f"the corpus has {corpus.vocab_size} token ids, the model only {model.config.vocab_size}")

    def make(name: str) -> Evaluator:
        given = options.get(name, {})
        if isinstance(corpus.heldout, TaskStream) and name != "task":
            raise ValueError(f"evaluator {name} reads text, and this run's data is a synthetic task; use task")
        if name == "byte_baselines":
            perplexity = make("perplexity")
            _as_bytes(perplexity.scored_tokens()[0])
            return ByteBaselines(corpus.train, perplexity, **given)
        window = given.get("window", sequence_length)
        defaults = {
            "perplexity": {"window": window, "stride": max(window // 2, 1)},
            "length": {"train_length": sequence_length},
            "gates": {"length": sequence_length},
        }
        try:
            if issubclass(EVALUATORS[name], LongContext):
                known = codec or _byte_codec(model)
                return EVALUATORS[name](model, corpus.heldout, known, **({"train_length": sequence_length} | given))
            return EVALUATORS[name](model, corpus.heldout, **(defaults.get(name, {}) | given))
        except ValueError as error:
            raise ValueError(f"evaluator {name}: {error}") from error

    return {name: make(name) for name in names}


def make_all_evaluators(
    section: Mapping[str, Mapping[str, int | None]],
    model: DecoderLM,
    corpus: Corpus,
    sequence_length: int,
    *,
    codec: TextCodec | None = None,
) -> tuple[dict[str, Evaluator], dict[str, str]]:
    """Builds every evaluator that applies to the model and its corpus.

    Args:
      section, model, corpus, sequence_length, codec: See `make_evaluators`.

    Returns:
      {name: evaluator}, and {name: reason} of the others.

    Raises:
      ValueError: for an unknown evaluator or option, or a corpus that is not the model's.
    """
    make = functools.partial(make_evaluators, section, model, corpus, sequence_length, codec=codec)
    made, reasons = make(names=[]), {}
    for name in EVALUATORS:
        try:
            made |= make(names=[name])
        except ValueError as error:
            reasons[name] = str(error)
    return made, reasons


def run(
    evaluators: Mapping[str, Evaluator], params: Mapping[str, Any], on_progress: Callable[[str], None] | None = None
) -> dict[str, dict[str, float]]:
    """Returns {name: {metric: value}}.

    Args:
      evaluators: Of `make_evaluators`, or any of their kind.
      params: Parameters of the model they were made for.
      on_progress: Called with the name of each evaluator before it starts.
    """
    results = {}
    for name, evaluator in evaluators.items():
        if on_progress:
            on_progress(name)
        results[name] = {metric: float(value) for metric, value in evaluator(params).items()}
    return results


def _checked_options(name: str, options: Mapping[str, Any]) -> dict[str, int]:
    """Returns the options that are set.

    Raises:
      ValueError: The evaluator or an option is unknown, or a value is not an integer.
    """
    if name not in EVALUATORS:
        raise ValueError(f"unknown evaluator {name!r}; choose from {', '.join(EVALUATORS)}")
    if not isinstance(options, Mapping):
        raise ValueError(f"evaluator {name} has options {options!r}; give a mapping such as {{'batch_size': 4}}")
    parameters = inspect.signature(EVALUATORS[name]).parameters.values()
    known = [item.name for item in parameters if item.kind is item.KEYWORD_ONLY]
    for option, value in options.items():
        if option not in known:
            raise ValueError(f"evaluator {name} has no option {option!r}; choose from {', '.join(known)}")
        if value is not None and type(value) is not int:
            raise ValueError(f"evaluator {name}: {option}={value!r} must be an integer")
    return {option: value for option, value in options.items() if value is not None}


def _byte_codec(model: DecoderLM) -> TextCodec:
    tokenizer, num_ids = ByteTokenizer(), model.config.vocab_size
    if num_ids not in (tokenizer.bos_id, tokenizer.vocab_size):
        raise ValueError(f"it needs the tokenizer of this model with {num_ids} ids")
    return TextCodec.of(tokenizer, num_ids)


def _as_bytes(tokens: np.ndarray) -> bytes:
    if len(tokens) and not (tokens.min() >= 0 and tokens.max() < 256):
        raise ValueError(f"byte_baselines needs byte tokens, found ids {tokens.min()} to {tokens.max()}")
    return tokens.astype(np.uint8).tobytes()
