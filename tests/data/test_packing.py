"""Rows cover every within-document target once and never mix documents."""

import collections

import numpy as np
import pytest

from path_jax.data import Document, PackedRows, first_fit_rows

CASES = {
    "mixed": [1, 2, 9, 8, 7, 30, 1, 1, 4, 17, 16, 15],
    "one": [50],
    "exact": [9, 9, 9],
    "minimum": [4, 5],
    "short": [2] * 20,
    "random": np.random.default_rng(0).integers(1, 40, 60).tolist(),
}
SOURCES = {"concat": PackedRows, "first_fit": first_fit_rows}
both_sources = pytest.mark.parametrize("make_rows", SOURCES.values(), ids=SOURCES.keys())
all_cases = pytest.mark.parametrize("lengths", CASES.values(), ids=CASES.keys())
T = 8


def unique_documents(lengths):
    """Documents whose tokens are all different, so a token names its place."""
    tokens = np.split(np.arange(1, sum(lengths) + 1, dtype=np.int32), np.cumsum(lengths)[:-1])
    return [Document(f"d{i}", piece) for i, piece in enumerate(tokens)]


@both_sources
@all_cases
def test_row_format(make_rows, lengths):
    rows = make_rows(unique_documents(lengths), T)
    dtypes = {"tokens": "i4", "targets": "i4", "weights": "f4"}
    dtypes |= {"segment_ids": "i4", "positions": "i4"}
    for index in range(len(rows)):
        row = rows[index]
        assert {name: value.dtype.str[1:] for name, value in row.items()} == dtypes
        assert all(value.shape == (T,) for value in row.values())
        segment_ids = row["segment_ids"]
        is_padding = segment_ids == 0
        # Segments are 1, 2, ... without gaps, and padding is at the end only.
        real = segment_ids[~is_padding]
        assert real[0] == 1 and set(np.diff(real)) <= {0, 1}
        assert not is_padding[: len(real)].any()
        for name in ("tokens", "targets", "weights", "positions"):
            assert not row[name][is_padding].any()
        for segment in range(1, real[-1] + 1):
            inside = segment_ids == segment
            np.testing.assert_array_equal(row["positions"][inside], np.arange(inside.sum()))
            # With unique ids, consecutive tokens of one document differ by exactly 1.
            assert set(np.diff(row["tokens"][inside])) <= {1}
        counted = row["weights"] == 1
        assert set(row["weights"]) <= {0, 1}
        np.testing.assert_array_equal(row["targets"][counted], row["tokens"][counted] + 1)


@both_sources
@all_cases
def test_every_target_inside_a_document_counts_exactly_once(make_rows, lengths):
    documents = unique_documents(lengths)
    rows = make_rows(documents, T)
    seen = collections.Counter()
    for index in range(len(rows)):
        row = rows[index]
        seen.update(row["targets"][row["weights"] == 1].tolist())
    expected = [token for document in documents for token in document.tokens[1:].tolist()]
    assert seen == collections.Counter(expected)


@all_cases
def test_concat_rows_are_the_stream(lengths):
    rows = PackedRows(unique_documents(lengths), T)
    num_targets = sum(lengths) - 1
    assert len(rows) == -(-num_targets // T)
    stream = np.arange(1, sum(lengths) + 1)
    tokens = np.concatenate([rows[i]["tokens"] for i in range(len(rows))])
    targets = np.concatenate([rows[i]["targets"] for i in range(len(rows))])
    np.testing.assert_array_equal(tokens[:num_targets], stream[:-1])
    np.testing.assert_array_equal(targets[:num_targets], stream[1:])


@all_cases
def test_first_fit_keeps_documents_whole_and_fills_greedily(lengths):
    rows = first_fit_rows(unique_documents(lengths), T)
    room, expected = [], []
    for length in lengths:
        for start in range(0, length - 1, T):
            size = min(T, length - 1 - start)
            fitting = [i for i, free in enumerate(room) if free >= size]
            if not fitting:
                room.append(T)
                expected.append(0)
            number = fitting[0] if fitting else len(room) - 1
            room[number] -= size
            expected[number] += 1
    assert [rows[i]["segment_ids"].max() for i in range(len(rows))] == expected


def test_first_fit_cuts_long_documents_only():
    documents = unique_documents([T + 1, T, T + 2])
    rows = first_fit_rows(documents, T)
    starts = [rows[i]["tokens"][rows[i]["positions"] == 0] for i in range(len(rows))]
    first_tokens = {int(document.tokens[0]) for document in documents}
    inner = {int(token) for row in starts for token in row if token} - first_tokens
    assert inner == {int(documents[2].tokens[T])}


@both_sources
def test_too_little_text(make_rows):
    with pytest.raises(ValueError, match="corpus has 120 tokens, fewer than one sequence of 257; lower"):
        make_rows(unique_documents([100, 20]), 256)
    with pytest.raises(ValueError, match="sequence_length is 0"):
        make_rows(unique_documents([100]), 0)
    assert len(make_rows(unique_documents([T + 1]), T)) == 1


def test_first_fit_needs_something_to_predict():
    with pytest.raises(ValueError, match="two tokens"):
        first_fit_rows(unique_documents([1] * 20), T)


@both_sources
def test_index_is_checked(make_rows):
    rows = make_rows(unique_documents([30]), T)
    for index in (-1, len(rows)):
        with pytest.raises(IndexError):
            rows[index]
    np.testing.assert_array_equal(rows[np.int64(1)]["tokens"], rows[1]["tokens"])
