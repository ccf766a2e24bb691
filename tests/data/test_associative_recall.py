"""Associative recall: answers, splits, places and replacements, against slow readings and the published samples."""

import dataclasses

import numpy as np
import pytest
from data.query_readers import (
    GOLDEN,
    LEVELS,
    check_golden_sample,
    check_rows,
    p_values,
    plain_recall,
    read_row,
    statistics,
)

from path_jax.data import TaskStream, make_task
from path_jax.data.associative_recall import AssociativeRecall

CASES = {
    "ar_32": AssociativeRecall(36),
    "padded": AssociativeRecall(24, num_kv=40, min_length=2, max_length=19),
    "values": AssociativeRecall(20, num_kv=16, min_length=2, max_length=16, query_type="value"),
    "every_token": AssociativeRecall(24, num_kv=20, min_length=6, max_length=20, mask_nonquery=False),
    "train": AssociativeRecall(20, num_kv=16, min_length=2, max_length=16, train_test_split=0.6),
    "test": AssociativeRecall(20, num_kv=16, min_length=2, max_length=16, train_test_split=0.1, split="test"),
    "test_values": AssociativeRecall(
        12, num_kv=8, max_length=8, min_length=4, query_type="value", train_test_split=0.4
    ),
    "published": AssociativeRecall(36, train_test_split=0.2, split="test", as_published=True),
    "small": AssociativeRecall(6, num_kv=2, min_length=2, max_length=2),
}
each_case = pytest.mark.parametrize("task", CASES.values(), ids=CASES)


