# SPDX-License-Identifier: Apache-2.0
"""``oft_R.weight``: OFT of inputs as OneTrainer trains it (``modules/module/oft_utils.py``, 23df3832 of 2026-08).

The rotations are PEFT's by a series of five terms, of a linear layer's inputs, of a convolution's kernels. ``oft_R.scaled_oft``
says that the angles are divided by twice the root of a block's side less one. A lone block may be one for all, or the only one:
what it does is the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from surgery_formats.adapters.grammar.kinds.kind import LeafKind, LeafWriter, ReadUpdate, flag_tensor
from surgery_formats.adapters.grammar.module import ModuleTensors, malformed
from surgery_formats.adapters.grammar.scales import StatedScales
from surgery_formats.updates import OFT as Rotation
from surgery_formats.updates import Factor, Update

__all__ = ["OFT"]

_TERMS = 5


def _read(module: ModuleTensors, scales: StatedScales) -> Iterable[ReadUpdate]:
    stored = module.matrix("oft_R.weight", "oft_R.scaled_oft" if "oft_R.weight" not in module.parts else "oft_R.weight")
    blocks, numbers = stored.matrix
    block = (1 + math.isqrt(1 + 8 * numbers)) // 2
    if len(stored.shape) != 2 or block * (block - 1) // 2 != numbers:
        raise malformed(stored, f"{list(stored.shape)}, no strictly upper triangles")
    angles = Factor.of(stored)
    if "oft_R.scaled_oft" in module.parts:
        divisor = 2 * math.sqrt(max(block - 1, 1))
        angles = Factor.computed((angles,), angles.shape, lambda values: values / divisor)
    shared = blocks == 1
    yield ReadUpdate(
        "weight", Rotation(angles, block, _TERMS, None, shared, inputs=0 if shared else blocks * block, kernels=True)
    )


def _write(update: Update, parameter: str, writer: LeafWriter) -> None:
    assert isinstance(update, Rotation)  # as `writes` says
    if not update.angles.terms:
        writer.put("oft_R.weight", update.angles)
        return
    writer.put("oft_R.weight", update.angles.terms[0])
    name = writer.spelt("oft_R.scaled_oft")
    writer.tensors[name] = flag_tensor(name)


def _is_as_trained(update: Update) -> bool:
    assert isinstance(update, Rotation)  # as `writes` says
    return update.kernels and update.terms == _TERMS and update.radius is None


OFT = LeafKind(
    name="OFT of inputs",
    roles=frozenset(["oft_R.weight", "oft_R.scaled_oft"]),
    marks=frozenset(["oft_R.weight", "oft_R.scaled_oft"]),
    read=_read,
    writes=frozenset([Rotation.kind]),
    write=_write,
    takes=_is_as_trained,
)
