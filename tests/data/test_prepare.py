"""Prepared directories: the same bytes however they were made, and nothing lost or accepted that is damaged."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
from checkpoints.synthetic import GGUF, random_params, write_gguf

from path_jax.data import DataConfig, encoding_of
from path_jax.data.__main__ import main
from path_jax.data.fasta import ALPHABETS
from path_jax.data.prepare import prepare
from path_jax.data.prepared import PreparedTokens
from path_jax.data.prepared_format import damaged_shards, read_manifest
from path_jax.data.shard_writer import RECORD_TOKENS
from path_jax.data.source_files import Encoding, list_files
from path_jax.data.tokenizer import ByteTokenizer, LearnedTokenizer, load_tokenizer

BYTES = Encoding("bytes", ByteTokenizer(), 256, 257)
DNA = Encoding("dna", ALPHABETS["dna"], 5, 6)


def prepared_files(directory):
    """{name: bytes} of what readers read."""
    paths = [directory / "dataset.json", *directory.glob("*.array_record")]
    return {path.name: path.read_bytes() for path in paths}


def stream_of(directory):
    tokens = PreparedTokens(directory)
    return tokens.read(0, tokens.num_tokens).tolist()


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Files of 0 to 5000 bytes, and one of several records that is longer than a shard."""
    root = tmp_path_factory.mktemp("texts")
    draw = random.Random(0)
    for number in range(60):
        (root / f"{number:02d}.txt").write_bytes(draw.randbytes(draw.choice([0, 1, 300, 5000])))
    (root / "30.txt").write_bytes(draw.randbytes(5 * RECORD_TOKENS + 7))
    return root


def run(texts, output, **options):
    return prepare(list_files([str(texts)], None), BYTES, output, **({"shard_bytes": 20_000} | options))


@pytest.fixture(scope="module")
def whole(texts, tmp_path_factory):
    """An undisturbed preparation."""
    output = tmp_path_factory.mktemp("prepared") / "whole"
    run(texts, output)
    return output


def test_the_stream_is_the_documents_in_order(texts, whole):
    expected = []
    for path in sorted(texts.iterdir()):
        expected += [256, *path.read_bytes()] if path.stat().st_size else []
    assert stream_of(whole) == expected
    manifest = read_manifest(whole)
    assert (manifest.vocab_size, manifest.bos_id, manifest.tokenizer["kind"]) == (257, 256, "bytes")
    assert sum(shard.documents for shard in manifest.shards) == expected.count(256)
    assert len(manifest.shards) > 4 and not damaged_shards(whole)
    assert all(shard.tokens > 0 for shard in manifest.shards)


def test_workers_make_the_same_bytes(texts, whole, tmp_path):
    run(texts, tmp_path / "out", workers=2)
    assert prepared_files(tmp_path / "out") == prepared_files(whole)


# Ends itself by signal 9 some time after its first shard.
KILLED = """
import os, sys, threading, time
import path_jax.data.shard_writer as writer
from path_jax.data.__main__ import main

write = writer._write_shard

def slow(job):
    time.sleep(0.02)
    write(job)
    threading.Timer(float(sys.argv[1]), os.kill, (os.getpid(), 9)).start()

writer._write_shard = slow
main(sys.argv[2:])
"""


def test_killed_preparations_go_on_to_the_same_bytes(texts, tmp_path):
    """At random moments, so also between a shard and what is said about it, or in the middle of one."""
    expected, output, draw = tmp_path / "expected", tmp_path / "out", random.Random(1)
    run(texts, expected, shard_bytes=1000)
    finished = 0
    for _ in range(3):
        arguments = ["prepare", str(texts), "--output", str(output), "--shard-bytes", "1000"]
        killed = subprocess.run([sys.executable, "-c", KILLED, str(0.06 * draw.random()), *arguments])
        assert killed.returncode == -signal.SIGKILL
        now = len(list(output.glob("shard-*.json")))
        assert now > finished and not (output / "dataset.json").exists()
        finished = now
    result = run(texts, output, shard_bytes=1000)
    assert result.kept == finished and 0 < result.kept < result.shards
    assert prepared_files(output) == prepared_files(expected)
    assert not list(output.glob("*.tmp"))


