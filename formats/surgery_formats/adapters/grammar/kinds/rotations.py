# SPDX-License-Identifier: Apache-2.0
"""``oft_blocks``: OFT and BOFT of outputs (LyCORIS 4.1.3, ``modules/diag_oft.py``, ``boft.py``; sd-scripts' ``oft.py``).

alpha is the constraint: Q may have a norm of alpha times the outputs. An alpha of 0 is no constraint for LyCORIS; for
sd-scripts, whose keys begin with ``oft_unet_``, it is one that nothing passes.
"""

from __future__ import annotations

from collections.abc import Iterable

from surgery_formats.adapters.grammar.kinds.kind import LeafKind, LeafWriter, ReadUpdate, number_tensor
from surgery_formats.adapters.grammar.module import ModuleTensors, malformed
from surgery_formats.adapters.grammar.scalars import scalar
from surgery_formats.adapters.grammar.scales import StatedScales
from surgery_formats.updates import Factor, OutputRotation, Update

__all__ = ["ROTATIONS"]

_BY_SD_SCRIPTS = "oft_"  # the stem's beginning


def _read(module: ModuleTensors, scales: StatedScales) -> Iterable[ReadUpdate]:
    blocks = module.part("oft_blocks", "oft_blocks" if "oft_blocks" in module.parts else "rescale")
    shape: tuple[int, ...] = blocks.shape
    if len(shape) not in (3, 4) or shape[-1] != shape[-2]:
        raise malformed(blocks, f"blocks of shape {list(shape)}")
    count, rows = shape[-3:-1]
    if len(shape) == 4 and (rows % 2 or count % (1 << (shape[0] - 1))):
        raise malformed(blocks, f"no butterfly has blocks of shape {list(blocks.shape)}")
    out = count * rows
    rescale = module.parts.get("rescale")
    if rescale is not None and rescale.numel != out:
        raise malformed(rescale, f"{rescale.numel} lengths for {out} rows")
    alpha = module.parts.get("alpha")
    constraint = 0.0 if alpha is None else scalar(alpha, "a constraint")
    if alpha is not None and not 0 <= constraint < float("inf"):
        raise malformed(alpha, f"a constraint of {constraint}")
    limited = constraint > 0 or (alpha is not None and module.stem.startswith(_BY_SD_SCRIPTS))
    update = OutputRotation(
        Factor.of(blocks),
        None if rescale is None else Factor((rescale,), (out,)),
        constraint * out if limited else None,
        noted=() if alpha is None else (alpha,),
    )
    kernel = (0,) * (len(rescale.shape) - 2) if rescale is not None else ()
    yield ReadUpdate("weight", update, kernel=kernel)


def _write(update: Update, parameter: str, writer: LeafWriter) -> None:
    assert isinstance(update, OutputRotation)  # as `writes` says
    writer.put("oft_blocks", update.generators)
    if update.rescale is not None:
        writer.put("rescale", update.rescale, (update.shape[0], 1, *writer.ones))
    name = writer.spelt("alpha")
    writer.tensors[name] = number_tensor(name, (update.limit or 0.0) / update.shape[0])


ROTATIONS = LeafKind(
    name="OFT",
    roles=frozenset(["oft_blocks", "rescale", "alpha"]),
    marks=frozenset(["oft_blocks", "rescale"]),
    read=_read,
    writes=frozenset(OutputRotation.kinds),
    write=_write,
)
