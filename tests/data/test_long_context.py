"""Questions about long texts: their answers are there, once, where they should be, and no prompt is too long."""

import re

import pytest

from path_jax.data import ByteTokenizer, vocabulary_tokenizer
from path_jax.data.long_context import BABILONG_TASKS, RULER_TASKS, Haystack, Needle, PhoneBook, TooShort

TASKS = (Needle, *RULER_TASKS, *BABILONG_TASKS, PhoneBook)
TEXTS = [" ".join(f"{a} times {b} is {a * b}." for b in range(9)) + "\n\n  indented" for a in range(40)]
HAYSTACK = Haystack(TEXTS)


def count_bytes(text):
    return 1 + len(ByteTokenizer().encode(text))


@pytest.fixture(scope="module")
def count_learned():
    tokenizers = pytest.importorskip("tokenizers")
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    merges = ["t i", "ti m", "tim e", "time s", "i s", "Ġ times", "Ġ is", "m a", "n u", "o f", "Ġ of"]
    tokenizer = vocabulary_tokenizer(
        model="gpt2", pre="gpt-2", tokens=alphabet + [merge.replace(" ", "") for merge in merges], types=None,
        merges=merges, scores=None, add_bos=False, bos_id=None, add_space_prefix=None,
    )  # fmt: skip
    return lambda text: len(tokenizer.encode(text))


def test_haystack_lines():
    assert Haystack(["a\n\n \nb  ", "c"]).take(1, 5) == ["b", "c", "a", "b", "c"]
    assert max(map(len, HAYSTACK.lines)) <= 120 and "  indented" in HAYSTACK.lines
    assert len(Haystack(TEXTS, max_chars=300).lines) < len(HAYSTACK.lines) / 10
    with pytest.raises(ValueError, match="no line of text"):
        Haystack([" \n"])


def test_the_default_haystack_is_the_standard_library():
    assert any(line.startswith("import ") for line in Haystack(max_chars=10_000).lines)


@pytest.mark.parametrize("standard", [False, True])
@pytest.mark.parametrize("make", TASKS, ids=lambda task: task.name)
def test_prompts_fill_their_length_and_no_more(make, standard, count_learned):
    for count in (count_bytes, count_learned):
        task = make(HAYSTACK, count, standard=standard)
        for length in (900, 2000):
            for index in range(4):
                sample = task(index, length)
                assert 0.7 * length < count(sample.prompt) <= length
                assert sample.target[0] == " " and all(answer in sample.target for answer in sample.answers)
                assert (sample.task, sample.length) == (make.name, length)
                assert sample == task(index, length)
        assert task(0, 900) != task(1, 900) != make(HAYSTACK, count, 1, standard)(1, 900)
    with pytest.raises(TooShort, match=f"{make.name} has at least .* more than 9"):
        make(HAYSTACK, count_bytes)(0, 9)


@pytest.mark.parametrize("make", [task for task in TASKS if task.has_depth], ids=lambda task: task.name)
@pytest.mark.parametrize("depth", [0.0, 0.25, 0.5, 1.0])
def test_the_answer_is_there_once_at_its_depth(make, depth):
    for index in range(3):
        sample = make(HAYSTACK, count_bytes)(index, 3000, depth)
        (answer,) = sample.answers
        assert sample.prompt.count(answer) == 1 and sample.depth == depth
        lines = sample.prompt.split("\n")
        (place,) = [i for i, line in enumerate(lines) if answer in line]
        assert abs(place / (len(lines) - 2) - depth) < 0.1
    with pytest.raises(ValueError, match="depth=1.5"):
        make(HAYSTACK, count_bytes)(0, 500, 1.5)


def test_every_value_of_one_key_and_every_variable_is_asked_for():
    values, variables = (make(HAYSTACK, count_bytes)(5, 1500) for make in RULER_TASKS[1:3])
    assert len(values.answers) == 3 and all(values.prompt.count(x) == 1 for x in values.answers)
    assert [values.prompt.index(x) for x in values.answers] == sorted(values.prompt.index(x) for x in values.answers)
    chain = re.findall(r"^VAR (\w+) = (?:VAR )?(\w+)$", variables.prompt, re.M)
    assert [name for name, _ in chain] == list(variables.answers)
    assert [source for _, source in chain[1:]] == list(variables.answers[:-1]) and chain[0][1].isdigit()


@pytest.mark.parametrize("make", RULER_TASKS[3:], ids=lambda task: task.name)
@pytest.mark.parametrize("length", [300, 1000, 20_000])
def test_the_words_asked_for_are_the_commonest(make, length):
    sample = make(HAYSTACK, count_bytes)(2, length)
    words = sample.prompt.split("\n")[0].split()[1:]
    counts = {word: words.count(word) for word in set(words)}
    assert min(counts[word] for word in sample.answers) > max(
        count for word, count in counts.items() if word not in sample.answers
    )


@pytest.mark.parametrize("make", BABILONG_TASKS, ids=lambda task: task.name)
def test_stories_are_answered_by_whoever_follows_them(make):
    for index in range(60):
        sample = make(HAYSTACK, count_bytes)(index, 1200)
        places, holder, seen = {}, {}, {}
        for line in sample.prompt.split("\n"):
            if match := re.fullmatch(r"(\w+) \w+ to the (\w+)\.", line):
                places[match[1]] = match[2]
                for thing, person in holder.items():
                    if person == match[1]:
                        seen[thing].append(match[2])
            elif match := re.fullmatch(r"(\w+) (?:got|took|picked up) the (\w+) there\.", line):
                person, thing = match.groups()
                assert thing not in holder and seen.get(thing, [places[person]])[-1] == places[person]
                holder[thing] = person
                seen.setdefault(thing, [places[person]])
            elif match := re.fullmatch(r"(\w+) (?:dropped|left) the (\w+) there\.", line):
                assert holder.pop(match[2]) == match[1]
        question = sample.prompt.split("\n")[-1]
        if match := re.match(r"Where is the (\w+)", question):
            expected = seen[match[1]][-1]
        elif match := re.match(r"Where was the (\w+) before the (\w+)", question):
            expected = seen[match[1]][seen[match[1]].index(match[2]) - 1]
        else:
            expected = places[re.match(r"Where is (\w+)", question)[1]]
        assert sample.answers == (expected,)


def test_phone_books_look_up_one_of_many_names():
    sample = PhoneBook(HAYSTACK, count_bytes)(0, 2000, 0.5)
    *book, _, name = sample.prompt.split("\n")
    entries = dict(line.split(": ") for line in book)
    assert len(entries) == len(book) > 50 and len(set(entries.values())) == len(book)
    assert entries[name.rstrip(":")] == sample.answers[0]
