# SPDX-License-Identifier: Apache-2.0
"""The weights of a graph as a checkpoint: by the names that they have in it, or, told by their values, by those of a base.

Nothing is computed for it. A weight that lies transposed, or as rows or columns of a packed matrix, is a tensor with
strides over the graph's bytes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from surgery.engine.quantised.mixed_config import SIDE_FILES
from surgery.onnx.locate.matrix import Matrix
from surgery.onnx.locate.pieces import LocatedPiece
from surgery.onnx.locate.search import Located, located_weights
from surgery.onnx.locate.wanted import wanted_weights
from surgery_formats.containers.base import Shard
from surgery_formats.containers.onnx import OnnxGraph
from surgery_formats.containers.onnx.container import ONNX
from surgery_formats.errors import FitError
from surgery_formats.models.checkpoint import Checkpoint
from surgery_formats.models.component import Component
from surgery_formats.models.identity import fingerprint
from surgery_formats.models.rebuilt.rebuilt import Dropped, Rebuilt
from surgery_formats.storage.quantised import CONFIG_KEYS
from surgery_formats.tensors.tensor import StoredTensor
from surgery_formats.text import listing

__all__ = ["recovered"]

_FILE = "model.onnx"  # the one file of weights is called after it


def recovered(
    graph: OnnxGraph, source: Checkpoint, base: Checkpoint | None, *, allow_loss: bool, workers: int | None = None
) -> Rebuilt:
    """What is to be written.

    Args:
        graph: The graph.
        source: The same, as a checkpoint.
        base: The model whose names its weights get; None keeps the graph's.
        allow_loss: Leave out weights of the base that the graph holds in another form, or not at all.
        workers: Threads that compare.

    Raises:
        FitError: the base is a pipeline, or weights of it are not there.
    """
    if base is None:
        names = {name: name for name in source.main.tensors}
        made = _made(source, source.main.tensors, names, source, {"names": "graph"})
        packed = {name: tensor.packed_as for name, tensor in source.main.tensors.items() if tensor.packed_as}
        told = (
            f"{len(packed)} tensors are the bytes of types that safetensors lacks "
            f"({', '.join(sorted(set(packed.values())))}): {listing(packed)}"
        )
        return replace(made, warnings=(told,)) if packed else made
    if base.is_pipeline:
        raise FitError(
            "a pipeline of several networks, of which a graph is one", file=base.path, hint="name its folder"
        )
    located = located_weights(graph, wanted_weights(base), workers=workers)
    found, origins = dict[str, StoredTensor](), dict[str, str]()
    for weight in located.weights:
        shape = _shape(base.main, weight.name)
        for piece in located.of_weight.get(weight.label, ()):
            if shape and (tensor := _tensor(piece, weight.name, shape)) is not None:
                found[weight.name], origins[weight.name] = tensor, piece.place.name
                break
    left = [weight.name for weight in located.weights if weight.name not in found]
    if not found or (left and not allow_loss):
        raise FitError(
            f"{len(left)} weights of the base are not in the graph as they are ({_why(located, left)})",
            file=graph.path,
            hint="`allow_loss=True` leaves them out; without a base every weight keeps the graph's name",
        )
    facts = {"names": "base", "base": {shard.path.name: fingerprint(shard.file) for shard in base.main.shards}}
    rebuilt = _made(source, found, origins, base, facts)
    if left:
        told = f"{len(left)} weights of the base are left out ({_why(located, left)})"
        rebuilt = replace(rebuilt, warnings=(*rebuilt.warnings, told))
    return rebuilt


def _made(
    source: Checkpoint,
    tensors: Mapping[str, StoredTensor],
    origins: Mapping[str, str],
    beside: Checkpoint,
    facts: Mapping[str, Any],
) -> Rebuilt:
    """A checkpoint of these tensors, with the configuration and the side files of another."""
    own = source.main
    used = set(origins.values())
    shard = Shard(own.folder / _FILE, ONNX.name, own.shards[0].file, tuple(tensors.values()))
    config, side_files = beside.main.config, beside.side_files
    if beside.is_quantised and not own.is_quantised:  # the graph's are numbers
        config = _without_codes(config)
        side_files = tuple(entry for entry in side_files if entry[0] not in SIDE_FILES)
    component = Component("", beside.main.folder, (shard,), None, "", config)
    return Rebuilt(
        source,
        Checkpoint(source.path, {"": component}, side_files),
        facts,
        tuple(
            Dropped(tensor, "no weight of the base: computed or added by the exporter")
            for name, tensor in own.tensors.items()
            if name not in used
        ),
        {name: (own.tensors[origin],) for name, origin in origins.items()},
    )


def _shape(base: Component, name: str) -> tuple[int, ...]:
    """Of a weight as the base's files have it, or would have it as numbers; empty where another tensor has it."""
    if base.self_contained or name not in base.parameters:
        return ()
    storage = base.parameters[name].storage
    if storage.elements is None:
        return () if storage.transposed else storage.sizes
    return base.tensors[name].shape if name in base.tensors else ()


def _without_codes(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration that says nothing of codes any more."""
    left = {key: value for key, value in config.items() if key not in CONFIG_KEYS}
    if isinstance(inner := left.get("text_config"), Mapping):
        left["text_config"] = _without_codes(inner)
    return left


def _tensor(piece: LocatedPiece, name: str, shape: tuple[int, ...]) -> StoredTensor | None:
    """A whole weight where it lies in a graph; None if it lies there in another form, or in parts."""
    place, weight, numel = piece.place, piece.weight, math.prod(shape)
    if (
        piece.is_scaled
        or not isinstance(place, Matrix)
        or place.tensor is None
        or not isinstance(piece.graph_rows, range)
    ):
        return None
    rows = numel if weight.is_vector else weight.cols if piece.flipped else weight.rows
    if piece.rows != range(rows) or len(piece.graph_rows) != rows or weight.rows * weight.cols != numel:
        return None
    first = piece.graph_rows[0]
    begin = place.start + (first if piece.turned or weight.is_vector else first * place.cols)
    if weight.is_vector:
        return _placed(place, name, shape, begin, numel, None) if 1 in (place.rows, place.cols) else None
    turned = piece.turned != piece.flipped
    step, inner = (1, place.cols) if turned else (place.cols, 1)
    height, width = weight.rows, weight.cols
    if not turned and width == place.cols:
        return _placed(place, name, shape, begin, numel, None)
    if shape[0] != height:
        return None
    strides = (step, *(inner * math.prod(shape[axis + 1 :]) for axis in range(1, len(shape))))
    return _placed(place, name, shape, begin, (height - 1) * step + (width - 1) * inner + 1, strides)


def _placed(
    place: Matrix, name: str, shape: tuple[int, ...], begin: int, count: int, strides: tuple[int, ...] | None
) -> StoredTensor | None:
    """`count` elements from `begin` of what a matrix of the graph is of."""
    if place.tensor is None:
        return None
    size, tensor = place.dtype.bits // 8, place.tensor
    return StoredTensor(name, place.dtype, shape, tensor.file, tensor.offset + begin * size, count * size, strides)


def _why(located: Located, names: list[str]) -> str:
    """How some of the weights lie in the graph, and their names."""
    return "; ".join(_ways(located, names))


def _ways(located: Located, names: list[str]) -> Iterator[str]:
    ways: dict[str, list[str]] = {}
    for name in names:
        pieces = located.of_weight.get(name, ())
        ways.setdefault(pieces[0].how if pieces else "not found", []).append(name)
    for way, own in list(ways.items())[:3]:
        yield f"{listing(own, 2)}: {way}"
