# SPDX-License-Identifier: Apache-2.0
"""Export a checkpoint as ONNX graphs that use its weight files as they are."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surgery.onnx.build import Built, Options, build
from surgery.onnx.contract import Contract
from surgery.onnx.genai import genai_config
from surgery.onnx.place import Mode, Parcel, choose_mode, embed, place
from surgery.onnx.target import choose, io_type
from surgery_formats.checkpoint import Checkpoint, Component, open_checkpoint
from surgery_formats.dtypes import DType
from surgery_formats.files.bounded_json import read_object

__all__ = ["ExportResult", "export_onnx"]


@dataclass(frozen=True)
class ExportResult:
    """What an export did.

    Attributes:
        output: The folder.
        contract: Of ``model.onnx``.
        files: Written graphs and small files with their sizes.
        weights: How weights got there.
        nbytes: Bytes written.
        nodes: Of ``model.onnx``.
        warnings: What the user should know.
    """

    output: Path
    contract: Contract
    files: Mapping[str, int]
    weights: Mode
    nbytes: int
    nodes: int
    warnings: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """For ``--json``."""
        contract = self.contract
        return {
            "output": str(self.output),
            "task": contract.task,
            "target": contract.target,
            "dtype": contract.dtype,
            "padding": contract.padding,
            "cache": contract.cache,
            "max_length": contract.max_length,
            "files": dict(self.files),
            "weights": self.weights,
            "weight_files": [one.name for one in contract.weights],
            "nbytes": self.nbytes,
            "nodes": self.nodes,
            "warnings": list(self.warnings),
        }


def export_onnx(
    base: str | os.PathLike[str],
    *,
    output: str | os.PathLike[str],
    target: str = "cpu",
    dtype: str = "auto",
    weights: str = "auto",
    max_length: int | None = None,
    overwrite: bool = False,
) -> ExportResult:
    """Write ``model.onnx`` and what belongs to it into a folder.

    Args:
        base: Hugging Face folder.
        output: Folder to make, or the base's own, to which files are only added.
        target: ``cuda``, ``cpu`` or ``portable``.
        dtype: Of arithmetic, logits and cache: ``auto``, ``fp32``, ``fp16``, ``bf16``.
        weights: ``auto``: used where they lie if `output` is their folder, else copied, their blocks shared where the file system can;
            ``reference``, ``link``, ``copy``, ``embed``.
        max_length: Longest sequence; None for as long as the model was made for.
        overwrite: Replace an existing output, atomically.

    Raises:
        InputError: the base cannot be read.
        FitError: an architecture without a recipe; a tensor missing, left over or misshapen; a type the target cannot run.
        OutputExistsError, ResourceError, ProofError: nothing is written.
    """
    checkpoint = open_checkpoint(base)
    component = checkpoint.main
    where = Path(output)
    io = io_type(target, dtype, _stored_type(component))
    built = build(component, Options(choose(target, io), io, max_length))
    mode = choose_mode(weights, where, component.folder, built.files)
    parcel = _parcel(checkpoint, built, mode, where)
    written = place(parcel, where, mode, component.folder, overwrite=overwrite)
    sizes = {name: len(data) for name, data in parcel.files.items()}
    return ExportResult(where, built.contract, sizes, mode, written, built.nodes, tuple(_warnings(mode)))


def _stored_type(component: Component) -> DType:
    """Of the embedding, else of the first matrix."""
    if component.embedding:
        return component.tensors[component.embedding].dtype
    return next((one.dtype for one in component.tensors.values() if one.dtype.is_float), DType.F32)


def _parcel(checkpoint: Checkpoint, built: Built, mode: Mode, output: Path) -> Parcel:
    component = checkpoint.main
    files: dict[str, bytes] = {}
    if built.contract.kind == "decoder":
        files["genai_config.json"] = genai_config(
            component.config,
            _generation(component.folder),
            built.contract,
            built.model.layers[0].attention.heads if built.model.layers else 0,
        )
    for name, model in built.graphs.items():
        if mode == "embed":
            embed(model, built.files)
        files[name] = model.SerializeToString(deterministic=True)
    side_files = [*checkpoint.side_files]
    if (component.folder / "config.json").exists():
        side_files.append(("config.json", component.folder / "config.json"))
    facts = {"target": built.contract.target, "dtype": built.contract.dtype, "weights": mode}
    taken = {*files, *(file.path.name for file in built.files)}
    return Parcel(
        files,
        () if mode == "embed" else built.files,
        [side for side in side_files if side[0] not in taken],
        facts,
    )


def _generation(folder: Path) -> Mapping[str, Any]:
    path = folder / "generation_config.json"
    return read_object(path) if path.exists() else {}


def _warnings(mode: Mode) -> list[str]:
    if mode == "link":
        return [
            "the weights are hard links: onnxruntime loads them, onnx.load refuses them, and a program that writes into one file "
            "changes both"
        ]
    return []
