"""Text to ids and back: bytes, and learned vocabularies in three notations.

Learned vocabularies are read from `tokenizer.json` or `vocab.json` with `merges.txt` (Hugging Face), or given as the
lists of a GGUF file; they need the package tokenizers (extra `[hf]`). Nothing is trained here, and SentencePiece's own
`.model` files are not read; tokenize with any tool and read the ids from `.npy` files instead.
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int32

_JSON_ESCAPED = "JSONGPT2Tokenizer"  # what the published FoX models name their tokenizer


@dataclasses.dataclass(frozen=True)
class ByteTokenizer:
    """Maps text to its UTF-8 bytes and back.

    Because one token is one byte, the loss in nats divided by ln 2 is bits per byte.

    Attributes:
      vocab_size: 256 bytes and the document opener.
      bos_id: The id that opens every document; never produced by `encode`.
    """

    vocab_size: int = dataclasses.field(default=257, init=False)
    bos_id: int = dataclasses.field(default=256, init=False)

    def encode(self, text: str | bytes) -> Int32[np.ndarray, "n"]:
        """Returns the bytes of `text` (UTF-8 for a string), without `bos_id`.

        Args:
          text: A string, or bytes that need not be valid UTF-8.

        Returns:
          Ids in [0, 256), int32 [n].
        """
        data = text.encode("utf-8") if isinstance(text, str) else text
        return np.frombuffer(data, dtype=np.uint8).astype(np.int32)

    def decode(self, ids: Any) -> str:
        """Returns the text of `ids`, dropping every id that is not a byte.

        Args:
          ids: Integer array or sequence [n]. A model may emit any id, so ids outside
            [0, 256) are skipped.

        Returns:
          The text. Byte runs that are not UTF-8 become U+FFFD.
        """
        array = np.asarray(ids, dtype=np.int64).reshape(-1)
        is_byte = (array >= 0) & (array < 256)
        return array[is_byte].astype(np.uint8).tobytes().decode("utf-8", errors="replace")


class LearnedTokenizer:
    """A learned vocabulary, by the package tokenizers.

    Args:
      tokenizer: A `tokenizers.Tokenizer`.
      is_json_escaped: The vocabulary was learned on text with JSON's escapes, as that of the published FoX models:
        a line break is the two characters backslash and n.

    Attributes:
      vocab_size: One more than the largest id.
    """

    def __init__(self, tokenizer: Any, is_json_escaped: bool = False):
        self._tokenizer = tokenizer
        self._is_json_escaped = is_json_escaped
        self.vocab_size = 1 + max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)

    def encode(self, text: str | bytes) -> Int32[np.ndarray, "n"]:
        """Returns the ids of `text`, int32 [n], with an opening token only where the vocabulary's own rules add one.

        Args:
          text: A string, or UTF-8 bytes, of which others become U+FFFD. Special tokens such as `<|endoftext|>` are
            recognised in it.
        """
        text = text.decode("utf-8", errors="replace") if isinstance(text, bytes) else text
        text = json.dumps(text)[1:-1] if self._is_json_escaped else text
        return np.array(self._tokenizer.encode(text).ids, np.int32)

    def decode(self, ids: Any) -> str:
        """Returns the text of `ids` [n], special tokens included; ids outside the vocabulary are skipped."""
        array = np.asarray(ids, dtype=np.int64).reshape(-1)
        known = array[(array >= 0) & (array < self.vocab_size)].tolist()
        text = self._tokenizer.decode(known, skip_special_tokens=False)
        if not self._is_json_escaped:
            return text
        try:
            return json.loads(f'"{text}"', strict=False)
        except json.JSONDecodeError:  # an escape cut in half, or a bare quote
            return text.encode().decode("unicode_escape", errors="ignore")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a `tokenizer.json`."""
        self._tokenizer.save(os.fspath(path))

    def files(self) -> dict[str, bytes]:
        """Returns {name: content} of a directory from which `load_tokenizer` makes the same tokenizer."""
        files = {"tokenizer.json": self._tokenizer.to_str(pretty=True).encode()}
        if self._is_json_escaped:
            files["tokenizer_config.json"] = json.dumps({"tokenizer_class": _JSON_ESCAPED}).encode()
        return files


