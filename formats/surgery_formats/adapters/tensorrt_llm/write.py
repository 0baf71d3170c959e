# SPDX-License-Identifier: Apache-2.0
"""Write the canonical form as TensorRT-LLM's arrays. Each module keeps its rank; its scale is multiplied into ``out``."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Mapping, Sequence

from surgery_formats.adapters.contents import Contents, contents_of
from surgery_formats.adapters.format import NewTensor, Rendering
from surgery_formats.adapters.packing import PackedFile
from surgery_formats.adapters.tensorrt_llm.files import CONFIG_FILE, MODULES, TENSOR_FILE
from surgery_formats.adapters.writing import ConversionLedger, factor_dtype, places_of, whole_place
from surgery_formats.arrays import Array
from surgery_formats.canonical.adapter import Adapter, Site
from surgery_formats.containers.base import TensorSpec
from surgery_formats.containers.npy import npy_header
from surgery_formats.dtypes import DType
from surgery_formats.errors import FitError
from surgery_formats.models.checkpoint import Checkpoint
from surgery_formats.updates import LoRA

__all__ = ["render_tensorrt_llm"]

_OF_BLOCK = re.compile(r"(?:model\.)?(?:language_model\.)?(?:model\.)?layers\.([0-9]{1,6})\.(.+)\.weight")
"""A module of the language model: towers for images have blocks with the same names in them."""
_NUMBERS = {name: number for number, name in MODULES.items()}


def render_tensorrt_llm(adapter: Adapter, base: Checkpoint | None) -> Rendering:
    """A folder. Only LoRAs of the linear layers of blocks with Llama's names have a place in it.

    Raises:
        FitError: no base is given.
    """
    if base is None:
        raise FitError(
            "TensorRT-LLM's arrays hold no names and no sizes: only the base tells them",
            file=adapter.path,
            hint="give the base with `base=`",
        )
    ledger = ConversionLedger()
    found: dict[tuple[int, int], LoRA] = {}
    for site, chain in adapter.updates.items():
        for update in chain:
            held = contents_of(update)
            place = None if (why := _fault(site, held, len(chain))) else _place(site, held, base)
            if not why and (place is None or place in found):
                why = "a second one on one module" if place else "TensorRT-LLM has no such module of a block"
            if why or place is None or held.lora is None:
                ledger.drop(site, update, why)
                continue
            found[place] = held.lora
            said = [f"scale {held.lora.scale:g} in out"] if held.lora.scale != 1.0 else []
            said += [held.folded] if held.folded else []
            ledger.keep(site, update, "folded" if said else "exact", ", ".join(said))
    ledger.drop_prompt(adapter)
    order = sorted(found)
    width = max((_values(found[place]) for place in order), default=0)
    dtype = _dtype(found)
    rows = [
        NewTensor(f"{layer}.{MODULES[m]}", dtype, (1, width), _loader(found[layer, m], width)) for layer, m in order
    ]
    config = npy_header(DType.I32, (1, len(order), 4))
    config += b"".join(struct.pack("<4i", m, layer, found[layer, m].rank, 0) for layer, m in order)
    return Rendering(
        TENSOR_FILE, tuple(rows), {}, {CONFIG_FILE: config}, tuple(ledger.entries), ledger.held, packing=_packed
    )


def _fault(site: Site, held: Contents, chained: int) -> str:
    """Why the format cannot hold an update; empty if it can."""
    if site.flat or site.component or site.kernel or not site.path.endswith(".weight"):
        return "this format has linear layers of language models alone"
    if chained > 1 or held.lora is None or held.dora is not None:
        return "this format has one LoRA for a module, and magnitudes that only a base's values tell"
    return ""


def _place(site: Site, held: Contents, base: Checkpoint) -> tuple[int, int] | None:
    """Layer and number of a module that the base has as a whole."""
    place = whole_place(places_of(site, base, held.update.tensors))
    if place is None:
        return None
    found = _OF_BLOCK.fullmatch(place[0])
    return (int(found[1]), _NUMBERS[found[2]]) if found is not None and found[2] in _NUMBERS else None


def _values(lora: LoRA) -> int:
    return lora.rank * sum(lora.shape)


def _dtype(found: Mapping[tuple[int, int], LoRA]) -> DType:
    """One for all rows: the widest that one of them needs."""
    needed = {factor_dtype([lora.A, lora.B], folded=lora.scale != 1.0) for lora in found.values()}
    return needed.pop() if len(needed) == 1 else DType.F64 if DType.F64 in needed else DType.F32


def _loader(lora: LoRA, width: int) -> Callable[[], Array]:
    def load() -> Array:
        import numpy

        row = numpy.zeros((1, width))
        first = lora.A.load(DType.F64).reshape(-1)
        second = lora.B.load(DType.F64).reshape(-1) * lora.scale
        row[0, : first.size] = first
        row[0, first.size : first.size + second.size] = second
        return row

    return load


def _packed(specs: Sequence[TensorSpec], metadata: Mapping[str, str]) -> PackedFile:
    """Rows one below the other, as one array; it has no place for free strings."""
    width, dtype = specs[0][2][1], specs[0][1]
    header, step = npy_header(dtype, (1, len(specs), width)), dtype.nbytes(width)
    ranges = {name: (len(header) + number * step, step) for number, (name, _, _) in enumerate(specs)}
    return PackedFile(header, ranges, len(header) + len(specs) * step)