def reader(num_kv, query_type):
    """Reads a text of pairs, and the answer to its question."""

    def read(_, text, question):
        pairs = list(zip(text[::2], text[1::2], strict=True))
        for items, first in zip(zip(*pairs), (3, 3 + num_kv // 2)):
            assert len(set(items)) == len(items) and all(first <= item < first + num_kv // 2 for item in items)
        by_key = dict(pairs) if query_type == "key" else {value: key for key, value in pairs}
        (query,) = question
        key, value = text.index(query), text.index(by_key[query])
        return {(key, value): (len(pairs) - key // 2).bit_length() - 1}

    return read


@each_case
def test_rows_are_right(task):
    read = reader(task.num_kv, task.query_type)
    assert check_rows(task, 3, np.arange(600), read) == 600
    assert check_rows(task, 3, np.arange(0), read) == 0


@pytest.mark.slow
@each_case
def test_100_000_rows_are_right(task):
    for start in range(0, 100_000, 10_000):
        check_rows(task, 11, np.arange(start, start + 10_000), reader(task.num_kv, task.query_type))


@each_case
def test_examples_do_not_depend_on_the_batch(task):
    order, together = np.array([7, 0, 11, 7, 3]), task.examples(5, np.arange(12))
    for whole, part, one in zip(together, task.examples(5, order), task.examples(5, order[:1])):
        np.testing.assert_array_equal(whole[order], part)
        np.testing.assert_array_equal(part[:1], one)
    if task.num_kv > 2:
        rows = [task.examples(seed, first + np.arange(20)).tokens for seed, first in ((5, 0), (6, 0), (5, 2**40))]
        assert len(np.unique(np.concatenate(rows), axis=0)) > 50


def golden_task(config):
    options = {key: value for key, value in config.items() if key != "prepare_train_set"}
    return AssociativeRecall(config["max_length"] + 4, **options)


@pytest.mark.parametrize("name", ["ar_32_key", "ar_small_value"])
def test_published_samples(name):
    golden = GOLDEN[name]
    task = golden_task(golden["config"])
    assert task.vocab_size == golden["vocab"]["vocab_size"]
    assert [first for first, _ in task.item_kinds] == [golden["vocab"][f"{kind}_START"] for kind in ("KEY", "VALUE")]
    for sample in golden["samples"]:
        check_golden_sample(sample, reader(task.num_kv, task.query_type))
    # The published label, which is moved by one for the loss, is our target.
    ((place, label),) = golden["labels"]
    assert place == golden["samples"][0]["sites"]["target_item"]
    assert label == golden["samples"][0]["tokens"][place]


@pytest.mark.parametrize("count", [4000, pytest.param(20_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["ar_32_key", "ar_small_value"])
def test_statistics_of_published_samples(name, count):
    golden = GOLDEN[name]
    task, read = golden_task(golden["config"]), reader(golden["config"]["num_kv"], golden["config"]["query_type"])
    found = []
    for tokens in task.examples(1, np.arange(count)).tokens.tolist():
        text, question = read_row(tokens)
        ((key, value),) = read(None, text, question[:-1])
        own = statistics(text, question[:-1], key, value)
        found.append(own | {"doc_length": own["total_length"], "num_pairs": len(text) // 2})
    for statistic, expected in golden["statistics"].items():
        if statistic == "eligible_pairs":  # all of them
            assert expected == golden["statistics"]["num_pairs"]
            continue
        p = p_values(expected, golden["num_samples"], [x[statistic] for x in found])
        assert min(p.values()) >= 0.001, (statistic, p)


def test_a_plain_generator_has_the_same_statistics():
    task, rng = CASES["padded"], np.random.RandomState(0)
    plain = []
    for _ in range(2000):
        text, question, key, value = plain_recall(rng, task.num_kv, task.min_length, task.max_length)
        plain.append(statistics(text, question[:-1], key, value) | {"query": question[0], "answer": question[1]})
    ours = []
    for tokens in task.examples(2, np.arange(8000)).tokens.tolist():
        text, question = read_row(tokens)
        key = text.index(question[0])
        ours.append(statistics(text, question[:-1], key, key + 1) | {"query": question[0], "answer": question[1]})
    for statistic in plain[0]:
        values = np.array([x[statistic] for x in plain], float)
        golden = [values.mean(), values.std(), *np.quantile(values, LEVELS)]
        p = p_values(golden, len(values), [x[statistic] for x in ours])
        assert min(p.values()) >= 0.001, (statistic, p)


def asked_pairs(task, count=4000, seed=0):
    """Pairs of a key and a value, [count, 2]."""
    tokens, sites, rows = task.examples(seed, np.arange(count)).tokens, task.sites(seed, np.arange(count)), range(count)
    pairs = np.stack([tokens[rows, sites["key"]], tokens[rows, sites["value"]]], axis=1)
    return pairs if task.query_type == "key" else pairs[:, ::-1]


@pytest.mark.parametrize("query_type", ["key", "value"])
def test_splits_have_different_pairs(query_type):
    task = AssociativeRecall(20, num_kv=40, min_length=4, max_length=16, query_type=query_type, train_test_split=0.3)
    test = dataclasses.replace(task, split="test")
    train, dev, withheld = (
        set(map(tuple, asked_pairs(x, 8000, seed).tolist())) for x, seed in ((task, 0), (task, 1), (test, 0))
    )
    assert not (train | dev) & withheld and len(train | dev | withheld) == 400
    assert abs(len(withheld) - 120) < 4 * np.sqrt(400 * 0.3 * 0.7)
    assert withheld == set(map(tuple, asked_pairs(dataclasses.replace(test, query_type="key"), 8000, 3).tolist()))
    other = dataclasses.replace(test, split_seed=1)
    assert len(withheld & set(map(tuple, asked_pairs(other, 8000).tolist()))) < 60
    assert task.variants()["withheld_pairs"] == test
    # Texts are not split.
    text = task.examples(0, np.arange(2000)).tokens[:, 1:5].reshape(-1, 2).tolist()
    assert {tuple(pair) for pair in text} & withheld


@pytest.mark.parametrize("split", ["train", "test"])
def test_numbers_of_pairs_are_uniform_in_every_split(split):
    """Short texts, which often have no pair to ask for, are not rarer."""
    task = AssociativeRecall(12, num_kv=16, min_length=2, max_length=8, train_test_split=0.5, split=split)
    sites = task.sites(0, np.arange(8000))
    counts = np.bincount((sites["divider"] - 1) // 2, minlength=5)[1:]
    assert (abs(counts - 2000) < 4 * np.sqrt(8000 * 3 / 16)).all()


def test_pairs_to_ask_for_are_equally_likely():
    task = AssociativeRecall(12, num_kv=16, min_length=8, max_length=8)
    keys, counts = np.unique(asked_pairs(task, 16_000)[:, 0], return_counts=True)
    assert len(keys) == 8 and (abs(counts - 2000) < 4 * np.sqrt(16_000 * 7 / 64)).all()
    places = np.bincount(task.sites(0, np.arange(16_000))["key"])[1::2]
    assert (abs(places - 4000) < 4 * np.sqrt(16_000 * 3 / 16)).all()


def test_the_published_split_never_asks_for_withheld_pairs():
    task = AssociativeRecall(36, num_kv=40, train_test_split=0.2, as_published=True)
    pairs = {}
    for split in ("train", "dev", "test"):
        pairs[split] = asked_pairs(dataclasses.replace(task, split=split), 500)
    np.testing.assert_array_equal(pairs["train"], pairs["test"])
    np.testing.assert_array_equal(pairs["train"], pairs["dev"])
    corrected = dataclasses.replace(task, as_published=False, split="test")
    withheld = set(map(tuple, asked_pairs(corrected, 8000).tolist()))
    assert withheld and not withheld & set(map(tuple, pairs["test"].tolist()))


def test_the_published_split_fails_without_a_pair():
    """Where the text is one pair, which is withheld; the others are as when it is not drawn again."""
    task = AssociativeRecall(6, num_kv=16, min_length=2, max_length=2, train_test_split=0.5, as_published=True)
    corrected, fine = dataclasses.replace(task, as_published=False), []
    for i in range(40):
        try:
            rows = task.examples(0, np.array([i]))
            np.testing.assert_array_equal(rows.tokens, corrected.examples(0, np.array([i])).tokens)
            fine.append(i)
        except ValueError as error:
            assert f"example {i} has no pair to ask for" in str(error)
    assert 8 < len(fine) < 32
    with pytest.raises(ValueError, match="example .* has no pair to ask for in 1 tries"):
        task.examples(0, np.arange(40))


@pytest.mark.parametrize("query_type", ["key", "value"])
@pytest.mark.parametrize("site", ["key", "value", "query", "answer"])
def test_replacements(query_type, site):
    task = AssociativeRecall(12, num_kv=20, min_length=4, max_length=8, query_type=query_type)
    index = np.arange(3000)
    tokens, places = task.examples(0, index).tokens, task.sites(0, index)[site]
    changed = task.replacements(tokens, site, 0, index)
    np.testing.assert_array_equal(np.nonzero(changed != tokens), (index, places))
    old, new = tokens[index, places], changed[index, places]
    is_key = old < 13
    np.testing.assert_array_equal(is_key, (site in ("key", "query")) == (query_type == "key"))
    assert (is_key == (new < 13)).all() and new.min() >= 3 and new.max() < 23
    assert not (tokens == new[:, None]).any()
    assert (np.bincount(new[is_key] - 3 if is_key.all() else new - 13) > 200).all()
    np.testing.assert_array_equal(task.replacements(tokens[5:8], site, 0, index[5:8]), changed[5:8])


@pytest.mark.parametrize("query_type, items", [("key", range(3, 13)), ("value", range(13, 23))])
def test_published_replacements(query_type, items):
    """A random number in [TERMINAL_START, QUERY_START - 2], and 1 more from the old token on."""
    task = AssociativeRecall(12, num_kv=20, min_length=4, max_length=8, query_type=query_type)
    index = np.arange(3000)
    tokens, sites = task.examples(0, index).tokens, task.sites(0, index)
    for site in ("key", "value"):
        changed = task.replacements(tokens, site, 0, index, as_published=True)
        np.testing.assert_array_equal(np.nonzero(changed != tokens), (index, sites[site]))
        expected = set(items)
        if site == "value":  # of the other kind than the query
            expected.remove(max(items) if query_type == "key" else min(items))
        assert set(changed[index, sites[site]].tolist()) == expected
    assert ((tokens == changed[index, sites["value"]][:, None]).sum(axis=1) > 0).any()


def test_replacements_where_the_row_holds_every_item():
    task = AssociativeRecall(12, num_kv=8, min_length=8, max_length=8)
    tokens, index = task.examples(0, np.arange(300)).tokens, np.arange(300)
    changed = task.replacements(tokens, "key", 0, index)
    place = task.sites(0, index)["key"]
    new = changed[index, place]
    assert (new != tokens[index, place]).all() and set(new.tolist()) == set(range(3, 7))
    with pytest.raises(ValueError, match="site='divider'"):
        task.replacements(tokens, "divider", 0, index)
    with pytest.raises(ValueError, match="single item"):
        CASES["small"].replacements(tokens, "key", 0, index)


def test_variants():
    task = AssociativeRecall(40, num_kv=64, min_length=8, max_length=32, mask_nonquery=False)
    variants = task.variants()
    assert variants["in_distribution"] == dataclasses.replace(task, mask_nonquery=True)
    longer = variants["pairs_x2"]
    assert (longer.min_length, longer.max_length, longer.length) == (16, 64, 72)
    assert longer.vocab_size == task.vocab_size and set(variants) == {"in_distribution", "pairs_x2"}
    assert check_rows(longer, 0, np.arange(50), reader(64, "key")) == 50
    assert set(dataclasses.replace(task, num_kv=62).variants()) == {"in_distribution"}


def test_a_train_set_repeats():
    task = AssociativeRecall(36, train_set_size=10)
    tokens = task.examples(0, np.arange(30)).tokens
    np.testing.assert_array_equal(tokens[:10], tokens[20:])
    assert len(np.unique(tokens, axis=0)) == 10


def test_batches_are_padded():
    task = make_task("ar", 64, {"num_kv": 32, "min_length": 2, "max_length": 8})
    batch = TaskStream(task, 0).batch(np.arange(50))
    is_there = batch.segment_ids > 0
    assert (is_there.sum(axis=1) % 2 == 0).all() and set(is_there.sum(axis=1)) == {6, 8, 10, 12}
    assert (batch.weights.sum(axis=1) == 1).all() and not batch.targets[~is_there].any()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_kv": 31}, "num_kv=31"),
        ({"query_type": "both"}, "query_type='both'"),
        ({"min_length": 1}, "min_length=1 .* at least 2"),
        ({"min_length": 34}, "min_length=34 and max_length=32"),
        ({"num_kv": 30}, "max_length=32 must be at most 30"),
        ({"max_length": 64}, "length=36 must be at least 68"),
        ({"train_test_split": 1.0}, "train_test_split=1.0"),
        ({"split": "validation"}, "split='validation'"),
        ({"split_seed": -1}, "split_seed=-1"),
        ({"train_set_size": -1}, "train_set_size=-1"),
        ({"vocab_size": 4}, "vocab_size"),
    ],
)
def test_bad_settings_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        make_task("ar", 36, options)
