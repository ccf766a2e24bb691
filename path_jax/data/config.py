"""Where the text is and how it becomes batches, checked before anything is read."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from path_jax.data.fasta import ALPHABETS
from path_jax.data.mixture import checked_weights
from path_jax.data.task_stream import make_task
from path_jax.data.tokenizer import ByteTokenizer

_SOURCES = ("stdlib", "files", "tokens", "tfds", "task", "prepared", "fasta", "mixture")
_PATHLESS = ("stdlib", "task", "mixture")
# What a part of a mixture may say; the rest is the mixture's.
_PART_SOURCES = ("stdlib", "files", "tokens", "prepared", "fasta")
_PART_KEYS = ("source", "path", "weight", "alphabet", "bos_id", "vocab_size")
_PACKINGS = ("concat", "first_fit")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where the text is and how it becomes batches.

    Attributes:
      source: `stdlib` (this Python's standard library), `files` (bytes of a file or
        directory), `tokens` (`.npy` ids), `tfds` (a prepared array_record dataset),
        `prepared` (what `python -m path_jax.data prepare` wrote), `fasta` (sequences of
        nucleotides or amino acids), `mixture` (several of these but `tfds`) or `task` (a
        synthetic task).
      path: The file or directory; empty for `stdlib`, `mixture` and `task`.
      sequence_length: T, at least 1.
      batch_size: Rows of a global batch, over all processes.
      packing: `concat` fills every row; `first_fit` keeps documents whole and pads, which
        needs the length of every document and so is not for `prepared`.
      heldout_fraction: Share held out for evaluation, in (0, 1): of the tokens, or of the
        records for `tfds`. Of `prepared` tokens it is the end of the stream, for every seed.
      seed: Chooses the held-out side and the shuffles, in [0, 2**32).
      tfds_split: Split of a TFDS dataset.
      text_key: Text feature of a TFDS dataset.
      bos_id: The id that opens a document; 256 unless `source` is `tokens`.
      vocab_size: Number of ids; 257 unless `source` is `tokens`. Tasks, prepared tokens,
        FASTA and mixtures have their own, and read neither of these two.
      alphabet: Of FASTA files, `dna` or `protein`.
      parts: Of a mixture, {name: {source, path, weight, alphabet, bos_id, vocab_size}}.
        Rows of training are of each part in the ratio of the weights; held-out tokens too,
        as many as the held-out side of every part allows. All parts have one vocabulary.
      task: A name in `path_jax.data.TASKS`; task_options: its settings but the length,
        which is `sequence_length`.
    """

    source: str = "stdlib"
    path: str = ""
    sequence_length: int = 256
    batch_size: int = 8
    packing: str = "concat"
    heldout_fraction: float = 0.05
    seed: int = 0
    tfds_split: str = "train"
    text_key: str = "text"
    bos_id: int = 256
    vocab_size: int = 257
    alphabet: str = "dna"
    parts: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    task: str = ""
    task_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        """Raises ValueError for the first field that cannot work."""
        if self.source not in _SOURCES:
            raise ValueError(f"data.source is {self.source!r}; choose one of {_SOURCES}")
        if self.packing not in _PACKINGS:
            raise ValueError(f"data.packing is {self.packing!r}; choose one of {_PACKINGS}")
        if bool(self.path) == (self.source in _PATHLESS):
            fix = "leave it empty or set data.source" if self.path else "set data.path"
            raise ValueError(f"data.path is {self.path!r} with source {self.source!r}; {fix}")
        for name in ("sequence_length", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"data.{name} is {getattr(self, name)}; it must be at least 1")
        if not 0 < self.heldout_fraction < 1:
            raise ValueError(f"data.heldout_fraction is {self.heldout_fraction}; it must be inside (0, 1)")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"data.seed is {self.seed}; it must be in [0, 2**32)")
        if not 0 <= self.bos_id < self.vocab_size:
            raise ValueError(f"data.bos_id is {self.bos_id}; it must be in [0, data.vocab_size={self.vocab_size})")
        if (self.source == "task") != bool(self.task) or (self.task_options and not self.task):
            raise ValueError(
                f"data.task is {self.task!r} with data.task_options {dict(self.task_options)} and source "
                f"{self.source!r}; a task and its options go with source 'task'"
            )
        if self.task:
            make_task(self.task, self.sequence_length, self.task_options)
            return
        if self.alphabet not in ALPHABETS:
            raise ValueError(f"data.alphabet is {self.alphabet!r}; choose one of {tuple(ALPHABETS)}")
        if (self.source == "mixture") != bool(self.parts):
            raise ValueError(
                f"data.parts has {len(self.parts)} parts and source is {self.source!r}; a mixture needs "
                f"parts, and only a mixture has them"
            )
        if self.parts:
            self.part_configs()
            self.part_weights()
            return
        if self.source == "prepared" and self.packing == "first_fit":
            raise ValueError("data.packing is 'first_fit', which prepared tokens do not offer; choose 'concat'")
        byte_ids = (ByteTokenizer().bos_id, ByteTokenizer().vocab_size)
        if self.source in ("stdlib", "files", "tfds") and (self.bos_id, self.vocab_size) != byte_ids:
            raise ValueError(
                f"data.bos_id and data.vocab_size are {(self.bos_id, self.vocab_size)}; source "
                f"{self.source!r} reads bytes, which need {byte_ids}"
            )

    def part_configs(self) -> dict[str, "DataConfig"]:
        """The parts of a mixture by name, sorted, so that the order of a file's keys does not matter.

        Raises:
          ValueError: for a key, source or value of a part that cannot work; names the part.
        """
        configs = {}
        for name, part in sorted(self.parts.items()):
            if unknown := sorted(set(part) - set(_PART_KEYS)):
                raise ValueError(f"data.parts.{name} has {', '.join(unknown)}; it may have {', '.join(_PART_KEYS)}")
            if part.get("source") not in _PART_SOURCES:
                raise ValueError(f"data.parts.{name}.source is {part.get('source')!r}; choose one of {_PART_SOURCES}")
            given = {key: value for key, value in part.items() if key != "weight"}
            shared = ("sequence_length", "batch_size", "packing", "heldout_fraction", "seed")
            try:
                configs[name] = DataConfig(**given, **{key: getattr(self, key) for key in shared})
            except (TypeError, ValueError) as error:
                raise ValueError(f"data.parts.{name}: {error}") from error
        return configs

    def part_weights(self) -> tuple[int, ...]:
        """Whole numbers in the ratio of the weights, in the order of `part_configs`; a missing weight is refused."""
        return checked_weights({name: part.get("weight") for name, part in sorted(self.parts.items())})
