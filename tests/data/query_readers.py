"""Slow readers and writers of documents that end with a question, and a comparison of their statistics."""

import functools
import json
import math
from pathlib import Path

import numpy as np

GOLDEN = json.loads((Path(__file__).parent.parent / "golden" / "tinylang.json").read_text())
BOS, EOS = 1, 2
LEVELS = 0, 0.05, 0.25, 0.5, 0.75, 0.95, 1  # of the golden quantiles
# Names in the published code.
SITES = {
    "key": "query_item_orig",
    "value": "target_item_orig",
    "divider": "divider",
    "query": "query_item",
    "type": "query_type",
    "answer": "target_item",
}


def read_row(tokens):
    """Text, and what follows the divider, of a row or of a whole document."""
    tokens = [token for token in tokens if token >= 0]
    assert tokens[0] == BOS
    divider = tokens.index(EOS)
    return tokens[1:divider], tokens[divider + 1 :]


def check_rows(task, seed, index, read):
    """Every column of the examples against `read(row number, text, question without its answer)`.

    It returns the levels of all right pairs of places in the text, of the key and of the value.
    """
    rows, sites = task.examples(seed, index), task.sites(seed, index)
    assert all(place.dtype == np.int32 for place in sites.values())
    for i, (tokens, targets, weights, level) in enumerate(zip(*(x.tolist() for x in rows))):
        text, question = read_row(tokens)
        end = len(text) + 2 + len(question)
        assert tokens[end:] == [-1] * (task.length - end)
        assert targets == [*tokens[1:end], EOS, *[0] * (task.length - end)]
        scored, key, value = end - 2, sites["key"][i] - 1, sites["value"][i] - 1
        expected = read(i, text, question[:-1])[key, value]
        if task.mask_nonquery:
            assert [t for t, weight in enumerate(weights) if weight] == [scored]
        else:
            assert weights == [1] * end + [0] * (task.length - end)
        assert question[-1] == targets[scored] == text[value] and question[0] == text[key]
        assert [(t, x) for t, x in enumerate(level) if x] == ([(scored, expected)] if expected else [])
        places = [1 + key, 1 + value, len(text) + 1, len(text) + 2, *([len(text) + 3] if len(question) == 3 else [])]
        assert [int(place[i]) for place in sites.values()] == [*places, end - 1]
    return len(rows.tokens)


def check_golden_sample(sample, read):
    text, question = read_row(sample["tokens"])
    assert question.pop() == EOS
    sites = {name: sample["sites"][published] for name, published in SITES.items() if published in sample["sites"]}
    key, value = sites["key"] - 1, sites["value"] - 1
    assert (key, value) in read(sample, text, question[:-1])
    assert (text[key], text[value], sites["divider"]) == (question[0], question[-1], 1 + len(text))
    assert (sites["query"], sites["answer"]) == (2 + len(text), 1 + len(text) + len(question))
    assert sites["type"] == 3 + len(text) if len(question) == 3 else sites.get("type", 0) == 0


def statistics(text, question, key, value):
    """What the published code states of both tasks; `question` is without the answer."""
    size = len(text)
    return {
        "total_length": size + len(question) + 4,
        "query_orig_target_orig_dist": abs(key - value),
        "query_query_orig_dist": size + 1 - key,
        "query_target_orig_dist": size + 1 - value,
        "query_orig_pos": key + 1,
        "target_orig_pos": value + 1,
    }


def _at_most(count, n, chance):
    """P(X <= count) of a binomial X."""
    if count >= n:
        return 1.0
    log = lambda k: math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
    terms = (log(k) + k * math.log(chance) + (n - k) * math.log1p(-chance) for k in range(count + 1))
    return min(math.fsum(map(math.exp, terms)), 1.0)


def p_values(golden, n, ours):
    """Of the golden mean and quantiles of n samples, with their standard deviation, if they were draws like ours."""
    mean, std, *quantiles = golden
    ours = np.asarray(ours, float)
    difference, variance = mean - ours.mean(), std**2 / n + ours.var() / len(ours)
    p = {"mean": math.erfc(abs(difference) / math.sqrt(2 * variance)) if variance else float(difference == 0)}
    # A quantile v between two sorted samples: so many at least are at most v, and so many at most are below.
    for level, v in zip(LEVELS, quantiles):
        place = level * (n - 1)
        # Where we have no sample on one side of v, the chance of one is about 1 / len(ours) at most.
        below, upto = (np.clip(x.mean(), 1 / len(x), 1 - 1 / len(x)) for x in (ours < v - 1e-9, ours <= v + 1e-9))
        enough, few = 1 - _at_most(math.floor(place), n, upto), _at_most(math.ceil(place), n, below)
        p[f"quantile {level}"] = min(2 * min(enough, few), 1.0)
    return p


