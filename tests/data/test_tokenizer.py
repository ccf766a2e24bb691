"""Learned vocabularies: the notations of Hugging Face and GGUF, and JSON-escaped text."""

import json
import pathlib

import pytest

from path_jax.data import LearnedTokenizer, load_tokenizer, vocabulary_tokenizer
from path_jax.data.tokenizer import ByteTokenizer

# Byte-level notation writes a space as Ġ and a line break as Ċ.
TOKENS = list("abcdefghijklmnopqrstuvwxyz0123456789.,'\\\"") + ["Ġ", "Ċ", "th", "the", "Ġthe", "12", "<|endoftext|>"]
MERGES = ["t h", "th e", "Ġ the", "1 2"]
ID = {token: index for index, token in enumerate(TOKENS)}
GGUF = dict(
    model="gpt2",
    pre="gpt-2",
    tokens=TOKENS,
    types=[1] * (len(TOKENS) - 1) + [3],
    merges=MERGES,
    scores=None,
    add_bos=False,
    bos_id=None,
    add_space_prefix=None,
)


def ids(text):
    return [ID[token] for token in text.split(" ")]


def write_vocabulary(directory, **settings):
    (directory / "vocab.json").write_text(json.dumps(ID))
    (directory / "merges.txt").write_text("#version: 0.2\n" + "\n".join(MERGES) + "\n")
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))


def test_the_notations_agree(tmp_path):
    text = "the the\n12<|endoftext|>12"
    expected = ids("the Ġthe Ċ 12 <|endoftext|> 12")
    write_vocabulary(tmp_path)
    of_lists = vocabulary_tokenizer(**GGUF)
    of_files = load_tokenizer(tmp_path)
    of_files.save(tmp_path / "tokenizer.json")
    of_json = load_tokenizer(tmp_path)
    for tokenizer in (of_lists, of_files, of_json):
        assert isinstance(tokenizer, LearnedTokenizer) and tokenizer.vocab_size == len(TOKENS)
        assert tokenizer.encode(text).tolist() == tokenizer.encode(text.encode()).tolist() == expected
        assert tokenizer.encode(text).dtype == "int32" and tokenizer.encode("").shape == (0,)
        assert tokenizer.decode([*expected, -1, 10**6]) == text


def test_digits_and_openers():
    assert vocabulary_tokenizer(**GGUF | dict(pre="smollm")).encode("12").tolist() == ids("1 2")
    opener = ID["<|endoftext|>"]
    for change in (dict(add_bos=True), dict(add_bos=None, pre="llama-bpe")):
        opened = vocabulary_tokenizer(**GGUF | change | dict(bos_id=opener))
        assert opened.encode("12").tolist() == ids("<|endoftext|> 12")
    assert vocabulary_tokenizer(**GGUF | dict(add_bos=None, bos_id=opener)).encode("12").tolist() == ids("12")


def test_sentencepiece():
    """`golden/sentencepiece.json`: a small vocabulary that the package sentencepiece learned, and what it encodes."""
    golden = json.loads((pathlib.Path(__file__).parents[1] / "golden" / "sentencepiece.json").read_text())
    lists = {name: golden[name] for name in ("tokens", "scores", "types")}
    lists |= dict(model="llama", pre=None, merges=None, bos_id=1, add_bos=False, add_space_prefix=None)
    tokenizer = vocabulary_tokenizer(**lists)
    for text, expected in zip(golden["texts"], golden["ids"], strict=True):
        assert tokenizer.encode(text).tolist() == expected
        assert tokenizer.decode(expected) == text
    opened = vocabulary_tokenizer(**lists | dict(add_bos=None))
    assert opened.encode("a").tolist() == [1, *tokenizer.encode("a")]
    assert opened.decode([1, *golden["ids"][0], 2]) == f"<s> {golden['texts'][0]}</s>"
    bare = vocabulary_tokenizer(**lists | dict(add_space_prefix=False))
    assert bare.encode(" " + golden["texts"][0]).tolist() == golden["ids"][0]


def test_json_escaped_text(tmp_path):
    """The published FoX models read a line break as the two characters backslash and n."""
    write_vocabulary(tmp_path, tokenizer_class="JSONGPT2Tokenizer")
    tokenizer = load_tokenizer(tmp_path)
    text = 'the\n"é"'
    escaped = ids('the \\ n \\ " \\ u 0 0 e 9 \\ "')
    assert tokenizer.encode(text).tolist() == escaped
    assert tokenizer.decode(escaped) == text
    assert tokenizer.decode(escaped[:-1]).startswith("the\n")  # an escape cut in half


@pytest.mark.parametrize(
    "change, reason",
    [
        (dict(model="llama"), "kind 'llama' is not supported"),
        (dict(model="llama", scores=[0.0]), f"{len(TOKENS)} tokens and 1 scores"),
        (dict(model="bert"), "kind 'bert' is not supported"),
        (dict(merges=None), "kind 'gpt2' is not supported"),
        (dict(pre="falcon"), "cut as 'falcon' is not supported; choose from gpt-2, smollm, llama-bpe"),
        (dict(merges=["a"]), "a merge that is not a pair"),
        (dict(tokens=["a", "a"], merges=[]), "a token twice"),
        (dict(tokens=7), "lists of strings"),
        (dict(merges=[1]), "lists of strings"),
        (dict(add_bos=True, bos_id=10**6), "open with token 1000000"),
        (dict(merges=["a zz"]), "out of vocabulary"),
    ],
    ids=str,
)
def test_other_vocabularies_are_refused(change, reason):
    with pytest.raises(ValueError, match=reason):
        vocabulary_tokenizer(**GGUF | change)


def test_directories(tmp_path):
    assert load_tokenizer(tmp_path) is None
    (tmp_path / "tokenizer.json").write_text('{"model": 1}')
    with pytest.raises(ValueError, match="is malformed"):
        load_tokenizer(tmp_path)


def test_bytes_need_no_package():
    assert ByteTokenizer().encode("é").tolist() == [0xC3, 0xA9]
