# SPDX-License-Identifier: Apache-2.0
"""An ``.onnx_adapter`` file as what it is to onnxruntime: arrays for inputs, whatever they mean, and whether a graph has these."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

from surgery.onnx.survey.ports import inputs_of, is_factor_name
from surgery.reports.array_report import ArrayFileReport, ArrayReport
from surgery.reports.graph_report import PortReport
from surgery_formats.containers.onnx import open_graph
from surgery_formats.containers.onnx_adapter import open_onnx_adapter
from surgery_formats.errors import SurgeryError
from surgery_formats.tensors.tensor import StoredTensor

__all__ = ["survey_arrays"]

_PAST = re.compile(r"past_key_values\.(\d+)\.(key|value)")
_GRAPH = "model.onnx"


def survey_arrays(path: Path, why: str) -> ArrayFileReport:
    """What the arrays of a file are, and whether the graph in its folder, or in the one around, takes them.

    Args:
        path: The file.
        why: Why it is no adapter of modules.

    Raises:
        MalformedError: not such a file.
    """
    shard = open_onnx_adapter(path)
    graph = next((one for one in (path.parent / _GRAPH, path.parent.parent / _GRAPH) if one.is_file()), None)
    unmet: Mapping[str, str] = {}
    if graph is not None:
        try:
            opened = open_graph(graph)
            unmet = _unmet(shard.tensors, inputs_of(opened.proto, opened.shapes))
        except SurgeryError:
            graph = None  # what lies beside is another question, and no reason to hide the file
    return ArrayFileReport(
        path=path,
        holds=_holds(shard.tensors),
        arrays=tuple(ArrayReport(tensor.name, tensor.stored_type, tensor.shape) for tensor in shard.tensors),
        parameters=sum(tensor.numel for tensor in shard.tensors),
        nbytes=shard.file.size,
        graph=graph,
        unmet=unmet,
        why=why,
    )


def _holds(tensors: Iterable[StoredTensor]) -> str:
    """What names and shapes tell."""
    past = {found[1]: tensor for tensor in tensors if (found := _PAST.fullmatch(tensor.name))}
    factors = [tensor for tensor in tensors if is_factor_name(tensor.name)]
    parts = []
    if past:
        tokens = Counter(tensor.shape[2] for tensor in past.values() if len(tensor.shape) == 4)
        count = " or ".join(map(str, tokens)) or "?"
        parts.append(f"keys and values of {count} virtual tokens in {len(past)} layers")
    if factors:
        ranks = Counter(min(tensor.shape) for tensor in factors if len(tensor.shape) == 2)
        parts.append(f"{len(factors)} factors of LoRAs of rank {' or '.join(map(str, sorted(ranks)))}")
    rest = sum(1 for tensor in tensors if not _PAST.fullmatch(tensor.name) and not is_factor_name(tensor.name))
    if rest:
        parts.append(f"{rest} other arrays")
    return ", ".join(parts)


def _unmet(tensors: Iterable[StoredTensor], ports: Iterable[PortReport]) -> dict[str, str]:
    """Arrays that no input takes, and why."""
    by_name = {port.name: port for port in ports}
    found = {}
    for tensor in tensors:
        port = by_name.get(tensor.name)
        if port is None:
            found[tensor.name] = "no input"
        elif port.dtype != tensor.stored_type:
            found[tensor.name] = f"an input of {port.dtype}"
        elif port.dims is not None and (
            len(port.dims) != len(tensor.shape)
            or any(isinstance(dim, int) and dim != size for dim, size in zip(port.dims, tensor.shape, strict=True))
        ):
            found[tensor.name] = "an input of other sizes"
    return found
