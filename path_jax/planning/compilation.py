"""The training step of a configuration, compiled for a machine that need not be there. No data is read."""

import dataclasses
import math
import re
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from path_jax.checkpoints import load_config
from path_jax.data.batch import Batch
from path_jax.models import DecoderLM
from path_jax.models.decoder_lm import abstract_params
from path_jax.parallel.sharding import batch_sharding, tree_shardings
from path_jax.planning.topology import Topology, find_devices
from path_jax.training.experiment import Experiment, describe_experiment
from path_jax.training.objectives import distillation, language_modelling, mixer_imitation
from path_jax.training.optim import make_optimizer
from path_jax.training.state import abstract_state
from path_jax.training.step import make_train_step

_UNREAD = "unread"  # stands for files that a plan does not look at


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled step.

    Attributes:
      hlo: text of the optimised program; jaxpr: what was traced; seconds: that the compiler took.
      state: shapes and shardings; frozen_bytes: of a teacher's parameters, on one device.
      argument_bytes, output_bytes, temporary_bytes, code_bytes: of one device; shared_bytes: of the outputs, in the
        place of arguments.
    """

    hlo: str
    jaxpr: Any
    seconds: float
    state: Any
    frozen_bytes: int
    argument_bytes: int
    output_bytes: int
    shared_bytes: int
    temporary_bytes: int
    code_bytes: int

    @property
    def peak_bytes(self) -> int:
        """What one device needs at once."""
        kept = self.argument_bytes + self.output_bytes - self.shared_bytes
        return kept + self.temporary_bytes + self.code_bytes


class OutOfMemory(Exception):
    """The compiler found no way to fit the program into a device.

    Attributes:
      peak_bytes: what it would have needed; buffers: the largest, see `Buffer`.
    """

    def __init__(self, report: str):
        super().__init__(report)
        used = re.search(r"Used ([\d.]+[KMGT]?) of ([\d.]+[KMGT]?) hbm", report)
        self.peak_bytes = parse_size(used.group(1)) if used else None
        self.buffers = largest_allocations(report)


@dataclasses.dataclass(frozen=True)
class Buffer:
    """An array of the program: its bytes on one device, its type, and the operation of the model that makes it."""

    bytes: int
    shape: str
    source: str


def describe(config: Mapping[str, Any], topology: Topology) -> Experiment:
    """The experiment of a resolved configuration on a machine; files that it names need not be there.

    Raises:
      ValueError: for what does not fit, naming it.
    """
    config = dict(config)
    data = config.get("data", {})
    if not data.get("path", "") and data.get("source") in ("files", "tokens", "tfds"):
        config["data"] = dict(data) | {"path": _UNREAD}
    if "conversion" in config and not config["conversion"].get("teacher"):
        config["conversion"] = dict(config["conversion"]) | {"teacher": _UNREAD}
    return describe_experiment(config, find_devices(topology))


def compile_step(experiment: Experiment, topology: Topology, batch_size: int) -> Program:
    """Compiles the step for a global batch of `batch_size` rows.

    Raises:
      OutOfMemory: it does not fit, where the compiler knows the memory.
      ValueError: the batch does not divide over the mesh, or a kernel refuses the model.
    """
    mesh, train, data = experiment.mesh, experiment.train, experiment.data
    conversion = experiment.conversion
    optimizer = make_optimizer(experiment.optim, train.num_steps, conversion and conversion.trained)
    with jax.set_mesh(mesh):
        state = abstract_state(experiment.model, optimizer, train.seed, mesh)
        objective, frozen = _objective(experiment)
        place = batch_sharding(mesh)
        array = lambda dtype: jax.ShapeDtypeStruct((batch_size, data.sequence_length), dtype, sharding=place)
        batch = Batch(*(array(jnp.float32 if name == "weights" else jnp.int32) for name in Batch._fields))
        shardings = jax.tree.map(lambda x: x.sharding, state)
        step = make_train_step(objective, optimizer, train.accumulate)
        traced = jax.jit(step, donate_argnums=0, out_shardings=(shardings, None)).trace(state, batch, *frozen)
        lowered = traced.lower(lowering_platforms=("tpu" if topology.is_tpu else "cpu",))
        start = time.perf_counter()
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" in str(error) or "Ran out of memory" in str(error):
                raise OutOfMemory(str(error)) from None
            raise ValueError(f"the compiler for {topology.name} fails: {str(error).strip().splitlines()[0]}") from error
    memory = compiled.memory_analysis()
    return Program(
        hlo=compiled.as_text(),
        jaxpr=traced.jaxpr,
        seconds=time.perf_counter() - start,
        state=state,
        frozen_bytes=sharded_bytes(frozen),
        argument_bytes=memory.argument_size_in_bytes,
        output_bytes=memory.output_size_in_bytes,
        shared_bytes=memory.alias_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
        code_bytes=memory.generated_code_size_in_bytes,
    )


def _objective(experiment):
    """What is minimised, and shapes of a teacher's parameters; an unread teacher is a RoPE model of the same shape."""
    train, conversion, model = experiment.train, experiment.conversion, experiment.model
    if conversion is None or conversion.stage == "lm":
        return language_modelling(model, z_loss=train.z_loss, chunk_size=train.loss_chunk), ()
    ours = model.config
    if conversion.teacher == _UNREAD:
        config = dataclasses.replace(ours, mixer="rope", mixer_options={})
    else:
        found = load_config(conversion.teacher, ours.dtype)
        config = dataclasses.replace(found, scan_layers=ours.scan_layers)
    shapes, teacher = abstract_params(config), DecoderLM(config)
    place = lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
    params = jax.tree.map(place, shapes, tree_shardings(shapes, experiment.mesh))
    if conversion.stage == "mse":
        return mixer_imitation(model, teacher), (params,)
    return distillation(model, teacher, chunk_size=train.loss_chunk), (params,)


def sharded_bytes(tree) -> int:
    """Bytes of a tree of sharded shapes on one device."""
    return sum(x.dtype.itemsize * math.prod(x.sharding.shard_shape(x.shape)) for x in jax.tree.leaves(tree))


def parse_size(text: str) -> int:
    """Bytes of a compiler's "21.09G"."""
    unit = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}.get(text[-1:].upper(), 1)
    return round(float(text.rstrip("KMGTBkmgtb")) * unit)


def largest_allocations(report: str) -> list[Buffer]:
    """Largest buffers of the TPU compiler's report of too little memory, in its order."""
    found = []
    for entry in re.split(r"\n\s*\d+\. Size: ", report)[1:]:
        size, operator = entry.split(None, 1)[0], re.search(r'op_name="([^"]*)"', entry)
        shape = re.search(r"Shape: ([^\s{]+)", entry)
        found.append(Buffer(parse_size(size), shape.group(1) if shape else "", operator.group(1) if operator else ""))
    return found
