"""Errors on synthetic tasks: counted right, with honest intervals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from path_jax.data import DataConfig, TaskStream, make_corpus
from path_jax.evaluation.runner import make_evaluators
from path_jax.evaluation.task_accuracy import TaskAccuracy, wilson_interval
from path_jax.models import DecoderLM, ModelConfig
from path_jax.models.decoder_lm import LMOutput

DATA = DataConfig(source="task", task="flip_flop", sequence_length=32)


class Oracle:
    """Stands in for a model: repeats the last written bit, or, with `params`, the bit of the last instruction."""

    config = ModelConfig(vocab_size=5, num_layers=1, embed_dim=8, num_heads=1)

    def apply(self, variables, tokens, **_):
        instruction, bit = tokens[:, ::2], tokens[:, 1::2]
        before = jnp.pad(bit, [(0, 0), (1, 0)])[:, :-1]
        place = jnp.arange(bit.shape[1])
        written = jax.lax.cummax(jnp.where(instruction == 0, place, 0), axis=1)
        right = jnp.take_along_axis(bit, written, axis=1)
        answer = jnp.where(variables["params"]["forgets"], before, right)
        return LMOutput(jax.nn.one_hot(jnp.repeat(answer, 2, axis=1), 5), None)


def test_a_model_that_knows_makes_no_error():
    evaluate = TaskAccuracy(Oracle(), make_corpus(DATA).heldout, num_scored=1000, batch_size=50)
    metrics = evaluate({"forgets": jnp.asarray(False)})
    for variant in ("in_distribution", "sparse", "dense"):
        assert metrics[f"{variant}/errors"] == metrics[f"{variant}/error"] == metrics[f"{variant}/error_low"] == 0
        assert 1000 <= metrics[f"{variant}/scored"] < 1000 + 50 * 16
        assert 0 < metrics[f"{variant}/error_high"] < 0.004


def test_errors_have_their_levels():
    """Repeating the bit before is right one instruction after the write, and half the time later."""
    evaluate = TaskAccuracy(Oracle(), make_corpus(DATA).heldout, num_scored=4000, batch_size=100)
    metrics = evaluate({"forgets": jnp.asarray(True)})
    assert metrics["in_distribution/error/1-1 back"] == 0
    assert abs(metrics["in_distribution/error/4-7 back"] - 0.5) < 0.1
    low, error, high = (metrics[f"sparse/{name}"] for name in ("error_low", "error", "error_high"))
    assert low < error < high and error == metrics["sparse/errors"] / metrics["sparse/scored"]


def test_wilson_interval():
    """Ends where the observed share is 1.96 standard errors of the assumed one away."""
    for errors, scored in ((3, 50), (0, 200), (200, 200)):
        for end in wilson_interval(errors, scored):
            if 0 < end < 1:
                half = 1.959964 * np.sqrt(end * (1 - end) / scored)
                assert abs(errors / scored - end) == pytest.approx(half, abs=1e-6)


def test_heldout_examples_are_others():
    corpus = make_corpus(DATA)
    train, heldout = (side.batch(np.arange(64)).tokens for side in (corpus.train, corpus.heldout))
    assert isinstance(corpus.train, TaskStream) and (train != heldout).any(1).all()
    other = make_corpus(DataConfig(source="task", task="flip_flop", sequence_length=32, seed=1))
    assert (other.train.batch(np.arange(64)).tokens != heldout).any(1).all()


def test_evaluators_of_text_and_of_tasks_do_not_mix():
    model = DecoderLM(Oracle.config)
    with pytest.raises(ValueError, match="perplexity reads text.*use task"):
        make_evaluators({"perplexity": {}}, model, make_corpus(DATA), 32)
    text = DataConfig(sequence_length=32)
    wide = DecoderLM(ModelConfig(vocab_size=257, num_layers=1, embed_dim=8, num_heads=1))
    with pytest.raises(ValueError, match="scores a synthetic task"):
        make_evaluators({"task": {}}, wide, make_corpus(text), 32)


@pytest.mark.parametrize(
    "options, reason",
    [
        (dict(source="task"), "data.task is ''"),
        (dict(task="flip_flop"), "go with source 'task'"),
        (dict(source="task", task="chess"), "task 'chess' is unknown; choose from flip_flop"),
        (dict(source="task", task="flip_flop", task_options={"size": 3}), "has no size; it has ignore"),
        (dict(source="task", task="flip_flop", task_options={"ignore": 2.0}), "ignore=2.0 must be in"),
        (dict(source="task", task="flip_flop", sequence_length=33), "length=33 must be even"),
    ],
)
def test_settings_that_do_not_fit_are_named(options, reason):
    with pytest.raises(ValueError, match=reason):
        DataConfig(**options)
