# SPDX-License-Identifier: Apache-2.0
"""``dora_scale``: the lengths of rows or columns, whose shape tells which."""

from __future__ import annotations

from surgery_formats.adapters.grammar.kinds.kind import LeafWriter
from surgery_formats.adapters.grammar.module import ModuleTensors, fit_error
from surgery_formats.updates import DoRA, Factor
from surgery_formats.updates.decomposed import Decomposed

__all__ = ["has_lengths_of_rows_alone", "lengths_of", "put_lengths"]


def lengths_of(module: ModuleTensors, out: int, channels: tuple[int, ...]) -> tuple[Factor, bool] | None:
    """The lengths, and whether they belong to rows; None if the module has none.

    They are ``(out, 1, ...)``, PEFT's ``(out,)``, or ``(1, in, ...)`` with one for each input channel.

    Args:
        module: Its tensors.
        out: Rows of the weight.
        channels: Input channels of the weight, as far as the factors tell: of a flattened convolution several may be.

    Raises:
        FitError: another shape.
    """
    stored = module.parts.get("dora_scale")
    if stored is None:
        return None
    sizes = stored.shape[:2]
    if sizes in ((out, 1), (out,)) and stored.numel == out:
        return Factor((stored,), (out,)), True
    if len(sizes) == 2 and sizes[0] == 1 and stored.numel == sizes[1] and _fits(sizes[1], channels):
        return Factor((stored,), (sizes[1],)), False
    raise fit_error(stored, f"'dora_scale' is {list(stored.shape)}, for a weight of {[out, *channels]}")


def _fits(size: int, channels: tuple[int, ...]) -> bool:
    return size in channels or (len(channels) == 1 and channels[0] % size == 0)


def has_lengths_of_rows_alone(writer: LeafWriter) -> bool:
    """Whether the spelling is PEFT's, which has one length for each row and no others."""
    return writer.leaves.get("dora_scale", "").startswith("lora_magnitude")


def put_lengths(writer: LeafWriter, update: DoRA | Decomposed) -> None:
    """Write the lengths of an update."""
    size = update.magnitude.shape[0]
    if has_lengths_of_rows_alone(writer):
        writer.put("dora_scale", update.magnitude, (size,))
    else:
        writer.put(
            "dora_scale", update.magnitude, (size, 1, *writer.ones) if update.per_row else (1, size, *writer.ones)
        )
