"""What a training step minimises: `objective(params, batch, rng) -> (sum to minimise, metrics)`.

The sum is divided by the weight of metrics["loss"] after all sums are reduced; metrics are (sum, weight) pairs.
"""

from path_jax.data.batch import Batch
from path_jax.models import DecoderLM
from path_jax.training.losses import next_token_loss


def language_modelling(model: DecoderLM, *, z_loss: float = 0.0, chunk_size: int = 0):
    """Next-token prediction: cross-entropy + z_loss * log_partition^2, averaged over the tokens that count."""

    def objective(params, batch: Batch, rng):
        del rng  # no dropout
        out = model.apply({"params": params}, batch.tokens, positions=batch.positions, segment_ids=batch.segment_ids)
        unembed = lambda hidden: model.apply({"params": params}, hidden, method="unembed")
        loss, squared, weight = next_token_loss(
            unembed, out.hidden, batch.targets, batch.weights, chunk_size=chunk_size
        )
        metrics = {"loss": (loss, weight), "log_partition_squared": (squared, weight)}
        return loss + z_loss * squared, metrics

    return objective
