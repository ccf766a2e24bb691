"""Questions about long texts, as text: needles in haystacks, and tasks in the manner of RULER, bAbI and phone books.

A task makes sample number i of a series `seed`, whoever asks and in whatever order. Its prompt has at most the asked
number of tokens, counted by the caller's tokenizer: the filling is cut to fit. Words and stories are generated here, so
nothing is downloaded and scores do not compare with published ones.

Sources: Kamradt, "Needle in a haystack", 2023; Hsieh et al., "RULER", 2024; Kuratov et al., "BABILong", 2024, after
Weston et al., "bAbI", 2015; Jelassi et al., "Repeat after me", 2024 (phone book).
"""

import dataclasses
import itertools
import random
import string
import textwrap
from collections.abc import Callable, Iterable, Sequence
from typing import ClassVar

from path_jax.data.text import standard_library_documents

_MAX_LINE = 120  # characters of a line of a haystack
_KEYS = "amber brave calm dusty early fancy gentle hollow icy jolly keen lucky mellow noble olive proud quiet".split()
_NOUNS = "anchor bridge candle desert engine falcon garden harbor island jacket kettle ladder mirror needle".split()
_FIRST_NAMES = "Ada Ben Cleo Dan Eva Finn Gwen Hugo Iris Jack Kim Liam Mia Noah Olga Paul Rosa Sam Tess Walt".split()


class TooShort(ValueError):
    """The question alone is longer than the asked length."""


@dataclasses.dataclass(frozen=True)
class Sample:
    """One question.

    Attributes:
      prompt: What the model reads.
      target: Text that would follow in a perfect answer; it opens with a space.
      answers: Parts of which all are wanted, in any order.
      task, length, depth: Which task; the tokens asked for; where the answer is, 0 (start) to 1 (end), or None where
        it is spread.
    """

    prompt: str
    target: str
    answers: tuple[str, ...]
    task: str
    length: int
    depth: float | None


class Haystack:
    """An endless text made of lines of documents, in their order, again from the start after the last.

    Args:
      texts: Documents; by default the modules of the standard library.
      max_chars: Documents are taken until they have so many characters. Without a line they are a ValueError.
    """

    def __init__(self, texts: Iterable[str] | None = None, max_chars: int = 2**22):
        if texts is None:
            texts = (str(item.tokens, "utf-8", "replace") for item in standard_library_documents(bytes))
        self.lines: list[str] = []
        size = 0
        for text in texts:
            for line in filter(str.strip, text.splitlines()):
                is_long = len(line) > _MAX_LINE
                self.lines += textwrap.wrap(line, _MAX_LINE, break_on_hyphens=False) if is_long else [line.rstrip()]
            size += len(text)
            if size >= max_chars:
                break
        if not self.lines:
            raise ValueError("the documents of the haystack hold no line of text")
        self._text = "\n".join(self.lines)

    def __contains__(self, text: str) -> bool:
        return text in self._text

    def take(self, start: int, count: int) -> list[str]:
        """`count` lines from line `start` on."""
        return [self.lines[(start + i) % len(self.lines)] for i in range(count)]


