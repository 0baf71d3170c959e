# SPDX-License-Identifier: Apache-2.0
"""Export a checkpoint as ONNX graphs that use its weight files as they are."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.onnx.build import ROWS, Built, Options, build
from surgery.onnx.contract import Contract
from surgery.onnx.genai import genai_config
from surgery.onnx.place import Mode, Parcel, choose_mode, embed, place, place_merged
from surgery.onnx.target import choose, io_type
from surgery_formats.checkpoint import Checkpoint, Component, open_checkpoint
from surgery_formats.dtypes import DType
from surgery_formats.errors import FitError
from surgery_formats.families.parameters import model_of
from surgery_formats.files.bounded_json import read_object

if TYPE_CHECKING:
    from surgery.onnx.parts import Parts

__all__ = ["ExportResult", "export_onnx"]

GENAI_CONFIG = "genai_config.json"


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
            "adapters": [dict(one) for one in contract.adapters],
            "warnings": list(self.warnings),
        }


def export_onnx(
    base: str | os.PathLike[str],
    *,
    output: str | os.PathLike[str],
    merge: Sequence[tuple[str | os.PathLike[str], float]] = (),
    swap: Sequence[str | os.PathLike[str]] = (),
    prefix: Sequence[str | os.PathLike[str]] = (),
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
        merge: Adapters folded into the weights, with their weights, in this order. Where the base's files are used as they are, the changed
            tensors go into ``delta.safetensors`` beside them.
        swap: LoRA adapters that get slots in the graph, and a file ``NAME.onnx_adapter`` each.
        prefix: At most one soft prompt, as keys and values that every sequence stands on.
        target: ``cuda``, ``cpu`` or ``portable``.
        dtype: Of arithmetic, logits and cache: ``auto``, ``fp32``, ``fp16``, ``bf16``.
        weights: ``auto``: used where they lie if `output` is their folder, else copied, their blocks shared where the file system can;
            ``reference``, ``link``, ``copy``, ``embed``.
        max_length: Longest sequence; None for as long as the model was made for.
        overwrite: Replace an existing output, atomically.

    Raises:
        InputError: the base or an adapter cannot be read.
        FitError: an architecture without a recipe; a tensor missing, left over or misshapen; an adapter that does not fit or cannot be used
            that way; a type the target cannot run.
        NothingChangedError: a merge would change no weight.
        OutputExistsError, ResourceError, ProofError: nothing is written.
    """
    checkpoint = open_checkpoint(base)
    component = checkpoint.main
    where = Path(output)
    io = io_type(target, dtype, _stored_type(component))
    mode = choose_mode(weights, where, component.folder, [shard.file for shard in component.shards])
    parts = _parts(checkpoint, merge, swap, prefix)
    merged = parts.merged if parts else None
    whole = merged is not None and mode == "copy"
    options = Options(choose(target, io), io, max_length)
    if merged is not None:
        if mode == "embed":
            raise FitError("merged weights are not embedded", hint="surgery merge first, or --weights copy")
        component = merged.component(component, where, whole=whole)
        options = replace(options, headers=merged.headers(whole=whole))
    model = model_of(component.config, frozenset(component.tensors))
    if parts is not None:
        past = parts.past(checkpoint.main, model, io)
        options = replace(options, past=past, slotted=parts.slotted, contract=parts.contract(past), rows=parts.rows(io))
    built = build(component, options, model)
    parcel = _parcel(checkpoint, component, built, mode)
    if parts is not None:
        parcel = _with_parts(parcel, parts, built, io)
    written = (
        place_merged(parcel, merged, checkpoint, where, overwrite=overwrite)
        if merged is not None and whole
        else place(parcel, where, mode, checkpoint, overwrite=overwrite, merged=merged)
    )
    sizes = {name: len(data) for name, data in parcel.files.items()}
    warnings = (*(parts.warnings if parts else ()), *_warnings(mode, component, built))
    return ExportResult(where, built.contract, sizes, mode, written, built.nodes, warnings)


