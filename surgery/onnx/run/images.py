# SPDX-License-Identifier: Apache-2.0
"""Encoders of images: runs over batches of ``pixel_values``, as an image processor makes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from surgery.onnx.run.arrays import read_array
from surgery.onnx.run.encoder import EncoderOutput, problem_of, run_encoder
from surgery.onnx.run.opening import GraphSession
from surgery_formats.errors import FitError

__all__ = ["look", "read_images", "reads_images"]

PIXELS = "pixel_values"


def reads_images(graph: GraphSession) -> bool:
    """Whether it is a graph of an encoder of images."""
    return graph.contract.kind == "encoder" and PIXELS in graph.inputs


def read_images(graph: GraphSession, files: Sequence[Path]) -> tuple[npt.NDArray[Any], tuple[str, ...]]:
    """The images in `files`, arrays (.npy) of one image ``(channels, height, width)`` or of several, and a name for each.

    Raises:
        InputError: a file cannot be read.
        FitError: images of another size than the graph's, or no numbers.
    """
    wanted = tuple(graph.inputs[PIXELS].shape[1:])
    images, names = [], list[str]()
    for file in files:
        values = read_array(file)
        batch = values[None] if values.ndim == len(wanted) else values
        if batch.shape[1:] != wanted or batch.dtype.kind != "f" or not len(batch):
            raise FitError(
                f"is {values.dtype} of the shape {list(values.shape)}, but the graph takes numbers {[*wanted]}",
                file=file,
                hint="the model's image processor makes them; positions are not interpolated for another size",
            )
        images.append(batch.astype(np.float32))
        names += [str(file)] if len(batch) == 1 else [f"{file}[{number}]" for number in range(len(batch))]
    return np.concatenate(images), tuple(names)


def look(
    graph: GraphSession, pixels: npt.NDArray[Any], slots: Mapping[str, npt.NDArray[Any]], problem: str, size: int
) -> EncoderOutput:
    """Run an encoder of images on `pixels`, see `read_images`, at most `size` at a time.

    Args:
        graph: The opened graph.
        pixels: Images ``(B, channels, height, width)``, resized and normalised.
        slots: Arrays of adapters, see `fill_slots`.
        problem: ``problem_type`` of the adapter's classifier; empty for the base's.
        size: Most images of a run.
    """
    groups = [run_encoder(graph, {PIXELS: pixels[at : at + size]}, slots) for at in range(0, len(pixels), size)]
    arrays = {name: np.concatenate([group[name] for group in groups]) for name in groups[0]}
    return EncoderOutput(arrays, (0,) * len(pixels), problem or problem_of(graph))