@dataclasses.dataclass(frozen=True)
class LongContextTask:
    """What the tasks share. Call one as `task(index, length, depth)`.

    Attributes:
      haystack: Filling of the prompts that have one.
      count: Number of tokens of a prompt, with what opens a text.
      seed: Of the series of samples.
      standard: Wording of the published benchmarks, rather than sentences that a plain language model continues.
    """

    name: ClassVar[str]
    has_depth: ClassVar[bool] = False

    haystack: Haystack
    count: Callable[[str], int]
    seed: int = 0
    standard: bool = False

    def __call__(self, index: int, length: int, depth: float | None = None) -> Sample:
        """Sample number `index` of `length` tokens at most; `depth` is drawn where it is None.

        Raises:
          TooShort: `length` does not hold even the question.
          ValueError: a depth is outside of [0, 1].
        """
        if depth is not None and not 0 <= depth <= 1:
            raise ValueError(f"{depth=} must be in [0, 1]")
        rng = random.Random(f"{self.seed}/{self.name}/{index}")  # a string seeds by its hash: no neighbours
        drawn = rng.random()  # in any case, so that a depth changes nothing else
        depth = (drawn if depth is None else depth) if self.has_depth else None
        prompt, target, answers = self._make(rng, length, depth)
        return Sample(prompt, target, tuple(answers), self.name, length, depth)

    def _make(self, rng: random.Random, length: int, depth: float | None) -> tuple[str, str, Sequence[str]]:
        """Prompt, target and answers."""
        raise NotImplementedError

    def _fit(self, build: Callable[[int], str], length: int, least: int = 0) -> int:
        """The largest n >= least for which build(n) has at most `length` tokens, where more n are more tokens."""
        if (needed := self.count(build(least))) > length:
            raise TooShort(f"a prompt of {self.name} has at least {needed} tokens, more than {length}")
        low, high = least, max(2 * least, 8)
        while self.count(build(high)) <= length:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.count(build(middle)) <= length else (low, middle)
        return low

    def _hidden(self, rng, length, facts: Sequence[tuple[float, str]], question: str, intro: str = "") -> str:
        """A haystack with (depth, line) facts, those of one depth in the order given, and a question."""
        start = rng.randrange(len(self.haystack.lines))

        def build(n):
            lines = self.haystack.take(start, n)
            for depth, fact in reversed(sorted(facts, key=lambda item: item[0])):
                lines.insert(round(depth * n), fact)
            return "\n".join([*([intro] if intro and self.standard else []), *lines, question])

        return build(self._fit(build, length))

    def _numbers(self, rng: random.Random, count: int) -> list[str]:
        """Different numbers of seven digits that the haystack does not have."""
        return self._absent(lambda: str(rng.randrange(10**6, 10**7)), count)

    def _absent(self, draw: Callable[[], str], count: int) -> list[str]:
        """Different strings that the haystack does not have."""
        found: dict[str, None] = {}
        while len(found) < count:
            if (text := draw()) not in self.haystack:
                found[text] = None
        return list(found)

    def _magic(self, key: str, values: Sequence[str]) -> tuple[list[str], str]:
        """The lines that tell the numbers of a key, and the question for them."""
        subject, verb = ("numbers", "are") if len(values) > 1 else ("number", "is")
        if self.standard:
            where = f"the special magic {subject} for {key} mentioned in the text"
            lines = [f"One of the special magic numbers for {key} is: {value}." for value in values]
            return lines, f"What {verb} {where}? {where.capitalize()} {verb}"
        return [f"The magic number of {key} is {value}." for value in values], f"The magic {subject} of {key} {verb}"


_INTRO = "Special magic numbers are hidden in the following text. Memorize them; you will be asked for them afterwards."


class Needle(LongContextTask):
    """One sentence with a number in a haystack."""

    name, has_depth, num_others = "needle", True, 0

    def _make(self, rng, length, depth):
        keys = rng.sample([f"{a} {b}" for a in _KEYS for b in _NOUNS], 1 + self.num_others)
        values = self._numbers(rng, len(keys))
        lines, question = self._magic(keys[0], values[:1])
        others = [self._magic(key, [value])[0][0] for key, value in zip(keys[1:], values[1:])]
        facts = [(depth, lines[0]), *((rng.random(), line) for line in others)]
        return self._hidden(rng, length, facts, question, _INTRO), f" {values[0]}", values[:1]


class MultiKey(Needle):
    """The same among needles of other keys."""

    name, num_others = "multikey", 3


class MultiValue(LongContextTask):
    """Needles that give one key several numbers, all of which are asked for."""

    name, num_values = "multivalue", 3

    def _make(self, rng, length, depth):
        key = f"{rng.choice(_KEYS)} {rng.choice(_NOUNS)}"
        values = self._numbers(rng, self.num_values)
        lines, question = self._magic(key, values)
        facts = zip(sorted(rng.random() for _ in lines), lines)
        return self._hidden(rng, length, list(facts), question, _INTRO), " " + ", ".join(values), values


