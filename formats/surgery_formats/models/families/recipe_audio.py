# SPDX-License-Identifier: Apache-2.0
"""What makes the first hidden states of a spectrogram, as data; see `surgery_formats.models.families.recipe`."""

from __future__ import annotations

from dataclasses import dataclass

from surgery_formats.models.families.recipe_parts import Shapes

__all__ = ["AudioStem", "TimeConvolution"]


@dataclass(frozen=True, slots=True)
class TimeConvolution:
    """A convolution over time, padded by one on both sides, then exact GELU.

    Attributes:
        weight: Tensor ``(outputs, inputs, kernel)``.
        bias: Tensor ``(outputs,)``.
        stride: Frames from one result to the next.
    """

    weight: str
    bias: str
    inputs: int
    outputs: int
    kernel: int = 3
    stride: int = 1


@dataclass(frozen=True, slots=True)
class AudioStem:
    """``(B, bins, frames)`` to ``(B, S, D)``: convolutions in order, then learned or stored positions are added.

    Attributes:
        bins: Values per frame.
        frames: Frames of every input: shorter sound is padded with silence before.
        convolutions: In order.
    """

    bins: int
    frames: int
    convolutions: tuple[TimeConvolution, ...]

    def shapes(self) -> Shapes:
        """Its tensors."""
        shapes: Shapes = {}
        for step in self.convolutions:
            shapes |= {step.weight: (step.outputs, step.inputs, step.kernel), step.bias: (step.outputs,)}
        return shapes
