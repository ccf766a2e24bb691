"""Associative recall over records of one's own, such as countries and their capitals, from a JSON or CSV file.

A row is `BOS key value key value ... EOS query answer`, with keys and values as tokens, or through `as_text(task.words,
tokens)`:

    France: Paris
    Peru: Lima

    France: Paris
"""

import csv
import dataclasses
import functools
import html.entities
import io
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from path_jax.data.associative_recall import check_pairs, pair_documents, pair_levels
from path_jax.data.query_document import FIRST_ITEM, Documents, QueryTask


def read_records(path: str | Path, key_column: str = "", value_column: str = "") -> dict[str, str]:
    """Values by key, in the order of the file.

    Args:
      path: UTF-8 text. `.json`: an object {key: value}, or a list of objects {"key": ..., "value": ...} or of pairs
        [key, value]; numbers, true and false are taken as they are spelled. `.csv`: commas, two columns; blanks around
        keys and values are dropped, and so are empty lines.
      key_column, value_column: names of the two columns in the first line of a CSV file, which has no such line without
        them; names of fields of a JSON list's objects, instead of "key" and "value".

    Raises:
      OSError: for a file that cannot be read.
      ValueError: for one that is malformed or has no records, or a key with two values, with the file's name and the
        line or entry.
    """
    path = Path(path)
    readers = {".json": _json_records, ".csv": _csv_records}
    if path.suffix.lower() not in readers:
        raise ValueError(f"{path} ends in neither .json nor .csv")
    if bool(key_column) != bool(value_column):
        raise ValueError(f"{key_column=} and {value_column=} go together")
    records, places = {}, {}
    try:
        text = path.read_bytes().decode("utf-8-sig")
        for place, key, value in readers[path.suffix.lower()](text, key_column, value_column):
            for name, item in (("key", key), ("value", value)):
                if not item or "\0" in item:
                    raise ValueError(f"{place}: the {name} {item!r} is empty or has a NUL character")
            if records.setdefault(key, value) != value:
                raise ValueError(f"{place}: key {key!r} has value {value!r}, and {records[key]!r} at {places[key]}")
            places.setdefault(key, place)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text at byte {error.start}") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if not records:
        raise ValueError(f"{path}: no records")
    return records


def _csv_records(text, key_column, value_column) -> Iterator[tuple[str, str, str]]:
    """Place, key, value."""
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    columns = None if key_column else (0, 1)
    while True:
        try:
            row = [field.strip() for field in next(reader)]
        except StopIteration:
            return
        except csv.Error as error:
            raise ValueError(f"line {reader.line_num}: {error}") from error
        if row in ([], [""]):
            continue
        if columns is None:
            for name in (key_column, value_column):
                if row.count(name) != 1:
                    raise ValueError(f"line {reader.line_num}: not one column {name!r} in {row}")
            columns = row.index(key_column), row.index(value_column)
            continue
        if len(row) <= max(columns) or (not key_column and len(row) != 2):
            fix = "" if key_column else "; name the key and the value column of wider files"
            raise ValueError(f"line {reader.line_num}: {len(row)} columns, {max(columns) + 1} needed{fix}")
        yield f"line {reader.line_num}", row[columns[0]], row[columns[1]]


def _json_records(text, key_column, value_column) -> Iterator[tuple[str, str, str]]:
    """Place, key, value. Objects are read as tuples of pairs, so that a repeated key is seen."""

    def refuse(name):
        raise ValueError(f"{name} is no JSON number")

    try:
        document = json.loads(text, parse_int=str, parse_float=str, parse_constant=refuse, object_pairs_hook=tuple)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(document, tuple | list):
        raise ValueError("neither an object nor a list")
    names = (key_column, value_column) if key_column else ("key", "value")
    for number, entry in enumerate(document, 1):
        place = f"entry {number}"
        if isinstance(document, list) and isinstance(entry, tuple):
            fields = dict(entry)
            if missing := [name for name in names if name not in fields]:
                raise ValueError(f"{place}: no field {missing[0]!r}")
            entry = [fields[name] for name in names]
        if not isinstance(entry, tuple | list) or len(entry) != 2:
            raise ValueError(f"{place}: neither a pair nor an object with {names[0]!r} and {names[1]!r}")
        yield place, *(_scalar(item, place) for item in entry)


