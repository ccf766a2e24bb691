"""Entity tracking in English: objects are put into boxes and moved, and boxes are swapped, and asked for.

    The apple is in Box 3.
    Move the apple to Box 5.
    Swap Box 5 and Box 2.
    Where is the apple? Box 2.

Rows are tokens, and text through `as_text(task.words, tokens)`. The number in the answer to a question is scored. A
swap exchanges what is in the boxes. A row begins by placing every object, in random order; it is cut after `length`
tokens, be it within a sentence.

Source: after Kim and Schuster, "Entity tracking in language models", 2023, who state the contents of boxes and ask for
them at the end; here objects are asked for, all along, and boxes are swapped.
"""

import dataclasses

import numpy as np

from path_jax.data.draws import Draws
from path_jax.data.examples import Examples, cut_examples

OBJECTS = (
    *("apple", "ball", "book", "bottle", "brush", "coin", "cup", "doll", "drum", "egg", "fork", "glove", "hammer"),
    *("hat", "key", "lamp", "map", "mirror", "needle", "pen", "ring", "rope", "shoe", "spoon", "watch", "whistle"),
)
PLACE, MOVE, SWAP, ASK = range(4)
# Every sentence is five tokens: opening, object or box, link, box, end.
_OPENING = ("The ", "Move the ", "Swap Box ", "Where is the ")
_LINK = (" is in Box ", " to Box ", " and Box ", "? Box ")
_END = ".\n"
_SENTENCE = 5
MOST_CHANGES = 3


@dataclasses.dataclass(frozen=True)
class Boxes:
    """Sentences after the first placements are independent draws; all objects and boxes are equally likely.

    The level of a question is the number of moves and swaps that touched the object since it was last placed, at most
    3. A swap touches what is in its boxes.

    Args:
      length: T; at least the first placements and a question.
      num_objects: 1 to 26.
      num_boxes: boxes 1 ... num_boxes, at least 2.
      moves: share of "Move the apple to Box 5."; swaps: of "Swap Box 5 and Box 2."; questions: of "Where is the
        apple? Box 2."; the rest places an object again, "The apple is in Box 3."
    """

    length: int = 256
    num_objects: int = 6
    num_boxes: int = 8
    moves: float = 0.2
    swaps: float = 0.3
    questions: float = 0.3

    def __post_init__(self):
        if not 1 <= self.num_objects <= len(OBJECTS):
            raise ValueError(f"num_objects={self.num_objects} must be in [1, {len(OBJECTS)}]")
        if self.num_boxes < 2:
            raise ValueError(f"num_boxes={self.num_boxes} must be at least 2")
        shares = self.moves, self.swaps, self.questions
        if min(shares) < 0 or sum(shares) > 1 + 1e-9:
            raise ValueError(
                f"moves={self.moves}, swaps={self.swaps} and questions={self.questions} must be at least 0 and "
                f"together at most 1"
            )
        if self.length < (needed := _SENTENCE * (self.num_objects + 1)):
            raise ValueError(f"length={self.length} must be at least {needed} for num_objects={self.num_objects}")

    @property
    def words(self) -> tuple[str, ...]:
        """Objects, boxes, the rest."""
        boxes = map(str, range(1, self.num_boxes + 1))
        return (*OBJECTS[: self.num_objects], *boxes, *_OPENING, *_LINK, _END)

    @property
    def vocab_size(self) -> int:
        """Number of words."""
        return self.num_objects + self.num_boxes + len(_OPENING) + len(_LINK) + 1

    @property
    def levels(self) -> tuple[str, ...]:
        """Numbers of moves and swaps."""
        return "0 changes", "1 change", "2 changes", "3+ changes"

    def examples(self, seed: int, index: np.ndarray) -> Examples:
        """See `Task`."""
        draws, count = Draws(seed, index), -(-self.length // _SENTENCE)
        # Sentences come first, so that a step reads contiguous rows.
        draw = lambda high: np.ascontiguousarray(draws.integers(high, count).T)
        chance = np.ascontiguousarray(draws.uniform(count).T)
        bounds = np.cumsum([self.questions, self.swaps, self.moves])
        kind = np.select([chance < bound for bound in bounds], [ASK, SWAP, MOVE], PLACE)
        thing, box = draw(self.num_objects), draw(self.num_boxes)
        other = (box + 1 + draw(self.num_boxes - 1)) % self.num_boxes
        kind[: self.num_objects] = PLACE
        thing[: self.num_objects] = draws.permutations(self.num_objects).T

        num_rows = kind.shape[1]
        place, changes = np.zeros((2, num_rows, self.num_objects), np.int64)
        rows = np.arange(num_rows)
        is_swap, is_put = kind == SWAP, kind <= MOVE
        level = np.zeros_like(box)
        # Outside of swaps no object is in a box to swap.
        left, right = np.where(is_swap, box, -1), np.where(is_swap, other, -1)
        for i in range(count):
            at = rows, thing[i]
            here, level[i] = place[at], changes[at]
            place[at] = np.where(is_put[i], box[i], here)
            changes[at] = np.where(is_put[i], np.where(kind[i] == MOVE, level[i] + 1, 0), level[i])
            box[i] = np.where(kind[i] == ASK, here, box[i])
            is_left, is_right = place == left[i][:, None], place == right[i][:, None]
            changes += is_left | is_right
            place = np.where(is_left, right[i][:, None], np.where(is_right, left[i][:, None], place))

        first_opening = self.num_objects + self.num_boxes
        first_link = first_opening + len(_OPENING)
        last = np.full_like(kind, first_link + len(_LINK))
        subject = np.where(is_swap, self.num_objects + other, thing)
        tokens = np.stack([first_opening + kind, subject, first_link + kind, self.num_objects + box, last], axis=2)
        tokens = tokens.transpose(1, 0, 2).reshape(num_rows, count * _SENTENCE)
        level = np.repeat(np.minimum(level, MOST_CHANGES).T, _SENTENCE, axis=1)
        return cut_examples(tokens, tokens == first_link + ASK, level, self.length)

    def variants(self) -> dict[str, "Boxes"]:
        """The settings themselves, and two and four times the length."""
        return {
            name: dataclasses.replace(self, length=factor * self.length)
            for name, factor in (("in_distribution", 1), ("length_x2", 2), ("length_x4", 4))
        }
