"""Speech for Whisper: WAV files, the espeak-ng program, log-mel features.

Samples are float32 at 16 kHz, one channel, in [-1, 1). Not supported: compressed audio, samples of other than 16 bits
(convert with ffmpeg or sox), features of a stream.
"""

import functools
import io
import os
import pathlib
import subprocess
import wave

import numpy as np
from jaxtyping import Float

SAMPLE_RATE = 16_000
_WINDOW = 400  # samples of a frame, 25 ms
_HOP = 160  # samples between frames, 10 ms
_SAMPLES_PER_POSITION = 2 * _HOP  # the encoder halves the number of frames
_LEAST_POWER = 1e-10
_MAX_RATE = 768_000
_STREAM_FRAMES = 2**28  # a program that writes to a pipe states a length at least like this, as it knows none


@functools.cache
def mel_filters(num_mel_bins: int = 80) -> Float[np.ndarray, "M 201"]:
    """Triangles on Slaney's mel scale from 0 to 8 kHz, each of area 1 in Hz, at the frequencies of a frame's spectrum.

    The scale is linear below 1 kHz, mel = 3 f / 200, and logarithmic above, mel = 15 + 27 ln(f / 1000) / ln 6.4.

    Raises:
      ValueError: without bins.

    Source: Slaney, Auditory Toolbox (1998), as Whisper takes it from librosa.
    """
    if num_mel_bins < 1:
        raise ValueError(f"{num_mel_bins=} must be positive")
    highest = 15 + 27 * np.log(SAMPLE_RATE / 2 / 1000) / np.log(6.4)
    mels = np.linspace(0, highest, num_mel_bins + 2)
    edges = np.where(mels < 15, mels * 200 / 3, 1000 * np.exp(np.log(6.4) * (mels - 15) / 27))[:, None]
    frequencies = np.linspace(0, SAMPLE_RATE / 2, _WINDOW // 2 + 1)
    left, middle, right = edges[:-2], edges[1:-1], edges[2:]
    rising, falling = (frequencies - left) / (middle - left), (right - frequencies) / (right - middle)
    filters = np.maximum(np.minimum(rising, falling), 0) * 2 / (right - left)
    filters.setflags(write=False)  # the cache hands out the same array again
    return filters


def log_mel(
    samples: Float[np.ndarray, "n"], num_mel_bins: int = 80, seconds: float = 30.0
) -> Float[np.ndarray, "M frames"]:
    """Log-mel features as Whisper reads them.

    y = max(log10(max(mel power, 1e-10)), its maximum - 8);  (y + 4) / 4

    Frames are 25 ms under a Hann window, every 10 ms, the first one centred at the first sample, of samples mirrored at
    both ends.

    Args:
      samples: float [n] at 16 kHz.
      num_mel_bins: 80, or 128 for large-v3.
      seconds: silence is added or the end cut to this length, a multiple of 20 ms; Whisper was trained on 30.

    Returns:
      float32 [num_mel_bins, 100 * seconds].

    Raises:
      ValueError: for samples of another shape or that are not finite, or a length that is not such a multiple.

    Source: Radford et al., "Robust speech recognition via large-scale weak supervision", 2022, section 2.2.
    """
    samples = np.asarray(samples)
    if samples.ndim != 1 or not np.issubdtype(samples.dtype, np.floating):
        raise ValueError(f"samples are {samples.dtype} {samples.shape}; one channel of floats [n] is expected")
    if not np.isfinite(samples).all():
        raise ValueError("samples must be finite")
    length = round(seconds * SAMPLE_RATE) if np.isfinite(seconds) else 0
    if length < _SAMPLES_PER_POSITION or length % _SAMPLES_PER_POSITION or abs(length - seconds * SAMPLE_RATE) > 0.01:
        raise ValueError(f"{seconds=} must be a positive multiple of 0.02: two frames make one position of the encoder")
    samples = np.pad(samples[:length].astype(np.float64), (0, max(0, length - len(samples))))
    padded = np.pad(samples, _WINDOW // 2, mode="reflect")
    frames = np.lib.stride_tricks.sliding_window_view(padded, _WINDOW)[::_HOP][:-1]  # Whisper drops the last one
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(_WINDOW) / _WINDOW)
    power = np.square(np.abs(np.fft.rfft(frames * window)))
    y = np.log10(np.maximum(mel_filters(num_mel_bins) @ power.T, _LEAST_POWER))
    return ((np.maximum(y, y.max() - 8) + 4) / 4).astype(np.float32)


def read_wav(path: str | os.PathLike[str]) -> Float[np.ndarray, "n"]:
    """Samples of a WAV file of 16-bit PCM; channels are averaged, and scipy changes a rate other than 16 kHz.

    Raises:
      FileNotFoundError: if there is no such file.
      ImportError: scipy is needed and not installed.
      ValueError: for a file that is truncated, compressed, empty or no WAV file.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    return _decoded(path.read_bytes(), path)


def speak(text: str, voice: str = "en") -> Float[np.ndarray, "n"]:
    """Text as the program espeak-ng speaks it, the same samples every time.

    Args:
      text: To speak.
      voice: A language or voice of espeak-ng: "en", "en-us", "de" ... (`espeak-ng --voices` lists them).

    Raises:
      FileNotFoundError: if the program is not installed.
      ImportError: scipy, which changes its 22.05 kHz to 16 kHz, is not installed.
      ValueError: without text, or for a voice that it does not have.
    """
    if not text.strip():
        raise ValueError("there is no text to speak")
    command = ["espeak-ng", "-b", "1", "-v", voice, "--stdin", "--stdout"]  # -b 1: the text is UTF-8
    try:
        done = subprocess.run(command, input=text.encode(), capture_output=True, check=False)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            "speech is made by the program espeak-ng, which is not installed; run: apt-get install espeak-ng (Debian, "
            "Ubuntu) or brew install espeak-ng (macOS)"
        ) from error
    if done.returncode or not done.stdout:
        reason = " ".join(done.stderr.decode(errors="replace").split())[:200]
        raise ValueError(f"espeak-ng with {voice=} failed ({done.returncode}): {reason}")
    return _decoded(done.stdout, "the output of espeak-ng")


def _decoded(data: bytes, where: str | pathlib.Path) -> Float[np.ndarray, "n"]:
    try:
        with wave.open(io.BytesIO(data)) as file:
            num_channels, width, rate, stated = file.getparams()[:4]
            frames = file.readframes(stated)
    except (wave.Error, EOFError, OSError, ValueError, ArithmeticError) as error:
        raise ValueError(
            f"{where} is not a WAV file of PCM samples: {str(error)[:200] or 'it is truncated'}"
        ) from error
    if width != 2:
        raise ValueError(f"{where} has samples of {8 * width} bits; 16 are read: convert it with ffmpeg or sox")
    if not 0 < rate <= _MAX_RATE:
        raise ValueError(f"{where} has a rate of {rate} Hz; at most {_MAX_RATE} are read")
    size = 2 * num_channels
    found = len(frames) // size
    if found < stated < _STREAM_FRAMES or not found:
        raise ValueError(f"{where} is truncated: {found} of {stated} samples are there")
    samples = np.frombuffer(frames[: found * size], "<i2").reshape(-1, num_channels).mean(axis=1) / 2**15
    return _resampled(samples, rate).astype(np.float32)


def _resampled(samples: Float[np.ndarray, "n"], rate: int) -> Float[np.ndarray, "m"]:
    if rate == SAMPLE_RATE:
        return samples
    try:
        from scipy.signal import resample_poly
    except ImportError as error:
        raise ImportError(
            f"speech of {rate} Hz is brought to {SAMPLE_RATE} Hz by scipy; run: pip install path-jax[speech]"
        ) from error
    divisor = np.gcd(rate, SAMPLE_RATE)
    return resample_poly(samples, SAMPLE_RATE // divisor, rate // divisor)
