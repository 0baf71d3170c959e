# SPDX-License-Identifier: Apache-2.0
"""The files of a base as a merge remembers them: where every tensor lies, headers, and the files beside the weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import xxhash

from surgery.engine.undo.coding import pack_bytes, unpack_bytes
from surgery.engine.undo.sidecar import Sidecar, SidecarWriter
from surgery_formats.containers.base import Shard
from surgery_formats.containers.safetensors import SAFETENSORS
from surgery_formats.containers.sharded import index_bytes, index_name, output_name
from surgery_formats.containers.weight_files import output_container
from surgery_formats.errors import MalformedError
from surgery_formats.files.raw import open_file
from surgery_formats.models.checkpoint import Checkpoint
from surgery_formats.models.component import Component

__all__ = ["kept_file", "remember_shards", "remember_side_files"]

_ALSO = ("README.md",)  # a merge writes its own


def remember_shards(checkpoint: Checkpoint, writer: SidecarWriter) -> list[dict[str, Any]]:
    """The weight files: name, size, and the place of every tensor. Their headers are kept byte for byte.

    A file of a container that is only read is remembered as the safetensors file that holds its tensors.
    """
    return [
        _shard(shard, component, writer) for component in checkpoint.components.values() for shard in component.shards
    ]


def _shard(shard: Shard, component: Component, writer: SidecarWriter) -> dict[str, Any]:
    container = output_container(shard.container)
    suffix = container.suffixes[0]
    specs = [(tensor.name, tensor.dtype, tensor.shape) for tensor in shard.tensors]
    layout = container.lay_out(specs, shard)
    name = _inside(component, output_name(shard.path.name, suffix))
    writer.add(f"header/{name}", pack_bytes(layout.header, repeats=True))
    rows = [[name, dtype.label, list(shape), *layout.ranges[name]] for name, dtype, shape in specs]
    return {
        "name": name,
        "component": component.name,
        "header": len(layout.header),
        "nbytes": layout.nbytes,
        "tensors": rows,
        **({"padding": [list(gap) for gap in layout.padding]} if layout.padding else {}),
    }


def remember_side_files(checkpoint: Checkpoint, merged: Path, writer: SidecarWriter) -> list[dict[str, Any]]:
    """Every other file of the base: its digest, and its bytes where the merged model has others."""
    remembered = []
    for name, data in _side_files(checkpoint):
        here = merged / name
        kept = not here.is_file() or here.read_bytes() != data
        if kept:
            writer.add(f"file/{name}", pack_bytes(data, repeats=True))
        digest = xxhash.xxh3_128_hexdigest(data)
        remembered.append({"name": name, "nbytes": len(data), "xxh3": digest, "kept": kept})
    return remembered


def _side_files(checkpoint: Checkpoint) -> Iterator[tuple[str, bytes]]:
    for name, path in checkpoint.side_files:
        yield name, path.read_bytes()
    named = {name for name, _ in checkpoint.side_files}
    for component in checkpoint.components.values():
        config = component.folder / "config.json"
        if (
            component.config
            and checkpoint.path.is_dir()
            and config.is_file()
            and _inside(component, "config.json") not in named
        ):
            yield _inside(component, "config.json"), config.read_bytes()
        if component.index is not None:
            yield _index(component)
    if checkpoint.path.is_dir():
        for name in _ALSO:
            if (path := checkpoint.path / name).is_file():
                yield name, path.read_bytes()


def _index(component: Component) -> tuple[str, bytes]:
    """The index as it is, or that of the safetensors files that stand for others."""
    suffix = SAFETENSORS.suffixes[0]
    if all(shard.path.name.endswith(suffix) for shard in component.shards):
        return _inside(component, component.index_name), (component.folder / component.index_name).read_bytes()
    shards = {output_name(shard.path.name, suffix): shard.tensors for shard in component.shards}
    tensors = [tensor for group in shards.values() for tensor in group]
    totals = {
        "total_size": sum(tensor.nbytes for tensor in tensors),
        "total_parameters": sum(tensor.numel for tensor in tensors),
    }
    weight_map = {tensor.name: name for name, group in shards.items() for tensor in group}
    name = index_name(next(iter(shards)), suffix, component.index_name)
    return _inside(component, name), index_bytes(weight_map, totals, component.index)


def _inside(component: Component, name: str) -> str:
    return f"{component.name}/{name}" if component.name else name


def kept_file(entry: Mapping[str, Any], sidecar: Sidecar, merged: Path) -> bytes:
    """The bytes of a remembered side file.

    Raises:
        MalformedError: the merged model has another one now.
    """
    name = str(entry["name"])
    if entry["kept"]:
        data = unpack_bytes(sidecar.segments(f"file/{name}").take(), int(entry["nbytes"]))
    else:
        file = open_file(merged / name)
        data = bytes(file.read(0, file.size))
    if xxhash.xxh3_128_hexdigest(data) != entry["xxh3"]:
        raise MalformedError("is not as the merge left it", file=merged / name)
    return data
