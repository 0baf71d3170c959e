# SPDX-License-Identifier: Apache-2.0
"""Write an edited graph into a folder of its own: its files of weights copied by the kernel, and what lies beside it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from surgery._version import __version__
from surgery.engine.card import CARD
from surgery.engine.execute import write_side_file
from surgery.engine.recorded import recorded_recipe
from surgery.onnx.edit.beside import files_beside
from surgery.onnx.edit.opening import check_places
from surgery.onnx.graph.contract import contract_of
from surgery.onnx.run.adapter_file import SmallFiles, sha256_of, write_small_files
from surgery_formats.containers.onnx import OnnxGraph, open_graph
from surgery_formats.containers.onnx.parse import parsed_model
from surgery_formats.errors import FitError, ProofError
from surgery_formats.files.output.folder import output_folder
from surgery_formats.files.raw import open_file
from surgery_formats.models.identity import fingerprint, tensor_digest
from surgery_formats.text import nbytes as human

if TYPE_CHECKING:
    import onnx

    from surgery_formats.tensors.tensor import StoredTensor

__all__ = ["NewValues", "editable", "write_edited"]

Array = npt.NDArray[Any]
NewValues = Callable[[Array], Array]

_OPTIONAL_INPUTS = 4  # version of the IR
_LIMIT = 2_000_000_000  # bytes of a protocol buffer; readers refuse 2 GiB


def editable(graph: OnnxGraph, *, inputs: bool = False) -> onnx.ModelProto:
    """The model of a graph with the values that are inside its file, for editing; it names no second graph any more.

    Args:
        graph: The graph.
        inputs: Whether it is to get optional inputs, which IR 3 and older do not have: there all weights are listed as inputs
            and none can be given.

    Raises:
        FitError: too large for a protocol buffer, or with files that no output has a place for.
        MalformedError: it, or its contract, cannot be parsed.
    """
    check_places(graph)
    if graph.file.size > _LIMIT:
        raise FitError(f"a graph of more than {human(_LIMIT)} cannot be parsed", file=graph.path)
    model = parsed_model(bytes(graph.file.read(0, graph.file.size)), graph.path)
    if inputs and model.ir_version < _OPTIONAL_INPUTS:
        stored = {one.name for one in model.graph.initializer}
        real = [one for one in model.graph.input if one.name not in stored]
        del model.graph.input[:]
        model.graph.input.extend(real)
        model.ir_version = _OPTIONAL_INPUTS
    _forget_companion(model, graph.path)
    return model


def write_edited(
    graph: OnnxGraph,
    model: onnx.ModelProto,
    output: Path,
    *,
    files: SmallFiles,
    facts: Mapping[str, Any],
    inputs: Sequence[Path] = (),
    overwrite: bool = False,
    changed: Mapping[str, NewValues] | None = None,
    dropped: Collection[str] = (),
) -> int:
    """Write the model under its old name, with the files it needs; returns the bytes written.

    Args:
        graph: The graph it was made of.
        model: The edited model; tensors with values in other files still say so.
        output: Folder to make.
        files: Further small files.
        facts: For the manifest.
        inputs: What was read beside the graph; the output may not lie in it.
        overwrite: Replace an existing output.
        changed: New values of tensors, made from the old ones, of the same type and shape.
        dropped: Tensors that the edited model no longer has.

    Raises:
        FitError: too large for a protocol buffer.
        OutputExistsError, ResourceError, ProofError: nothing is written.
    """
    changed = changed or {}
    inside = [name for name in changed if name not in graph.tensors or graph.tensors[name].file is graph.file]
    _change_inside(model, {name: changed[name] for name in inside})
    data = model.SerializeToString(deterministic=True)
    if len(data) > _LIMIT:
        raise FitError(f"the graph would have {human(len(data))}, more than one file of ONNX can hold", file=graph.path)
    name = graph.path.name
    ours = {name, *files, *(_location(graph, file.path) for file in graph.external)}
    sides = [side for side in files_beside(graph.path.parent, CARD) if side.name not in ours]
    made = sorted((key, sha256_of(value)) for key, value in files.items())
    # new values are in no graph: they follow from what is read, and from what the manifest says of it
    read = [fingerprint(file) for file in (*graph.files, *(open_file(path) for path in inputs if path.is_file()))]
    plan = _digest([__version__, name, hashlib.sha256(data).hexdigest(), made, read, dict(facts)])
    job = _digest([plan, [file.identity for file in graph.files]])
    roots = [*(file.path for file in graph.files), *(side.source for side in sides if side.source), *inputs]
    with output_folder(output, job, overwrite=overwrite, inputs=roots, recorded=plan) as folder:
        for file in graph.external:
            location = _location(graph, file.path)
            if location not in folder.finished:
                out = folder.create(location, file.size)
                out.copy_from(file, 0, 0, file.size)
                for key, change in changed.items():
                    if key not in inside and (tensor := graph.tensors[key]).file is file:
                        out.pwrite(_new(tensor, graph, change), tensor.offset)
                out.finish({})
        for side in sides:
            write_side_file(side, folder)
        write_small_files(folder, {**files, name: data})
        _prove(graph, folder.staged / name, changed, set(dropped))
        graph.check_unchanged()
        account = {"plan": plan, "inputs": {name: fingerprint(graph.file)}, **facts}
        folder.commit(account | recorded_recipe())
    return len(data) + sum(file.size for file in graph.external) + sum(map(len, files.values()))


def _digest(values: list[Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _forget_companion(model: onnx.ModelProto, path: Path) -> None:
    """A second graph for several rows on top of a past is not edited with the first: rows then go one by one."""
    props = {prop.key: prop.value for prop in model.metadata_props}
    contract = contract_of(model, path)
    if contract is None or not contract.prefill:
        return
    props |= replace(contract, prefill="").as_metadata()
    for prop in model.metadata_props:
        prop.value = props[prop.key]


def _location(graph: OnnxGraph, path: Path) -> str:
    return path.relative_to(graph.path.parent).as_posix()


def _new(tensor: StoredTensor, graph: OnnxGraph, change: NewValues) -> bytes:
    """The bytes of a tensor with its new values."""
    values = np.asarray(tensor.read()).reshape(graph.shapes[tensor.name])
    return np.ascontiguousarray(change(values)).tobytes()


def _change_inside(model: onnx.ModelProto, changed: Mapping[str, NewValues]) -> None:
    import onnx

    for tensor in model.graph.initializer:
        if tensor.name in changed:
            values = changed[tensor.name](onnx.numpy_helper.to_array(tensor))
            tensor.CopyFrom(onnx.numpy_helper.from_array(np.ascontiguousarray(values), tensor.name))


def _prove(before: OnnxGraph, path: Path, changed: Mapping[str, NewValues], dropped: Collection[str]) -> None:
    """Read back: every tensor that the graph had, where it lies now.

    Raises:
        ProofError: one is missing, or has other bytes.
    """
    after = open_graph(path)
    for name, tensor in before.tensors.items():
        if name in dropped:
            continue
        found = after.tensors.get(name)
        if found is None or (found.dtype, found.shape) != (tensor.dtype, tensor.shape):
            raise ProofError("a tensor of the graph is gone from what was written", file=path, tensor=name)
        if name in changed:
            if bytes(found.file.read(found.offset, found.nbytes)) != _new(tensor, before, changed[name]):
                raise ProofError(
                    "a tensor has other values than were meant in what was written", file=path, tensor=name
                )
        elif not _same(tensor, found, before, after):
            raise ProofError("a tensor of the graph has other bytes in what was written", file=path, tensor=name)


def _same(old: StoredTensor, new: StoredTensor, before: OnnxGraph, after: OnnxGraph) -> bool:
    inside = old.file is before.file, new.file is after.file
    if inside == (False, False):  # a copy by the kernel, which is proved by the identity of its source
        return (_location(before, old.file.path), old.offset) == (_location(after, new.file.path), new.offset)
    return inside == (True, True) and tensor_digest(old) == tensor_digest(new)