@functools.cache
def published(name):
    """A golden document with all head probabilities: the published construction, from its seed."""
    golden = GOLDEN[name]
    config, rng = golden["config"], np.random.RandomState(golden["seed"])
    names = [f"nt{i}" for i in range(config["num_nonterminals"])]
    terminals = [f"t{i}" for i in range(config["num_terminals"])]
    depth = {name: rng.randint(1, config["max_depth"] + 1) for name in names}
    factor, rules = config["terminal_occurrence_factor"], {}
    for name in names:
        deeper = [other for other in names if depth[other] > depth[name]]
        symbols = deeper + (terminals if factor is None else ["any terminal"])
        weights = None if factor is None else np.array([1.0] * len(deeper) + [factor]) / (len(deeper) + factor)
        rules[name] = []
        for _ in range(rng.randint(1, config["max_rules_per_nt"] + 1)):
            chosen = rng.choice(len(symbols), size=rng.randint(1, config["max_rhs_len"]), p=weights)
            rules[name].append([symbols[i] for i in chosen])
    for rule in (rule for name in names for rule in rules[name]):
        rule[:] = [terminals[rng.randint(len(terminals))] if symbol == "any terminal" else symbol for symbol in rule]
    grammar = {"max_depths": depth, "rules": rules}
    grammar["rule_probs"] = {name: rng.dirichlet(np.ones(len(rules[name]))).tolist() for name in names}
    grammar["head_probs"] = {name: rng.dirichlet(np.ones(len(terminals))).tolist() for name in names}
    grammar["start_probs"] = [1 / len(names)] * len(names)
    assert {key: grammar[key] for key in golden["grammar"]} == golden["grammar"]
    return {"config": config, "grammar": grammar}


def plain_recall(rng, num_kv, min_length, max_length):
    """One document at a time, as the published code writes them: text, question, place of key and of value."""
    count, half = rng.randint(min_length // 2, max_length // 2 + 1), num_kv // 2
    keys, values = (rng.choice(half, size=count, replace=False) for _ in range(2))
    text = []
    for key, value in zip(keys, values):
        text += [3 + int(key), 3 + half + int(value)]
    asked = 2 * rng.randint(count)
    return text, [text[asked], text[asked + 1]], asked, asked + 1


def plain_sentence(rng, grammar, limit):
    """Terminals and parents of one sentence, symbol by symbol, or None if it is too long."""
    terminals, parents, heads = [], [], []  # heads: places of the heads of the rules so far
    num_terminals = grammar.head_probs.shape[1]
    # What is to be written, from the left: (symbol, rule above it, the rule it is the head of or None).
    stack = [(num_terminals + rng.choice(len(grammar.start_probs), p=grammar.start_probs), None, None)]
    while stack:
        symbol, above, own = stack.pop()
        if symbol < num_terminals:
            if own is not None:
                heads[own] = len(terminals)
            terminals.append(symbol)
            parents.append(above)
            if len(terminals) > limit:
                return None
            continue
        lhs, own = symbol - num_terminals, len(heads)
        heads.append(None)
        rule = grammar.rules[lhs, rng.choice(grammar.rules.shape[1], p=grammar.rule_probs[lhs])]
        children = [(child, own, None) for child in rule[rule >= 0].tolist()]
        head = (rng.choice(num_terminals, p=grammar.head_probs[lhs]), above, own)
        stack += reversed([head, *children] if grammar.head_position == "left" else [*children, head])
    return terminals, [-1 if above is None else heads[above] for above in parents]


def plain_treecall(rng, grammar, kinds, limit=1024):
    """One document at a time, answers first: text, parents, kind, place of query and of answer."""
    while True:
        sentence = plain_sentence(rng, grammar, limit)
        if sentence is None or len(sentence[0]) < 3:
            continue
        text, parents = [3 + terminal for terminal in sentence[0]], sentence[1]
        pairs = {kind: found for kind in kinds if (found := relatives(text, parents, kind))}
        if pairs:
            kind = list(pairs)[rng.randint(len(pairs))]
            value = rng.choice(sorted({answer for _, answer in pairs[kind]}))
            return text, parents, kind, rng.choice([query for query, answer in pairs[kind] if answer == value]), value


def relatives(text, parents, kind, unambiguous=True):
    """All pairs (place of the query, place of the answer) of a kind, by the definitions."""
    last = {token: i for i, token in enumerate(text)}
    may_ask = lambda i: not unambiguous or last[text[i]] == i
    if kind == "sibling":
        group = {}
        for i, parent in enumerate(parents):
            group.setdefault(parent, []).append(i)
        return [(i, group[p][-1]) for i, p in enumerate(parents) if may_ask(i) and may_ask(group[p][-1])]
    pairs = [(i, parent) for i, parent in enumerate(parents) if parent >= 0]
    pairs = pairs if kind == "parent" else [(parent, i) for i, parent in pairs]
    return [(query, answer) for query, answer in pairs if may_ask(query)]


def depths(parents):
    """Of a tree's terminals: the number of rules above and at each."""
    has_children, depth = set(parents), {}

    def above(i):
        if i not in depth:
            depth[i] = 0 if parents[i] < 0 else 1 + above(parents[i])
        return depth[i]

    return [above(i) + (i in has_children) for i in range(len(parents))]
