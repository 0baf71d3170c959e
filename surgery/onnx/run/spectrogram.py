# SPDX-License-Identifier: Apache-2.0
"""Sound as an encoder of sound reads it: a spectrogram from a file, or made of a recording as Whisper's program makes it.

16,000 samples a second, windows of 25 ms every 10 ms, logarithms of powers in bands of equal width on Slaney's mel scale.
"""

from __future__ import annotations

import wave
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from surgery.onnx.run.arrays import check_file, read_array
from surgery_formats.errors import FitError, MalformedError

__all__ = ["log_mel", "read_sound"]

Array = npt.NDArray[Any]

_RATE, _WINDOW, _STEP = 16000, 400, 160
_LINEAR, _KNEE = 200 / 3, 1000.0  # hertz per mel below the knee, and the knee; a factor of 6.4 every 27 mels above


def read_sound(file: Path, bins: int, frames: int) -> Array:
    """The spectrogram ``(bins, frames)`` in `file`: an array (.npy), or a recording (.wav) of at most `frames`.

    Raises:
        NotFoundError: no such file.
        MalformedError: it cannot be read.
        FitError: another kind, rate or size.
    """
    check_file(file)
    if file.suffix == ".npy":
        values = read_array(file)
        values = values[0] if values.ndim == 3 and len(values) == 1 else values
        if values.shape != (bins, frames) or values.dtype.kind != "f":
            raise FitError(
                f"is {values.dtype} of the shape {list(values.shape)}, but the graph takes numbers [{bins}, {frames}]",
                file=file,
            )
        return np.asarray(values, np.float32)
    if file.suffix != ".wav":
        raise FitError("neither a .npy array nor a .wav recording", file=file, hint="convert it to a .wav of 16 kHz")
    samples = _samples(file)
    if len(samples) > frames * _STEP:
        raise FitError(
            f"lasts {len(samples) / _RATE:.1f} s, but the graph reads {frames * _STEP / _RATE:.0f} s at once",
            file=file,
            hint="cut it",
        )
    return log_mel(samples, bins, frames)


def _samples(file: Path) -> Array:
    """Samples from -1 to 1, the mean of all channels."""
    try:
        with wave.open(str(file), "rb") as sound:
            channels, width, rate = sound.getnchannels(), sound.getsampwidth(), sound.getframerate()
            data = sound.readframes(sound.getnframes())
    except (wave.Error, EOFError, RuntimeError) as error:  # the last where a chunk ends beyond the file
        raise MalformedError("not a recording that is read: PCM of 16 bits", file=file) from error
    if width != 2 or rate != _RATE:
        raise FitError(f"has {8 * width} bits and {rate} Hz; it must have 16 bits and {_RATE} Hz", file=file)
    whole = np.frombuffer(data[: len(data) // (2 * channels) * 2 * channels], "<i2").reshape(-1, channels)
    return np.asarray(whole.mean(1) / 32768, np.float32)


def log_mel(samples: Array, bins: int, frames: int) -> Array:
    """``(bins, frames)`` of samples, silence behind their end."""
    padded = np.zeros(frames * _STEP, np.float64)
    padded[: len(samples)] = samples
    padded = np.pad(padded, _WINDOW // 2, mode="reflect")
    places = np.arange(frames)[:, None] * _STEP + np.arange(_WINDOW)
    shape = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(_WINDOW) / _WINDOW)
    powers = np.abs(np.fft.rfft(padded[places] * shape, axis=1)) ** 2
    values = np.log10(np.maximum(_bands(bins) @ powers.T, 1e-10))
    values = np.maximum(values, values.max() - 8)
    return np.asarray((values + 4) / 4, np.float32)


def _bands(bins: int) -> Array:
    """Triangles ``(bins, frequencies)`` between neighbours on the mel scale, each of the area 2."""
    top = _KNEE / _LINEAR + np.log(_RATE / 2 / _KNEE) / (np.log(6.4) / 27)
    mels = np.linspace(0, top, bins + 2)
    knee = _KNEE / _LINEAR
    edges = np.where(mels < knee, mels * _LINEAR, _KNEE * np.exp(np.log(6.4) / 27 * (mels - knee)))
    heights = np.linspace(0, _RATE / 2, _WINDOW // 2 + 1)
    rising = (heights - edges[:-2, None]) / np.diff(edges)[:-1, None]
    falling = (edges[2:, None] - heights) / np.diff(edges)[1:, None]
    triangles = np.maximum(0, np.minimum(rising, falling))
    return np.asarray(triangles * (2 / (edges[2:] - edges[:-2]))[:, None], np.float64)
