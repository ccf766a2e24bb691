"""Synthetic tasks: examples by number, answers that a slow reading of the row finds too, and fair draws."""

import dataclasses
import re

import numpy as np
import pytest
from data.slow_readers import slow_answers

from path_jax.data import TASKS, Batch, TaskStream, as_batch, as_text, make_task
from path_jax.data.boxes import Boxes
from path_jax.data.code_variables import CodeVariables
from path_jax.data.draws import Draws
from path_jax.data.examples import Examples, cut_examples
from path_jax.data.flip_flop import IGNORE, ONE, READ, WRITE, ZERO, FlipFlop
from path_jax.data.group_words import GroupWords
from path_jax.data.motif import Motif
from path_jax.data.recall import MultiQueryRecall, RepeatedRecall

NUM_ROWS = 200
CASES = {
    "flip_flop": FlipFlop(64),
    "flip_flop_dense": FlipFlop(32, ignore=0.1),
    "flip_flop_every_token": FlipFlop(32, every_token=True),
    "group_words_a5": GroupWords(24),
    "group_words_s4": GroupWords(24, "s4"),
    "group_words_steps": GroupWords(33, "z5", generators=2),
    "group_words_swaps": GroupWords(18, "s4", generators="swaps", start=True),
    "group_words_involutions": GroupWords(18, "a5", generators="involutions", start=True),
    "mqrar": RepeatedRecall(64, num_keys=6, num_key_tokens=16, num_values=8),
    "mqrar_3_back": RepeatedRecall(96, num_keys=7, num_key_tokens=7, num_values=5, back=3),
    "mqar": MultiQueryRecall(64, num_pairs=8, num_key_tokens=32, num_values=16),
    "mqar_random_filler": MultiQueryRecall(50, num_pairs=5, num_key_tokens=20, num_values=10, num_fillers=4, power=1.0),
    "mqar_forget": MultiQueryRecall(64, num_pairs=8, num_key_tokens=8, num_values=8, forget=0.5),
    "mqar_hops": MultiQueryRecall(48, num_pairs=11, num_key_tokens=20, num_values=20, hops=4),
    "mqar_all": MultiQueryRecall(64, num_pairs=11, num_key_tokens=20, num_values=9, forget=0.3, hops=3, num_fillers=2),
    "code_variables": CodeVariables(128),
    "code_variables_wide": CodeVariables(150, num_variables=26, num_values=12, copies=0.2, conditions=0.4, prints=0.4),
    "code_variables_pieces": CodeVariables(96, num_variables=4, num_values=8, pieces=True),
    "boxes": Boxes(160),
    "motif": Motif(128),
    "motif_long": Motif(96, num_loci=2, motif_length=5, copies=0.2, exchanges=0.0, spacer_length=7, spacers=0.2),
    "motif_letters": Motif(70, num_loci=9, motif_length=1, inversions=0.4, spacers=0.05, spacer_length=1),
    "boxes_few": Boxes(81, num_objects=1, num_boxes=2, moves=0.1, swaps=0.6, questions=0.3),
}
each_case = pytest.mark.parametrize("task", CASES.values(), ids=CASES)


def examples_of(task, count=NUM_ROWS, seed=3):
    return task.examples(seed, np.arange(count))


@each_case
def test_examples_do_not_depend_on_the_batch(task):
    """Any order, any company, repeated, alone, far away."""
    together = task.examples(5, np.arange(12))
    order = np.array([7, 0, 11, 7, 3])
    for whole, part, one in zip(together, task.examples(5, order), task.examples(5, order[:1])):
        np.testing.assert_array_equal(whole[order], part)
        np.testing.assert_array_equal(part[:1], one)
    far = task.examples(5, np.array([2**40, 2**40 + 1]))
    assert not (far.tokens[0] == far.tokens[1]).all()


@each_case
def test_seeds_and_numbers_give_different_rows(task):
    first, second = (examples_of(task, 50, seed).tokens for seed in (0, 1))
    assert len(np.unique(np.concatenate([first, second]), axis=0)) > 90


