"""What a training step minimises: `objective(params, batch, rng, *frozen) -> (sum to minimise, metrics)`.

The sum is divided by the weight of metrics["loss"] after all sums are reduced; metrics are (sum, weight) pairs. What is
frozen, the parameters of a teacher, goes into the step as an argument and is not differentiated.
"""

import jax
import jax.numpy as jnp

from path_jax.data.batch import Batch
from path_jax.models import DecoderLM
from path_jax.nn.taps import is_tap
from path_jax.training.losses import next_token_loss, teacher_divergence


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


def distillation(model: DecoderLM, teacher: DecoderLM, *, chunk_size: int = 0):
    """KL divergence from the teacher's next-token distributions, averaged over the tokens that count."""

    def objective(params, batch: Batch, rng, teacher_params):
        del rng
        arguments = dict(positions=batch.positions, segment_ids=batch.segment_ids)
        run = lambda model, params: model.apply({"params": params}, batch.tokens, **arguments).hidden
        unembed = lambda model, params: lambda hidden: model.apply({"params": params}, hidden, method="unembed")
        loss, weight = teacher_divergence(
            unembed(model, params), run(model, params),
            unembed(teacher, teacher_params), run(teacher, teacher_params),
            batch.weights, chunk_size=chunk_size,
        )  # fmt: skip
        return loss, {"loss": (loss, weight)}

    return objective


def mixer_imitation(model: DecoderLM, teacher: DecoderLM):
    """Squared error of every mixer on the teacher's inputs to it, relative to the teacher's output, mean over layers.

    1 is what an output of zeros would have. Metrics also have the error of each layer, `layer_0` and so on.
    """
    config = model.config

    def objective(params, batch: Batch, rng, teacher_params):
        del rng
        arguments = dict(positions=batch.positions, segment_ids=batch.segment_ids)
        _, captured = teacher.apply(
            {"params": teacher_params}, batch.tokens, **arguments, capture_intermediates=is_tap, mutable="intermediates"
        )
        weights = batch.weights[..., None]

        def error(params, layer, index=0):
            x, expected = (layer[name]["__call__"][0] for name in ("mixer_in", "mixer_out"))
            actual, _ = config.make_mixer(index).apply({"params": params["mixer"]}, x, **arguments)
            squares = lambda x: jnp.sum(weights * jnp.square(x.astype(jnp.float32)))
            return squares(actual.astype(jnp.float32) - expected) / jnp.maximum(squares(expected), 1e-30)

        layers = captured["intermediates"]
        if config.scan_layers:
            errors = jax.lax.map(lambda pair: error(*pair), (params["layers"], layers["layers"]))
        else:
            names = [f"layers_{i}" for i in range(config.num_layers)]
            errors = jnp.stack([error(params[name], layers[name], i) for i, name in enumerate(names)])
        # Weighted by tokens, so that micro-batches add up.
        weight = batch.weights.sum()
        metrics = {f"layer_{i}": (weight * errors[i], weight) for i in range(config.num_layers)}
        return weight * errors.mean(), metrics | {"loss": (weight * errors.mean(), weight)}

    return objective
