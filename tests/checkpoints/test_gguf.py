"""GGUF files, written by the gguf package from a tiny llama."""

import struct

import gguf
import jax
import numpy as np
import pytest
from checkpoints.synthetic import GGUF, random_params, write_gguf

from path_jax.checkpoints import load_pretrained
from path_jax.checkpoints.gguf import GgufFile
from path_jax.data import vocabulary_tokenizer

TYPES = ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
# Of the largest weight, as rounding of 4, 5, 8 bits per block of 32, or of 11 and 8 bits per number, allows.
TOLERANCE = dict(F32=0, F16=2e-3, BF16=8e-3, Q4_0=0.14, Q4_1=0.07, Q5_0=0.07, Q5_1=0.04, Q8_0=8e-3)


@pytest.fixture(scope="module")
def params():
    return random_params(GGUF)


@pytest.mark.parametrize("kind", TYPES)
def test_every_type(kind, params, tmp_path):
    config, loaded = load_pretrained(write_gguf(tmp_path / "x.gguf", params, kind))
    assert config.make_mixer().rope_theta == 5e4
    assert (config.num_layers, config.num_kv_heads, config.norm_eps) == (2, 2, GGUF.norm_eps)
    assert jax.tree.structure(loaded) == jax.tree.structure(params)
    for ours, expected in zip(jax.tree.leaves(loaded), jax.tree.leaves(params)):
        assert ours.dtype == "float32"
        assert np.abs(ours - expected).max() <= TOLERANCE[kind] * np.abs(expected).max()


def test_rows_of_queries_are_interleaved_in_the_file(params, tmp_path):
    """Row 2 i + j of a head is the j-th of the i-th pair that is turned; ours are the first halves, then the second."""
    reader = gguf.GGUFReader(write_gguf(tmp_path / "x.gguf", params))
    stored = {tensor.name: tensor.data for tensor in reader.tensors}
    ours = np.asarray(params["layers_1"]["mixer"]["q_proj"]["kernel"]).T
    half = GGUF.head_dim // 2
    for head in range(GGUF.num_heads):
        for i in range(half):
            for j in range(2):
                row = stored["blk.1.attn_q.weight"][head * GGUF.head_dim + 2 * i + j]
                np.testing.assert_array_equal(row, ours[head * GGUF.head_dim + j * half + i])


def test_vocabulary(params, tmp_path):
    with GgufFile(write_gguf(tmp_path / "x.gguf", params)) as file:
        tokenizer = vocabulary_tokenizer(**file.vocabulary())
    assert tokenizer.encode("abba<|end|>a").tolist() == [2, 1, 0, 3, 0]
    assert tokenizer.decode([2, 1, 0, 3, 0, 99]) == "abba<|end|>a"


def test_other_models_are_refused_by_name(params, tmp_path):
    path = tmp_path / "x.gguf"
    for arguments, reason in (
        (dict(architecture="mamba"), "architecture 'mamba'; 'llama' is supported"),
        (dict(change=lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.YARN)), "scaled by 'yarn'"),
        (dict(change=lambda w: w.add_expert_count(8)), "a mixture of 8 experts"),
        (dict(change=lambda w: w.add_tensor("rope_freqs.weight", np.ones(8, np.float32))), "rope_freqs.weight"),
    ):
        with pytest.raises(ValueError, match=reason):
            load_pretrained(write_gguf(path, params, **arguments))
    data = write_gguf(path, params, "Q8_0").read_bytes()
    name = b"blk.0.ffn_up.weight"
    at = data.index(name) + len(name) + 4 + 2 * 8  # the type follows the number of dimensions and two of them
    for kind, reason in ((gguf.GGMLQuantizationType.IQ4_NL, "IQ4_NL"), (10**6, "malformed")):
        path.write_bytes(data[:at] + struct.pack("<I", kind) + data[at + 4 :])
        with pytest.raises(ValueError, match=reason):
            load_pretrained(path)


def test_damaged_files(params, tmp_path):
    data = write_gguf(tmp_path / "whole.gguf", params).read_bytes()
    path = tmp_path / "x.gguf"
    assert data[32:69] == b"general.architecture" + struct.pack("<IQ", 8, 5) + b"llama"
    tokens = struct.pack("<IQ", 8, 4)  # an array of four strings
    assert tokens in data
    huge = struct.pack("<Q", 2**60)
    cases = {
        "is not a GGUF file": [b"", b"GGU", b"\0" * 99],
        "truncated or malformed": [
            *(data[:size] for size in (4, 23, 60, 300, 900, len(data) // 2, len(data) - 1)),
            data[:8] + huge + data[16:],  # tensors
            data[:16] + huge + data[24:],  # values
            data[:24] + huge + data[32:],  # bytes of the first key
            data.replace(tokens, struct.pack("<IQ", 8, 2**60)),
            data[:16] + struct.pack("<Q", 2) + 2 * data[24:69] + data[69:],  # the first key twice
            data[:4] + struct.pack("<I", 1) + data[8:],
            data.replace(struct.pack("<QQ", 64, 40), struct.pack("<QQ", 2**32, 2**32)),
        ],
    }
    for reason, files in cases.items():
        for number, damaged in enumerate(files):
            path.write_bytes(damaged)
            with pytest.raises(ValueError, match=reason) as error:
                load_pretrained(path)
            assert "\n" not in str(error.value), number
    with pytest.raises(FileNotFoundError):
        load_pretrained(tmp_path / "absent.gguf")