class VariableTracking(LongContextTask):
    """A chain of assignments; all variables with one value are asked for."""

    name, num_hops = "variables", 3

    def _make(self, rng, length, depth):
        names = self._absent(lambda: "".join(rng.choices(string.ascii_uppercase, k=4)), 1 + self.num_hops)
        (value,) = self._numbers(rng, 1)
        sources = [value, *(f"VAR {name}" for name in names)]
        lines = [f"VAR {name} = {source}" for name, source in zip(names, sources)]
        intro = "Memorize and track the chain of variable assignments hidden in the following text."
        question = f"The variables equal to {value} are"
        if self.standard:
            asked = f"Question: Find all variables that are assigned the value {value} in the text above."
            question = f"{asked} Answer: {len(names)} variables are assigned the value {value}, they are:"
        facts = zip(sorted(rng.random() for _ in lines), lines)
        return self._hidden(rng, length, list(facts), question, intro), " " + ", ".join(names), names


class CommonWords(LongContextTask):
    """A list in which three words occur ten times as often as the others."""

    name, num_asked = "common_words", 3

    def _make(self, rng, length, depth):
        series = rng.random()
        common = _words(random.Random(f"{series}"), self.num_asked)

        def build(n):
            draw, often = random.Random(f"{series}"), max(n // 10, 2)
            seldom, rest = max(often // 10, 1), n - often * self.num_asked
            words = _words(draw, self.num_asked + -(-rest // seldom))
            listed = words[: self.num_asked] * often + (words[self.num_asked :] * seldom)[:rest]
            draw.shuffle(listed)
            return self._ask(listed)

        return build(self._fit(build, length, least=4 * self.num_asked)), " " + ", ".join(common), common

    def _ask(self, words):
        question = f"The {self.num_asked} most common words are"
        if not self.standard:
            return f"Words: {' '.join(words)}\n{question}"
        numbered = " ".join(f"{i}. {word}" for i, word in enumerate(words, 1))
        intro = "Below is a numbered list of words. Memorize the ones that appear most often."
        asked = f"Question: What are the {self.num_asked} most common words in the above list? Answer: {question}:"
        return f"{intro}\n{numbered}\n{asked}"


class FrequentWords(LongContextTask):
    """Made-up words of which number i occurs as often as 1 / i^2 of all; the first three are asked for."""

    name, num_asked = "frequent_words", 3

    def _make(self, rng, length, depth):
        series = rng.random()
        asked = _words(random.Random(f"{series}"), self.num_asked)

        def build(n):
            draw = random.Random(f"{series}")
            counts = [n]  # of the first word; then until a word would not occur at all
            while (more := n // (len(counts) + 1) ** 2) and len(counts) < 50:
                counts.append(more)
            listed = [word for word, count in zip(_words(draw, len(counts)), counts) for _ in range(count)]
            draw.shuffle(listed)
            question = f"The {self.num_asked} most frequent words are"
            if not self.standard:
                return f"Words: {' '.join(listed)}\n{question}"
            intro = "Read the following coded text and track the frequency of each coded word."
            asked = f"Question: What are the {self.num_asked} most frequently appeared words in the above coded text?"
            return f"{intro}\n{' '.join(listed)}\n{asked} Answer: {question}:"

        # From 18 on the third word, n // 9, occurs more often than the fourth, n // 16.
        return build(self._fit(build, length, least=18)), " " + ", ".join(asked), asked


class PhoneBook(LongContextTask):
    """A list of names and numbers; one name is looked up."""

    name, has_depth = "phonebook", True

    def _make(self, rng, length, depth):
        series = rng.random()

        def book(n):
            draw = random.Random(f"{series}")
            names = [f"{draw.choice(_FIRST_NAMES)} {word.capitalize()}" for word in _words(draw, n)]
            drawn = draw.sample(range(9 * 10**6), n)
            return names, [f"{100 + x // 10**4}-{x % 10**4:04d}" for x in drawn], round(depth * (n - 1))

        def build(n):
            names, numbers, asked = book(n)
            lines = [f"{name}: {number}" for name, number in zip(names, numbers)]
            question = f"{names[asked]}:"
            if self.standard:
                question = f"What is the phone number of {names[asked]}? The phone number of {names[asked]} is"
            return "\n".join([*lines, "", question])

        size = self._fit(build, length, least=1)
        _, numbers, asked = book(size)
        return build(size), f" {numbers[asked]}", [numbers[asked]]


_PERSONS = ("Mary", "John", "Daniel", "Sandra")
_PLACES = ("bathroom", "bedroom", "garden", "hallway", "kitchen", "office")
_THINGS = ("apple", "football", "milk")


class Story(LongContextTask):
    """Persons who go to places with things, told among the lines of a haystack; see the subclasses."""

    num_facts: ClassVar[int]
    has_things: ClassVar[bool] = True

    def _make(self, rng, length, depth):
        facts, questions = next(filter(None, (self._tell(rng) for _ in itertools.count())))
        question, answer = rng.choice(questions)
        told = list(zip(sorted(rng.random() for _ in facts), facts))
        intro = "Facts about persons are hidden in the following text. Answer the question from the facts alone."
        return self._hidden(rng, length, told, question, intro), f" {answer}", [answer]

    def _tell(self, rng) -> tuple[list[str], list[tuple[str, str]]] | None:
        """Facts, and questions with answers; None for a story that has gone on for long without one."""
        facts: list[str] = []
        holder: dict[str, str] = {}
        place: dict[str, str] = {}  # of persons, once it is told
        seen: dict[str, list[str]] = {thing: [] for thing in _THINGS}  # places of things, one after the other
        while len(facts) < 2 * self.num_facts:
            if len(facts) >= self.num_facts and (questions := self._questions(place, seen)):
                return facts, questions
            person, act = rng.choice(_PERSONS), rng.random() if self.has_things else 1.0
            here = place.get(person)
            near = [x for x in _THINGS if here and x not in holder and seen[x][-1:] in ([], [here])]
            has = [x for x in _THINGS if holder.get(x) == person]
            if act < 0.35 and near:
                thing = rng.choice(near)
                holder[thing], seen[thing] = person, seen[thing] or [here]
                facts.append(f"{person} {rng.choice(('got', 'took', 'picked up'))} the {thing} there.")
            elif 0.35 <= act < 0.45 and has:
                del holder[thing := rng.choice(has)]
                facts.append(f"{person} {rng.choice(('dropped', 'left'))} the {thing} there.")
            else:
                place[person] = rng.choice([x for x in _PLACES if x != here])
                facts.append(
                    f"{person} {rng.choice(('moved', 'went', 'journeyed', 'travelled'))} to the {place[person]}."
                )
                for thing in has:
                    seen[thing].append(place[person])
        return None

    def _questions(self, place: dict[str, str], seen: dict[str, list[str]]) -> list[tuple[str, str]]:
        """(question, answer) that the story determines."""
        raise NotImplementedError


class OneFact(Story):
    """Where a person is."""

    name, num_facts, has_things = "qa1", 3, False

    def _questions(self, place, seen):
        return [(f"Where is {person}? {person} is in the", here) for person, here in place.items()]


class TwoFacts(Story):
    """Where a thing is that was carried somewhere: who has it, and where that person went."""

    name, num_facts = "qa2", 5

    def _questions(self, place, seen):
        found = [(thing, places[-1]) for thing, places in seen.items() if len(places) > 1]
        return [(f"Where is the {thing}? The {thing} is in the", here) for thing, here in found]


class ThreeFacts(Story):
    """Where a thing was before it came to a place."""

    name, num_facts = "qa3", 7

    def _questions(self, place, seen):
        # It came to the place named once only.
        found = [(x, *places[-2:]) for x, places in seen.items() if len(places) > 1 and places.count(places[-1]) == 1]
        ask = lambda x, now: f"Where was the {x} before the {now}? Before the {now}, the {x} was in the"
        return [(ask(x, now), before) for x, before, now in found]


RULER_TASKS = (MultiKey, MultiValue, VariableTracking, CommonWords, FrequentWords)
BABILONG_TASKS = (OneFact, TwoFacts, ThreeFacts)


def _words(draw: random.Random, count: int) -> list[str]:
    """Different pronounceable words; more of them start with the same ones."""
    found: dict[str, None] = {}
    while len(found) < count:
        syllables = 2 if len(found) < 500 else 3
        word = "".join(draw.choice("bdfgklmnprstvz") + draw.choice("aeiou") for _ in range(syllables))
        found[word + draw.choice("lmnrst")] = None
    return list(found)
