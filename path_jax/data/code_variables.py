r"""Programs that assign, copy and test variables, and print them; each print states its answer in a comment.

    a = 3
    b = a
    if b == 3: c = 5
    print(b) # 3

Rows are tokens, and Python text through `as_text(task.words, tokens)`. The value after `) # ` is scored. A program
begins by giving every variable a value, in random order; it is cut after `length` tokens, be it within a statement.
Loops, arithmetic and scopes are not part of it.

Source: after the variable tracking of Hsieh et al., "RULER: what's the real context size of your long-context language
models?", 2024, with reassignments and conditions, so that a value cannot be found by its name alone.
"""

import dataclasses
import string

import numpy as np

from path_jax.data.draws import Draws
from path_jax.data.examples import Examples, cut_examples

CONSTANT, COPY, CONDITION, PRINT = range(4)
# Pieces (text before, field, text after).
_STATEMENTS = (
    (("", "variable", " = "), ("", "constant", "\n")),
    (("", "variable", " = "), ("", "other", "\n")),
    (("if ", "other", " == "), ("", "compared", ": "), ("", "variable", " = "), ("", "constant", "\n")),
    (("print(", "variable", ") # "), ("", "asked", "\n")),
)
_TYPES = {"variable": "variable", "other": "variable", "constant": "value", "compared": "value", "asked": "value"}
MOST_COPIES = 3


