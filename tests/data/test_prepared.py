"""Prepared tokens as a source: the rows of PackedRows, one global order, positions that resume."""

import concurrent.futures
import dataclasses
import itertools
import random

import numpy as np
import pytest

from path_jax.data import (
    Batch,
    ByteTokenizer,
    DataConfig,
    Document,
    PackedRows,
    PreparedRange,
    PreparedRows,
    PreparedTokens,
    documents_at,
    encoding_of,
    file_documents,
    make_corpus,
    make_iterator,
)
from path_jax.data.prepare import prepare
from path_jax.data.shard_writer import RECORD_TOKENS
from path_jax.data.source_files import Encoding, list_files

BYTES = Encoding("bytes", ByteTokenizer(), 256, 257)


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    root = tmp_path_factory.mktemp("texts")
    draw = random.Random(3)
    for number in range(50):
        (root / f"{number:02d}.txt").write_bytes(draw.randbytes(draw.choice([1, 2, 40, 900, 7000])))
    (root / "20.txt").write_bytes(draw.randbytes(3 * RECORD_TOKENS))
    return root


@pytest.fixture(scope="module")
def prepared(texts, tmp_path_factory):
    output = tmp_path_factory.mktemp("prepared") / "out"
    prepare(list_files([str(texts)], None), BYTES, output, shard_bytes=30_000)
    return str(output)


def config_for(path, **changes):
    config = DataConfig(source="prepared", path=path, sequence_length=300, batch_size=4, seed=7)
    return dataclasses.replace(config, **changes)


def take(iterator, count):
    return list(itertools.islice(iterator, count))


def assert_same(actual, expected):
    for left, right in zip(actual, expected, strict=True):
        for name in Batch._fields:
            np.testing.assert_array_equal(getattr(left, name), getattr(right, name))


@pytest.mark.parametrize("length", [1, 7, 300, 20_000])
def test_rows_are_those_of_the_same_documents(texts, prepared, length):
    documents, stream = file_documents(texts), PreparedTokens(prepared)
    expected = PackedRows(documents, length)
    rows = PreparedRows(PreparedRange(stream, 0, stream.num_tokens), length)
    assert len(rows) == len(expected)
    for index in range(0, len(rows), max(1, len(rows) // 200)) if length > 1 else range(0, len(rows), 997):
        for name, value in expected[index].items():
            np.testing.assert_array_equal(rows[index][name], value, strict=True)
    for name, value in expected[len(rows) - 1].items():
        np.testing.assert_array_equal(rows[len(rows) - 1][name], value)
    with pytest.raises(IndexError):
        rows[len(rows)]


def test_documents_are_those_that_were_read(texts, prepared):
    stream = PreparedTokens(prepared)
    documents = PreparedRange(stream, 0, stream.num_tokens)
    expected = file_documents(texts)
    assert len(documents) == len(expected)
    for index in [*range(len(expected)), 0, len(expected) - 1, 3]:
        np.testing.assert_array_equal(documents[index].tokens, expected[index].tokens)
    assert len({document.name for document in documents}) == len(expected)
    with pytest.raises(IndexError):
        documents[len(documents)]


@pytest.mark.parametrize("fraction", [0.01, 0.05, 0.3, 0.6, 0.95])
def test_the_sides_share_nothing_and_miss_nothing(prepared, fraction):
    stream = PreparedTokens(prepared)
    train, heldout = stream.split(fraction)
    assert (train.start, train.stop, heldout.stop) == (0, heldout.start, stream.num_tokens)
    share = (heldout.stop - heldout.start) / stream.num_tokens
    assert 0.5 * fraction <= share <= 1.5 * fraction
    for side in (train, heldout):
        tokens = [document.tokens for document in side]
        np.testing.assert_array_equal(np.concatenate(tokens), stream.read(side.start, side.stop))
    borders = np.flatnonzero(stream.read(0, stream.num_tokens) == 256)[1:]
    goal = round((1 - fraction) * stream.num_tokens)
    nearest = int(borders[abs(borders - goal).argmin()])
    is_near = abs(nearest - goal) <= fraction / 2 * stream.num_tokens
    assert heldout.start == (nearest if is_near else goal)
    assert is_near == (fraction > 0.01)  # both cases are here


def test_a_long_document_is_cut_rather_than_a_side_lost(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "0").write_bytes(b"x" * 10)
    (tmp_path / "a" / "1").write_bytes(b"y" * 990)
    prepare(list_files([str(tmp_path / "a")], None), BYTES, tmp_path / "out")
    train, heldout = PreparedTokens(tmp_path / "out").split(0.1)
    assert [len(document.tokens) for document in train] == [11, 891]
    assert [document.tokens.tolist() for document in heldout] == [[ord("y")] * 100]
    with pytest.raises(ValueError, match="fewer than one sequence"):
        make_iterator(config_for(str(tmp_path / "out")), heldout)
    (tmp_path / "b").write_bytes(b"z")
    prepare(list_files([str(tmp_path / "b")], None), BYTES, tmp_path / "small")
    assert [side.stop - side.start for side in PreparedTokens(tmp_path / "small").split(0.05)] == [1, 1]


@pytest.mark.parametrize("process_count", [2, 4])
def test_global_batches_do_not_depend_on_the_process_count(prepared, process_count):
    config = config_for(prepared)
    train = make_corpus(config).train
    num_batches = len(PreparedRows(train, 300)) // 4 + 10  # into the second epoch
    expected = take(make_iterator(config, train), num_batches)
    parts = [
        take(make_iterator(config, train, process_index=p, process_count=process_count), num_batches)
        for p in range(process_count)
    ]
    joined = [Batch(*map(np.concatenate, zip(*step, strict=True))) for step in zip(*parts, strict=True)]
    assert_same(joined, expected)


def test_an_epoch_visits_every_row_once_in_an_order_of_the_seed(prepared):
    config = config_for(prepared, batch_size=1)
    train = make_corpus(config).train
    rows = PreparedRows(train, 300)
    visited = lambda seed: [
        batch.tokens[0].tobytes()
        for batch in take(make_iterator(dataclasses.replace(config, seed=seed), train), len(rows))
    ]
    first, second = visited(0), visited(1)
    assert first != second and sorted(first) == sorted(second)
    assert sorted(first) == sorted(rows[index]["tokens"].tobytes() for index in range(len(rows)))


def test_positions_resume_under_any_process_count(prepared):
    """Saved by one process in the middle of an epoch, read by each of two."""
    config = config_for(prepared)
    train = make_corpus(config).train
    iterator = make_iterator(config, train)
    take(iterator, 7)
    state, expected = iterator.get_state(), take(iterator, 60)
    iterator.set_state(state)
    assert_same(take(iterator, 60), expected)
    parts = []
    for process in (0, 1):
        part = make_iterator(config, train, process_index=process, process_count=2)
        part.set_state(state)
        parts.append(take(part, 60))
    assert_same([Batch(*map(np.concatenate, zip(*step))) for step in zip(*parts)], expected)


def test_the_same_batches_as_from_memory(texts, prepared):
    """With the shuffles of other sources: only where the tokens come from differs."""
    config = config_for(prepared)
    stream = PreparedTokens(prepared)
    expected = make_iterator(dataclasses.replace(config, source="files", path=str(texts)), file_documents(texts))
    actual = make_iterator(config, PreparedRange(stream, 0, stream.num_tokens))
    assert_same(take(actual, 30), take(expected, 30))


def test_threads_read_the_same(prepared):
    stream = PreparedTokens(prepared)
    rows = PreparedRows(PreparedRange(stream, 0, stream.num_tokens), 500)
    expected = [rows[index]["tokens"].tobytes() for index in range(len(rows))]
    other = PreparedTokens(prepared)
    other_rows = PreparedRows(PreparedRange(other, 0, other.num_tokens), 500)
    order = random.Random(0).choices(range(len(rows)), k=600)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda index: other_rows[index]["tokens"].tobytes(), order))
    assert found == [expected[index] for index in order]