@each_case
def test_shapes_types_and_ranges(task):
    rows = examples_of(task)
    assert [x.dtype.name for x in rows] == ["int32", "int32", "float32", "int32"]
    assert {x.shape for x in rows} == {(NUM_ROWS, task.length)}
    for ids in rows.tokens, rows.targets:
        assert ids.min() >= 0 and ids.max() < task.vocab_size
    assert set(np.unique(rows.weights)) <= {0.0, 1.0}
    assert rows.weights.sum() > NUM_ROWS
    assert rows.level.min() == 0 and rows.level.max() < len(task.levels)
    assert not rows.level[rows.weights == 0].any()
    assert all(re.fullmatch(r"[\w+\- ]+", name) for name in task.levels) and len(set(task.levels)) == len(task.levels)
    is_next = rows.targets[:, :-1] == rows.tokens[:, 1:]
    assert is_next[rows.weights[:, :-1] == 0].all()
    assert all(len(x) == 0 for x in examples_of(task, 0))


@each_case
def test_answers_are_right(task):
    rows = examples_of(task)
    for tokens, targets, weights, level in zip(*(x.tolist() for x in rows)):
        expected = slow_answers(task, tokens)
        if hasattr(task, "words"):
            expected.pop(task.length - 1, None)  # the text ends before its answer
        if not getattr(task, "every_token", False):
            assert [t for t, weight in enumerate(weights) if weight] == sorted(expected)
        assert {t: (targets[t], level[t]) for t in expected} == expected


@each_case
def test_answers_are_determined_by_the_tokens_before(task):
    for tokens, targets, weights in zip(*(x.tolist() for x in examples_of(task, 4)[:3])):
        for t in np.flatnonzero(weights):
            answers = slow_answers(task, tokens[: t + 1])
            if t in answers:  # not so where every token is scored
                assert answers[t][0] == targets[t]
            else:
                assert task.every_token


@each_case
def test_variants_share_a_vocabulary(task):
    variants = task.variants()
    only_answers = {"every_token": False} if isinstance(task, FlipFlop) else {}
    assert variants["in_distribution"] == dataclasses.replace(task, **only_answers)
    for name, variant in variants.items():
        assert variant.vocab_size == task.vocab_size, name
        assert getattr(variant, "words", None) == getattr(task, "words", None)
        rows = examples_of(variant, 3)
        assert rows.tokens.shape == (3, variant.length) and rows.tokens.max() < task.vocab_size
        assert rows.level.max() < len(variant.levels)


@pytest.mark.parametrize("name", TASKS)
def test_settings_have_defaults(name):
    task = make_task(name, 256, {})
    assert task == TASKS[name](length=256)
    assert {"in_distribution"} < set(task.variants())
    assert type(task) in set(map(type, CASES.values())) or name in ("ar", "atr", "records")  # tested in their own files


