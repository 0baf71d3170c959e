# SPDX-License-Identifier: Apache-2.0
"""The model beside a graph, under whatever names its layout gave to the files."""

from __future__ import annotations

from collections.abc import Mapping

from surgery.onnx.export.inserted import INSERTED
from surgery.onnx.export.merged import DELTA
from surgery.onnx.run.opening import side_folder
from surgery.verification.bytes import data_shard
from surgery.verification.session import GraphFile
from surgery_formats.files.bounded_json import read_object
from surgery_formats.models.checkpoint import open_checkpoint
from surgery_formats.models.component import Component

__all__ = ["model_beside"]


def model_beside(graph: GraphFile, own: Mapping[str, str]) -> Component:
    """The model beside a graph, of which what a merge changed is no part; `own` names files that got another name."""
    folder = graph.path.parent
    computed = (DELTA, INSERTED)
    names = [file.name for file in graph.weight_files]
    of_base = [name for name in names if own.get(name, name) not in computed]
    if not own and names == of_base and side_folder(graph.path) == folder:
        return open_checkpoint(folder).main
    shards = [data_shard(folder / name) for name in of_base]
    config = read_object(side_folder(graph.path) / "config.json")
    return Component("", folder, tuple(shards), None, "", config)
