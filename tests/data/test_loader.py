"""The iterator is deterministic, sharded and resumable, for memory and TFDS sources."""

import dataclasses
import itertools
import re
import sys

import grain
import numpy as np
import orbax.checkpoint as ocp
import pytest

from path_jax.data import (
    Batch,
    ByteTokenizer,
    DataConfig,
    Document,
    PackedRows,
    make_corpus,
    make_iterator,
)

PACKINGS = ["concat", "first_fit"]
NUM_RECORDS = 40


def config_for(**changes):
    return dataclasses.replace(
        DataConfig(source="files", path="unused", sequence_length=16, batch_size=4, seed=7),
        **changes,
    )


def make_documents():
    lengths = np.random.default_rng(0).integers(3, 60, 24)
    pieces = np.split(np.arange(1, lengths.sum() + 1, dtype=np.int32), np.cumsum(lengths)[:-1])
    return tuple(Document(f"d{i}", piece) for i, piece in enumerate(pieces))


def take(iterator, count):
    return list(itertools.islice(iterator, count))


def assert_same(actual, expected):
    assert len(actual) == len(expected)
    for left, right in zip(actual, expected, strict=True):
        for name in Batch._fields:
            np.testing.assert_array_equal(getattr(left, name), getattr(right, name))


def assert_is_batch(batch, size, length):
    assert isinstance(batch, Batch)
    for name, value in batch._asdict().items():
        assert isinstance(value, np.ndarray), name
        assert value.shape == (size, length), name
        assert value.dtype == (np.float32 if name == "weights" else np.int32), name


def assert_resumes(make, directory):
    """Saves after 5 batches with Orbax; 20 batches that follow must be the same."""
    iterator = make()
    take(iterator, 5)
    with ocp.CheckpointManager(directory) as manager:
        manager.save(5, args=ocp.args.Composite(data=grain.checkpoint.CheckpointSave(iterator)))
    expected = take(iterator, 20)
    restored = make()
    take(restored, 2)
    with ocp.CheckpointManager(directory) as manager:
        manager.restore(5, args=ocp.args.Composite(data=grain.checkpoint.CheckpointRestore(restored)))
    assert_same(take(restored, 20), expected)


