"""Document sources and the train/held-out split."""

import sysconfig

import numpy as np
import pytest

from path_jax.data import (
    ByteTokenizer,
    Document,
    file_documents,
    split_documents,
    standard_library_documents,
    token_file_documents,
)

BOS = ByteTokenizer().bos_id


def documents_of_lengths(lengths):
    return tuple(Document(f"d{i}", np.array([BOS] + [i % 256] * (n - 1), np.int32)) for i, n in enumerate(lengths))


@pytest.mark.parametrize("text", ["", "plain", "naïve Ω 漢字 🙂", "\x00\r\n"])
def test_bytes_round_trip(text):
    ids = ByteTokenizer().encode(text)
    assert ids.dtype == np.int32
    assert len(ids) == len(text.encode())
    assert ByteTokenizer().decode(ids) == text


def test_decode_drops_special_ids_and_replaces_broken_utf8():
    tokenizer = ByteTokenizer()
    assert tokenizer.decode([BOS, 104, 105, 300, -1]) == "hi"
    assert tokenizer.decode([0xE6, 104]) == "\ufffdh"
    assert tokenizer.encode(b"\xff\xfe").tolist() == [255, 254]


def test_files_are_sorted_and_keep_every_byte(tmp_path):
    contents = {"b.txt": b"\xff\x00", "a/z.txt": b"zz", "a.txt": b"\r\nx"}
    for name, data in contents.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    (tmp_path / "empty.txt").touch()
    (tmp_path / ".hidden").write_text("no")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "config").write_text("no")
    (tmp_path / "inside").symlink_to(tmp_path / "b.txt")
    documents = file_documents(tmp_path)
    assert [document.name for document in documents] == sorted(contents)
    for document in documents:
        assert document.tokens.dtype == np.int32
        assert document.tokens[0] == BOS
        assert document.tokens[1:].astype(np.uint8).tobytes() == contents[document.name]


def test_one_file_is_one_document(tmp_path):
    (tmp_path / "book.txt").write_text("words")
    (document,) = file_documents(tmp_path / "book.txt")
    assert document.name == "book.txt"
    assert len(document.tokens) == 6


@pytest.mark.parametrize("is_folder", [False, True])
def test_a_link_out_of_the_directory_is_refused(tmp_path, is_folder):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret.txt").write_text("x")
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    (corpus / "own.txt").write_text("x")
    (corpus / "link").symlink_to(outside if is_folder else outside / "secret.txt")
    with pytest.raises(ValueError, match="outside"):
        file_documents(corpus)


def test_missing_and_empty_paths(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent"):
        file_documents(tmp_path / "absent")
    with pytest.raises(ValueError, match="no visible non-empty file"):
        file_documents(tmp_path)


def test_standard_library_has_source_but_no_tests():
    documents = standard_library_documents()
    names = [document.name for document in documents]
    assert names == sorted(set(names))
    assert {"argparse.py", "json/decoder.py"} <= set(names)
    parts = {part for name in names for part in name.split("/")}
    assert parts.isdisjoint({"test", "tests", "idle_test", "site-packages", "__pycache__"})
    number = names.index("argparse.py")
    with open(f"{sysconfig.get_paths()['stdlib']}/argparse.py", "rb") as file:
        assert documents[number].tokens[1:].astype(np.uint8).tobytes() == file.read()


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32, np.int64])
def test_token_files_are_cut_at_bos(tmp_path, dtype):
    tokens = np.array([5, 6, 1, 7, 1, 8, 9], dtype)
    np.save(tmp_path / "t.npy", tokens)
    documents = token_file_documents(tmp_path, bos_id=1)
    assert [document.tokens.tolist() for document in documents] == [[5, 6], [1, 7], [1, 8, 9]]
    assert [document.name for document in documents] == ["t.npy#0", "t.npy#1", "t.npy#2"]
    assert all(document.tokens.dtype == np.int32 for document in documents)
    (whole,) = token_file_documents(tmp_path / "t.npy", bos_id=2)
    assert whole.name == "t.npy"
    np.testing.assert_array_equal(whole.tokens, tokens)


@pytest.mark.parametrize(
    "array, message",
    [
        (np.zeros((2, 2), np.int32), "1-D integer"),
        (np.zeros(3), "1-D integer"),
        (np.array([{"a": 1}], object), "not a plain .npy array"),
        (np.array([-1, 2]), "ids -1..2"),
        (np.array([2**40]), "2..31-1"),
        (np.zeros(0, np.int32), "no token"),
    ],
)
def test_malformed_token_files(tmp_path, array, message):
    np.save(tmp_path / "t.npy", array, allow_pickle=True)
    with pytest.raises(ValueError, match=message):
        token_file_documents(tmp_path / "t.npy", bos_id=1)


@pytest.mark.parametrize("fraction", [0.05, 0.3, 0.9])
@pytest.mark.parametrize("seed", [0, 1])
def test_split_partitions_documents_near_the_fraction(fraction, seed):
    lengths = np.random.default_rng(seed).integers(2, 200, 300)
    documents = documents_of_lengths(lengths)
    train, heldout = split_documents(documents, fraction, seed)
    names = {item.name for item in train}, {item.name for item in heldout}
    assert names[0].isdisjoint(names[1])
    assert len(train) + len(heldout) == len(documents)
    share = sum(len(item.tokens) for item in heldout) / lengths.sum()
    assert abs(share - fraction) < 0.01


def test_split_depends_on_names_and_seed_only():
    documents = documents_of_lengths([20] * 50)
    heldout = {item.name for item in split_documents(documents, 0.2, 3)[1]}
    assert heldout == {item.name for item in split_documents(documents[::-1], 0.2, 3)[1]}
    assert heldout != {item.name for item in split_documents(documents, 0.2, 4)[1]}


@pytest.mark.parametrize("fraction", [0.001, 0.999])
@pytest.mark.parametrize("lengths", [[2, 2], [1000, 2], [1000, 2, 2]])
def test_split_never_leaves_a_side_empty(lengths, fraction):
    train, heldout = split_documents(documents_of_lengths(lengths), fraction, 0)
    assert train and heldout


@pytest.mark.parametrize("opener", [[BOS], []])
def test_one_document_is_cut_by_position(opener):
    body = list(range(100))
    document = Document("book.txt", np.array(opener + body, np.int32))
    (train,), (heldout,) = split_documents((document,), 0.1, 0)
    assert (train.name, heldout.name) == ("book.txt[0:90]", "book.txt[90:100]")
    assert train.tokens.tolist() == opener + body[:90]
    assert heldout.tokens.tolist() == opener + body[90:]


def test_split_refuses_bad_arguments():
    documents = documents_of_lengths([5, 5])
    for fraction in (0.0, 1.0, float("nan")):
        with pytest.raises(ValueError, match="heldout_fraction"):
            split_documents(documents, fraction, 0)
    with pytest.raises(ValueError, match="repeat.*d0"):
        split_documents((documents[0], documents[0]), 0.5, 0)
    with pytest.raises(ValueError, match="at least 2"):
        split_documents(documents_of_lengths([2]), 0.5, 0)