def load_tokenizer(directory: str | os.PathLike[str]) -> LearnedTokenizer | None:
    """Returns the tokenizer of a Hugging Face directory, or None if it has no tokenizer files.

    Raises:
      ImportError: the package tokenizers is not installed.
      ValueError: a file is malformed.
    """
    directory = pathlib.Path(directory)
    settings = directory / "tokenizer_config.json"
    try:
        name = json.loads(settings.read_text()).get("tokenizer_class") if settings.is_file() else None
        is_json_escaped = name == _JSON_ESCAPED
        if (directory / "tokenizer.json").is_file():
            from_file = _tokenizers().Tokenizer.from_file
            return LearnedTokenizer(_built(lambda: from_file(str(directory / "tokenizer.json"))), is_json_escaped)
        if (directory / "vocab.json").is_file() and (directory / "merges.txt").is_file():
            vocabulary = json.loads((directory / "vocab.json").read_text())
            lines = (directory / "merges.txt").read_text().splitlines()
            merges = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
            special = [token for token in ("<|endoftext|>",) if token in vocabulary]
            return LearnedTokenizer(_byte_level(vocabulary, merges, special, "gpt-2"), is_json_escaped)
    except (ValueError, TypeError, AttributeError, RecursionError) as error:  # not JSON, or JSON of another shape
        raise ValueError(f"the tokenizer of {directory} is malformed: {str(error)[:200]}") from error
    return None


def vocabulary_tokenizer(
    *,
    model: str,
    pre: str | None,
    tokens: Sequence[str],
    types: Sequence[int] | None,
    merges: Sequence[str] | None,
    scores: Sequence[float] | None,
    add_bos: bool | None,
    bos_id: int | None,
    add_space_prefix: bool | None,
) -> LearnedTokenizer:
    """Builds a tokenizer from the lists of a GGUF file.

    Args:
      model: `tokenizer.ggml.model`: "gpt2" (byte-level merges) or "llama" (SentencePiece's merges).
      pre: How text is cut before byte-level merging: "gpt-2", "smollm" or "llama-bpe".
      tokens: Token of every id.
      types: 3 (control) and 4 (user-defined) are special tokens; 2 is the unknown token of SentencePiece.
      merges: Pairs "left right" of byte-level merging, the earliest first.
      scores: Of every token, for SentencePiece: the pair whose union has the highest is merged first.
      add_bos: Whether a text opens with `bos_id`; None means that it does, as in llama.cpp, unless the vocabulary is
        byte-level and `pre` is not "llama-bpe".
      bos_id: That token.
      add_space_prefix: Whether SentencePiece puts a space before a text; None means that it does.

    Raises:
      ImportError: the package tokenizers is not installed.
      ValueError: for another kind of vocabulary, or lists that do not fit.
    """
    if not all(isinstance(x, list) and all(isinstance(y, str) for y in x) for x in (tokens, merges or [])):
        raise ValueError("the tokens and merges of a vocabulary must be lists of strings")
    special = [token for token, kind in zip(tokens, types or ()) if kind in (3, 4)]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens):
        raise ValueError("the vocabulary has a token twice")
    if model == "gpt2" and merges is not None:
        if pre not in _CUTS:
            raise ValueError(f"text cut as {pre!r} is not supported; choose from {', '.join(_CUTS)}")
        pairs = [tuple(merge.split(" ")) for merge in merges]
        if not all(len(pair) == 2 for pair in pairs):
            raise ValueError("the vocabulary has a merge that is not a pair")
        tokenizer = _byte_level(vocabulary, pairs, special, pre)
    elif model == "llama" and scores is not None:
        if len(scores) != len(tokens):
            raise ValueError(f"the vocabulary has {len(tokens)} tokens and {len(scores)} scores")
        unknown = next((token for token, kind in zip(tokens, types or ()) if kind == 2), None)
        tokenizer = _sentencepiece(vocabulary, scores, special, unknown, add_space_prefix is not False)
    else:
        raise ValueError(
            f"a vocabulary of the kind {model!r} is not supported; 'gpt2' with merges and 'llama' with scores are"
        )
    if add_bos or (add_bos is None and (model == "llama" or pre == "llama-bpe")):
        if bos_id is None or not 0 <= bos_id < len(tokens):
            raise ValueError(f"texts open with token {bos_id}, which is not in the vocabulary of {len(tokens)}")
        opener = tokens[bos_id]
        tokenizer.post_processor = _tokenizers().processors.TemplateProcessing(
            single=[opener, "$A"], pair=[opener, "$A", "$B"], special_tokens=[(opener, bos_id)]
        )
    return LearnedTokenizer(tokenizer)


