# SPDX-License-Identifier: Apache-2.0
"""Parameters that were saved while their values lay in other processes: DeepSpeed's ZeRO-3 leaves a shape of [0]."""

from __future__ import annotations

from surgery_formats.tensors.tensor import Tensor

__all__ = ["UNGATHERED", "is_ungathered"]

UNGATHERED = (
    "ZeRO-3 leaves this of a parameter that was not gathered before it was saved, and its values are not in the file: "
    "rebuild them from the checkpoint's folder with its zero_to_fp32.py, or save again with "
    "stage3_gather_16bit_weights_on_model_save (huggingface/peft#2450)"
)
"""What an empty parameter means, and what helps."""


def is_ungathered(tensor: Tensor) -> bool:
    """Whether it has the shape that ZeRO-3 leaves."""
    return tuple(tensor.shape) == (0,)