def test_what_cannot_work_is_refused(prepared, tmp_path):
    with pytest.raises(ValueError, match="first_fit.*prepared tokens do not offer"):
        config_for(prepared, packing="first_fit")
    with pytest.raises(FileNotFoundError, match="not a prepared data set"):
        make_corpus(config_for(str(tmp_path)))
    with pytest.raises(ValueError, match="fewer than one sequence of 5000001"):
        config = config_for(prepared, sequence_length=5_000_000)
        make_iterator(config, make_corpus(config).train)


def test_vocabularies_of_sources(prepared, tmp_path):
    (tmp_path / "a.fa").write_text(">x\nACG\n")
    (tmp_path / "a.txt").write_text("hi")
    dna = DataConfig(source="fasta", path=str(tmp_path / "a.fa"))
    part = {"source": "prepared", "path": prepared, "weight": 1}
    kinds = {
        "bytes": [DataConfig(), config_for(prepared), DataConfig(source="mixture", parts={"a": part})],
        "dna": [dna],
    }
    for kind, configs in kinds.items():
        assert {encoding_of(config).kind for config in configs} == {kind}
    tokens = DataConfig(source="tokens", path="x", vocab_size=9, bos_id=1)
    gone = config_for(str(tmp_path / "gone"))
    task = DataConfig(source="task", task="flip_flop", sequence_length=16)
    assert [encoding_of(config) for config in (tokens, gone, task)] == [None] * 3
    text = lambda config, name: [document.tokens.tolist() for document in documents_at(config, tmp_path / name)]
    assert text(config_for(prepared), "a.txt") == [[256, ord("h"), ord("i")]]
    assert text(dna, "a.fa") == [[5, 0, 1, 2]]
    with pytest.raises(ValueError, match="nothing says how text becomes the ids"):
        documents_at(gone, tmp_path / "a.txt")
    assert isinstance(documents_at(config_for(prepared), tmp_path / "a.txt")[0], Document)