# How each family cuts text before merging: the pattern of byte-level BPE (None: GPT-2's), and whether digits are cut
# one by one first.
_CUTS = {
    "gpt-2": (None, False),
    "smollm": (None, True),
    "llama-bpe": (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
        r"|\s+(?!\S)|\s+",
        False,
    ),
}


def _byte_level(vocabulary: dict[str, int], merges: list[tuple[str, str]], special: list[str], cut: str) -> Any:
    tokenizers = _tokenizers()
    pattern, has_single_digits = _CUTS[cut]
    # ignore_merges: Llama 3 takes a whole piece that is in the vocabulary as it is.
    ignore_merges = cut == "llama-bpe"
    model = _built(lambda: tokenizers.models.BPE(vocab=vocabulary, merges=merges, ignore_merges=ignore_merges))
    tokenizer = tokenizers.Tokenizer(model)
    cutters = tokenizers.pre_tokenizers
    steps = [cutters.Digits(individual_digits=True)] if has_single_digits else []
    if pattern:
        steps.append(cutters.Split(tokenizers.Regex(pattern), behavior="isolated"))
    steps.append(cutters.ByteLevel(add_prefix_space=False, use_regex=pattern is None))
    tokenizer.pre_tokenizer = cutters.Sequence(steps)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens([tokenizers.AddedToken(token, normalized=False, special=True) for token in special])
    return tokenizer


def _sentencepiece(
    vocabulary: dict[str, int], scores: Sequence[float], special: list[str], unknown: str | None, has_prefix: bool
) -> Any:
    """Merges by the score of what they make; characters that are not in the vocabulary become bytes `<0xE2>`."""
    tokenizers = _tokenizers()
    merges = [
        (-scores[index], (token[:cut], token[cut:]))
        for token, index in vocabulary.items()
        for cut in range(1, len(token))
        if token[:cut] in vocabulary and token[cut:] in vocabulary
    ]
    merges = [pair for _, pair in sorted(merges, key=lambda merge: merge[0])]
    bpe = tokenizers.models.BPE
    model = _built(lambda: bpe(vocab=vocabulary, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    tokenizer = tokenizers.Tokenizer(model)
    normalizers, decoders = tokenizers.normalizers, tokenizers.decoders
    prefix = [normalizers.Prepend("\u2581")] if has_prefix else []
    tokenizer.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", "\u2581")])
    strip = [decoders.Strip(" ", 1, 0)] if has_prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    tokenizer.add_special_tokens([tokenizers.AddedToken(token, normalized=False, special=True) for token in special])
    return tokenizer


def _built(build: Callable[[], Any]) -> Any:
    """What the package builds from a file or lists of others; damage in them becomes a ValueError."""
    try:
        return build()
    except Exception as error:
        # The package raises Exception itself for damage, so nothing narrower catches it. Other kinds are not damage.
        if type(error) not in (Exception, TypeError, ValueError, OverflowError):
            raise
        raise ValueError(f"the vocabulary and its merges do not fit: {str(error)[:200]}") from error


def _tokenizers() -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise ImportError("learned vocabularies need the package tokenizers; run: pip install path-jax[hf]") from error
    return tokenizers
