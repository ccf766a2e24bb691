"""Accuracy of answers about long texts, by length and depth, with no judge but the text of the answer.

Prompts are read through the decode cache, so that their length is bounded by time rather than memory.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np
from jaxtyping import Int

from path_jax.data import Document
from path_jax.data.long_context import (
    BABILONG_TASKS,
    RULER_TASKS,
    Haystack,
    LongContextTask,
    Needle,
    PhoneBook,
    Sample,
    TooShort,
)
from path_jax.evaluation.streaming import CHUNK, Reader, answer_room, capacity
from path_jax.evaluation.text_codec import TextCodec
from path_jax.models import DecoderLM

_SLACK = 8  # tokens generated beyond those of the expected answer
_HAYSTACK_CHARS = 2**20


class Question(NamedTuple):
    """A sample as the model sees it."""

    sample: Sample
    prompt: Int[np.ndarray, "t"]
    target: Int[np.ndarray, "a"]  # follows


class LongContext:
    """Answers to questions about texts of growing length.

    Calling the object with parameters returns, for every task and length,

      TASK/LENGTH/DEPTH and TASK/LENGTH: share of the wanted parts that the greedily generated answer has, see
        `is_answered`, by depth where the task has one, and over all questions;
      exact/TASK/LENGTH: share of the questions all tokens of whose expected answer are the likeliest, each given the
        text and the tokens before it;
      loss/TASK/LENGTH: mean loss of those tokens in nats.

    Lengths are those of training, twice that and so on; a task is left out at lengths that do not hold its question.

    Args:
      model: The language model.
      documents: Held-out texts, whose lines are the haystack.
      codec: The model's tokenizer.
      train_length: Shortest prompt, in tokens.
      multiple: The longest prompt is so many times as long, or as long as the model can read.
      max_length: The longest prompt, if given; lengths then halve from there down to `train_length`.
      num_depths: Depths from 0 to 1.
      samples: Questions for each length and depth; a task without depths has `num_depths` times as many.
      batch_size: Prompts read at a time. chunk: Tokens of each per call of the model.
      standard: 1 for the wording of the published benchmarks, 0 for sentences that a plain language model continues.
      seed: Of the questions.

    Raises:
      ValueError: for a number out of range, or if no task fits into the longest prompt.
    """

    tasks: ClassVar[Sequence[type[LongContextTask]]]

    def __init__(
        self,
        model: DecoderLM,
        documents: Sequence[Document],
        codec: TextCodec,
        *,
        train_length: int,
        multiple: int = 4,
        max_length: int | None = None,
        num_depths: int = 5,
        samples: int = 2,
        batch_size: int = 8,
        chunk: int = CHUNK,
        standard: int = 0,
        seed: int = 0,
    ):
        for name, value in (
            ("train_length", train_length),
            ("multiple", multiple),
            ("max_length", 1 if max_length is None else max_length),
            ("num_depths", num_depths),
            ("samples", samples),
            ("batch_size", batch_size),
            ("chunk", chunk),
        ):
            if value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        wanted = multiple * train_length if max_length is None else max_length
        longest = capacity(model.config, wanted + answer_room(1)) - answer_room(1)
        texts = (codec.decode(document.tokens) for document in documents)
        haystack = Haystack(texts, max(_HAYSTACK_CHARS, 8 * wanted))
        depths = np.linspace(0, 1, num_depths).tolist() if num_depths > 1 else [0.5]
        self._model, self._codec, self._is_line = model, codec, not standard
        self._batch_size = batch_size
        self.questions: list[Question] = []
        for length in _lengths(train_length, longest):
            for task in self.tasks:
                task = task(haystack, lambda text: len(codec.encode(text)), seed, bool(standard))
                found = _samples(task, length, depths, samples)
                self.questions += [_question(codec, sample) for sample in found]
        if not self.questions:
            raise ValueError(f"no question fits into the {longest} tokens of the longest prompt; raise max_length")
        self._longest = longest  # not of these prompts: evaluators of one length share their programs
        self._chunk = min(chunk, *(question.sample.length for question in self.questions))

    def __call__(self, params: Mapping[str, Any]) -> dict[str, float]:
        """See the class."""
        questions = sorted(self.questions, key=lambda item: len(item.prompt))
        room = answer_room(max(len(question.target) for question in questions) + _SLACK)
        reader = Reader(
            self._model, params, batch_size=self._batch_size, max_length=self._longest + room, chunk=self._chunk
        )
        values: dict[str, list[float]] = {}
        for begin in range(0, len(questions), self._batch_size):
            for key, value in self._answer(reader, questions[begin : begin + self._batch_size]):
                values.setdefault(key, []).append(value)
        return {key: float(np.mean(values[key])) for key in sorted(values, key=_order)}

    def _answer(self, reader, batch: Sequence[Question]):
        """(metric, value) pairs, several for each question."""
        prefix = reader.read([question.prompt for question in batch])
        scores = reader.score(prefix, [question.target for question in batch])
        generated = reader.generate(prefix, max(len(question.target) for question in batch) + _SLACK)
        for (sample, _, _), (losses, is_greedy), new in zip(batch, scores, generated):
            text = self._codec.tokenizer.decode(new)
            text = text.strip().split("\n")[0] if self._is_line else text  # what follows is another line of the text
            share = float(np.mean([is_answered(text, answer) for answer in sample.answers]))
            key = f"{sample.task}/{sample.length}"
            if sample.depth is not None:
                yield f"{key}/{sample.depth:.2f}", share
            yield key, share
            yield f"exact/{key}", float(is_greedy.all())
            yield f"loss/{key}", float(losses.mean())


class NeedleInHaystack(LongContext):
    """A number in a sentence that is hidden in the documents, at every depth."""

    tasks = (Needle,)


class Ruler(LongContext):
    """Tasks in the manner of RULER: several needles, chains of variables, counting words."""

    tasks = RULER_TASKS


class Babilong(LongContext):
    """Stories of one, two and three supporting facts among the lines of the documents."""

    tasks = BABILONG_TASKS


class PhoneBookLookup(LongContext):
    """One name of a list of names and numbers, at every depth."""

    tasks = (PhoneBook,)


def is_answered(text: str, answer: str) -> bool:
    """Whether whole words of `text` are `answer`, whatever the case, punctuation and grouping of digits."""
    return f" {normalised(answer)} " in f" {normalised(text)} "


def normalised(text: str) -> str:
    """Lower-case words and numbers with single spaces; `1,234` and `555-1234` lose what is between their digits."""
    text = re.sub(r"(?<=\d)(,(?=\d{3}(?!\d))|-(?=\d))", "", text.lower())
    return " ".join(re.findall(r"\w+", text))


def _lengths(shortest: int, longest: int) -> list[int]:
    """The longest, half of it and so on, down to the shortest, in increasing order."""
    lengths = [longest] if longest > 0 else []
    while lengths and lengths[0] // 2 >= shortest:
        lengths.insert(0, lengths[0] // 2)
    return lengths


def _samples(task: LongContextTask, length: int, depths: Sequence[float], number: int) -> list[Sample]:
    """`number` samples for each depth, or none at all where most are longer than `length`."""
    found: list[Sample] = []
    grid = [(depth, number) for depth in depths] if task.has_depth else [(None, number * len(depths))]
    for cell, (depth, wanted) in enumerate(grid):
        size = len(found) + wanted
        for index in range(4 * cell * wanted, 4 * (cell + 1) * wanted):  # the questions differ in length
            try:
                found.append(task(index, length, depth))
            except TooShort:
                continue
            if len(found) == size:
                break
        else:
            return []
    return found


def _question(codec: TextCodec, sample: Sample) -> Question:
    """Ids of the prompt and of its answer; a token that joins both belongs to the answer."""
    prompt, whole = codec.encode(sample.prompt), codec.encode(sample.prompt + sample.target)
    size = min(len(prompt), len(whole) - 1)
    is_same = prompt[:size] == whole[:size]
    size = size if is_same.all() else max(int(np.argmin(is_same)), 1)
    return Question(sample, whole[:size], whole[size:])


def _order(key: str) -> tuple[bool, str, int, str]:
    """Accuracies first; lengths as numbers."""
    kind, *parts = key.split("/")
    is_other = kind in ("exact", "loss")
    task, length, *depth = parts if is_other else [kind, *parts]
    return is_other, f"{kind}/{task}", int(length), "".join(depth) or "~"
