"""FASTA files: what is read, and errors that name file and line."""

import gzip

import numpy as np
import pytest

from path_jax.data import ALPHABETS, DataConfig, fasta_documents, make_corpus
from path_jax.data import fasta as fasta_module
from path_jax.data.fasta import is_fasta, read_fasta

DNA, PROTEIN = ALPHABETS["dna"], ALPHABETS["protein"]


def write(path, text):
    data = text.encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def letters(documents, alphabet=DNA):
    return {document.name: alphabet.decode(document.tokens) for document in documents}


def test_alphabets_round_trip():
    for alphabet, size in ((DNA, 6), (PROTEIN, 27)):
        ids = alphabet.encode(alphabet.letters)
        np.testing.assert_array_equal(ids, np.arange(size - 1))
        assert ids.dtype == np.int32 and (alphabet.bos_id, alphabet.vocab_size) == (size - 1, size)
        assert alphabet.decode([alphabet.bos_id, *ids, 900, -1]) == alphabet.letters
        np.testing.assert_array_equal(alphabet.encode(alphabet.letters.lower().encode()), ids)
    assert DNA.decode(DNA.encode("RyKMSWBDHVuU")) == "N" * 10 + "TT"
    assert PROTEIN.decode(PROTEIN.encode("Jj*")) == "XX*"
    assert set("ACDEFGHIKLMNPQRSTVWY") | set("XBZUO*") == set(PROTEIN.letters)
    for wrong in ("AC-", "AC G", "ACé"):
        with pytest.raises(ValueError, match="letter 3 is not in the dna alphabet"):
            DNA.encode(wrong)


@pytest.mark.parametrize("name", ["a.fa", "a.fasta.gz"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_records_with_all_that_is_allowed(tmp_path, name, end):
    lines = [
        "; a comment",
        ">one  first record",
        "ACgt",
        "",
        "nnA ",
        "; within",
        "C",
        ">two|x",
        "T",
        "",
        ">three",
        "gg",
    ]
    path = write(tmp_path / name, end.join(lines))
    expected = {f"{name}:one": "ACGTNNAC", f"{name}:two|x": "T", f"{name}:three": "GG"}
    documents = fasta_documents(path, DNA)
    assert letters(documents) == expected
    assert all(document.tokens[0] == DNA.bos_id and document.tokens.dtype == np.int32 for document in documents)
    assert all((document.tokens[1:] < DNA.bos_id).all() for document in documents)


def test_long_lines_are_read_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(fasta_module, "_CHUNK_BYTES", 7)
    path = write(tmp_path / "a.fa", ">x\n" + "ACGTA" * 20 + "\n" + "C" * 7 + "\n>y\nGG")
    sizes = [len(ids) for _, ids in read_fasta(path, DNA)]
    assert max(sizes) <= 7 and sum(sizes) == 1 + 107 + 1 + 2
    assert letters(fasta_documents(path, DNA)) == {"a.fa:x": "ACGTA" * 20 + "C" * 7, "a.fa:y": "GG"}
    for opener in (">", ";"):
        write(path, f">x\nA\n{opener}long name\nAC")
        with pytest.raises(ValueError, match="a.fa, line 3: a name or comment has more than 7 bytes"):
            fasta_documents(path, DNA)


@pytest.mark.parametrize("name", ["a.fa", "a.fa.gz"])
@pytest.mark.parametrize(
    "text, message",
    [
        ("ACGT\n", "line 1: a sequence comes before"),
        (">x\nAC\n>y\nA-C\n", "line 4: '-' is not in the dna alphabet"),
        (">x\nAC\n\n;\nA C\n", "line 5: ' '"),
        (">x\nAC\n>y\n\n>z\nA\n", "line 3: the record y has no sequence"),
        (">x\nAC\n>y\n", "line 3: the record y has no sequence"),
        (">\nAC\n", "line 1: a record has no name"),
        ("> x\nAC\n", "line 1: a record has no name"),
        (">x\nMKV\n", "line 2: 'V'|line 2: 'M'"),
        ("", "holds no"),
        ("; nothing\n", "holds no FASTA record"),
    ],
)
def test_malformed_files_name_file_and_line(tmp_path, name, text, message):
    path = write(tmp_path / name, text.replace("MKV", "AEV"))
    with pytest.raises(ValueError, match=f"a.fa.*{message}".replace("'V'|line 2: 'M'", "'E'")):
        fasta_documents(path, DNA)


def test_lines_are_those_of_the_file_wherever_reading_begins(tmp_path):
    path = write(tmp_path / "a.fa", ">x\nAC\nGT\n>y\nA\n>z\nA!\n")
    begin = path.read_bytes().index(b">z")
    with pytest.raises(ValueError, match="a.fa, line 7: '!'"):
        list(read_fasta(path, DNA, begin))
    assert [name for name, _ in read_fasta(path, DNA, 0, begin) if name] == ["x", "y"]


def test_damaged_compression_is_an_error_in_one_line(tmp_path):
    path = write(tmp_path / "a.fa.gz", ">x\n" + "ACGT" * 5000)
    data = path.read_bytes()
    for damaged in (data[: len(data) // 2], b"no gzip"):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="a.fa.gz is damaged: "):
            fasta_documents(path, DNA)


def test_suffixes():
    names = ["a.fa", "b.FASTA", "c.fna.gz", "d.faa", "e.txt", "fa", "g.gz"]
    assert [is_fasta(name) for name in names] == [True] * 4 + [False] * 3


def test_source_of_a_run(tmp_path):
    write(tmp_path / "a.faa", ">x\nMKV*\n>y\nMAA\n")
    write(tmp_path / "b.faa.gz", ">x\nACDEF\n")
    (tmp_path / "notes.txt").write_text("no FASTA")
    config = DataConfig(
        source="fasta", path=str(tmp_path), alphabet="protein", heldout_fraction=0.3, sequence_length=4, batch_size=1
    )
    corpus = make_corpus(config)
    names = {document.name for side in (corpus.train, corpus.heldout) for document in side}
    assert names == {"a.faa:x", "a.faa:y", "b.faa.gz:x"} and corpus.vocab_size == 27
    write(tmp_path / "b.faa", ">x\nA\n>x\nA\n")
    with pytest.raises(ValueError, match="document names repeat.*b.faa:x"):
        make_corpus(config)
    with pytest.raises(ValueError, match="data.alphabet is 'rna'"):
        DataConfig(source="fasta", path="x", alphabet="rna")


def test_one_long_sequence_is_cut_by_position(tmp_path):
    write(tmp_path / "a.fa", ">chromosome\n" + "ACGT" * 25)
    corpus = make_corpus(DataConfig(source="fasta", path=str(tmp_path), heldout_fraction=0.1))
    assert [len(side[0].tokens) for side in (corpus.train, corpus.heldout)] == [91, 11]
    assert all(side[0].tokens[0] == DNA.bos_id for side in (corpus.train, corpus.heldout))
