"""Measures cells of `gpu_speed` in JAX: reads them from standard input and prints a line of JSON for each."""

import functools
import json
import os
import statistics
import sys
import time

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # leave memory to the process after this one

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.gpu_worker import NUM_HEADS, TOKENS, answer, measure, say
from pallas_kernels import forgetting_attention, path_attention

TRAINED = "125m"  # size of the model whose training step is measured


def inputs(cell: dict, dtype="bfloat16") -> dict:
    """Random inputs: unit w, beta in (0, 2); forget gates in (0.9, 1), or 0.95 on average where they decay strongly."""
    length, head_dim = cell["length"], cell["head_dim"]
    shape = (max(1, TOKENS // length), length, NUM_HEADS, head_dim)
    keys = jax.random.split(jax.random.key(0), 7)
    q, k, v, w, dout = (jax.random.normal(key, shape) for key in keys[:5])
    most = 0.1 if cell["op"] in ("fox_strong", "fox_pruned") else 0.01
    return {
        **{name: x.astype(dtype) for name, x in (("q", q), ("k", k), ("v", v), ("dout", dout))},
        "w": w / jnp.linalg.norm(w, axis=-1, keepdims=True),
        "beta": jax.random.uniform(keys[5], shape[:3], maxval=2.0),
        "log_forget": -jax.random.uniform(keys[6], shape[:3], maxval=most),
    }


def operation(cell: dict):
    """The function, and the names of the inputs it takes."""
    op, by = cell["op"], cell["by"]
    if by == "cudnn":
        return functools.partial(jax.nn.dot_product_attention, is_causal=True, implementation="cudnn"), ("q", "k", "v")
    if by == "tokamax":
        import tokamax

        return functools.partial(tokamax.dot_product_attention, is_causal=True), ("q", "k", "v")
    if op == "path":
        return functools.partial(path_attention, implementation=by), ("q", "k", "v", "w", "beta")
    if op == "path_fox":
        return functools.partial(path_attention, implementation=by), ("q", "k", "v", "w", "beta", "log_forget")
    prune = "auto" if op == "fox_pruned" else None
    return functools.partial(forgetting_attention, prune=prune, implementation=by), ("q", "k", "v", "log_forget")


def with_gradients(function):
    """(inputs, dout) -> output and gradients of all inputs."""

    def both(arguments, dout):
        out, pull_back = jax.vjp(function, *arguments)
        return out, pull_back(dout)

    return both


def time_cell(cell: dict) -> dict:
    """Time and memory of both directions."""
    function, names = operation(cell)
    values = inputs(cell)
    arguments, dout = tuple(values[name] for name in names), values["dout"]
    del values
    result = {}
    directions = {"forward": lambda arguments, dout: function(*arguments), "both": with_gradients(function)}
    for direction, run in directions.items():
        compiled = jax.jit(run).lower(arguments, dout).compile()
        memory = compiled.memory_analysis()
        result[direction] = measure(functools.partial(compiled, arguments, dout), jax.block_until_ready)
        result[direction]["bytes"] = memory.temp_size_in_bytes + memory.output_size_in_bytes
    return result


def accuracy_cell(cell: dict) -> dict:
    """Largest errors of output and gradients over the largest number, against float32 in XLA."""
    function, names = operation(cell)
    exact = operation(cell | {"by": "xla"})[0]
    values = inputs(cell)
    arguments, dout = tuple(values[name] for name in names), values["dout"]
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), (arguments, dout))
    with jax.default_matmul_precision("highest"):
        expected = jax.jit(with_gradients(exact))(*wide)
    found = jax.jit(with_gradients(function))(arguments, dout)
    error = lambda x, y: float(np.abs(np.float32(x) - np.float32(y)).max() / np.abs(np.float32(y)).max())
    out, gradients = found[0], found[1]
    return {"errors": {"out": error(out, expected[0])} | {
        f"d{name}": error(x, y) for name, x, y in zip(names, gradients, expected[1])
    }}  # fmt: skip


def train_cell(cell: dict) -> dict:
    """Steps of the 125M configuration on 8 rows of random tokens, again and again: the loss must fall."""
    from configs import lm_baselines, lm_path
    from path_jax.data import Batch
    from path_jax.metrics import peak_flops
    from path_jax.mixers import attention
    from path_jax.models import DecoderLM, ModelConfig
    from path_jax.models.decoder_lm import count_parameters
    from path_jax.parallel.mesh import make_mesh
    from path_jax.training.objectives import language_modelling
    from path_jax.training.optim import OptimConfig, make_optimizer
    from path_jax.training.state import sharded_state
    from path_jax.training.step import make_train_step

    configs = lm_path if cell["op"] == "path_fox" else lm_baselines
    config = configs.get_config(f"size={TRAINED},mixer={cell['op']}")
    section = config.model.to_dict()
    if cell["by"] == "cudnn":  # the twin, as a user without this package would run it
        peer = functools.partial(jax.nn.dot_product_attention, is_causal=True, implementation="cudnn")
        attention.forgetting_attention = lambda q, k, v, log_forget, **options: peer(q, k, v)
    else:
        section["implementation"] = cell["by"]
    model = DecoderLM(ModelConfig(**section))
    rows, length, steps = 8, cell["length"], 20
    optimizer = make_optimizer(OptimConfig(lr=1e-3, warmup_steps=1), steps)
    objective = language_modelling(model, z_loss=0.0, chunk_size=config.train.loss_chunk)
    tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, (rows, length + 1), dtype=np.int32)
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), (rows, length))
    ones = np.ones((rows, length))
    batch = Batch(tokens[:, :-1], tokens[:, 1:], ones.astype(np.float32), ones.astype(np.int32), positions)
    mesh = make_mesh({}, jax.devices()[:1])
    with jax.set_mesh(mesh):
        state = sharded_state(model, optimizer, 0, mesh)
        step = jax.jit(make_train_step(objective, optimizer), donate_argnums=0)
        losses, seconds = [], []
        for _ in range(steps):
            start = time.perf_counter()
            state, metrics = step(state, batch)
            total, weight = jax.device_get(metrics["loss"])
            seconds.append(time.perf_counter() - start)
            losses.append(float(total / weight))
    rate = rows * length / statistics.median(seconds[2:])
    flops = model.config.train_flops_per_token(count_parameters(model.config), length)
    peak = peak_flops(jax.devices()[0].device_kind)
    return {"tokens_per_second": rate, "utilisation": peak and rate * flops / peak, "losses": losses}


def main():
    """Introduces itself, then answers cell after cell."""
    device = jax.devices()[0]
    versions = {"jax": jax.__version__, "python": sys.version.split()[0]}
    say({"machine": {"gpu": device.device_kind, "platform": device.client.platform_version} | versions})
    functions = {"time": time_cell, "accuracy": accuracy_cell, "train": train_cell}
    for cell in json.load(sys.stdin):
        answer(functools.partial(functions[cell["kind"]], cell))


if __name__ == "__main__":
    main()
