"""Recall over one's own records: reading files, and answers that are the file's."""

import csv
import dataclasses
import json

import numpy as np
import pytest
from data.query_readers import check_rows, read_row

from path_jax.data import as_text, make_task
from path_jax.data.records import Records, read_records

CAPITALS = {
    **{"France": "Paris", "Peru": "Lima", "Bolivia, Plurinational State of": "Sucre", "Japan": "Tōkyō"},
    **{"Chad": "N'Djamena", "Kenya": "Nairobi", "San Marino": "San Marino", "Malta": "Valletta", "Laos": "Vientiane"},
    **{"one": "1", "uno": "1", "Guyana": 'George"town"'},
}


@pytest.fixture
def paths(tmp_path):
    """The same records in all notations."""
    items = list(CAPITALS.items())
    documents = {
        "object.json": CAPITALS,
        "pairs.json": items,
        "objects.json": [{"value": value, "key": key, "note": None} for key, value in items],
    }
    for name, document in documents.items():
        (tmp_path / name).write_text(json.dumps(document, ensure_ascii=name == "object.json"), encoding="utf-8")
    with (tmp_path / "two.csv").open("w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file).writerows(items)
    with (tmp_path / "named.CSV").open("w", newline="\r\n", encoding="utf-8") as file:
        csv.writer(file).writerows([("", "city", "country"), *((i, y, f" {x} ") for i, (x, y) in enumerate(items)), ()])
    return tmp_path


NOTATIONS = {
    **dict.fromkeys(["object.json", "pairs.json", "objects.json", "two.csv"], {}),
    "named.CSV": dict(key_column="country", value_column="city"),
}
each_notation = pytest.mark.parametrize("name, columns", NOTATIONS.items(), ids=NOTATIONS)


@each_notation
def test_all_notations_are_read(paths, name, columns):
    assert list(read_records(paths / name, **columns).items()) == list(CAPITALS.items())


def reader(task, records):
    """Looks at spellings only."""
    words = task.words

    def read(_, text, question):
        keys, values = ([words[token] for token in text[i::2]] for i in range(2))
        assert len(set(keys)) == len(keys) and task.min_records <= len(keys) <= task.max_records
        for key, value in zip(keys, values, strict=True):
            assert key.endswith(": ") and value.endswith("\n") and records[key[:-2]] == value[:-1]
        place = keys.index(words[question[0]])
        return {(2 * place, 2 * place + 1): (len(keys) - place).bit_length() - 1}

    return read


@each_notation
def test_rows_are_right(paths, name, columns):
    task = make_task("records", 28, dict(path=str(paths / name), min_records=1, max_records=12, **columns))
    assert task.vocab_size == len(task.words) == 3 + 12 + 11  # two have the value 1
    assert check_rows(task, 0, np.arange(500), reader(task, CAPITALS)) == 500


DEFAULT = Records(80, min_records=4, max_records=30)


def test_rows_of_the_default_are_right():
    records = dict(zip((word[:-2] for word in DEFAULT.words[3:255]), DEFAULT._records.values(), strict=True))
    assert records["eacute"] == "233" and len(records) == 252
    task = dataclasses.replace(DEFAULT, mask_nonquery=False)
    assert check_rows(task, 0, np.arange(500), reader(DEFAULT, records)) == 500


@pytest.mark.slow
def test_100_000_rows_are_right():
    for start in range(0, 100_000, 10_000):
        check_rows(DEFAULT, 5, np.arange(start, start + 10_000), reader(DEFAULT, DEFAULT._records))


def test_examples_do_not_depend_on_the_batch():
    order, together = np.array([7, 0, 11, 7, 3]), DEFAULT.examples(5, np.arange(12))
    for whole, part in zip(together, DEFAULT.examples(5, order)):
        np.testing.assert_array_equal(whole[order], part)


def test_numbers_and_records_are_uniform():
    text = DEFAULT.documents(0, np.arange(6000)).text
    even = lambda counts: (abs(counts - counts.mean()) < 4 * np.sqrt(counts.mean())).all()
    assert even(np.bincount((text >= 0).sum(axis=1) // 2)[4:])
    assert even(np.bincount(text[:, 0] - 3, minlength=252))
    asked = DEFAULT.documents(0, np.arange(6000))
    assert even(np.bincount(asked.text[np.arange(6000), asked.key] - 3, minlength=252))


def test_text(paths):
    task = Records(10, path=str(paths / "two.csv"), min_records=3, max_records=3)
    tokens = task.examples(0, np.arange(1)).tokens[0]
    *records, gap, question = as_text(task.words, tokens).splitlines()
    assert gap == "" and question in records and len(records) == 3
    assert all(CAPITALS[key] == value for key, value in (line.split(": ") for line in records))


def test_numbers_are_taken_as_they_are_spelled(tmp_path):
    path = tmp_path / "numbers.json"
    path.write_text('{"a": 1.50, "b": -2e10, "c": 12345678901234567890, "d": true, "e": "x"}')
    assert list(read_records(path).values()) == ["1.50", "-2e10", "12345678901234567890", "true", "x"]
    path.write_text('[[1, "a"], [1.0, "a"], [false, 0], [1, "a"]]')
    assert read_records(path) == {"1": "a", "1.0": "a", "false": "0"}


def test_named_fields_of_json(tmp_path):
    path = tmp_path / "fields.json"
    path.write_text('[{"id": 3, "name": "x"}, {"name": "y", "id": 4}]')
    assert read_records(path, "id", "name") == {"3": "x", "4": "y"}


def test_records_can_be_withheld():
    task = dataclasses.replace(DEFAULT, train_test_split=0.3)
    asked = {}
    for split in ("train", "test"):
        documents = dataclasses.replace(task, split=split).documents(0, np.arange(3000))
        asked[split] = set(documents.text[np.arange(3000), documents.key].tolist())
    assert not asked["train"] & asked["test"] and len(asked["train"] | asked["test"]) == 252
    assert abs(len(asked["test"]) - 0.3 * 252) < 4 * np.sqrt(252 * 0.3 * 0.7)
    assert set(task.variants()) == {"in_distribution", "records_x2", "withheld_pairs"}


def test_variants(paths):
    assert DEFAULT.variants()["records_x2"] == Records(140, min_records=8, max_records=60)
    assert set(Records(28, path=str(paths / "two.csv"), max_records=8, min_records=8).variants()) == {"in_distribution"}


@pytest.mark.parametrize("site", ["key", "value"])
def test_replacements(site):
    index = np.arange(500)
    tokens, places = DEFAULT.examples(0, index).tokens, DEFAULT.sites(0, index)[site]
    changed = DEFAULT.replacements(tokens, site, 0, index)
    new = changed[index, places]
    assert not (tokens == new[:, None]).any() and ((new < 255) == (site == "key")).all()


BAD_FILES = {
    "bad.txt": ("a,b", "neither .json nor .csv"),
    "empty.json": ("", "Expecting value: line 1 column 1"),
    "nothing.json": ("{}", "no records"),
    "nothing.csv": ("\n\n", "no records"),
    "number.json": ("3", "neither an object nor a list"),
    "cut.json": ('{"a": 1,\n "b"', "line 2"),
    "nan.json": ('{"a": NaN}', "NaN is no JSON number"),
    "null.json": ('[["a", "b"], ["c", null]]', "entry 2: keys and values are"),
    "nested.json": ('{"a": {"b": "c"}}', "entry 1: keys and values are"),
    "deep.json": ("[" * 100_000, "nested too deeply"),
    "triple.json": ('[["a", "b"], ["c", "d", "e"]]', "entry 2: neither a pair nor"),
    "text.json": ('["ab"]', "entry 1: neither a pair nor"),
    "field.json": ('[{"key": 1, "value": 2}, {"key": 3}]', "entry 2: no field 'value'"),
    "twice.json": ('{"a": 1, "b": 2, "a": 3}', "entry 3: key 'a' has value '3', and '1' at entry 1"),
    "nul.json": ('{"a": "b\\u0000"}', "entry 1: the value .* NUL"),
    "half.json": ('{"a": "\\ud800"}', "entry 1: .* surrogate"),
    "latin.json": (b'{"a": "\xe9"}', "not UTF-8 text at byte 7"),
    "wide.csv": ("a,b\nc,d,e\n", "line 2: 3 columns, 2 needed; name"),
    "narrow.csv": ("a,b\nc\n", "line 2: 1 columns, 2 needed"),
    "twice.csv": ("a,b\nc,d\n\na,c\n", "line 4: key 'a' has value 'c', and 'b' at line 1"),
    "blank.csv": ("a,b\n,d\n", "line 2: the key '' is empty"),
    "quote.csv": ('a,b\n"c,d\n', "line 2: unexpected end"),
    "nul.csv": ("a,b\nc,d\0\n", "line 2: .*NUL"),
    "latin.csv": (b"a,\xff", "not UTF-8 text at byte 2"),
    "utf16.csv": ("a,b".encode("utf-16"), "not UTF-8 text at byte 0"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_malformed_files_are_named(tmp_path, name):
    content, message = BAD_FILES[name]
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=f"task records: .*{name}.*{message}"):
        make_task("records", 64, {"path": str(path)})


@pytest.mark.parametrize(
    "columns, message",
    [
        (("a", ""), "key_column='a' and value_column='' go together"),
        (("a", "c"), r"line 1: not one column 'c' in \['a', 'b', 'b'\]"),
        (("a", "b"), "line 1: not one column 'b'"),
    ],
)
def test_missing_columns_are_named(tmp_path, columns, message):
    path = tmp_path / "records.csv"
    path.write_text("a,b,b\n1,2,3\n")
    with pytest.raises(ValueError, match=message):
        read_records(path, *columns)


def test_short_lines_and_missing_files(tmp_path):
    path = tmp_path / "records.csv"
    path.write_text("a,b,c\n1,2,3\n1\n")
    with pytest.raises(ValueError, match="line 3: 1 columns, 3 needed$"):
        read_records(path, "a", "c")
    with pytest.raises(FileNotFoundError):
        make_task("records", 64, {"path": str(tmp_path / "none.csv")})


@pytest.mark.parametrize(
    "options, message",
    [
        ({"min_records": 0}, "min_records=0"),
        ({"min_records": 20}, "min_records=20 and max_records=16"),
        ({"max_records": 253}, "at most 252"),
        ({"max_records": 31}, "length=64 must be at least 66"),
        ({"train_test_split": 1e-9, "split": "test"}, "split='test' has none of the 252 records"),
        ({"sheet": 1}, "sheet"),
    ],
)
def test_bad_settings_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        make_task("records", 64, options)


def test_a_row_as_it_is_read():
    tokens = DEFAULT.examples(0, np.arange(1)).tokens[0].tolist()
    text, (query, answer) = read_row(tokens)
    assert text[text.index(query) + 1] == answer
