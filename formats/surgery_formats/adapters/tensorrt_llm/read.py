# SPDX-License-Identifier: Apache-2.0
"""Read TensorRT-LLM's arrays (TensorRT-LLM 5573a380: ``examples/hf_lora_convert.py``, ``tensorrt_llm/lora_manager.py``).

``model.lora_weights.npy`` is ``(1, modules, values)``, a row for each module: ``in`` (rank, in), ``out`` (out, rank) multiplied by the
scale, of a DoRA the magnitude divided by the lengths of the rows (``examples/dora/normalize_weights.py``), and zeros.
``model.lora_config.npy`` is ``(1, modules, 3)`` or 4 of int32: number of the module, layer, rank, and whether it is a DoRA.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from surgery_formats.adapters.tensorrt_llm.files import CONFIG_FILE, MODULES, OTHER_MODULES, TENSOR_FILE, own_folder
from surgery_formats.adapters.tensorrt_llm.rows import PackedRow
from surgery_formats.canonical.adapter import Adapter, Site
from surgery_formats.canonical.provenance import Provenance
from surgery_formats.containers.npy import npy_array
from surgery_formats.dtypes import DType
from surgery_formats.errors import FitError, MalformedError
from surgery_formats.files.raw import open_file
from surgery_formats.tensors.tensor import StoredTensor
from surgery_formats.updates import Update

__all__ = ["read_tensorrt_llm"]

_MODULE_LIMIT = 1 << 16
_DORA = (
    "its DoRA is taken as TensorRT-LLM takes it: rows are multiplied by the magnitudes as they are, which have to be those of "
    "normalize_weights.py"
)


def read_tensorrt_llm(path: Path) -> Adapter:
    """Read a folder, or the one that an array of it lies in.

    Raises:
        NotFoundError, MalformedError: an array is missing, or is none of TensorRT-LLM's.
        FitError: a module that is not read.
    """
    folder = own_folder(path)
    weights = npy_array(open_file(folder / TENSOR_FILE), "lora_weights")
    if len(weights.shape) != 3 or weights.shape[0] != 1 or 0 in weights.shape or not weights.dtype.is_float:
        raise MalformedError(
            f"is {list(weights.shape)} of {weights.dtype.label}", file=weights.path, tensor=weights.name
        )
    updates: dict[Site, tuple[Update, ...]] = {}
    tensors = []
    for number, (module, layer, rank, is_dora) in enumerate(_config(folder / CONFIG_FILE, weights)):
        row = _row(weights, number)
        if module not in MODULES:
            what = OTHER_MODULES.get(module)
            raise FitError(f"is of {what}" if what else f"has the number {module}", file=row.path, tensor=row.name)
        site = Site(f"model.layers.{layer}.{MODULES[module]}.weight", module_kind="linear")
        if site in updates:
            raise MalformedError(f"a second row for '{site}'", file=row.path, tensor=row.name)
        chain = (PackedRow(row, rank, is_dora), PackedRow(row, rank, is_dora, stretches=True))
        updates[site] = chain if is_dora else chain[:1]
        tensors.append(row)
    dora = any(len(chain) > 1 for chain in updates.values())
    return Adapter(
        path=path,
        format="tensorrt-llm",
        kind="DORA" if dora else "LORA",
        updates=dict(sorted(updates.items())),
        tensors=tuple(tensors),
        stated_issues=(_DORA,) if dora else (),
        provenance=Provenance("TensorRT-LLM (its arrays)"),
    )


def _config(path: Path, weights: StoredTensor) -> list[tuple[int, int, int, bool]]:
    """Module, layer, rank and whether it is a DoRA, of every row."""
    config = npy_array(open_file(path), "lora_config")
    count = weights.shape[1]
    if config.dtype is not DType.I32 or config.shape not in ((1, count, 3), (1, count, 4)) or count > _MODULE_LIMIT:
        raise MalformedError(
            f"is {list(config.shape)} of {config.dtype.label}, not a row of int32 for each of {count} modules",
            file=config.path,
            tensor=config.name,
        )
    known = []
    for line in config.read().reshape(count, -1).tolist():
        module, layer, rank, is_dora = (*line, 0)[:4]
        if not 0 <= layer < 1 << 20 or not 0 < rank <= weights.shape[2] or is_dora not in (0, 1):
            raise MalformedError(f"the row {line} is none of TensorRT-LLM's", file=config.path, tensor=config.name)
        known.append((module, layer, rank, bool(is_dora)))
    return known


def _row(weights: StoredTensor, number: int) -> StoredTensor:
    step = weights.nbytes // weights.shape[1]
    return replace(
        weights,
        name=f"{weights.name}[{number}]",
        shape=weights.shape[2:],
        offset=weights.offset + number * step,
        nbytes=step,
    )
