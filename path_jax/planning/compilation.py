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

_FILE_SOURCES = ("files", "tokens", "tfds", "prepared", "fasta")
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
      peak_bytes: of one device, the arguments and what the compiler says it needs beside them; jaxpr: what was traced.
    """

    def __init__(self, report: str, argument_bytes: int, jaxpr: Any):
        super().__init__(report)
        self.peak_bytes, self.jaxpr = argument_bytes + required_bytes(report), jaxpr


def describe(config: Mapping[str, Any], topology: Topology) -> Experiment:
    """The experiment of a resolved configuration on a machine; files that it names need not be there.

    Raises:
      ValueError: for what does not fit, naming it.
    """
    config = dict(config)
    data = config.get("data", {})
    if not data.get("path", "") and data.get("source") in _FILE_SOURCES:
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
                needed = sharded_bytes((state, batch, frozen))
                raise OutOfMemory(str(error), needed, traced.jaxpr) from None
            raise ValueError(f"the compiler for {topology.name} fails: {str(error).strip().splitlines()[0]}") from error
    memory = compiled.memory_analysis()
    try:
        hlo = compiled.as_text()
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(
            f"JAX {jax.__version__} cannot read what this libtpu compiles; install the one that it asks for, "
            f"pip install 'jax[tpu]=={jax.__version__}': {str(error).splitlines()[0]}"
        ) from error
    return Program(
        hlo=hlo,
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


def required_bytes(report: str) -> int:
    """Bytes that the TPU compiler's report of too little memory asks for beside arguments, 0 if it does not say."""
    found = re.search(r"required for HLO temporaries \(([\d.]+)([KMGT]?)\)", report)
    return round(float(found.group(1)) * 1024 ** " KMGT".index(found.group(2) or " ")) if found else 0