@dataclasses.dataclass(frozen=True)
class CodeVariables:
    """Statements after the first assignments are independent draws; all variables and constants are equally likely.

    A condition states the value its variable has in half of the cases, else any value. The level of a print is the
    number of copies that the value went through since it was written as a constant, at most 3.

    Args:
      length: T; at least the first assignments and a print.
      num_variables: 2 to 26, named a, b, ...
      num_values: values 0 ... num_values - 1.
      copies: share of `b = a`; conditions: of `if b == 3: c = 5`; prints: of `print(a) # 3`; the rest is `a = 3`.
      pieces: `a = `, `print(a) # `, `3` with its line end and so on are one token each, not two or three;
        the text is the same. Rows of one length have twice as many answers, and no token lies between a variable and
        its value.
    """

    length: int = 256
    num_variables: int = 5
    num_values: int = 10
    copies: float = 0.35
    conditions: float = 0.15
    prints: float = 0.25
    pieces: bool = False

    def __post_init__(self):
        if not 2 <= self.num_variables <= 26:
            raise ValueError(f"num_variables={self.num_variables} must be in [2, 26]")
        if self.num_values < 2:
            raise ValueError(f"num_values={self.num_values} must be at least 2")
        shares = self.copies, self.conditions, self.prints
        if min(shares) < 0 or sum(shares) > 1 + 1e-9:
            raise ValueError(
                f"copies={self.copies}, conditions={self.conditions} and prints={self.prints} must be at least 0 and "
                f"together at most 1"
            )
        needed = len(self._tokens(CONSTANT)) * self.num_variables + len(self._tokens(PRINT))
        if self.length < needed:
            raise ValueError(f"length={self.length} must be at least {needed} for num_variables={self.num_variables}")

    def _tokens(self, statement: int) -> list[tuple[tuple[str, str, str], str]]:
        """Kind (text before, type, text after) and field of each token of a statement; a fixed text has neither."""
        tokens = []
        for before, field, after in _STATEMENTS[statement]:
            if self.pieces:
                tokens.append(((before, _TYPES[field], after), field))
            else:
                parts = ((before, "", ""), ""), (("", _TYPES[field], ""), field), ((after, "", ""), "")
                tokens += [(kind, name) for kind, name in parts if any(kind)]
        return tokens

    def _names(self) -> dict[tuple[str, str, str], tuple[str, ...]]:
        """What the tokens of each kind are called, in the order of their ids."""
        names = {
            "variable": tuple(string.ascii_lowercase[: self.num_variables]),
            "value": tuple(map(str, range(self.num_values))),
            "": ("",),
        }
        kinds = [kind for statement in range(len(_STATEMENTS)) for kind, _ in self._tokens(statement)]
        if not self.pieces:
            kinds = [("", "variable", ""), ("", "value", ""), *kinds]
        return {kind: names[kind[1]] for kind in kinds}

    @property
    def words(self) -> tuple[str, ...]:
        """Variables, values, the rest; or the pieces."""
        kinds = self._names().items()
        return tuple(f"{before}{name}{after}" for (before, _, after), names in kinds for name in names)

    @property
    def vocab_size(self) -> int:
        """Number of words."""
        return len(self.words)

    @property
    def levels(self) -> tuple[str, ...]:
        """Numbers of copies."""
        return "0 copies", "1 copy", "2 copies", "3+ copies"

    def examples(self, seed: int, index: np.ndarray) -> Examples:
        """See `Task`."""
        statements = [self._tokens(kind) for kind in range(len(_STATEMENTS))]
        longest = max(map(len, statements))
        draws, count = Draws(seed, index), -(-self.length // min(map(len, statements)))
        # Statements come first, so that a step of the program reads contiguous rows.
        draw = lambda high: np.ascontiguousarray(draws.integers(high, count).T)
        bounds = np.cumsum([self.prints, self.conditions, self.copies])
        chance = np.ascontiguousarray(draws.uniform(count).T)
        kind = np.select([chance < bound for bound in bounds], [PRINT, CONDITION, COPY], CONSTANT)
        variable = draw(self.num_variables)
        other = (variable + 1 + draw(self.num_variables - 1)) % self.num_variables
        constant, compared = draw(self.num_values), draw(2 * self.num_values)
        kind[: self.num_variables] = CONSTANT
        variable[: self.num_variables] = draws.permutations(self.num_variables).T

        num_rows = kind.shape[1]
        value, copies = np.zeros((2, num_rows * self.num_variables), np.int64)
        row = self.num_variables * np.arange(num_rows)
        asked, level = np.zeros_like(variable), np.zeros_like(variable)
        is_copy, is_condition, is_write = kind == COPY, kind == CONDITION, kind <= COPY
        for i in range(count):
            to, source = row + variable[i], row + other[i]
            asked[i], level[i], read = value[to], copies[to], value[source]
            compared[i] = np.where(compared[i] < self.num_values, compared[i], read)
            is_done = is_write[i] | is_condition[i] & (compared[i] == read)
            value[to] = np.where(is_done, np.where(is_copy[i], read, constant[i]), asked[i])
            copies[to] = np.where(is_done, np.where(is_copy[i], copies[source] + 1, 0), level[i])

        fields = {"variable": variable, "other": other, "constant": constant, "compared": compared, "asked": asked}
        sizes = [len(names) for names in self._names().values()]
        first_id = dict(zip(self._names(), np.cumsum([0, *sizes])))
        first, field_at = (
            np.full((len(statements), longest), -1, np.int32),
            np.full((len(statements), longest), "", "U8"),
        )
        for i, statement in enumerate(statements):
            first[i, : len(statement)] = [first_id[kind] for kind, _ in statement]
            field_at[i, : len(statement)] = [field for _, field in statement]
        tokens = first[kind.T]
        for name, field in fields.items():
            tokens += np.where((field_at == name)[kind.T], field.T[..., None], 0).astype(np.int32)
        is_asked = (np.roll(field_at, -1, axis=1) == "asked")[kind.T]  # the token before the answer
        level = np.broadcast_to(np.minimum(level, MOST_COPIES).T[..., None], tokens.shape)
        flat = lambda x: x.reshape(num_rows, count * longest)
        return cut_examples(flat(tokens), flat(is_asked), flat(level), self.length)

    def variants(self) -> dict[str, "CodeVariables"]:
        """The settings themselves, and two and four times the length."""
        return {
            name: dataclasses.replace(self, length=factor * self.length)
            for name, factor in (("in_distribution", 1), ("length_x2", 2), ("length_x4", 4))
        }
