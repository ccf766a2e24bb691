"""Associative treecall: grammars, trees and questions, against slow readings and the published samples."""

import dataclasses
import functools
import json

import numpy as np
import pytest
from data.query_readers import (
    GOLDEN,
    LEVELS,
    check_golden_sample,
    check_rows,
    depths,
    p_values,
    plain_treecall,
    published,
    read_row,
    relatives,
    statistics,
)

from path_jax.data import TaskStream, make_task
from path_jax.data.treecall import QUERIES, Treecall

ALL = "parent+child+sibling"
SMALL = dict(max_depth=4, num_nonterminals=8, num_terminals=12)
CASES = {
    "parent": Treecall(64),
    "left": Treecall(64, head_position="left", **SMALL),
    "wide": Treecall(128, num_terminals=8192, max_rhs_len=10),
    "all": Treecall(48, queries=ALL, **SMALL),
    "siblings": Treecall(40, queries="sibling", grammar_seed=3, num_terminals=7),
    "ambiguous": Treecall(48, queries=ALL, unambiguous_queries=False, sample_first="query", head_position="left"),
    "every_token": Treecall(32, mask_nonquery=False),
    "train": Treecall(48, train_test_split=0.5, queries="parent+child"),
    "test": Treecall(48, train_test_split=0.2, split="test", queries=ALL),
    "transparent": Treecall(48, transparent_nonterminals=True, **SMALL),
    "cut": Treecall(13, max_rhs_len=8),
}
each_case = pytest.mark.parametrize("task", CASES.values(), ids=CASES)
GOLDEN_NAMES = [name for name in GOLDEN if GOLDEN[name]["kind"] == "PCFG"]


def check_tree(grammar, text, parents):
    """That the grammar has this tree: heads at their side of what they are over, and rules for all of it."""
    assert parents.count(-1) == 1
    children = [[] for _ in parents]
    for i, parent in enumerate(parents):
        if parent >= 0:
            children[parent].append(i)
    first_nonterminal = grammar.head_probs.shape[1]

    @functools.cache
    def span(i):
        """Places below and at i."""
        return sorted([i, *(j for child in children[i] for j in span(child))])

    @functools.cache
    def nonterminals(i):
        """Those that may have become what is below and at the head i."""
        places = span(i)
        assert places == list(range(places[0], places[-1] + 1))
        assert i == (places[0] if grammar.head_position == "left" else places[-1])
        # A terminal, or the nonterminals of a head.
        parts = [nonterminals(j) if children[j] else {text[j] - 3} for j in children[i]]
        found = set()
        for lhs, rules in enumerate(grammar.rules.tolist()):
            for rule, prob in zip(rules, grammar.rule_probs[lhs]):
                rule = [symbol for symbol in rule if symbol >= 0]
                if prob > 0 and len(rule) == len(parts) and all(symbol in part for symbol, part in zip(rule, parts)):
                    found.add(first_nonterminal + lhs)
        return {lhs for lhs in found if grammar.head_probs[lhs - first_nonterminal, text[i] - 3] > 0}

    assert nonterminals(parents.index(-1))


def reader(grammar, trees, queries="parent", unambiguous=True, may_ask=None, checked=1):
    """Reads texts with these trees, or with their own; rules are looked up in one of `checked`."""
    kinds = queries.split("+")

    def read(sample, text, question):
        parents = sample["parents"] if trees is None else trees[sample, : len(text)].tolist()
        if trees is None or sample % checked == 0:
            check_tree(grammar, text, parents)
        kind = QUERIES[question[1] - 3 - grammar.head_probs.shape[1]] if len(question) > 1 else kinds[0]
        assert kind in kinds and len(question) == 1 + (len(kinds) > 1)
        pairs = relatives(text, parents, kind, unambiguous)
        pairs = [pair for pair in pairs if not may_ask or may_ask(*(text[i] for i in pair))]
        pairs = [(query, answer) for query, answer in pairs if text[query] == question[0]]
        return {pair: max(abs(pair[0] - pair[1]), 1).bit_length() - 1 for pair in pairs}

    return read


