"""JSONL and FASTA files are cut between documents, wherever the cuts fall."""

import gzip
import json
import random

import numpy as np
import pytest

from path_jax.data.fasta import ALPHABETS
from path_jax.data.prepare import prepare
from path_jax.data.prepared import PreparedTokens
from path_jax.data.source_files import Encoding, Part, cut_parts, list_files, part_tokens
from path_jax.data.tokenizer import ByteTokenizer

BYTES = Encoding("bytes", ByteTokenizer(), 256, 257)
DNA = Encoding("dna", ALPHABETS["dna"], 5, 6)


def jsonl(count):
    draw = random.Random(2)
    return [{"text": "é" * draw.choice([0, 3, 900]), "id": number} for number in range(count)]


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_jsonl_is_cut_between_lines(tmp_path, suffix):
    rows = jsonl(40)
    data = "".join(json.dumps(row) + "\n" * (1 + row["id"] % 2) for row in rows).encode()
    path = tmp_path / f"a{suffix}"
    path.write_bytes(gzip.compress(data) if suffix.endswith("gz") else data)
    result = prepare(list_files([str(path)], None), BYTES, tmp_path / "out", shard_bytes=2000)
    assert (result.shards > 5) == (suffix == ".jsonl")
    stream = PreparedTokens(tmp_path / "out")
    expected = [token for row in rows if row["text"] for token in [256, *row["text"].encode()]]
    assert stream.read(0, stream.num_tokens).tolist() == expected


def test_parts_cover_a_file_at_every_size(tmp_path):
    """Wherever the cuts fall, the parts together are the file and each is whole documents."""
    lines = [json.dumps({"text": "x" * (number % 7)}) + "\n" for number in range(25)]
    (tmp_path / "a.jsonl").write_text("".join(lines))
    (tmp_path / "a.fa").write_text("".join(f">r{n} >x\nAC\n;>\nGT\n" for n in range(25)))
    for name, encoding, opener in (("a.jsonl", BYTES, b"{"), ("a.fa", DNA, b">")):
        (file,) = list_files([str(tmp_path / name)], None)
        data = (tmp_path / name).read_bytes()
        whole = np.concatenate(list(part_tokens(Part(file, 0, file.size), encoding)))
        for size in range(1, 150):
            parts = list(cut_parts(file, size))
            assert b"".join(data[part.begin : part.end] for part in parts) == data
            assert all(data[part.begin : part.begin + 1] == opener for part in parts)
            if size % 10 == 3:
                tokens = [tokens for part in parts for tokens in part_tokens(part, encoding)]
                np.testing.assert_array_equal(np.concatenate(tokens), whole)


@pytest.mark.parametrize(
    "line, message",
    [("{", "line 3: "), ('["a"]', "line 3: "), ('{"body": "a"}', "no 'text'; set --text-key"), ('{"text": 1}', "int")],
)
def test_malformed_jsonl_is_named_by_its_line(tmp_path, line, message):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n\n' + line + "\n")
    with pytest.raises(ValueError, match=f"a.jsonl, line 3: .*{message.removeprefix('line 3: ')}"):
        prepare(list_files([str(path)], None), BYTES, tmp_path / "out", shard_bytes=15)