def _scalar(item, place):
    if isinstance(item, bool):
        return str(item).lower()
    if not isinstance(item, str):
        raise ValueError(f"{place}: keys and values are strings, numbers or truth values")
    try:
        item.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"{place}: {item!r} has half of a surrogate pair") from error
    return item


@dataclasses.dataclass(frozen=True)
class Records(QueryTask):
    """A row is n different records, n uniform, and one of their keys; the answer is its value in the file.

    Values of a row may be equal. The level of a question is as in `AssociativeRecall`, and so is what happens to texts
    without a record that the split may ask for.

    Args:
      path: see `read_records`; empty: the names and code points of the 252 characters of HTML 4.
      key_column, value_column: see `read_records`.
      min_records, max_records: least and greatest n.
      length, mask_nonquery, train_test_split, split, split_seed, train_set_size: see `QueryTask`.
    """

    path: str = ""
    key_column: str = ""
    value_column: str = ""
    min_records: int = 16
    max_records: int = 16

    def __post_init__(self):
        super().__post_init__()
        check_pairs(self, ("min_records", "max_records"), 1, len(self._keys))
        if not self.may_ask(*self._ids).any():
            raise ValueError(
                f"split={self.split!r} has none of the {len(self._keys)} records with "
                f"train_test_split={self.train_test_split}; change split_seed={self.split_seed}"
            )

    @functools.cached_property
    def _records(self):
        if self.path:
            return read_records(self.path, self.key_column, self.value_column)
        return {name: str(code) for name, code in html.entities.name2codepoint.items()}

    @functools.cached_property
    def _keys(self):
        return tuple(self._records)

    @functools.cached_property
    def _values(self):
        return tuple(dict.fromkeys(self._records.values()))

    @functools.cached_property
    def _ids(self):
        """Ids of the keys and of their values, int64 [records] each."""
        number = {value: i for i, value in enumerate(self._values)}
        values = np.array([number[value] for value in self._records.values()])
        return FIRST_ITEM + np.arange(len(values)), FIRST_ITEM + len(values) + values

    @property
    def words(self) -> tuple[str, ...]:
        """PAD, BOS, EOS, keys, different values. A text that is both has two ids."""
        keys, values = (f"{key}: " for key in self._keys), (f"{value}\n" for value in self._values)
        return ("", "", "\n", *keys, *values)

    @property
    def vocab_size(self) -> int:
        """Number of words."""
        return FIRST_ITEM + len(self._keys) + len(self._values)

    @property
    def item_kinds(self) -> tuple[tuple[int, int], ...]:
        """Keys, values."""
        return (FIRST_ITEM, len(self._keys)), (FIRST_ITEM + len(self._keys), len(self._values))

    @property
    def levels(self) -> tuple[str, ...]:
        """Distances of a record from the end of the text, in records."""
        return pair_levels(self.max_records)

    def documents(self, seed: int, index: np.ndarray) -> Documents:
        """See `QueryTask`."""
        keys, values = self._ids

        def pairs(draws, count):
            chosen = draws.distinct(len(keys), count)
            return keys[chosen], values[chosen]

        return pair_documents(self, pairs, (self.min_records, self.max_records), seed, index)

    def longer(self) -> dict[str, "Records"]:
        """Twice the records, where there are so many."""
        if 2 * self.max_records > len(self._keys):
            return {}
        bounds = {"min_records": 2 * self.min_records, "max_records": 2 * self.max_records}
        return {"records_x2": dataclasses.replace(self, length=self.length + 2 * self.max_records, **bounds)}
