"""Cross-entropy and z-loss against NumPy, whole and in chunks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from path_jax.training.losses import next_token_loss


@pytest.fixture
def inputs():
    rng = np.random.default_rng(0)
    hidden = rng.standard_normal((2, 13, 8)).astype(np.float32)
    kernel = rng.standard_normal((8, 11)).astype(np.float32)
    return hidden, kernel, rng.integers(0, 11, (2, 13)), rng.integers(0, 2, (2, 13)).astype(np.float32)


def test_sums_equal_numpy(inputs):
    hidden, kernel, targets, weights = inputs
    logits = (hidden @ kernel).astype(np.float64)
    log_partition = np.log(np.exp(logits).sum(-1))
    nll = log_partition - np.take_along_axis(logits, targets[..., None], -1)[..., 0]
    sums = next_token_loss(lambda h: h @ kernel, jnp.asarray(hidden), targets, weights)
    np.testing.assert_allclose(
        sums, [(nll * weights).sum(), (log_partition**2 * weights).sum(), weights.sum()], rtol=1e-5
    )


@pytest.mark.parametrize("chunk_size", [1, 4, 13, 50])
def test_chunks_change_neither_loss_nor_gradient(inputs, chunk_size):
    hidden, kernel, targets, weights = inputs

    def loss(hidden, kernel, chunk_size):
        sums = next_token_loss(lambda h: h @ kernel, hidden, targets, weights, chunk_size=chunk_size)
        return sums[0] + 1e-2 * sums[1]

    whole = jax.value_and_grad(loss, argnums=(0, 1))(hidden, kernel, 0)
    chunked = jax.value_and_grad(loss, argnums=(0, 1))(hidden, kernel, chunk_size)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), whole, chunked)


def test_logits_of_one_chunk_at_a_time(inputs):
    """No array of the chunked loss, forward or backward, has the size of all the logits."""
    _, _, targets, weights = inputs
    hidden = jnp.zeros((2, 13, 8))
    loss = lambda hidden, kernel: next_token_loss(lambda h: h @ kernel, hidden, targets, weights, chunk_size=2)[0]
    text = str(jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(hidden, jnp.zeros((8, 101))))
    assert "2,2,101]" in text and "2,13,101]" not in text and "7,2,2,101]" not in text
