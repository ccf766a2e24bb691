"""From a resolved configuration to everything a run needs, checked before anything is written."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from path_jax.checkpoints.native import read_config, write_config
from path_jax.data import Corpus, DataConfig, make_corpus
from path_jax.models import DecoderLM, ModelConfig
from path_jax.models.decoder_lm import count_parameters
from path_jax.parallel import cluster
from path_jax.parallel.mesh import make_mesh
from path_jax.training.conversion import ConversionConfig
from path_jax.training.optim import OptimConfig, make_schedule

# What may differ when a run is resumed: where it runs and how it is watched, not what it computes.
_MAY_CHANGE = ("config.mesh",) + tuple(
    f"config.train.{name}"
    for name in (
        "keep_checkpoints", "keep_every", "hang_seconds", "hang_exit", "log_batches", "profile_start", "profile_steps",
    )
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Settings of the loop.

    Args:
      num_steps: updates; seed: of the parameters.
      save_every: steps between checkpoints; keep_checkpoints: how many stay; keep_every: so do those of steps that are
        multiples of it, 0 for none.
      eval_every: steps between evaluations, 0 for none before the end.
      accumulate: micro-batches per step; loss_chunk: tokens per row whose logits exist at a time, 0 for all.
      z_loss: weight of the squared log-partition.
      tensorboard: also write TensorBoard events (extra [tensorboard]).
      profile_start, profile_steps: window of steps traced by the profiler into workdir/profile; 0 steps for none.
      hang_seconds: seconds without the end of a step after which stacks are written, 0 for never; hang_exit: whether
        the process then ends.
      log_batches: also write the hash of every global batch to workdir/batches.jsonl, which gathers its tokens.
    """

    num_steps: int = 1000
    seed: int = 0
    save_every: int = 500
    keep_checkpoints: int = 2
    eval_every: int = 0
    accumulate: int = 1
    loss_chunk: int = 0
    z_loss: float = 0.0
    tensorboard: bool = False
    profile_start: int = 10
    profile_steps: int = 0
    keep_every: int = 0
    hang_seconds: float = 1800.0
    hang_exit: bool = True
    log_batches: bool = False

    def __post_init__(self):
        for name in ("num_steps", "save_every", "keep_checkpoints", "accumulate"):
            if getattr(self, name) < 1:
                raise ValueError(f"train.{name}={getattr(self, name)} must be at least 1")
        for name in ("keep_every", "hang_seconds"):
            if getattr(self, name) < 0:
                raise ValueError(f"train.{name}={getattr(self, name)} must not be negative; 0 turns it off")


@dataclasses.dataclass(frozen=True)
class Experiment:
    """What a configuration describes, checked but not started."""

    config: dict
    model: DecoderLM
    data: DataConfig
    optim: OptimConfig
    train: TrainConfig
    mesh: jax.sharding.Mesh
    corpus: Corpus | None
    conversion: ConversionConfig | None = None


def make_experiment(config: Mapping[str, Any]) -> Experiment:
    """Checks a resolved configuration and reads its corpus.

    Sections are model, data, optim, mesh, train, evals and, for a conversion, conversion.

    Raises:
      ValueError: for a section, key or value that does not fit, naming it.
      FileNotFoundError: for a missing corpus.
    """
    experiment = describe_experiment(config)
    corpus, vocab_size = make_corpus(experiment.data), experiment.model.config.vocab_size
    if corpus.vocab_size > vocab_size:
        raise ValueError(f"model.vocab_size={vocab_size} is less than the corpus needs: {corpus.vocab_size}")
    return dataclasses.replace(experiment, corpus=corpus)


def describe_experiment(config: Mapping[str, Any], devices=None) -> Experiment:
    """As `make_experiment`, without a corpus, for any devices (default: all).

    Raises:
      ValueError: for a section, key or value that does not fit, naming it.
    """
    sections = {"model", "data", "optim", "mesh", "train", "evals"}
    if set(config) - {"conversion"} != sections:
        raise ValueError(f"config has sections {sorted(config)}, expected {sorted(sections)}")

    def build(cls, section):
        unknown = set(config[section]) - {field.name for field in dataclasses.fields(cls)}
        if unknown:
            raise ValueError(f"unknown keys in config.{section}: {', '.join(sorted(unknown))}")
        return cls(**config[section])

    model_config, data = build(ModelConfig, "model"), build(DataConfig, "data")
    optim, train = build(OptimConfig, "optim"), build(TrainConfig, "train")
    mesh = make_mesh(config["mesh"], devices)
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    if data.batch_size % (shards * train.accumulate):
        raise ValueError(
            f"data.batch_size={data.batch_size} is not a multiple of {shards} data shards x "
            f"train.accumulate={train.accumulate}"
        )
    if mesh.shape["sequence"] > 1 and data.sequence_length % (2 * mesh.shape["sequence"]):
        raise ValueError(
            f"data.sequence_length={data.sequence_length} is not a multiple of twice "
            f"mesh.sequence={mesh.shape['sequence']}: attention cuts every shard in two"
        )
    make_schedule(optim, train.num_steps)
    model = DecoderLM(model_config)
    try:
        count_parameters(model_config)
    except TypeError as error:  # a keyword that the mixer does not have
        raise ValueError(f"config.model.mixer_options: {error}") from error
    conversion = build(ConversionConfig, "conversion") if "conversion" in config else None
    return Experiment(dict(config), model, data, optim, train, mesh, None, conversion)


def prepare_workdir(workdir: Path, experiment: Experiment) -> None:
    """Fills the directory with config.json and the lists of documents, or checks that it belongs to this run.

    A run may go on with another mesh, other numbers of checkpoints to keep and other settings of watchdog and profiler;
    config.json keeps those it began with.
    """
    config = json.loads(json.dumps(experiment.config))
    if (workdir / "config.json").exists():
        differences = _differences(read_config(workdir), config)
        if differences:
            raise ValueError(f"{workdir} holds another run ({'; '.join(differences)}); choose another --workdir")
        for path, names in _document_lists(workdir, experiment):
            if path.exists() and path.read_text() != names:
                raise ValueError(f"the documents differ from those in {path}; restore them or choose another --workdir")
        return
    for path, names in _document_lists(workdir, experiment):
        path.write_text(names)
    write_config(workdir, config)  # last: it marks the directory as a run


def check_same_experiment(workdir: Path, experiment: Experiment) -> None:
    """Raises ClusterError if the processes of a run do not train the same on the same documents."""
    cluster.check_same("configuration", json.dumps(experiment.config, sort_keys=True))
    cluster.check_same("list of documents", "".join(names for _, names in _document_lists(workdir, experiment)))


def _document_lists(workdir: Path, experiment: Experiment):
    """(file, names of the documents) of both sides; a lazy corpus, which naming would read whole, has none."""
    for side in ("train", "heldout"):
        documents = getattr(experiment.corpus, side)
        if isinstance(documents, (list, tuple)):
            yield workdir / f"{side}_files.txt", "".join(document.name + "\n" for document in documents)


def _differences(old, new, path="config") -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict) and path not in _MAY_CHANGE:
        keys = sorted(old.keys() | new.keys())
        return [line for key in keys for line in _differences(old.get(key), new.get(key), f"{path}.{key}")]
    return [] if old == new or path in _MAY_CHANGE else [f"{path} is {old!r} there, {new!r} here"]
