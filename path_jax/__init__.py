"""Path-JAX: PaTH attention, the Forgetting Transformer and PaTH-FoX; models, training, evaluation."""