def check_task(task, seed, index, checked=1):
    trees = task.trees(seed, index)
    may_ask = lambda query, answer: task.may_ask(*np.array([[answer], [query]]))[0]
    may_ask = may_ask if task.train_test_split else None
    read = reader(task.grammar, trees, task.queries, task.unambiguous_queries, may_ask, checked)
    count = check_rows(task, seed, index, read)
    sizes = (task.documents(seed, index).text >= 0).sum(axis=1)
    assert not len(index) or (sizes.min() >= task.min_sentence and sizes.max() <= task.length - 4)
    assert (trees >= -1).all() and ((trees >= 0).sum(axis=1) == sizes - 1).all()
    return count


@each_case
def test_rows_are_right(task):
    assert check_task(task, 3, np.arange(250)) == 250
    assert check_task(task, 3, np.arange(0)) == 0


@pytest.mark.slow
@each_case
def test_100_000_rows_are_right(task):
    for start in range(0, 100_000, 5000):
        check_task(task, 11, np.arange(start, start + 5000), checked=10)


@each_case
def test_examples_do_not_depend_on_the_batch(task):
    order, together = np.array([7, 0, 11, 7, 3]), task.examples(5, np.arange(12))
    for whole, part, one in zip(together, task.examples(5, order), task.examples(5, order[:1])):
        np.testing.assert_array_equal(whole[order], part)
        np.testing.assert_array_equal(part[:1], one)
    whole, part = task.trees(5, np.arange(12))[order], task.trees(5, order)  # as wide as their longest sentences
    np.testing.assert_array_equal(whole[:, : part.shape[1]], part)
    assert (whole[:, part.shape[1] :] == -1).all()
    rows = [task.examples(seed, first + np.arange(20)).tokens for seed, first in ((5, 0), (6, 0), (5, 2**40))]
    for i, other in enumerate(rows):
        assert len(np.unique(other, axis=0)) > 8 and (other != rows[i - 1]).any(axis=1).sum() > 15


def golden_task(name, folder):
    document = published(name)
    (folder / "grammar.json").write_text(json.dumps(document))
    config = document["config"]
    kinds = [kind for kind in QUERIES if not config.get(f"no_{kind}_queries")]
    options = {key: config[key] for key in ("mask_nonquery", "train_test_split", "unambiguous_queries")}
    return Treecall(1029, queries="+".join(kinds), grammar_file=str(folder / "grammar.json"), **options)


@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_published_samples(name, tmp_path):
    golden, task = GOLDEN[name], golden_task(name, tmp_path)
    assert task.vocab_size == golden["vocab"]["vocab_size"]
    assert task.item_kinds == ((3, golden["vocab"]["QUERY_START"] - 3),)
    for sample in golden["samples"]:
        check_golden_sample(sample, reader(task.grammar, None, task.queries))
        text, _ = read_row(sample["tokens"])
        pairs = relatives(text, sample["parents"], sample["kind"].lower())
        assert [len(pairs), *(len(set(places)) for places in zip(*pairs))] == sample["eligible"]
        assert max(depths(sample["parents"])) == sample["depth"]
    ((place, label),) = golden["labels"]
    assert place == golden["samples"][0]["sites"]["target_item"] and label == golden["samples"][0]["tokens"][place]


def all_statistics(text, parents, kind, question, key, value):
    pairs = relatives(text, parents, kind)
    return statistics(text, question, key, value) | {
        "doc_length": len(text),
        "branching_factor": (len(text) - 1) / len(set(parents) - {-1}),
        "percent_non_unique": 1 - len(set(text)) / len(text),
        "depth": max(depths(parents)),
        "eligible_pairs": len(pairs),
        "eligible_queries": len({query for query, _ in pairs}),
        "eligible_targets": len({answer for _, answer in pairs}),
    }


def task_statistics(task, seed, count):
    index = np.arange(count)
    rows = zip(*(x.tolist() for x in (task.examples(seed, index).tokens, task.trees(seed, index))))
    sites, kinds = task.sites(seed, index), task.queries.split("+")
    for i, (tokens, parents) in enumerate(rows):
        text, (*question, _) = read_row(tokens)
        kind = QUERIES[question[1] - 3 - task.grammar.num_terminals] if len(kinds) > 1 else kinds[0]
        key, value = int(sites["key"][i]) - 1, int(sites["value"][i]) - 1
        yield all_statistics(text, parents[: len(text)], kind, question, key, value)


