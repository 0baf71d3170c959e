# SPDX-License-Identifier: Apache-2.0
"""Fingerprint: one hash of what a model, an adapter or a graph holds, wherever and however it is stored."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from surgery.comparison.fingerprint_result import FingerprintResult, ModelContent
from surgery.engine.inputs import Openable, as_list, opened_or_graph
from surgery.progress import Callback, Progress
from surgery.reports.result import timed
from surgery_formats.containers.onnx import OnnxGraph, open_graph
from surgery_formats.errors import FitError, UsageError
from surgery_formats.models.checkpoint import Checkpoint
from surgery_formats.models.content import TensorContent, content_of, merkle_root
from surgery_formats.tensors.tensor import Tensor

__all__ = ["FingerprintResult", "fingerprint"]


@timed
def fingerprint(
    models: Openable | Iterable[Openable],
    *,
    against: Openable | None = None,
    progress: Callback | None = None,
) -> FingerprintResult:
    """An id of the tensors of each model: names, types, shapes and values, and nothing else.

    Shards, order, metadata and the kind of file make no difference: the id of a folder is that of its tensors. An adapter's
    is that of its factors, as they are stored; what its configuration says of them (alpha, ranks) is not in it, and
    `surgery.diff` compares what adapters do. Every byte is read.

    Args:
        models: Models, adapters or ONNX graphs: paths, or what was opened.
        against: Another one, whose tensors each is compared with.
        progress: Called with every tensor.

    Raises:
        UsageError: no model.
        InputError: one of them cannot be read.
        FitError: it has no tensors, or some of text.
    """
    named: list[Openable] = as_list(models)
    listed = [opened_or_graph(model, "models") for model in named]
    if not listed:
        raise UsageError("no model was named")
    other = None if against is None else opened_or_graph(against, "against")
    opened = [_tensors(one) for one in (*listed, *([] if other is None else [other]))]
    meter = _meter(sum(tensor.nbytes for one in opened for tensor in one.tensors.values()), progress)
    found = [_content(one, meter) for one in opened]
    if other is None:
        return FingerprintResult(tuple(found))
    return FingerprintResult(tuple(_compared(one, found[-1]) for one in found[:-1]), found[-1])


@dataclass(frozen=True)
class _Named:
    """The tensors of a model where it lies, those of a pipeline with the network that they are of; and the graph, if it is one."""

    path: Path
    tensors: Mapping[str, Tensor]
    graph: OnnxGraph | None = None


def _tensors(opened: object) -> _Named:
    if isinstance(opened, Path):
        graph = open_graph(opened)
        if graph.strings:
            raise FitError("a tensor of text, which has no bytes", file=opened, tensor=graph.strings[0])
        return _Named(opened, graph.tensors, graph)
    if isinstance(opened, Checkpoint):
        named: dict[str, Tensor] = {
            f"{component.name}:{tensor.name}" if component.name else tensor.name: tensor
            for component in opened.components.values()
            for tensor in component.tensors.values()
        }
        return _Named(opened.path, named)
    tensors: tuple[Tensor, ...] = opened.tensors  # type: ignore[attr-defined]
    path: Path = opened.path  # type: ignore[attr-defined]
    several: dict[str, Tensor] = {}
    for tensor in tensors:
        if several.setdefault(tensor.name, tensor) is not tensor:
            raise FitError("two tensors of this name", file=path, tensor=tensor.name, hint="of several files: name one")
    return _Named(path, several)


def _content(named: _Named, read: Callable[[int], None]) -> ModelContent:
    content = content_of(named.tensors, read)
    if named.graph is not None:
        content = _of_graph(named.graph, content)
    if not content:
        raise FitError("it has no tensors", file=named.path)
    return ModelContent(named.path, merkle_root([one.leaf(name) for name, one in content.items()]), content)


def _of_graph(graph: OnnxGraph, content: Mapping[str, TensorContent]) -> dict[str, TensorContent]:
    """With shapes as the graph has them, also of what is bytes here; and with the tensors that are written value by value."""
    found = {name: replace(one, shape=graph.shapes[name]) for name, one in content.items()}
    for name in graph.small:
        raw = graph.small.raw(name)
        found[name] = TensorContent(
            graph.small.label(name), graph.shapes[name], hashlib.sha256(raw).hexdigest(), len(raw)
        )
    return {name: found[name] for name in sorted(found)}


def _compared(model: ModelContent, other: ModelContent) -> ModelContent:
    ours, theirs = model.tensors, other.tensors
    return replace(
        model,
        changed=tuple(name for name in ours if name in theirs and ours[name] != theirs[name]),
        missing=tuple(name for name in theirs if name not in ours),
        added=tuple(name for name in ours if name not in theirs),
    )


def _meter(total: int, progress: Callback | None) -> Callable[[int], None]:
    done = 0

    def read(nbytes: int) -> None:
        nonlocal done
        done += nbytes  # by several threads: a count that is a tensor short is shown for a moment
        if progress is not None:
            progress(Progress(done, total, "reading"))

    return read