@pytest.fixture(scope="module")
def tfds_path(tmp_path_factory):
    """A prepared dataset of 40 records, one empty and one long."""
    tfds = pytest.importorskip("tensorflow_datasets", reason="needs path-jax[tfds]")

    class TinyText(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")
        # Without a source folder, TFDS looks for no checksum files next to this test.
        code_path = None

        def _info(self):
            features = tfds.features.FeaturesDict({"text": tfds.features.Text()})
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for i in range(NUM_RECORDS):
                yield (
                    i,
                    {"text": "" if i == 3 else f"record {i} é " * (20 if i == 5 else i % 4 + 1)},
                )

    builder = TinyText(data_dir=tmp_path_factory.mktemp("tfds"), file_format="array_record")
    builder.download_and_prepare()
    return str(builder.data_path)


@pytest.mark.parametrize("packing", PACKINGS)
def test_batches_and_determinism(packing):
    config = config_for(packing=packing)
    first = take(make_iterator(config, make_documents()), 12)
    for batch in first:
        assert_is_batch(batch, 4, 16)
    assert_same(take(make_iterator(config, make_documents()), 12), first)
    other = take(make_iterator(dataclasses.replace(config, seed=8), make_documents()), 1)
    assert not np.array_equal(other[0].tokens, first[0].tokens)


def test_an_epoch_visits_every_row_once_in_a_new_order():
    config = config_for(batch_size=1)
    rows = PackedRows(make_documents(), 16)
    iterator = make_iterator(config, make_documents())
    everything = sorted(rows[i]["tokens"].tolist() for i in range(len(rows)))
    epochs = [[b.tokens[0].tolist() for b in take(iterator, len(rows))] for _ in range(3)]
    assert all(sorted(epoch) == everything for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("process_count", [2, 4])
def test_global_batches_do_not_depend_on_the_process_count(packing, process_count):
    config = config_for(packing=packing)
    documents = make_documents()
    # Enough batches to cross two epoch boundaries.
    expected = take(make_iterator(config, documents), 30)
    parts = [
        take(make_iterator(config, documents, process_index=p, process_count=process_count), 30)
        for p in range(process_count)
    ]
    assert_is_batch(parts[0][0], 4 // process_count, 16)
    joined = [Batch(*map(np.concatenate, zip(*step, strict=True))) for step in zip(*parts, strict=True)]
    assert_same(joined, expected)


@pytest.mark.parametrize("packing", PACKINGS)
def test_orbax_resume_across_an_epoch(packing, tmp_path):
    documents = make_documents()
    num_rows = len(PackedRows(documents, 16))
    # The save is inside the first epoch and the 20 batches after it leave it.
    assert 5 * 4 < num_rows < 25 * 4
    assert_resumes(lambda: make_iterator(config_for(packing=packing), documents), tmp_path / "c")


def test_state_in_memory_before_and_after_the_first_batch():
    iterator = make_iterator(config_for(), make_documents())
    for count in (0, 3):
        take(iterator, count)
        state = iterator.get_state()
        expected = take(iterator, 4)
        iterator.set_state(state)
        assert_same(take(iterator, 4), expected)


def test_a_corpus_of_one_row():
    documents = (Document("d", np.arange(17, dtype=np.int32)),)
    for batch in take(make_iterator(config_for(batch_size=1), documents), 3):
        np.testing.assert_array_equal(batch.tokens[0], np.arange(16))


@pytest.mark.parametrize("packing", PACKINGS)
def test_tfds_stream_is_the_text(tfds_path, packing):
    config = config_for(source="tfds", path=tfds_path, packing=packing, heldout_fraction=0.1)
    corpus = make_corpus(config)
    assert (len(corpus.train), len(corpus.heldout)) == (36, 4)
    names = {document.name for side in (corpus.train, corpus.heldout) for document in side}
    assert names == {f"train#{i}" for i in range(NUM_RECORDS)}
    tokenizer = ByteTokenizer()
    texts = [tokenizer.decode(document.tokens) for document in corpus.train]
    pieces = []
    for batch in take(make_iterator(config, corpus.train), 30):
        assert_is_batch(batch, 4, 16)
        np.testing.assert_array_equal(batch.weights > 0, batch.segment_ids > 0)
        for tokens, targets, segments, positions in zip(
            batch.tokens, batch.targets, batch.segment_ids, batch.positions, strict=True
        ):
            for segment in range(1, segments.max() + 1):
                inside = segments == segment
                np.testing.assert_array_equal(positions[inside], np.arange(inside.sum()))
                np.testing.assert_array_equal(tokens[inside][1:], targets[inside][:-1])
                pieces.append((tokens[inside], targets[inside]))
    joined = "\n".join(text.encode().decode("latin-1") for text in texts)
    assert all(bytes(t.astype(np.uint8)).decode("latin-1") in joined for _, t in pieces)
    # Each of the non-empty documents opens in the stream before any repeats too often.
    openers = sum(int(tokens[0] == tokenizer.bos_id) for tokens, _ in pieces)
    assert openers > 36


@pytest.mark.parametrize("packing", PACKINGS)
def test_tfds_orbax_resume(tfds_path, packing, tmp_path):
    config = config_for(source="tfds", path=tfds_path, packing=packing)
    train = make_corpus(config).train
    assert_resumes(lambda: make_iterator(config, train, process_index=1, process_count=2), tmp_path / "c")


def test_tfds_processes_share_the_records_out(tfds_path):
    config = config_for(source="tfds", path=tfds_path)
    train = make_corpus(config).train
    per_process = len(train) // 2 - 1  # One record may be empty.
    records = []
    for process in (0, 1):
        iterator = make_iterator(config, train, process_index=process, process_count=2)
        targets = np.concatenate([batch.targets.ravel() for batch in take(iterator, 40)])
        numbers = re.findall(r"record (\d+) é", ByteTokenizer().decode(targets))
        records.append([number for number, _ in itertools.groupby(numbers)][:per_process])
    assert len(set(records[0]) | set(records[1])) == 2 * per_process


def test_tfds_errors_name_what_exists(tfds_path, tmp_path):
    config = config_for(source="tfds", path=tfds_path)
    with pytest.raises(ValueError, match="text_key.*'text'"):
        make_corpus(dataclasses.replace(config, text_key="body"))
    with pytest.raises(ValueError, match="tfds_split.*'train'"):
        make_corpus(dataclasses.replace(config, tfds_split="valid"))
    with pytest.raises(FileNotFoundError):
        make_corpus(dataclasses.replace(config, path=str(tmp_path / "absent")))


def test_tfds_missing_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(ImportError, match=r"pip install path-jax\[tfds\]"):
        make_corpus(config_for(source="tfds"))


def test_make_corpus_reads_files_and_tokens(tmp_path):
    (tmp_path / "book.txt").write_text("word " * 100)
    corpus = make_corpus(config_for(path=str(tmp_path / "book.txt"), heldout_fraction=0.2))
    assert [document.name for document in corpus.train] == ["book.txt[0:400]"]
    assert corpus.vocab_size == 257
    np.save(tmp_path / "ids.npy", np.array([1, 5, 1, 6, 9], np.uint16))
    config = config_for(source="tokens", path=str(tmp_path), bos_id=1, vocab_size=10)
    assert len(make_corpus(config).train) == 1
    with pytest.raises(ValueError, match="id 9, outside data.vocab_size=9"):
        make_corpus(dataclasses.replace(config, vocab_size=9))


def test_make_corpus_default_is_the_standard_library():
    corpus = make_corpus(DataConfig())
    sizes = [sum(len(item.tokens) for item in side) for side in (corpus.train, corpus.heldout)]
    assert abs(sizes[1] / sum(sizes) - 0.05) < 0.005


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"source": "web"}, "data.source is 'web'"),
        ({"path": ""}, "set data.path"),
        ({"source": "stdlib"}, "leave it empty"),
        ({"sequence_length": 0}, "data.sequence_length is 0"),
        ({"batch_size": 0}, "data.batch_size is 0"),
        ({"packing": "best"}, "data.packing is 'best'"),
        ({"heldout_fraction": 1.0}, "data.heldout_fraction is 1.0"),
        ({"seed": -1}, "data.seed is -1"),
        ({"source": "tokens", "bos_id": 300}, "data.bos_id is 300"),
        ({"vocab_size": 300}, "reads bytes"),
    ],
)
def test_config_is_validated(changes, message):
    with pytest.raises(ValueError, match=message):
        config_for(**changes)


def test_iterator_arguments_are_validated():
    documents = make_documents()
    with pytest.raises(ValueError, match="batch_size=4 does not divide over 3"):
        make_iterator(config_for(), documents, process_count=3)
    with pytest.raises(ValueError, match="process_index is 2"):
        make_iterator(config_for(), documents, process_index=2, process_count=2)
    with pytest.raises(ValueError, match="fewer than one sequence of 5001"):
        make_iterator(config_for(sequence_length=5000), documents)