def _parts(
    checkpoint: Checkpoint,
    merge: Sequence[tuple[str | os.PathLike[str], float]],
    swap: Sequence[str | os.PathLike[str]],
    prefix: Sequence[str | os.PathLike[str]],
) -> Parts | None:
    """Imported when there are adapters: their arithmetic needs torch, a plain export does not."""
    if not (merge or swap or prefix):
        return None
    from surgery.onnx.parts import read_parts

    return read_parts(checkpoint, merge, swap, prefix)


def _with_parts(parcel: Parcel, parts: Parts, built: Built, io: DType) -> Parcel:
    """Adapter files in front of the graphs; no genai_config.json where onnxruntime-genai could not keep the graph's contract."""
    files = {one.file: one.data(built.contract.slots, io) for one in parts.swapped}
    keeps = not parts.prompt or ROWS in built.graphs
    rest = {name: data for name, data in parcel.files.items() if name != GENAI_CONFIG or keeps}
    return replace(parcel, files={**files, **rest})


def _stored_type(component: Component) -> DType:
    """Of the embedding, else of the first matrix."""
    if component.embedding:
        return component.tensors[component.embedding].dtype
    return next((one.dtype for one in component.tensors.values() if one.dtype.is_float), DType.F32)


def _parcel(checkpoint: Checkpoint, component: Component, built: Built, mode: Mode) -> Parcel:
    files: dict[str, bytes] = {}
    if built.contract.kind == "decoder":
        files[GENAI_CONFIG] = genai_config(
            component.config,
            _generation(checkpoint.main.folder),
            built.contract,
            built.model.layers[0].attention.heads if built.model.layers else 0,
            ROWS if ROWS in built.graphs else "model.onnx",
        )
    for name, model in built.graphs.items():
        if mode == "embed":
            embed(model, built.files)
        files[name] = model.SerializeToString(deterministic=True)
    side_files = [*checkpoint.side_files]
    if (checkpoint.main.folder / "config.json").exists():
        side_files.append(("config.json", checkpoint.main.folder / "config.json"))
    facts = {"target": built.contract.target, "dtype": built.contract.dtype, "weights": mode}
    taken = {*files, *(file.path.name for file in built.files)}
    return Parcel(
        files,
        () if mode == "embed" else tuple(file for file in built.files if file.fd >= 0),
        [side for side in side_files if side[0] not in taken],
        facts,
    )


def _generation(folder: Path) -> Mapping[str, Any]:
    path = folder / "generation_config.json"
    return read_object(path) if path.exists() else {}


def _warnings(mode: Mode, component: Component, built: Built) -> list[str]:
    found = []
    if mode == "link":
        found.append(
            "the weights are hard links: onnxruntime loads them, onnx.load refuses them, and a program that writes into one file "
            "changes both"
        )
    if built.contract.kind == "decoder" and built.contract.target == "cuda" and built.contract.dtype == "fp32":
        found.append(
            "fp32 on CUDA has no GroupQueryAttention: the cache grows with every token; --dtype fp16 or bf16 is much faster"
        )
    if built.contract.virtual_tokens and ROWS not in built.graphs:
        found.append(
            "no genai_config.json: onnxruntime-genai always passes a past of its own, so it cannot stand on trained keys and values"
        )
    elif built.contract.virtual_tokens:
        first, last = built.contract.vocabulary, built.contract.vocabulary + built.contract.virtual_tokens - 1
        found.append(
            f"onnxruntime-genai passes a past of its own and gets {ROWS}: there the soft prompt is the token ids {first} to {last}, to be "
            "put in front of a text"
        )
    elif built.contract.kind == "decoder":
        ends = (component.config.get("eos_token_id"), _generation(component.folder).get("eos_token_id"))
        if all(one is None for one in ends):
            found.append("the model names no eos_token_id; onnxruntime-genai takes token 0 for the end of a text")
    return found
