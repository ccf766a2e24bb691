"""Random context-free grammars without recursion, whose every rule adds a head terminal; and their sentences as trees.

A nonterminal A becomes `head B1 ... Bk` or `B1 ... Bk head`: a rule of A is drawn for B1 ... Bk, and a terminal for the
head from probabilities that A has. Terminals among the B are children of the head, and so is the head of each
nonterminal among them: a sentence of S terminals is a tree with S nodes.

Source: Arora et al., "Mechanistic evaluation of Transformers and state space models", 2025, and class PCFG of its code.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int, Int32

from path_jax.data.draws import Draws

HEAD_POSITIONS = "left", "right"


@dataclasses.dataclass(frozen=True, eq=False)
class Grammar:
    """N nonterminals with up to R rules of up to L symbols, and V terminals 0 ... V - 1.

    Attributes:
      rules: symbols B1 ... Bk of each rule, terminals by their number, nonterminal i as V + i, -1 after the end.
      rule_probs: of each rule; 0 where a nonterminal has no more rules.
      head_probs: of each terminal as the head of a nonterminal.
      start_probs: of each nonterminal as the start of a sentence.
      depths: a rule of A has only nonterminals of greater depth than A, so that no tree is deeper than the number of
        depths.
      head_position: "left" or "right".

    Raises:
      ValueError: where that is not so, a probability is negative or a sum of probabilities is not 1.
    """

    rules: Int[np.ndarray, "N R L"]
    rule_probs: Float[np.ndarray, "N R"]
    head_probs: Float[np.ndarray, "N V"]
    start_probs: Float[np.ndarray, "N"]
    depths: Int[np.ndarray, "N"]
    head_position: str = "right"

    def __post_init__(self):
        if self.head_position not in HEAD_POSITIONS:
            raise ValueError(f"head_position={self.head_position!r} is not one of {', '.join(HEAD_POSITIONS)}")
        for name in ("rule_probs", "head_probs", "start_probs"):
            probs = getattr(self, name)
            if (probs < 0).any() or not np.allclose(probs.sum(axis=-1), 1, atol=1e-6):
                raise ValueError(f"{name} must be at least 0 and sum to 1; the sums are {probs.sum(axis=-1)}")
        is_rule = (self.rules >= 0).any(axis=2)
        if (self.rule_probs[~is_rule] > 0).any():
            raise ValueError("a rule without symbols has a probability")
        lhs, _, _ = at = np.nonzero(self.rules >= self.num_terminals)
        rhs = self.rules[at] - self.num_terminals
        if (rhs >= len(self.depths)).any():
            raise ValueError(f"rules have nonterminal {rhs.max()}, and there are {len(self.depths)}")
        wrong = np.flatnonzero(self.depths[rhs] <= self.depths[lhs])
        if len(wrong):
            raise ValueError(
                f"nonterminal {lhs[wrong[0]]} has depth {self.depths[lhs[wrong[0]]]} and a rule with nonterminal "
                f"{rhs[wrong[0]]} of depth {self.depths[rhs[wrong[0]]]}, which must be greater"
            )

    @classmethod
    @functools.lru_cache(maxsize=16)
    def random(
        cls,
        seed: int = 0,
        *,
        head_position: str = "right",
        max_depth: int = 10,
        max_rhs_len: int = 5,
        max_rules_per_nt: int = 5,
        num_nonterminals: int = 40,
        num_terminals: int = 20,
        terminal_occurrence_factor: float = 0.0,
        transparent_nonterminals: bool = False,
    ) -> "Grammar":
        """A random grammar. The published code makes other ones of the same distribution from its seeds.

        Args:
          seed: not negative.
          head_position: side of the head, "left" or "right".
          max_depth: depths are uniform in [1, max_depth].
          max_rhs_len: numbers k of symbols are uniform in [1, max_rhs_len - 1].
          max_rules_per_nt: numbers of rules are uniform in [1, max_rules_per_nt]. Probabilities of rules and of heads
            are Dirichlet(1); all nonterminals are equally likely to start a sentence.
          num_nonterminals: N.
          num_terminals: all are equally likely in rules.
          terminal_occurrence_factor: how much likelier it is that a symbol of a rule is a terminal than that it is a
            given nonterminal of greater depth; 0 means num_terminals.
          transparent_nonterminals: the head of nonterminal i is always terminal num_terminals + i; V = num_terminals +
            N.

        Raises:
          ValueError: for a number out of range.
        """
        if min(max_depth, max_rules_per_nt, num_nonterminals, num_terminals) < 1:
            raise ValueError(
                f"{max_depth=}, {max_rules_per_nt=}, {num_nonterminals=} and {num_terminals=} must be positive"
            )
        if max_rhs_len < 2 or terminal_occurrence_factor < 0:
            raise ValueError(f"{max_rhs_len=} must be at least 2, {terminal_occurrence_factor=} must not be negative")
        draws, shape = Draws(seed, [0]), (num_nonterminals, max_rules_per_nt)
        exponentials = lambda *shape: -np.log1p(-draws.uniform(*shape)[0])
        depths = 1 + draws.integers(max_depth, num_nonterminals)[0]
        num_rules = 1 + draws.integers(max_rules_per_nt, num_nonterminals)[0]
        num_symbols = 1 + draws.integers(max_rhs_len - 1, *shape)[0]
        # In order of depth, the nonterminals that A's rules may have are the last ones.
        by_depth = np.argsort(depths, kind="stable")
        deeper = (depths > depths[:, None]).sum(axis=1)[:, None, None]
        weight = draws.uniform(*shape, max_rhs_len - 1)[0] * (deeper + (terminal_occurrence_factor or num_terminals))
        terminal = draws.integers(num_terminals, *shape, max_rhs_len - 1)[0]
        number = np.minimum(num_nonterminals - deeper + weight.astype(np.int64), num_nonterminals - 1)
        num_heads = num_terminals + num_nonterminals * transparent_nonterminals
        rules = np.where(weight < deeper, num_heads + by_depth[number], terminal)
        is_rule = np.arange(max_rules_per_nt) < num_rules[:, None]
        rules[~(is_rule[..., None] & (np.arange(max_rhs_len - 1) < num_symbols[..., None]))] = -1
        rule_probs = exponentials(*shape) * is_rule
        if transparent_nonterminals:
            head_probs = np.eye(num_nonterminals, num_heads, num_terminals)
        else:
            head_probs = exponentials(num_nonterminals, num_terminals)
        return cls(
            rules,
            rule_probs / rule_probs.sum(axis=1, keepdims=True),
            head_probs / head_probs.sum(axis=1, keepdims=True),
            np.full(num_nonterminals, 1 / num_nonterminals),
            depths,
            head_position,
        )

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> "Grammar":
        """A grammar from the fields of class PCFG of the published code.

        Args:
          document: {"config": {"head_position"}, "grammar": {"max_depths": {NAME: depth}, "rules": {NAME: [[symbol,
            ...], ...]}, "rule_probs": {NAME: [...]}, "head_probs": {NAME: [...]}, "start_probs": [...]}}, where NAMEs
            are "nt0", "nt1" ... and symbols these and "t0", "t1" ...

        Raises:
          ValueError: for a missing field, or a grammar that `Grammar` refuses.
        """
        try:
            grammar, names = document["grammar"], list(document["grammar"]["max_depths"])
            head_probs = np.array([grammar["head_probs"][name] for name in names], np.float64)
            number = {f"t{i}": i for i in range(head_probs.shape[1])}
            number |= {name: len(number) + i for i, name in enumerate(names)}
            rules = [[[number[symbol] for symbol in rule] for rule in grammar["rules"][name]] for name in names]
            shape = len(rules), max(map(len, rules)), max(len(rule) for own in rules for rule in own)
            symbols, rule_probs = np.full(shape, -1), np.zeros(shape[:2])
            for i, own in enumerate(rules):
                probs = grammar["rule_probs"][names[i]]
                rule_probs[i, : len(probs)] = probs
                for j, rule in enumerate(own):
                    symbols[i, j, : len(rule)] = rule
            depths = np.array([grammar["max_depths"][name] for name in names])
            start_probs = np.array(grammar["start_probs"], np.float64)
            position = document["config"]["head_position"]
        except (KeyError, TypeError, IndexError) as error:
            raise ValueError(f"no grammar as it is published: {error!r}") from error
        return cls(symbols, rule_probs, head_probs, start_probs, depths, position)

    @property
    def num_terminals(self) -> int:
        """V."""
        return self.head_probs.shape[1]

    def sentences(
        self, draws: Draws, limit: int
    ) -> tuple[Int32[np.ndarray, "n S"], Int32[np.ndarray, "n S"], Int[np.ndarray, "n"]]:
        """A sentence for each example.

        Args:
          draws: of n examples.
          limit: greatest number of terminals.

        Returns:
          Terminals, -1 after the end; the place of each terminal's parent, -1 for the root and after the end; and the
          number of terminals. Where a sentence is longer than the limit, both are -1, and the number is some number
          above it. S is the greatest number of the others.
        """
        key, chance = draws.integers(2**53), draws.uniform()
        symbol = self._starts.draw(np.zeros(len(key), np.int64), chance)
        size, row, levels = np.ones(len(key), np.int64), np.arange(len(key)), []
        # Down the trees, a level of all of them at once. Every nonterminal has a key of its own, made of its parent's,
        # so that what it becomes does not depend on other examples.
        while len(row):
            chance = Draws(0, key).uniform(2)
            rhs = self.rules[symbol, self._rules.draw(symbol, chance[:, 0])]
            head = self._heads.draw(symbol, chance[:, 1])
            size += np.bincount(row, (rhs >= 0).sum(axis=1), len(size)).astype(np.int64)
            is_expanded = (rhs >= self.num_terminals) & (size[row] <= limit)[:, None]
            node, slot = np.nonzero(is_expanded)
            levels.append((row, head, rhs, is_expanded, node))
            row, symbol, key = row[node], rhs[node, slot] - self.num_terminals, key[node] + slot
            key = Draws(1, key).integers(2**53)
        # Up, for the number of terminals below every symbol.
        widths, below = [], np.zeros(0, np.int64)
        for _, _, rhs, is_expanded, _ in reversed(levels):
            width = (rhs >= 0).astype(np.int64)
            width[is_expanded] = below
            widths.append(width)
            below = 1 + width.sum(axis=1)
        # Down again, for the places.
        longest = size[size <= limit].max(initial=1)
        terminals, parents = np.full((2, len(size), longest), -1, np.int32)
        first, above, is_left = np.zeros(len(size), np.int64), np.full(len(size), -1), self.head_position == "left"
        for (row, head, rhs, is_expanded, node), width in zip(levels, reversed(widths)):
            place = first[:, None] + is_left + np.cumsum(width, axis=1) - width
            own = first if is_left else first + width.sum(axis=1)
            fits = size[row] <= limit
            at = row[fits], own[fits]
            terminals[at], parents[at] = head[fits], above[fits]
            child, slot = np.nonzero((rhs >= 0) & (rhs < self.num_terminals) & fits[:, None])
            at = row[child], place[child, slot]
            terminals[at], parents[at] = rhs[child, slot], own[child]
            first, above = place[is_expanded], own[node]
        return terminals, parents, size

    def size_probs(self, limit: int) -> Float[np.ndarray, "limit+1"]:
        """Probabilities of 0 ... limit terminals in a sentence, without drawing one."""
        below = np.zeros((len(self.depths), limit + 1))
        for i in np.argsort(-self.depths):
            for rule, prob in zip(self.rules[i], self.rule_probs[i]):
                sizes = np.zeros(limit + 1)
                sizes[1 + ((rule >= 0) & (rule < self.num_terminals)).sum() :][:1] = prob
                for symbol in rule[rule >= self.num_terminals] - self.num_terminals:
                    sizes = np.convolve(sizes, below[symbol])[: limit + 1]
                below[i] += sizes
        return self.start_probs @ below

    @functools.cached_property
    def _starts(self):
        return _Choices.of(self.start_probs[None])

    @functools.cached_property
    def _rules(self):
        return _Choices.of(self.rule_probs)

    @functools.cached_property
    def _heads(self):
        return _Choices.of(self.head_probs)


class _Choices(NamedTuple):
    """Rows of probabilities as one ascending table: row i is i plus the sums so far; `last` is its last choice."""

    table: np.ndarray
    last: np.ndarray

    @classmethod
    def of(cls, probs):
        table = np.arange(len(probs))[:, None] + np.cumsum(probs, axis=1)
        return cls(table.ravel(), probs.shape[1] - 1 - (probs[:, ::-1] > 0).argmax(axis=1))

    def draw(self, row, chance):
        """A choice from each row [m], by numbers in [0, 1) [m]."""
        found = np.searchsorted(self.table, row + chance, side="right") - row * (len(self.table) // len(self.last))
        return np.minimum(found, self.last[row])  # the sums are inexact