@pytest.mark.parametrize(
    "name, length, options, message",
    [
        ("flip_flop", 7, {}, "length=7"),
        ("flip_flop", 8, {"ignore": 1.5}, "ignore=1.5"),
        ("group_words", 0, {}, "length=0"),
        ("group_words", 8, {"group": "a9"}, "a9"),
        ("group_words", 8, {"group": "s3", "generators": 7}, "generators=7"),
        ("group_words", 8, {"group": "s3", "generators": "cycles"}, "generators='cycles'"),
        ("group_words", 8, {"group": "a5", "generators": "swaps"}, "has no swaps"),
        ("group_words", 8, {"group": "z7", "generators": "involutions"}, "has no involutions"),
        ("group_words", 1, {"start": True}, "length=1"),
        ("mqrar", 65, {}, "length=65"),
        ("mqrar", 4, {"back": 2}, "length=4"),
        ("mqrar", 64, {"back": 0}, "back=0"),
        ("mqrar", 64, {"num_keys": 65, "num_key_tokens": 64}, "num_keys=65.*num_key_tokens=64"),
        ("mqrar", 64, {"num_values": 0}, "num_values=0"),
        ("mqar", 62, {}, "length=62"),
        ("mqar", 64, {"forget": 0.25}, "length=64.*72"),
        ("mqar", 256, {"forget": -0.1}, "forget=-0.1"),
        ("mqar", 256, {"power": 0}, "power=0"),
        ("mqar", 256, {"num_fillers": 0}, "num_fillers=0"),
        ("mqar", 256, {"num_pairs": 0}, "num_pairs=0"),
        ("mqar", 256, {"hops": 17}, "hops=17"),
        ("mqar", 256, {"num_key_tokens": 15}, "num_key_tokens=15"),
        ("mqar", 256, {"num_values": 7, "hops": 2}, "8 .*num_values=7"),
        ("code_variables", 24, {}, "length=24.*25"),
        ("code_variables", 256, {"num_variables": 27}, "num_variables=27"),
        ("code_variables", 256, {"num_values": 1}, "num_values=1"),
        ("code_variables", 256, {"copies": 0.7}, "copies=0.7"),
        ("code_variables", 256, {"prints": -0.2}, "prints=-0.2"),
        ("boxes", 34, {}, "length=34.*35"),
        ("boxes", 256, {"num_objects": 27}, "num_objects=27"),
        ("boxes", 256, {"num_boxes": 1}, "num_boxes=1"),
        ("boxes", 256, {"swaps": 0.9}, "swaps=0.9"),
        ("boxes", 256, {"sizes": 3}, "sizes"),
        ("motif", 29, {}, "length=29.*30"),
        ("motif", 256, {"num_loci": 1}, "num_loci=1"),
        ("motif", 256, {"motif_length": 0}, "motif_length=0"),
        ("motif", 256, {"spacer_length": 0}, "spacer_length=0"),
        ("motif", 256, {"spacers": 0.6}, "spacers=0.6"),
        ("motif", 256, {"copies": -0.1}, "copies=-0.1"),
        ("chess", 256, {}, "chess"),
    ],
)
def test_bad_settings_are_named(name, length, options, message):
    with pytest.raises(ValueError, match=message):
        make_task(name, length, options)


def test_the_sides_of_a_stream_differ_and_make_batches():
    task, index = CASES["boxes"], np.arange(4)
    train, heldout = (TaskStream(task, seed=2, is_heldout=side) for side in (False, True))
    sides = [train.examples(index).tokens, heldout.examples(index).tokens, TaskStream(task, 3).examples(index).tokens]
    assert len(np.unique(np.concatenate(sides), axis=0)) == 12
    batch = train.batch(index)
    assert isinstance(batch, Batch)
    np.testing.assert_array_equal(batch.tokens, sides[0])
    np.testing.assert_array_equal(batch.positions, np.broadcast_to(np.arange(160), (4, 160)))
    assert (batch.segment_ids == 1).all()


def test_padding_is_no_part_of_a_document():
    rows = Examples(*(np.array([[4, 2, -1]], np.int32) for _ in range(2)), np.ones((1, 3), np.float32), None)
    batch = as_batch(rows)
    assert [x.tolist() for x in (batch.tokens, batch.targets, batch.segment_ids, batch.positions)] == [
        [[4, 2, 0]],
        [[4, 2, 0]],
        [[1, 1, 0]],
        [[0, 1, 0]],
    ]


def test_cut_examples_closes_gaps_and_drops_questions_without_an_answer():
    tokens = np.array([[5, -1, 6, 7, -1, 8], [1, 2, -1, -1, 3, 4]])
    rows = cut_examples(tokens, np.isin(tokens, [6, 7, 2]), tokens, 3)
    np.testing.assert_array_equal(rows.tokens, [[5, 6, 7], [1, 2, 3]])
    np.testing.assert_array_equal(rows.targets, [[6, 7, 7], [2, 3, 3]])
    np.testing.assert_array_equal(rows.weights, [[0, 1, 0], [0, 1, 0]])
    np.testing.assert_array_equal(rows.level, [[0, 6, 0], [0, 2, 0]])


def assert_shares(counts, shares):
    """Counts of independent draws, within 4 standard deviations."""
    counts, shares = np.asarray(counts), np.asarray(shares)
    total = counts.sum()
    assert (abs(counts - total * shares) < 4 * np.sqrt(total * shares * (1 - shares)) + 1e-9).all(), counts / total