@pytest.mark.parametrize("count", [1000, pytest.param(20_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_statistics_of_published_samples(name, count, tmp_path):
    golden, found = GOLDEN[name], list(task_statistics(golden_task(name, tmp_path), 1, count))
    for statistic, expected in golden["statistics"].items():
        p = p_values(expected, golden["num_samples"], [x[statistic] for x in found])
        assert min(p.values()) >= 0.001, (statistic, p)


def test_a_plain_generator_has_the_same_statistics():
    task, rng = Treecall(1029, queries=ALL, **SMALL), np.random.RandomState(1)
    plain = []
    for _ in range(600):
        text, parents, kind, key, value = plain_treecall(rng, task.grammar, QUERIES)
        plain.append(all_statistics(text, parents, kind, [0, 0], int(key), int(value)) | {"kind": QUERIES.index(kind)})
    ours = list(task_statistics(task, 1, 2000))
    kinds = task.documents(1, np.arange(2000)).kind - 3 - task.grammar.num_terminals
    ours = [x | {"kind": int(kind)} for x, kind in zip(ours, kinds)]
    for statistic in plain[0]:
        values = np.array([x[statistic] for x in plain], float)
        p = p_values([values.mean(), values.std(), *np.quantile(values, LEVELS)], 600, [x[statistic] for x in ours])
        assert min(p.values()) >= 0.001, (statistic, p)


@pytest.mark.parametrize("sample_first", ["target", "query"])
@pytest.mark.parametrize("kind", QUERIES)
def test_questions_of_one_sentence(kind, sample_first, tmp_path):
    """A grammar of one sentence, of which all pairs have a known chance."""
    rules = {"nt0": [["t0", "nt1", "t1", "nt2"]], "nt1": [["t2", "nt2"]], "nt2": [["t3"]]}
    heads = {name: np.eye(7)[i + 4].tolist() for i, name in enumerate(rules)}
    grammar = {"max_depths": {"nt0": 1, "nt1": 2, "nt2": 3}, "rules": rules, "head_probs": heads}
    grammar |= {"rule_probs": dict.fromkeys(rules, [1.0]), "start_probs": [1.0, 0.0, 0.0]}
    path = tmp_path / "grammar.json"
    path.write_text(json.dumps({"config": {"head_position": "right"}, "grammar": grammar}))
    options = dict(queries=kind, sample_first=sample_first, grammar_file=str(path))
    task = Treecall(20, unambiguous_queries=False, **options)
    index = np.arange(4000)
    assert (task.documents(0, index).text[:, :9] == np.array([0, 2, 3, 6, 5, 1, 3, 6, 4]) + 3).all()
    parents = task.trees(0, index)[0, :9].tolist()
    assert parents == [8, 4, 3, 4, 8, 8, 7, 8, -1]
    pairs = relatives(list(range(9)), parents, kind)
    first = [pair[sample_first == "target"] for pair in pairs]
    chance = {pair: 1 / len(set(first)) / first.count(x) for pair, x in zip(pairs, first)}
    documents = task.documents(0, index)
    found, counts = np.unique(np.stack([documents.key, documents.value], axis=1), axis=0, return_counts=True)
    assert sorted(map(tuple, found.tolist())) == sorted(pairs)
    for pair, count in zip(map(tuple, found.tolist()), counts):
        assert abs(count - 4000 * chance[pair]) < 4 * np.sqrt(4000 * chance[pair])


def test_transparent_heads_name_their_nonterminals():
    task = CASES["transparent"]
    assert task.vocab_size == 3 + 12 + 8 + 3 and task.item_kinds == ((3, 20),)
    text, parents = task.documents(0, np.arange(300)).text, task.trees(0, np.arange(300))
    is_head = np.zeros(text.shape, bool)
    rows, places = np.nonzero(parents >= 0)
    is_head[rows, parents[rows, places]] = True
    assert (is_head == (text >= 15)).all()


def asked_pairs(task, seed, count=1500):
    index = np.arange(count)
    tokens, sites = task.examples(seed, index).tokens, task.sites(seed, index)
    return set(zip(tokens[index, sites["value"]].tolist(), tokens[index, sites["key"]].tolist()))


def test_splits_have_different_pairs():
    task = Treecall(64, train_test_split=0.2)
    test = dataclasses.replace(task, split="test")
    train, dev, withheld = asked_pairs(task, 0), asked_pairs(task, 1), asked_pairs(test, 0)
    assert not (train | dev) & withheld
    assert 0.1 < len(withheld) / len(train | dev | withheld) < 0.3
    assert asked_pairs(Treecall(64), 0) & withheld
    variants = dataclasses.replace(task, mask_nonquery=False).variants()
    assert variants["withheld_pairs"] == test and variants["in_distribution"] == task


def test_withheld_pairs_do_not_change_answers():
    """The last sibling is the last one, be it withheld or not."""
    task = Treecall(48, queries="sibling", train_test_split=0.5, **SMALL)
    assert check_task(task, 0, np.arange(300)) == 300


def test_longer_sentences():
    task = Treecall(16)
    variants, probs = task.variants(), task.grammar.size_probs(12)
    assert list(variants) == ["in_distribution", "long_sentences", "sentences_x2"]
    long, longer = variants["long_sentences"], variants["sentences_x2"]
    assert probs[long.min_sentence :].sum() >= 0.05 > probs[long.min_sentence + 1 :].sum()
    assert (longer.length, longer.min_sentence, longer.vocab_size) == (28, 13, task.vocab_size)
    assert check_task(longer, 0, np.arange(100)) == check_task(long, 0, np.arange(100)) == 100
    # This grammar makes no longer ones.
    assert list(Treecall(256).variants()) == list(Treecall(1100).variants()) == ["in_distribution", "long_sentences"]


@pytest.mark.parametrize("site", ["key", "value", "query", "answer"])
def test_replacements(site):
    task, index = Treecall(128, num_terminals=200, max_rhs_len=9, queries=ALL), np.arange(1000)
    tokens, places = task.examples(0, index).tokens, task.sites(0, index)[site]
    for as_published in (False, True):
        changed = task.replacements(tokens, site, 0, index, as_published=as_published)
        np.testing.assert_array_equal(np.nonzero(changed != tokens), (index, places))
        new = changed[index, places]
        assert new.min() >= 3 and new.max() < 203 and len(np.unique(new)) > 180
        assert (tokens == new[:, None]).any() == as_published
    with pytest.raises(ValueError, match="site='type'"):
        task.replacements(tokens, "type", 0, index)


def test_batches_are_padded():
    batch = TaskStream(make_task("atr", 64, {"num_terminals": 50}), 0).batch(np.arange(50))
    assert (batch.weights.sum(axis=1) == 1).all() and not batch.targets[batch.segment_ids == 0].any()
    assert (batch.segment_ids > 0).any(axis=1).all() and not batch.segment_ids.all()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"queries": "parents"}, "queries='parents'"),
        ({"queries": "parent+parent"}, "queries='parent.parent'"),
        ({"queries": ""}, "queries=''"),
        ({"sample_first": "answer"}, "sample_first='answer'"),
        ({"min_sentence": 1}, "min_sentence=1"),
        ({"min_sentence": 61}, "length=64 has room for 60 terminals; min_sentence=61"),
        ({"min_sentence": 60}, "of the sentences of the grammar have 60 to 60 terminals"),
        ({"max_rhs_len": 1}, "max_rhs_len=1"),
        ({"max_depth": 0}, "max_depth=0"),
        ({"num_terminals": 0}, "num_terminals=0"),
        ({"terminal_occurrence_factor": -1.0}, "terminal_occurrence_factor=-1.0"),
        ({"head_position": "middle"}, "head_position='middle'"),
        ({"grammar_seed": -1}, "seed=-1"),
        ({"split": "all"}, "split='all'"),
    ],
)
def test_bad_settings_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        make_task("atr", 64, options)
