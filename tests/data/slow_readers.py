"""Answers to synthetic tasks by reading a row token by token; the tests compare the tasks with them."""

import itertools
import re

import numpy as np

from path_jax.data import as_text
from path_jax.data.boxes import Boxes
from path_jax.data.code_variables import CodeVariables
from path_jax.data.flip_flop import READ, WRITE, FlipFlop
from path_jax.data.group_words import GroupWords
from path_jax.data.motif import Motif
from path_jax.data.recall import FORGET, NONE, MultiQueryRecall, RepeatedRecall


def halvings(distance):
    return distance.bit_length() - 1


def flip_flop_answers(task, tokens):
    for t, token in enumerate(tokens):
        if token == WRITE:
            written = t
        if token == READ:
            yield t, tokens[written + 1], halvings((t - written) // 2)


def permutations_of(group):
    elements = list(itertools.permutations(range(int(group[1:]))))
    sign = lambda p: np.linalg.det(np.eye(len(p))[list(p)])
    return [p for p in elements if group[0] == "s" or sign(p) > 0]


def group_answers(task, tokens):
    if task.group == "z5":
        assert set(tokens) <= {0, 1}
        for t in range(len(tokens)):
            yield t, sum(tokens[: t + 1]) % 5, halvings(t + 1)
        return
    elements = permutations_of(task.group)
    product = tuple(range(len(elements[0])))
    first = int(task.start)
    assert all(token == len(elements) for token in tokens[:first])
    for t, token in enumerate(tokens[first:], first):
        if task.generators == "swaps":
            assert sum(i != x for i, x in enumerate(elements[token])) == 2
        if task.generators == "involutions":
            twice = tuple(elements[token][i] for i in elements[token])
            assert twice == tuple(range(len(twice))) != elements[token]
        product = tuple(product[i] for i in elements[token])
        yield t, elements.index(product), halvings(t + 1 - first)


def repeated_answers(task, tokens):
    history = {}
    for t in range(0, len(tokens), 2):
        writings = history.setdefault(tokens[t], [])
        if len(writings) >= task.back:
            written = writings[-task.back]
            yield t, tokens[written + 1], halvings((t - written) // 2)
        writings.append(t)


def multi_query_answers(task, tokens):
    first_key = task.vocab_size - task.num_values - task.num_key_tokens
    is_key = lambda token: first_key <= token < first_key + task.num_key_tokens
    memory = {}
    for t, token in enumerate(tokens):
        if t < task.num_written:
            if t % 2 and token == FORGET:
                del memory[tokens[t - 1]]
            elif t % 2:
                assert tokens[t - 1] not in memory
                memory[tokens[t - 1]] = token
        elif is_key(token):
            links = 0
            while is_key(token):
                token, links = memory.get(token, NONE), links + 1
            yield t, token, task.hops if token == NONE else links - 1
        else:
            assert FORGET < token < first_key


def run_program(text):
    """Value and number of copies at each print of a program, the last line of which may be unfinished."""
    variables, printed = {}, []

    def assign(name, expression):
        value, copies = variables.get(expression, (expression, -1))
        variables[name] = value, copies + 1

    for line in text.splitlines(keepends=True):
        if match := re.fullmatch(r"print\((\w)\) # (\d*)\n?", line):
            printed.append(variables[match[1]])
            assert match[2] in ("", printed[-1][0])
        elif match := re.fullmatch(r"(\w) = (\w+)\n", line):
            assign(match[1], match[2])
        elif match := re.fullmatch(r"if (\w) == (\d+): (\w) = (\d+)\n", line):
            if variables[match[1]][0] == match[2]:
                assign(match[3], match[4])
        else:
            assert not line.endswith("\n"), line
    return printed


def follow_story(text):
    """Box and number of changes at each question, the last sentence may be unfinished."""
    place, changes, asked = {}, {}, []
    for line in text.splitlines(keepends=True):
        if match := re.fullmatch(r"Where is the (\w+)\? Box (\d*)(\.\n)?", line):
            asked.append((place[match[1]], changes[match[1]]))
            assert match[2] in ("", asked[-1][0])
        elif match := re.fullmatch(r"The (\w+) is in Box (\d+)\.\n", line):
            place[match[1]], changes[match[1]] = match[2], 0
        elif match := re.fullmatch(r"Move the (\w+) to Box (\d+)\.\n", line):
            place[match[1]], changes[match[1]] = match[2], changes[match[1]] + 1
        elif match := re.fullmatch(r"Swap Box (\d+) and Box (\d+)\.\n", line):
            assert match[1] != match[2]
            other = {match[1]: match[2], match[2]: match[1]}
            for thing in place:
                changes[thing] += place[thing] in other
                place[thing] = other.get(place[thing], place[thing])
        else:
            assert not line.endswith("\n"), line
    return asked


def text_answers(task, tokens):
    run, question = (run_program, ") # ") if isinstance(task, CodeVariables) else (follow_story, "? Box ")
    words, places = task.words, [t for t, token in enumerate(tokens) if task.words[token].endswith(question)]
    for t, (answer, level) in zip(places, run(as_text(words, tokens)), strict=True):
        yield t, words.index(f"{answer}\n" if getattr(task, "pieces", False) else answer), min(level, 3)


def motif_answers(task, tokens):
    """Reads events by their text; an unfinished answer counts as far as it goes."""
    words, size, site = task.words, task.motif_length, {}
    complement = dict(zip("ACGT", "TGCA"))
    places = list(itertools.accumulate((len(words[token]) for token in tokens), initial=0))
    for match in re.finditer(r" (L\d+)(?:=([ACGT]+)|(~)|([/<]) (L\d+)|(\?)([ACGT]*))", as_text(words, tokens)):
        here, written, inverted, sign, there, question, _ = match.groups()
        if written:
            site[here] = written[:size], 0
        elif inverted:
            motif, changes = site[here]
            site[here] = "".join(complement[letter] for letter in reversed(motif)), changes + 1
        elif sign:
            (mine, my_changes), (other, changes) = site[here], site[there]
            site[here] = other, changes + 1
            if sign == "/":
                site[there] = mine, my_changes + 1
        elif question:
            motif, changes = site[here]
            first = places.index(match.start(6))
            for t, letter in enumerate(motif, first):
                if t < len(tokens):
                    yield t, words.index(letter), min(changes, 3)


def slow_answers(task, tokens):
    """{position: (answer, level)}, from the tokens alone."""
    answers = {
        FlipFlop: flip_flop_answers,
        GroupWords: group_answers,
        RepeatedRecall: repeated_answers,
        MultiQueryRecall: multi_query_answers,
        CodeVariables: text_answers,
        Boxes: text_answers,
        Motif: motif_answers,
    }[type(task)]
    return {t: (answer, level) for t, answer, level in answers(task, tokens)}