@pytest.mark.parametrize("ignore", [0.8, 0.98, 0.1])
def test_flip_flop_shares(ignore):
    tokens = examples_of(FlipFlop(128, ignore=ignore), 500).tokens
    assert (tokens[:, 0] == WRITE).all() and (tokens[:, -2] == READ).all()
    inside = tokens[:, 2:-2:2]
    rest = (1 - ignore) / 2
    assert_shares([(inside == kind).sum() for kind in (WRITE, READ, IGNORE)], [rest, rest, ignore])
    bits = tokens[:, 1::2][tokens[:, ::2] != READ]
    assert_shares([(bits == bit).sum() for bit in (ZERO, ONE)], [0.5, 0.5])


def test_sentence_and_statement_shares():
    task = Boxes(500, moves=0.15, swaps=0.25, questions=0.35)
    opening = examples_of(task).tokens[:, 5 * task.num_objects :: 5] - task.num_objects - task.num_boxes
    assert_shares(np.bincount(opening.ravel()), [0.25, 0.15, 0.25, 0.35])
    task = CodeVariables(1000, copies=0.3, conditions=0.2, prints=0.1)
    lines = "".join(
        as_text(task.words, row[4 * task.num_variables :]).rsplit("\n", 1)[0] + "\n" for row in examples_of(task).tokens
    )
    count = lambda pattern: len(re.findall(pattern, lines, re.MULTILINE))
    counts = [count(r"^\w = \d"), count(r"^\w = [a-z]"), count(r"^if"), count(r"^print")]
    np.testing.assert_allclose(np.array(counts) / sum(counts), [0.4, 0.3, 0.2, 0.1], atol=0.01)


def test_motif_shares_and_answers():
    """Events have their shares, and all letters are equally likely as answers, whatever was done to the motif."""
    task = Motif(600, inversions=0.3, exchanges=0.05, copies=0.15, questions=0.25, spacers=0.1)
    rows = examples_of(task, 400)
    text = "".join(as_text(task.words, row[5 * task.num_loci :]) for row in rows.tokens)
    counts = [text.count(sign) for sign in "~/<?="]
    assert_shares(counts, np.array([0.3, 0.05, 0.15, 0.25, 0.15]) / 0.9)
    first = rows.tokens == task.words.index("?")
    for level in range(4):
        answers = rows.targets[first & (rows.weights > 0) & (rows.level == level)]
        np.testing.assert_allclose(np.bincount(answers, minlength=4) / len(answers), 0.25, atol=0.04)


def test_questions_follow_the_power_law():
    """The first pair draws its place first, with these weights."""
    task = MultiQueryRecall(64, num_pairs=4, num_key_tokens=8, num_values=8, power=0.2)
    tokens = examples_of(task, 4000).tokens
    place = (tokens[:, task.num_written :: 2] == tokens[:, :1]).argmax(axis=1)
    weights = np.arange(1, 29) ** -0.8
    assert_shares(np.bincount(place, minlength=28), weights / weights.sum())


@pytest.mark.parametrize("task", [CASES["mqar"], CASES["mqar_forget"], CASES["mqrar_3_back"]], ids=str)
def test_keys_are_uniform(task):
    first_key = 0 if isinstance(task, RepeatedRecall) else task.vocab_size - task.num_values - task.num_key_tokens
    keys = examples_of(task, 2000).tokens[:, :16:2] - first_key
    assert_shares(
        np.bincount(keys[:, 0], minlength=task.num_key_tokens), np.full(task.num_key_tokens, 1 / task.num_key_tokens)
    )
    if isinstance(task, MultiQueryRecall):
        assert (np.diff(np.sort(keys, axis=1), axis=1) > 0).all()


def test_rows_of_recall_hold_so_many_keys():
    task = RepeatedRecall(768)
    assert {len(set(row[::2])) for row in examples_of(task, 20).tokens} == {task.num_keys}


def test_the_papers_example_of_recall():
    """A 1 B 2 A 3 A 4."""
    tokens = [0, 11, 1, 12, 0, 13, 0, 14]
    assert slow_answers(RepeatedRecall(8), tokens) == {4: (11, 1), 6: (13, 0)}
    assert slow_answers(RepeatedRecall(8, back=2), tokens) == {6: (11, 1)}


