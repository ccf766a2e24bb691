"""The byte models are distributions and match their definition."""

import collections
import math

import numpy as np
import pytest

from path_jax.evaluation.byte_baselines import (
    Order3Model,
    gzip_bits_per_byte,
    order3_bits_per_byte,
)

TEXT = (
    b"the cat sat on the mat; the rat ate the hat that the cat had. "
    b"for each line in the file, the line is read and the words are counted.\n"
) * 8


def reference_log2_prob(train, data):
    """The definition with dictionaries, one byte at a time."""
    successors = collections.defaultdict(collections.Counter)
    for position, byte in enumerate(train):
        for order in range(min(position, 3) + 1):
            successors[train[position - order : position]][byte] += 1

    def probability(context, byte):
        lower = probability(context[1:], byte) if context else 1 / 256
        seen = successors.get(context)
        if not seen:
            return lower
        return (seen[byte] + len(seen) * lower) / (seen.total() + len(seen))

    return [math.log2(probability(data[max(i - 3, 0) : i], b)) for i, b in enumerate(data)]


@pytest.mark.parametrize("train", [TEXT, b"a", b"ab", b"abc", b"abcd", b"\x00" * 9, bytes(range(256)) * 2])
@pytest.mark.parametrize("data", [b"the dog sat", b"\xff\x00\x00\x00\x00zz", b"a"])
def test_equals_the_dictionary_reference(train, data):
    actual = Order3Model.fit(train).log2_prob(data)
    np.testing.assert_allclose(actual, reference_log2_prob(train, data), rtol=1e-12)


@pytest.mark.parametrize("context", [b"", b"t", b"th", b"the", b" th", b"\xff\xfe\xfd", b"q\x00"])
def test_next_byte_probabilities_sum_to_one(context):
    model = Order3Model.fit(TEXT)
    logs = [model.log2_prob(bytes([byte]), context)[0] for byte in range(256)]
    assert sum(2**value for value in logs) == pytest.approx(1, abs=1e-12)
    assert min(logs) > -math.inf


def test_context_argument_continues_a_text():
    model = Order3Model.fit(TEXT)
    data = b"the cat is on the file"
    for cut in (1, 2, 3, 10):
        np.testing.assert_array_equal(model.log2_prob(data[cut:], data[:cut]), model.log2_prob(data)[cut:])


def test_beats_order_zero_and_does_not_adapt():
    train, heldout = TEXT[:900], TEXT[900:] + b"unseen words"
    counts = np.bincount(np.frombuffer(train, np.uint8), minlength=256) + 1
    order0 = -np.log2(counts / counts.sum())[np.frombuffer(heldout, np.uint8)].mean()
    assert order3_bits_per_byte(train, heldout) < 0.7 * order0
    model = Order3Model.fit(train)
    np.testing.assert_array_equal(model.log2_prob(heldout)[:50], model.log2_prob(heldout[:50]))
    # Random bytes cannot be predicted better than uniformly.
    noise = np.random.default_rng(0).bytes(20000)
    assert order3_bits_per_byte(noise[:10000], noise[10000:]) > 7.9


def test_gzip():
    noise = np.random.default_rng(0).bytes(10000)
    assert 8 < gzip_bits_per_byte(noise) < 8.1
    assert gzip_bits_per_byte(TEXT) < 2
    assert gzip_bits_per_byte(TEXT) == gzip_bits_per_byte(TEXT)


def test_empty_input_is_refused():
    for call in (
        lambda: gzip_bits_per_byte(b""),
        lambda: order3_bits_per_byte(b"", b"a"),
        lambda: order3_bits_per_byte(b"a", b""),
    ):
        with pytest.raises(ValueError, match="0 bytes"):
            call()
