"""Associative treecall (ATR): a sentence of a random grammar, then one of its terminals, and a relative of it."""

import dataclasses
import functools
import json
from pathlib import Path

import numpy as np
from jaxtyping import Int32

from path_jax.data.grammar import Grammar
from path_jax.data.query_document import FIRST_ITEM, Documents, QueryTask, one_of

QUERIES = "parent", "child", "sibling"
MAX_SENTENCE = 1024
_WIDTHS = 8, 16, 32  # of sentences whose questions are drawn together
_LONG_SHARE = 0.05  # of the sentences, for variants with long ones; fewer would take more than 20 tries each


@dataclasses.dataclass(frozen=True)
class Treecall(QueryTask):
    """ATR: a row is `BOS sentence EOS query answer`, with several kinds of questions `BOS ... EOS query type answer`.

    The sentence is a tree of terminals (`path_jax.data.grammar`). The answer is a parent or a child of the query, or
    the last of the terminals with the query's parent; that may be the query itself, which is also its answer if it is
    the root. Kinds of questions that the sentence has pairs for are equally likely, then the answers of the kind, then
    the queries with this answer. Sentences without a pair, or with too few or too many terminals, are drawn again. The
    level of a question is the distance of query and answer in the sentence, halved until it is 1; 0 counts as 1.

    Args:
      length: T. Sentences are as long as fit, up to T - 4 terminals, T - 5 with several kinds, and 1024: a small T
        changes their distribution.
      queries: kinds of questions, some of "parent", "child" and "sibling" with + between them. Where "child" has
        several answers, one of them is drawn and scored.
      unambiguous_queries: only asks for the last terminal of its kind in the sentence, and for "sibling" only where
        the answer is the last of its kind too.
      sample_first: "target" draws the answer first, as published, "query" the query.
      min_sentence: least number of terminals, at least 2.
      grammar_seed, head_position, max_depth, max_rhs_len, max_rules_per_nt, num_nonterminals, num_terminals,
        terminal_occurrence_factor, transparent_nonterminals: see `Grammar.random`.
      grammar_file: a JSON file to read the grammar from instead (`Grammar.from_json`).
      mask_nonquery, train_test_split, split, split_seed, train_set_size: see `QueryTask`. Pairs are (answer, query).

    Source: Arora et al., "Mechanistic evaluation of Transformers and state space models", 2025, and class PCFG of its
    code. There, withheld pairs change which terminal is the last sibling; here they change no answer.
    """

    queries: str = "parent"
    unambiguous_queries: bool = True
    sample_first: str = "target"
    min_sentence: int = 3
    grammar_seed: int = 0
    head_position: str = "right"
    max_depth: int = 10
    max_rhs_len: int = 5
    max_rules_per_nt: int = 5
    num_nonterminals: int = 40
    num_terminals: int = 20
    terminal_occurrence_factor: float = 20.0
    transparent_nonterminals: bool = False
    grammar_file: str = ""

    def __post_init__(self):
        super().__post_init__()
        if not self._kinds or not set(self._kinds) <= set(QUERIES) or len(set(self._kinds)) < len(self._kinds):
            raise ValueError(f"queries={self.queries!r} must be some of {', '.join(QUERIES)}, with + between them")
        if self.sample_first not in ("target", "query"):
            raise ValueError(f"sample_first={self.sample_first!r} is neither target nor query")
        if self.min_sentence < 2 or self._max_sentence < self.min_sentence:
            raise ValueError(
                f"length={self.length} has room for {self._max_sentence} terminals; min_sentence={self.min_sentence} "
                f"must be at least 2 and at most that"
            )
        if (share := self._share_of_sentences()) < 1 / 1000:
            raise ValueError(
                f"{share:.2%} of the sentences of the grammar have {self.min_sentence} to {self._max_sentence} "
                f"terminals; change min_sentence={self.min_sentence}, length={self.length} or the grammar"
            )

    @functools.cached_property
    def grammar(self) -> Grammar:
        """The grammar, drawn or read."""
        if self.grammar_file:
            try:
                return Grammar.from_json(json.loads(Path(self.grammar_file).read_text(encoding="utf-8")))
            except ValueError as error:
                raise ValueError(f"{self.grammar_file}: {error}") from error
        names = (
            *("head_position", "max_depth", "max_rhs_len", "max_rules_per_nt", "num_nonterminals", "num_terminals"),
            *("terminal_occurrence_factor", "transparent_nonterminals"),
        )
        return Grammar.random(self.grammar_seed, **{name: getattr(self, name) for name in names})

    @property
    def _kinds(self):
        return self.queries.split("+")

    @property
    def _max_sentence(self):
        return min(MAX_SENTENCE, self.length - 4 - (len(self._kinds) > 1))

    def _share_of_sentences(self):
        return self.grammar.size_probs(self._max_sentence)[self.min_sentence :].sum()

    @property
    def vocab_size(self) -> int:
        """PAD, BOS, EOS, terminals, the kinds parent, child and sibling, asked or not."""
        return FIRST_ITEM + self.grammar.num_terminals + len(QUERIES)

    @property
    def item_kinds(self) -> tuple[tuple[int, int], ...]:
        """Terminals."""
        return ((FIRST_ITEM, self.grammar.num_terminals),)

    @property
    def levels(self) -> tuple[str, ...]:
        """Distances of query and answer in the sentence, in terminals."""
        longest = self._max_sentence - 1
        return tuple(f"{2**i if i else 0}-{2 ** (i + 1) - 1} apart" for i in range(longest.bit_length()))

    def documents(self, seed: int, index: np.ndarray) -> Documents:
        """See `QueryTask`."""
        return self._trees(seed, index)[0]

    def trees(self, seed: int, index: np.ndarray) -> Int32[np.ndarray, "n S"]:
        """Place of each terminal's parent in the texts of `documents`, -1 for the root and after the end."""
        return self._trees(seed, index)[1]

    def _trees(self, seed, index):
        first_kind = FIRST_ITEM + self.grammar.num_terminals

        def sample(draws, _):
            chance = draws.uniform(3)
            terminals, parents, size = self.grammar.sentences(draws, self._max_sentence)
            text = np.where(terminals >= 0, FIRST_ITEM + terminals, -1)
            fits = (size >= self.min_sentence) & (size <= self._max_sentence)
            kind, key, value = np.zeros((3, len(text)), np.int64)
            # Sentences of like size together: most of the width is for the few long ones.
            groups = np.where(fits, np.searchsorted(_WIDTHS, size), -1)
            for group in range(len(_WIDTHS) + 1):
                some = np.flatnonzero(groups == group)
                cut = slice(_WIDTHS[group] if group < len(_WIDTHS) else None)
                found = self._questions(text[some, cut], parents[some, cut], chance[some])
                kind[some], key[some], value[some], fits[some] = found
            return fits, text, parents, size, first_kind + kind, key, value

        text, parents, size, kind, key, value = self.first_accepted(sample, seed, index)
        distance = np.maximum(abs(key - value), 1)
        return Documents(text, size, key, value, distance, kind if len(self._kinds) > 1 else None), parents

    def _questions(self, text, parents, chance):
        """Numbers of kinds, places of query and answer in sentences [n, S], and whether there are any; [n] each."""
        is_there, has_parent, parent = text >= 0, parents >= 0, np.maximum(parents, 0)
        rows, place = np.arange(len(text)), np.broadcast_to(np.arange(text.shape[1]), text.shape)
        may_ask = is_there & (not self.unambiguous_queries or _is_last(text))
        kinds = []  # (queries, answers, pairs), [n, S] each; every place has one pair of a kind at most
        for kind in self._kinds:
            if kind == "parent":
                query, answer, is_pair = place, parent, has_parent & may_ask
            elif kind == "child":
                query, answer = parent, place
                is_pair = has_parent & np.take_along_axis(may_ask, parent, axis=1)
            else:
                last = np.zeros(text.shape, np.int64)
                np.maximum.at(last, (rows[:, None], parent), np.where(has_parent, place, 0))
                query, answer = place, np.where(has_parent, np.take_along_axis(last, parent, axis=1), place)
                is_pair = may_ask & np.take_along_axis(may_ask, answer, axis=1)
            at = np.nonzero(is_pair)
            is_pair[at] = self.may_ask(text[at[0], answer[at]], text[at[0], query[at]])
            kinds.append((query, answer, is_pair))
        has_pairs = np.stack([is_pair.any(axis=1) for _, _, is_pair in kinds], axis=1)
        kind = one_of(has_pairs, chance[:, 0])
        query, answer, is_pair = kinds[0]
        for number, parts in enumerate(kinds[1:], 1):
            is_this = (kind == number)[:, None]
            query, answer, is_pair = (np.where(is_this, *pair) for pair in zip(parts, (query, answer, is_pair)))
        first = answer if self.sample_first == "target" else query
        is_first, at = np.zeros(text.shape, bool), np.nonzero(is_pair)
        is_first[at[0], first[at]] = True
        chosen = one_of(is_first, chance[:, 1])
        pair = one_of(is_pair & (first == chosen[:, None]), chance[:, 2])
        numbers = np.array([QUERIES.index(name) for name in self._kinds])
        return numbers[kind], query[rows, pair], answer[rows, pair], has_pairs.any(axis=1)

    def longer(self) -> dict[str, "Treecall"]:
        """The longest sentences that fit, and those up to twice as long as any; a twentieth of all sentences at least.

        Either is left out where the grammar has no such share of them.
        """
        longest, task = self._max_sentence, dataclasses.replace
        at_least = lambda limit: np.cumsum(self.grammar.size_probs(limit)[::-1])[::-1]
        variants, share = {}, at_least(longest)
        if (share[self.min_sentence + 1 :] >= _LONG_SHARE).any():
            variants["long_sentences"] = task(self, min_sentence=int(np.flatnonzero(share >= _LONG_SHARE)[-1]))
        if longest < MAX_SENTENCE and at_least(min(2 * longest, MAX_SENTENCE))[longest + 1] >= _LONG_SHARE:
            variants["sentences_x2"] = task(self, length=self.length + longest, min_sentence=longest + 1)
        return variants


def _is_last(text):
    """Whether no later place of the row holds the same id; bool [n, S] as `text`."""
    width = text.shape[1]
    kind = np.int32 if (text.max(initial=0) + 1) * width < 2**31 else np.int64  # 32 bits are sorted in half the time
    ids, place = np.divmod(np.sort(text.astype(kind) * kind(width) + np.arange(width, dtype=kind), axis=1), kind(width))
    is_last = np.ones(text.shape, bool)
    is_last[:, :-1] = ids[:, :-1] != ids[:, 1:]
    found = np.empty_like(is_last)
    np.put_along_axis(found, place, is_last, axis=1)
    return found
