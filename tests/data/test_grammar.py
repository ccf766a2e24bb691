"""Random grammars: their rules, the probabilities of sentences, and files that hold none."""

import copy
import json

import numpy as np
import pytest
from data.query_readers import depths, published

from path_jax.data.draws import Draws
from path_jax.data.grammar import Grammar
from path_jax.data.treecall import Treecall


@pytest.mark.parametrize("factor", [0, 20.0])
def test_random_grammars(factor):
    """Depths, numbers and lengths of rules are uniform, symbols as likely as said, and rules go deeper."""
    count, depth, size = 300, 6, 5
    options = dict(max_depth=depth, num_nonterminals=count, num_terminals=50, max_rules_per_nt=4, max_rhs_len=size)
    grammar = Grammar.random(2, terminal_occurrence_factor=factor, **options)
    even = lambda counts: (abs(counts - counts.mean()) < 4 * np.sqrt(counts.mean())).all()
    assert even(np.bincount(grammar.depths, minlength=depth + 1)[1:]) and grammar.depths.max() == depth
    is_symbol = grammar.rules >= 0
    lengths = is_symbol.sum(axis=2)
    assert even(np.bincount(lengths[lengths > 0], minlength=size)[1:]) and lengths.max() == size - 1
    assert even(np.bincount((lengths > 0).sum(axis=1), minlength=5)[1:])
    assert ((grammar.rule_probs > 0) == (lengths > 0)).all()
    deeper = np.array([(grammar.depths > depth).sum() for depth in grammar.depths])
    is_deep = grammar.rules >= 50
    expected = (lengths.sum(axis=1) * deeper / (deeper + (factor or 50))).sum()
    assert abs(is_deep.sum() - expected) < 4 * np.sqrt(expected)
    lhs, _, _ = at = np.nonzero(is_deep)
    assert (grammar.depths[grammar.rules[at] - 50] > grammar.depths[lhs]).all()
    assert even(np.bincount(grammar.rules[is_symbol & ~is_deep], minlength=50))
    # The deepest nonterminals, which all others may have, are equally likely.
    in_rules = np.bincount(grammar.rules[is_deep] - 50, minlength=count)
    assert even(in_rules[grammar.depths == depth])
    # Dirichlet(1): the mean of the squares of k probabilities is 2 / k (k + 1).
    assert grammar.head_probs.shape == (count, 50)
    assert abs((grammar.head_probs**2).mean() * 50 * 51 / 2 - 1) < 0.05
    assert Grammar.random(2, terminal_occurrence_factor=factor, **options) is grammar
    assert (Grammar.random(3, **options).depths != grammar.depths).any()


GRAMMARS = {
    "left": Grammar.random(0, head_position="left", max_depth=4, num_nonterminals=8, num_terminals=12),
    "wide": Grammar.random(0, num_terminals=8192, max_rhs_len=10, terminal_occurrence_factor=20.0),
    "few_terminals": Grammar.random(3, num_terminals=7, terminal_occurrence_factor=20.0),
}


@pytest.mark.parametrize("grammar", GRAMMARS.values(), ids=GRAMMARS)
def test_sentences_have_their_probabilities(grammar):
    """Lengths as computed from the rules, trees no deeper than the grammar, roots as likely as starts and heads say."""
    limit = 60
    terminals, parents, size = grammar.sentences(Draws(7, np.arange(20_000)), limit)
    probs = grammar.size_probs(limit)
    counts = np.bincount(np.minimum(size, limit + 1), minlength=limit + 2)
    probs = np.append(probs, 1 - probs.sum())
    near = lambda counts, probs: (abs(counts - 20_000 * probs) < 4.5 * np.sqrt(20_000 * probs) + 4).all()
    assert near(counts, probs) and abs(probs.sum() - 1) < 1e-9
    fits = size <= limit
    if fits.all():
        roots = terminals[(parents < 0) & (terminals >= 0)]
        assert near(np.bincount(roots, minlength=grammar.num_terminals), grammar.start_probs @ grammar.head_probs)
    np.testing.assert_array_equal((terminals >= 0).sum(axis=1), np.where(fits, size, 0))
    for i in np.flatnonzero(fits)[:500]:
        assert max(depths(parents[i, : size[i]].tolist())) <= grammar.depths.max()


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda g: g["grammar"].pop("head_probs"), "KeyError.'head_probs'"),
        (lambda g: g["config"].pop("head_position"), "KeyError.'head_position'"),
        (lambda g: g["config"].update(head_position="middle"), "head_position='middle'"),
        (lambda g: g["grammar"]["rules"]["nt4"][0].append("t20"), "KeyError.'t20'"),
        (
            lambda g: g["grammar"]["rules"]["nt4"][0].append("nt0"),
            "nonterminal 4 has depth 1 .* nonterminal 0 of depth 1",
        ),
        (lambda g: g["grammar"]["rule_probs"]["nt0"].append(0.1), "rule_probs must be .* sum to 1"),
        (lambda g: g["grammar"]["rule_probs"]["nt0"].extend([0] * 9), "shape"),
        (lambda g: g["grammar"]["rules"]["nt0"].pop(), "a rule without symbols"),
        (lambda g: g.update(grammar=[]), "TypeError"),
        (lambda g: g["grammar"]["rule_probs"].update(nt0=[0.5, 0.6]), "rule_probs must be at least 0 and sum to 1"),
        (lambda g: g["grammar"]["head_probs"].update(nt0=[-1, 2] + [0] * 18), "head_probs must be at least 0"),
    ],
)
def test_bad_grammars_are_named(change, message, tmp_path):
    document = copy.deepcopy(published("pcfg_20t_allqueries"))
    document["grammar"]["max_depths"].update(nt0=1, nt4=1)
    document["grammar"]["rules"]["nt4"][0] = ["t0"]
    change(document)
    path = tmp_path / "bad.json"
    path.write_text(json.dumps(document))
    with pytest.raises(ValueError, match=f"bad.json: .*{message}"):
        Treecall(64, grammar_file=str(path))
