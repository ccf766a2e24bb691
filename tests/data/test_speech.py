"""Log-mel features against transformers' WhisperFeatureExtractor; WAV files and the program that speaks."""

import pathlib
import shutil
import struct
import wave

import numpy as np
import pytest

from path_jax.data.speech import log_mel, mel_filters, read_wav, speak

# mel80 and mel128: what WhisperFeatureExtractor (transformers 5.23) makes of `rising_tone`, at some frames.
GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "whisper" / "golden.npz"
FRAMES = [0, 1, 40, 119, 120, 121, 150, 2999]
NOISE = np.random.default_rng(0).uniform(-0.5, 0.5, 9000).astype(np.float32)


def rising_tone():
    """1.2 s from 200 to 2360 Hz, then 0.3 s of silence."""
    seconds = np.arange(24000) / 16000
    return (0.4 * np.sin(2 * np.pi * (200 + 900 * seconds) * seconds) * (seconds < 1.2)).astype(np.float32)


def write_wav(path, samples, rate=16000, width=2, num_channels=1):
    with wave.open(str(path), "wb") as file:
        file.setparams((num_channels, width, rate, 0, "NONE", ""))
        file.writeframes(samples.tobytes())
    return path


@pytest.mark.parametrize("num_mel_bins", [80, 128])
def test_features_are_those_of_transformers(num_mel_bins):
    features = log_mel(rising_tone(), num_mel_bins)
    assert features.shape == (num_mel_bins, 3000) and features.dtype == "float32"
    expected = np.load(GOLDEN)[f"mel{num_mel_bins}"]
    assert np.abs(features[:, FRAMES] - expected).max() <= 1e-4 and expected.std() > 0.2


def test_filters_are_triangles_of_equal_area():
    filters = mel_filters(80)
    assert filters.shape == (80, 201) and (filters >= 0).all()
    # 40 Hz between frequencies; a triangle that few of them hit has another sum.
    np.testing.assert_allclose(filters[50:].sum(axis=1) * 40, 1, atol=0.03)
    assert (np.diff(filters.argmax(axis=1)) >= 0).all()
    assert filters[:, 25].argmax() == 26  # 1 kHz is mel 15 of 45.25: 26.9 of 81 steps, next to the middle of this one


def test_speech_is_padded_or_cut():
    short, long = log_mel(NOISE, seconds=0.5), log_mel(NOISE, seconds=1)
    assert short.shape == (80, 50) and long.shape == (80, 100)
    # All but the last two frames, which see what follows; NOISE is loud enough for both to have the same maximum.
    np.testing.assert_allclose(short[:, :47], long[:, :47], atol=2e-3)
    assert long[:, 60:].max() == long.min()  # silence
    padded = log_mel(np.pad(NOISE, (0, 7000)), seconds=1)
    np.testing.assert_array_equal(long, padded)
    np.testing.assert_array_equal(log_mel(np.zeros(0, np.float32), seconds=0.02), np.full((80, 2), -1.5, np.float32))


def test_features_of_something_else():
    for samples, options, reason in (
        (NOISE[None], {}, r"float32 \(1, 9000\); one channel of floats"),
        ((NOISE * 99).astype(np.int16), {}, "int16"),
        (np.full(5, np.nan), {}, "finite"),
        (NOISE, dict(seconds=0.03), "seconds=0.03 must be a positive multiple of 0.02"),
        (NOISE, dict(seconds=0), "seconds=0 must be"),
        (NOISE, dict(seconds=float("inf")), "seconds=inf"),
        (NOISE, dict(num_mel_bins=0), "num_mel_bins=0 must be positive"),
    ):
        with pytest.raises(ValueError, match=reason):
            log_mel(samples, **options)


def test_wav_files(tmp_path):
    samples = (NOISE * 2**15).astype("<i2")
    read = read_wav(write_wav(tmp_path / "a.wav", samples))
    assert read.dtype == "float32"
    np.testing.assert_array_equal(read, samples / np.float32(2**15))
    stereo = np.stack([samples, -samples // 2], axis=1)
    np.testing.assert_allclose(
        read_wav(write_wav(tmp_path / "b.wav", stereo, num_channels=2)), stereo.mean(axis=1) / 2**15, atol=1e-7
    )
    for rate in (8000, 22050, 44100):
        tone = np.sin(2 * np.pi * 440 * np.arange(rate) / rate)
        read = read_wav(write_wav(tmp_path / "c.wav", (tone * 2**14).astype("<i2"), rate))
        assert len(read) == 16000
        expected = np.sin(2 * np.pi * 440 * np.arange(16000) / 16000) / 2
        assert np.abs(read - expected)[200:-200].max() < 5e-3


def test_damaged_wav_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no file"):
        read_wav(tmp_path / "absent.wav")
    whole = write_wav(tmp_path / "whole.wav", (NOISE * 2**15).astype("<i2")).read_bytes()
    path = tmp_path / "x.wav"
    compressed = whole[:20] + struct.pack("<H", 85) + whole[22:]  # MP3
    for data, reason in (
        (b"", "is not a WAV file of PCM samples: it is truncated"),
        (b"ID3" + whole, "is not a WAV file"),
        (whole[:30], "is not a WAV file"),
        (compressed, "is not a WAV file of PCM samples: unknown format"),
        (whole[:-1000], "is truncated: 8500 of 9000 samples"),
        (whole[:44], "is truncated: 0 of 9000 samples"),
        (whole[:24] + struct.pack("<I", 0) + whole[28:], "has a rate of 0 Hz"),
    ):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=reason) as error:
            read_wav(path)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="samples of 8 bits; 16 are read"):
        read_wav(write_wav(path, np.zeros(9, np.uint8), width=1))


def test_speaking_runs_the_program(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="no text"):
        speak(" \n")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="apt-get install espeak-ng"):
        speak("hello")
    # To a pipe, WAV files are written with a length that is not yet known.
    wav = write_wav(tmp_path / "out.wav", (NOISE * 2**15).astype("<i2")).read_bytes()
    wav = wav[:4] + struct.pack("<I", 0x7FFFF024) + wav[8:40] + struct.pack("<I", 0x7FFFF000) + wav[44:]
    (tmp_path / "out.wav").write_bytes(wav)
    program = tmp_path / "espeak-ng"
    program.write_text(f'#!/bin/sh\ncd {tmp_path}\nprintf "%s|" "$@" > arguments\n/bin/cat > text\n/bin/cat out.wav\n')
    program.chmod(0o755)
    np.testing.assert_allclose(speak("-x $(ls) ü", "en-us"), NOISE, atol=2**-15)
    assert (tmp_path / "text").read_text() == "-x $(ls) ü"
    assert (tmp_path / "arguments").read_text() == "-b|1|-v|en-us|--stdin|--stdout|"
    program.write_text("#!/bin/sh\necho 'no such\nvoice' >&2\nexit 1\n")
    with pytest.raises(ValueError, match=r"voice='xx' failed \(1\): no such voice"):
        speak("hello", "xx")


@pytest.mark.skipif(shutil.which("espeak-ng") is None, reason="the program espeak-ng is not installed")
def test_espeak_ng_speaks():
    samples = speak("Hello world.")
    assert samples.dtype == "float32" and 8000 < len(samples) < 48000 and 0.1 < np.abs(samples).max() <= 1
    np.testing.assert_array_equal(samples, speak("Hello world."))
