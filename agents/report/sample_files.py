"""Videos and sounds of an evaluation as files that a browser plays.

Images have a file of their own, `iteration_NNNN.png`, which also shows frames of a video and the waveform of a sound.
"""

from __future__ import annotations

import io
import wave
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from agents.output.files import write_file
from rewards.kinds import kind_of

FRAMES_PER_SECOND = 16
"""The rate of every video here: a pipeline does not say how fast its frames shall be shown."""
_LONGEST_SIDE = 256
_PEAK = 32_767


def write_samples(folder: Path, name: str, samples: npt.NDArray[Any], sampling_rate: int | None) -> None:
    """Write each video to `NAME_NN.webp`, at most 256 pixels wide and high, and each sound to `NAME_NN.wav`.

    Samples of another kind get no file. Nor do sounds whose model does not say their sampling rate.

    Args:
        folder: of the files.
        name: with which the files begin.
        samples: videos `(samples, frames, height, width, 3)` uint8, or sounds `(samples, channels, length)` float.
        sampling_rate: of the sounds, per second.
    """
    kind = kind_of(samples)
    for index, sample in enumerate(samples):
        if kind == "video":
            write_file(folder / f"{name}_{index:02d}.webp", _film(sample))
        elif kind == "audio" and sampling_rate is not None:
            write_file(folder / f"{name}_{index:02d}.wav", _sound(sample, int(sampling_rate)))


def sample_paths(folder: Path, name: str) -> Sequence[Path]:
    """Return the files that `write_samples` wrote, in the order of the samples."""
    return sorted(path for path in folder.glob(f"{name}_??.*") if path.suffix in (".webp", ".wav"))


def _film(frames: npt.NDArray[np.uint8]) -> bytes:
    pictures = [Image.fromarray(frame) for frame in frames]
    for picture in pictures:
        picture.thumbnail((_LONGEST_SIDE, _LONGEST_SIDE))
    content = io.BytesIO()
    first, *others = pictures
    duration = round(1000 / FRAMES_PER_SECOND)
    first.save(content, "webp", save_all=True, append_images=others, duration=duration, loop=0, quality=80)
    return content.getvalue()


def _sound(samples: npt.NDArray[np.floating[Any]], rate: int) -> bytes:
    """Return a WAV file of 16 bits; what is louder than 1 is clipped, as players do, and NaN is silent."""
    content = io.BytesIO()
    with wave.open(content, "wb") as file:
        file.setnchannels(len(samples))
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((np.nan_to_num(samples).clip(-1, 1).T * _PEAK).round().astype("<i2").tobytes())
    return content.getvalue()