def test_text_of_a_program():
    task = CodeVariables(60)
    assert as_text(task.words, [0, 15, 8, 16, 20, 0, 21, 8, 16, -1]) == "a = 3\nprint(a) # 3\n"
    text = as_text(task.words, examples_of(task, 1).tokens[0])
    assert sorted(line[0] for line in text.splitlines()[:5]) == list("abcde")


def test_pieces_spell_the_same_programs():
    words, pieces = (CodeVariables(length, pieces=pieces) for length, pieces in ((200, False), (100, True)))
    for row, pieces_row in zip(examples_of(words, 20).tokens, examples_of(pieces, 20).tokens):
        text = [as_text(task.words, tokens) for task, tokens in ((words, row), (pieces, pieces_row))]
        length = min(map(len, text))
        assert text[0][:length] == text[1][:length]


def test_text_of_a_story():
    task = Boxes(60)
    text = as_text(task.words, examples_of(task, 1).tokens[0])
    assert text.count(".\n") == 12
    assert re.fullmatch(r"(The \w+ is in Box \d\.\n){6}((The|Move|Swap|Where) [^\n]*\d\.\n){6}", text)
    assert len(set(re.findall(r"The (\w+)", text)[:6])) == 6


def test_the_example_of_motifs():
    """The text that the task describes itself with, and its own spelling of a row."""
    task = Motif(60, num_loci=3)
    text = " L0=ACG L1=TTA L2=GAC L0~ L1/ L2CCAT L2< L0 L1?GAC L2?CGT"
    tokens = [task.words.index(word) for word in re.findall(r" L\d|[^ ]", text)]
    assert as_text(task.words, tokens) == text
    answers = slow_answers(task, tokens)
    assert ["".join(task.words[answers[t][0]] for t in sorted(answers))] == ["GACCGT"]
    assert [answers[t][1] for t in sorted(answers)] == [1, 1, 1, 2, 2, 2]
    row = as_text(task.words, examples_of(task, 1).tokens[0])
    assert re.match(r"( L[0-2]=[ACGT]{3}){3}", row) and sorted(re.findall(r"L(\d)=", row)[:3]) == list("012")


@pytest.mark.parametrize(
    "task", [CodeVariables(), Boxes(), Motif(length=128)], ids=["code_variables", "boxes", "motif"]
)
def test_every_level_occurs(task):
    rows = examples_of(task, 300)
    counts = np.bincount(rows.level[rows.weights > 0], minlength=len(task.levels))
    assert (counts > 0.03 * counts.sum()).all()


def test_draws_are_uniform_and_neighbours_independent():
    numbers = Draws(0, np.arange(400)).uniform(500)
    assert 0 <= numbers.min() and numbers.max() < 1
    assert_shares(np.histogram(numbers, bins=50, range=(0, 1))[0], np.full(50, 1 / 50))
    centred = (numbers - 0.5) * np.sqrt(12)
    pairs = {
        "next draw": (centred[:, :-1], centred[:, 1:]),
        "next example": (centred[:-1], centred[1:]),
        "next draw of the next example": (centred[:-1, :-1], centred[1:, 1:]),
        "previous draw of the next example": (centred[:-1, 1:], centred[1:, :-1]),
        "next seed": (centred, (Draws(1, np.arange(400)).uniform(500) - 0.5) * np.sqrt(12)),
    }
    for name, (left, right) in pairs.items():
        assert abs((left * right).mean()) < 4 / np.sqrt(left.size), name


def test_draws_continue():
    """Later draws are other numbers; their shapes do not matter."""
    index = np.array([3, 1])
    whole, draws = Draws(9, index).uniform(10), Draws(9, index)
    parts = [draws.uniform(2, 2).reshape(2, 4), draws.uniform().reshape(2, 1), draws.uniform(5)]
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), whole)


def test_integers_and_permutations():
    draws = Draws(4, np.arange(3000))
    high = np.array([1, 2, 7])
    numbers = draws.integers(high, 3)
    for i, size in enumerate(high):
        assert_shares(np.bincount(numbers[:, i]), np.full(size, 1 / size))
    orders = draws.permutations(3, 2)
    assert (np.sort(orders, axis=-1) == np.arange(3)).all()
    assert_shares(np.unique(orders.reshape(-1, 3), axis=0, return_counts=True)[1], np.full(6, 1 / 6))