def test_workers_end_with_a_killed_parent(texts, tmp_path):
    """A worker that went on would write into the directory of the next call, and wait for ever."""
    command = ["-m", "path_jax.data", "prepare", str(texts), "--output", str(tmp_path / "out"), "--workers", "2"]
    process = subprocess.Popen([sys.executable, *command, "--shard-bytes", "200"], stderr=subprocess.DEVNULL)
    children = []
    deadline = time.monotonic() + 60
    while not list((tmp_path / "out").glob("shard-*.json")) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    with open(f"/proc/{process.pid}/task/{process.pid}/children") as file:
        children = [int(child) for child in file.read().split()]
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert children

    def is_running(child):
        try:
            with open(f"/proc/{child}/stat") as file:
                return file.read().rsplit(")", 1)[1].split()[0] != "Z"
        except FileNotFoundError:
            return False

    while any(map(is_running, children)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(map(is_running, children))


def test_a_finished_directory_is_kept_and_a_lost_shard_made_again(texts, whole, tmp_path):
    output = tmp_path / "out"
    shutil.copytree(whole, output)
    result = run(texts, output)
    assert result.kept == result.shards and result.source_bytes == 0
    shard = sorted(output.glob("*.array_record"))[2]
    shard.unlink()
    (output / "shard-00000-of-99999.array_record.123.tmp").write_bytes(b"half")
    result = run(texts, output, workers=2)
    assert result.kept == result.shards - 1
    assert prepared_files(output) == prepared_files(whole)
    assert not list(output.glob("*.tmp"))


def test_another_preparation_is_refused_by_the_difference(texts, whole, tmp_path):
    output, files = tmp_path / "out", list_files([str(texts)], None)
    shutil.copytree(whole, output)
    before = prepared_files(output)
    learned = Encoding("bytes", ByteTokenizer(), 256, 300)
    for difference, arguments in {
        "shard_bytes 20000, not 10000": (files, BYTES, output, 10_000),
        r"files, not \d+": (files[1:], BYTES, output, 20_000),
        "in place of /": (files[::-1], BYTES, output, 20_000),
        "vocab_size 257, not 300": (files, learned, output, 20_000),
    }.items():
        with pytest.raises(ValueError, match=f"begun with .*{difference}.*choose another --output"):
            prepare(*arguments[:3], shard_bytes=arguments[3])
    changed = tmp_path / "texts"
    shutil.copytree(texts, changed)
    run(changed, tmp_path / "other")
    path = changed / list_files([str(changed)], None)[0].path
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(ValueError, match=f"{path.name} of another size, time or kind"):
        run(changed, tmp_path / "other")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("x")
    with pytest.raises(ValueError, match="holds thesis.tex and is no prepared directory"):
        run(texts, tmp_path / "full")
    assert prepared_files(output) == before and os.listdir(tmp_path / "full") == ["thesis.tex"]
    with pytest.raises(ValueError, match="the tokenizer has 257 ids, more than 256"):
        prepare(files, Encoding("bytes", ByteTokenizer(), 0, 256), tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_a_file_that_changes_meanwhile_is_noticed(texts, tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("a")
    files = list_files([str(path)], None)
    path.write_text("ab")
    with pytest.raises(ValueError, match="a.txt has changed"):
        prepare(files, BYTES, tmp_path / "out")


def test_two_preparations_of_one_directory_are_refused(texts, tmp_path):
    (tmp_path / "out").mkdir()
    command = (
        "import fcntl, sys\nfile = open(sys.argv[1], 'wb')\nfcntl.flock(file, fcntl.LOCK_EX)\n"
        "print('locked', flush=True)\nsys.stdin.read()\n"
    )
    arguments = [sys.executable, "-c", command, str(tmp_path / "out" / ".lock")]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "locked\n"
        with pytest.raises(OSError, match="another process prepares"):
            run(texts, tmp_path / "out")
        other.stdin.close()
    run(texts, tmp_path / "out")


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_full_disk_is_one_line_and_the_rest_is_kept(texts, whole, tmp_path, workers):
    """Files may have 140 kB here, which the longest document does not fit into."""
    program = (
        "import resource, signal, sys\nfrom path_jax.data.__main__ import main\n"
        "if __name__ == '__main__':\n"
        "    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (140_000, 140_000))\n"
        "    main(sys.argv[1:])\n"
    )
    (tmp_path / "limited.py").write_text(program)
    arguments = ["prepare", str(texts), f"--output={tmp_path / 'out'}", "--shard-bytes=20000", f"--workers={workers}"]
    environment = os.environ | {"PYTHONPATH": os.getcwd()}
    done = subprocess.run(
        [sys.executable, str(tmp_path / "limited.py"), *arguments], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "array_record cannot be written: " in done.stderr.splitlines()[-1]
    assert not (tmp_path / "out" / "dataset.json").exists()
    result = run(texts, tmp_path / "out")
    assert 0 < result.kept < result.shards
    assert prepared_files(tmp_path / "out") == prepared_files(whole)


def damage(path, kind):
    data = bytearray(path.read_bytes())
    if kind == "missing":
        path.unlink()
    elif kind == "cut":
        path.write_bytes(data[: len(data) // 2])
    elif kind == "empty":
        path.write_bytes(b"")
    else:
        data[len(data) // 3] ^= 1
        path.write_bytes(data)


@pytest.mark.parametrize("kind", ["bit", "cut", "empty", "missing"])
def test_damage_is_found_and_named(whole, tmp_path, kind, capsys):
    output = tmp_path / "out"
    shutil.copytree(whole, output)
    longest = max(read_manifest(output).shards, key=lambda shard: shard.tokens)
    damage(output / longest.name, kind)
    assert list(damaged_shards(output)) == [longest.name]
    with pytest.raises(SystemExit, match=f"^data verify: 1 of .*{longest.name}") as error:
        main(["verify", str(output)])
    assert "\n" not in str(error.value)
    with pytest.raises((ValueError, OSError), match=f"{longest.name} .*run: python -m path_jax.data verify"):
        stream_of(output)
    main(["verify", str(whole)])
    assert "all as they were written" in capsys.readouterr().out


def changed_manifest(path, change):
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda m: m["shards"][0].update(name="../x"), r"names '../x' where shard-00000-of-\d+.array_record belongs"),
        (lambda m: m["shards"].reverse(), "belongs"),
        (lambda m: m["shards"].pop(), "belongs"),
        (lambda m: m.update(format=2), "format 2"),
        (lambda m: m.update(dtype="object"), "dtype object"),
        (lambda m: m.update(bos_id=257), "bos_id 257"),
        (lambda m: m.update(record_tokens=0), "0 is not a valid number"),
        (lambda m: m["shards"][0].update(tokens=True), "True is not a valid number"),
        (lambda m: m.pop("tokenizer"), "KeyError 'tokenizer'"),
    ],
)
def test_manifests_that_cannot_be_are_refused(whole, tmp_path, change, message):
    shutil.copytree(whole, tmp_path / "out")
    changed_manifest(tmp_path / "out" / "dataset.json", change)
    with pytest.raises(ValueError, match=message):
        read_manifest(tmp_path / "out")


def test_links_out_of_the_directory_and_other_directories_are_refused(whole, tmp_path):
    output = tmp_path / "out"
    shutil.copytree(whole, output)
    shard = output / read_manifest(output).shards[0].name
    shard.rename(tmp_path / "elsewhere")
    os.symlink(tmp_path / "elsewhere", shard)
    with pytest.raises(ValueError, match="a link to .*elsewhere"):
        PreparedTokens(output).read(0, 1)
    assert list(damaged_shards(output)) == [shard.name]
    (output / "dataset.json").unlink()
    with pytest.raises(FileNotFoundError, match="its preparation did not end"):
        PreparedTokens(output)
    with pytest.raises(FileNotFoundError, match="not a prepared data set"):
        PreparedTokens(tmp_path)
    (output / "dataset.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        PreparedTokens(output)


def test_ids_outside_the_vocabulary_are_damage(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "out")
    changed_manifest(tmp_path / "out" / "dataset.json", lambda m: m.update(vocab_size=200, bos_id=1))
    with pytest.raises(ValueError, match="has id .* with 200 ids"):
        stream_of(tmp_path / "out")


def test_command_prepares_fasta(tmp_path, capsys):
    (tmp_path / "a.fa").write_text(">x\nACGTN\n>y\nacgu\n")
    output = tmp_path / "out"
    main(["prepare", str(tmp_path / "a.fa"), "--output", str(output), "--tokenizer", "dna"])
    printed = capsys.readouterr().out
    assert "2 documents, 11 tokens, 1 shards" in printed and "--config.data.source=prepared" in printed
    assert stream_of(output) == [5, 0, 1, 2, 3, 4, 5, 0, 1, 2, 3]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A vocabulary of a, b, ab and the end of a text, 3."""
    path = tmp_path_factory.mktemp("vocabulary") / "model.gguf"
    return write_gguf(path, random_params(GGUF), change=lambda writer: writer.add_eos_token_id(3))


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_learned_vocabularies_travel_with_the_tokens(checkpoint, tmp_path, workers, capsys):
    (tmp_path / "texts").mkdir()
    for name, text in (("0.txt", "abba"), ("1.txt", "b"), ("2.txt", "<|end|>a")):
        (tmp_path / "texts" / name).write_text(text)
    output = tmp_path / "tokens"
    arguments = ["prepare", str(tmp_path / "texts"), f"--output={output}", "--shard-bytes=4"]
    main([*arguments, f"--tokenizer={checkpoint}", f"--workers={workers}"])
    printed = capsys.readouterr().out
    assert "3 documents, 8 tokens, 2 shards" in printed
    assert f"--config.data.path={output}, for a model with vocab_size={read_manifest(output).vocab_size}" in printed
    assert stream_of(output) == [3, 2, 1, 0, 3, 1, 3, 0]  # a text that opens itself is not opened twice
    encoding = encoding_of(DataConfig(source="prepared", path=str(output)))
    assert (encoding.kind, encoding.bos_id) == ("learned", 3) and encoding.opened("ab").tolist() == [3, 2]
    before = prepared_files(output)
    with pytest.raises(SystemExit, match="begun with vocab_size 40, not 4; choose another --output"):
        main([*arguments, f"--tokenizer={output / 'tokenizer.json'}", "--bos-id=2"])
    with pytest.raises(SystemExit, match="begun with tokenizer.*bytes"):
        main(arguments)
    assert prepared_files(output) == before
    (output / "tokenizer.json").unlink()
    assert encoding_of(DataConfig(source="prepared", path=str(output))) is None


def test_vocabularies_of_escaped_text_stay_so(checkpoint, tmp_path):
    """The flag lies in a second file, and both count for the checksum."""
    (tmp_path / "a.txt").write_text("a\nb")
    vocabulary = tmp_path / "vocabulary"
    vocabulary.mkdir()
    (tmp_path / "b.txt").write_text("ab")
    main(["prepare", str(tmp_path / "b.txt"), f"--output={tmp_path / 'plain'}", f"--tokenizer={checkpoint}"])
    tokenizer = LearnedTokenizer(load_tokenizer(tmp_path / "plain")._tokenizer, is_json_escaped=True)
    for name, content in tokenizer.files().items():
        (vocabulary / name).write_bytes(content)
    arguments = ["prepare", str(tmp_path / "b.txt"), f"--tokenizer={vocabulary}", "--bos-id=3"]
    main([*arguments, f"--output={tmp_path / 'escaped'}"])
    again = load_tokenizer(tmp_path / "escaped")
    assert again._is_json_escaped and not load_tokenizer(tmp_path / "plain")._is_json_escaped
    checksums = [read_manifest(tmp_path / name).tokenizer["sha256"] for name in ("plain", "escaped")]
    assert checksums[0] != checksums[1]


def test_bad_commands_are_one_line(checkpoint, tmp_path):
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "a.fa").write_text(">x\nAC\n")
    (tmp_path / "none").mkdir()
    text, output = str(tmp_path / "a.txt"), str(tmp_path / "out")
    for arguments, reason in (
        ([str(tmp_path / "b.txt")], "b.txt does not exist"),
        ([str(tmp_path / "none")], "no visible non-empty file"),
        ([text, "--tokenizer=dna"], "take --tokenizer=dna or protein"),
        ([str(tmp_path / "a.fa")], "a.fa is fasta and the tokenizer bytes"),
        ([text, "--tokenizer=/nowhere"], "--tokenizer=/nowhere"),
        ([text, f"--tokenizer={tmp_path / 'none'}"], "has no tokenizer.json"),
        ([text, f"--tokenizer={text}"], "not named tokenizer.json"),
        ([text, "--bos-id=3"], "--bos-id=3"),
        ([text, f"--tokenizer={checkpoint}", "--bos-id=40"], "--bos-id=40"),
        ([str(tmp_path)], f"--output={output} is in {tmp_path}"),
        ([text, "--workers=0"], "workers=0"),
        ([text, "--shard-bytes=0"], "shard_bytes=0"),
    ):
        with pytest.raises(SystemExit) as error:
            main(["prepare", *arguments, f"--output={output}"])
        assert reason in str(error.value) and "\n" not in str(error.value)
        assert not os.path.exists(output)
    with pytest.raises(SystemExit, match="^data verify: .*not a prepared data set"):
        main(["verify", str(tmp_path)])
