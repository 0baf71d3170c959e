# SPDX-License-Identifier: Apache-2.0
"""What predicts the next token of a text: a graph, or the reference of a model's weights."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from surgery.engine.inputs import AdaptersLike, CheckpointLike, as_checkpoint, as_path
from surgery.evaluation.predictor import Predictor
from surgery.onnx.run.opening import placed_graph
from surgery_formats.errors import UsageError
from surgery_formats.files.remote.path import is_remote
from surgery_formats.models.checkpoint import Checkpoint

__all__ = ["open_predictor"]


def open_predictor(
    model: CheckpointLike, adapters: AdaptersLike, argument: str, *, device: str, threads: int | None
) -> Predictor:
    """A graph if `model` is one, or a folder with one; otherwise the reference of its weights.

    Args:
        model: The model.
        adapters: Of a graph, what fills its slots; of weights, what is attached to them.
        argument: The model's name, for messages.
        device: Of a graph.
        threads: Of a graph, on the CPU.

    Raises:
        InputError: something cannot be read.
        FitError: an adapter in the place of a model, or a model that predicts no next token.
    """
    graph = None if isinstance(model, Checkpoint) else _graph(as_path(model, argument))
    if graph is not None:
        from surgery.evaluation.graph_predictor import open_graph_predictor

        return open_graph_predictor(graph, _files(adapters), device, threads)
    from surgery.evaluation.reference_predictor import open_reference_predictor

    attached = "adapters" if argument == "model" else "against_adapters"
    hint = f"its base belongs here, and the adapter is attached to it: `{attached}=`"
    return open_reference_predictor(as_checkpoint(model, argument, hint=hint), adapters)


def _graph(path: Path) -> Path | None:
    if path.name.endswith(".onnx"):
        return path
    return None if is_remote(path) or not path.is_dir() else placed_graph(path)


def _files(adapters: AdaptersLike) -> list[str]:
    """``FILE`` or ``FILE=0.5``, as the runner takes them.

    Raises:
        UsageError: something else than a path, with or without its strength.
    """
    if isinstance(adapters, Mapping):
        return [_file(item) for item in adapters.items()]
    if isinstance(adapters, str | os.PathLike) or _is_pair(adapters):
        return [_file(adapters)]
    return [_file(item) for item in adapters] if isinstance(adapters, Iterable) else [_file(adapters)]


def _is_pair(value: object) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and isinstance(value[1], int | float)


def _file(value: Any) -> str:
    path, strength = value if _is_pair(value) else (value, 1)
    if not isinstance(path, str | os.PathLike):
        raise UsageError("adapters of a graph are files or names", hint="`surgery convert` writes the file")
    return os.fspath(path) if strength == 1 else f"{os.fspath(path)}={strength:g}"
