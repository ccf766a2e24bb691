"""Mixtures: exact shares, one order for every process count, positions that resume."""

import dataclasses
import itertools

import numpy as np
import pytest

from path_jax.data import Batch, ByteTokenizer, DataConfig, Mixture, make_corpus, make_iterator
from path_jax.data.mixture import checked_weights, chosen_part
from path_jax.data.prepare import prepare
from path_jax.data.source_files import Encoding, list_files


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Parts whose letters are a, b and c, of different sizes and sources, 5 : 3 : 2."""
    root = tmp_path_factory.mktemp("mixture")
    for letter, sizes in (("a", (700, 900)), ("b", (400, 300, 2000)), ("c", (1500, 800, 60))):
        (root / letter).mkdir()
        for number, size in enumerate(sizes):
            (root / letter / f"{number}.txt").write_text(letter * size)
    encoding = Encoding("bytes", ByteTokenizer(), 256, 257)
    prepare(list_files([str(root / "c")], None), encoding, root / "prepared", shard_bytes=1000)
    parts = {
        "letters_b": {"source": "files", "path": str(root / "b"), "weight": 0.3},
        "letters_a": {"source": "files", "path": str(root / "a"), "weight": 0.5},
        "letters_c": {"source": "prepared", "path": str(root / "prepared"), "weight": 0.2},
    }
    return DataConfig(source="mixture", parts=parts, sequence_length=16, batch_size=4, seed=3, heldout_fraction=0.2)


def take(iterator, count):
    return list(itertools.islice(iterator, count))


def assert_same(actual, expected):
    for left, right in zip(actual, expected, strict=True):
        for name in Batch._fields:
            np.testing.assert_array_equal(getattr(left, name), getattr(right, name))


def letters_of(batches):
    return [chr(row[row < 256].max()) for batch in batches for row in batch.tokens]


@pytest.mark.parametrize("weights", [(1,), (1, 1), (5, 3, 2), (1, 100), (7, 1, 1, 13)])
def test_every_row_of_a_part_is_chosen_once_and_evenly(weights):
    total = sum(weights)
    count = [0] * len(weights)
    for number in range(3 * total):
        part, place = chosen_part(weights, number)
        assert place == count[part]
        count[part] += 1
        for done, weight in zip(count, weights):
            assert abs(done - (number + 1) * weight / total) < len(weights)
    assert count == [3 * weight for weight in weights]
    far = [chosen_part(weights, 10**12 * total + number)[0] for number in range(total)]
    assert [far.count(part) for part in range(len(weights))] == list(weights)


def test_weights_are_exact():
    assert checked_weights({"a": 0.7, "b": 0.3}) == (7, 3)
    assert checked_weights({"a": 2, "b": 4, "c": 0.5}) == (4, 8, 1)
    for weight in (0, -1, float("nan"), float("inf"), "1", True, None):
        with pytest.raises(ValueError, match="data.parts.b.weight is .*positive number"):
            checked_weights({"a": 1, "b": weight})


def test_rows_have_the_shares_and_parts_repeat_by_themselves(config):
    corpus = make_corpus(config)
    assert corpus.vocab_size == 257
    found = letters_of(take(make_iterator(config, corpus.train), 250))
    assert [found.count(letter) for letter in "abc"] == [500, 300, 200]
    for start in range(0, 1000, 100):  # evenly from the beginning on
        assert abs(found[start : start + 100].count("a") - 50) <= 2


@pytest.mark.parametrize("process_count", [2, 4])
def test_global_batches_do_not_depend_on_the_process_count(config, process_count):
    train = make_corpus(config).train
    expected = take(make_iterator(config, train), 60)
    parts = [
        take(make_iterator(config, train, process_index=p, process_count=process_count), 60)
        for p in range(process_count)
    ]
    assert_same([Batch(*map(np.concatenate, zip(*step))) for step in zip(*parts)], expected)


def test_order_depends_on_the_seed_and_not_on_the_order_of_the_keys(config):
    train = make_corpus(config).train
    expected = take(make_iterator(config, train), 20)
    turned = dataclasses.replace(config, parts=dict(reversed(config.parts.items())))
    assert_same(take(make_iterator(turned, make_corpus(turned).train), 20), expected)
    other = take(make_iterator(dataclasses.replace(config, seed=4), train), 20)
    assert any((left.segment_ids != right.segment_ids).any() for left, right in zip(other, expected))


def test_positions_resume_in_the_middle_of_epochs(config):
    train = make_corpus(config).train
    iterator = make_iterator(config, train)
    take(iterator, 23)
    state, expected = iterator.get_state(), take(iterator, 50)
    again = make_iterator(config, train)
    again.set_state(state)
    assert_same(take(again, 50), expected)


def test_heldout_tokens_have_the_shares(config):
    corpus = make_corpus(config)
    assert isinstance(corpus.heldout, Mixture)
    sides = {name: make_corpus(part).heldout for name, part in config.part_configs().items()}
    tokens = {name: sum(len(document.tokens) for document in part) for name, part in corpus.heldout.parts.items()}
    total = sum(tokens.values())
    for (name, size), share in zip(tokens.items(), (0.5, 0.3, 0.2)):
        assert abs(size / total - share) < 0.01, name
    whole = {name: sum(len(document.tokens) for document in side) for name, side in sides.items()}
    assert any(tokens[name] >= whole[name] - 1 for name in tokens)  # as many as one part allows
    names = [document.name for document in corpus.heldout]
    assert len(names) == len(corpus.heldout) == len(set(names)) and names[0].startswith("letters_a/")
    trained = {document.name for document in corpus.train}
    for name, part in corpus.heldout.parts.items():
        if name != "letters_c":  # whose documents are numbers
            assert not {f"{name}/{document.name}" for document in part} & trained
    with pytest.raises(IndexError):
        corpus.heldout[len(names)]


@pytest.mark.parametrize("packing", ["concat", "first_fit"])
def test_parts_take_the_packing_and_refuse_it_by_name(config, packing):
    if packing == "first_fit":
        with pytest.raises(ValueError, match="data.parts.letters_c: data.packing"):
            dataclasses.replace(config, packing=packing)
    parts = {name: part for name, part in config.parts.items() if name != "letters_c"}
    mixed = dataclasses.replace(config, parts=parts, packing=packing)
    found = letters_of(take(make_iterator(mixed, make_corpus(mixed).train), 16))
    assert found.count("a") == 40


@pytest.mark.parametrize(
    "part, message",
    [
        ({"source": "web"}, "data.parts.x.source is 'web'"),
        ({"source": "tfds", "path": "x"}, "data.parts.x.source is 'tfds'"),
        ({"source": "mixture"}, "data.parts.x.source is 'mixture'"),
        ({"source": "files"}, "data.parts.x: data.path"),
        ({"source": "stdlib", "seed": 3}, "data.parts.x has seed; it may have source"),
        ({"source": "stdlib", "weight": 0}, "data.parts.x.weight is 0"),
        ({"source": "stdlib", "weight": "much"}, "data.parts.x.weight is 'much'"),
        ({"source": "stdlib", "vocab_size": 300}, "data.parts.x: .*reads bytes"),
    ],
)
def test_bad_parts_are_named(part, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(source="mixture", parts={"a": {"source": "stdlib", "weight": 1}, "x": {"weight": 1} | part})


def test_mixtures_need_parts_and_one_vocabulary(config, tmp_path):
    with pytest.raises(ValueError, match="a mixture needs parts"):
        DataConfig(source="mixture")
    with pytest.raises(ValueError, match="only a mixture has them"):
        DataConfig(source="stdlib", parts=config.parts)
    with pytest.raises(ValueError, match="data.parts.a.weight is None"):
        DataConfig(source="mixture", parts={"a": {"source": "stdlib"}})
    (tmp_path / "a.fa").write_text(">x\nACGTACGT\n>y\nACGT\n")
    parts = config.parts | {"dna": {"source": "fasta", "path": str(tmp_path / "a.fa"), "weight": 1}}
    with pytest.raises(ValueError, match="one vocabulary.*dna 6 ids opened by 5, letters_a 257 ids opened by 256"):
        make_corpus(dataclasses.replace(config, parts=parts))
