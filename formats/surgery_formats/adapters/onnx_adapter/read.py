# SPDX-License-Identifier: Apache-2.0
"""Read an ``.onnx_adapter`` file into the canonical form.

Its arrays are inputs of a graph, ``MODULE.lora_A.weight`` (in, rank) and ``MODULE.lora_B.weight`` (rank, out). The names are those of
Olive's ``convert-adapters`` (``olive/cli/convert_adapters.py``): PEFT's, without ``base_model.model.`` where ``model.`` follows. The
scale is in B. Of an embedding A is ``(V, rank)``, one row for each token.
"""

from __future__ import annotations

from pathlib import Path

from surgery_formats.adapters.embeddings import is_embedding
from surgery_formats.canonical.adapter import Adapter, Ignored, Site
from surgery_formats.containers.onnx_adapter import open_onnx_adapter
from surgery_formats.errors import FitError, MalformedError
from surgery_formats.tensors.tensor import StoredTensor
from surgery_formats.updates import Factor, LoRA, Update

__all__ = ["A", "B", "read_onnx_adapter"]

A, B = ".lora_A.weight", ".lora_B.weight"
_PREFIX = "base_model.model."
_NO_FACTORS = "neither lora_A nor lora_B of a module: what the graph makes of this input is not known here"


def read_onnx_adapter(path: Path) -> Adapter:
    """Read one file. Only names, types and sizes are read.

    Raises:
        NotFoundError, MalformedError: no such file, or a factor without the other.
        FitError: an input that is no factor of a LoRA, or factors as codes.
    """
    shard = open_onnx_adapter(path)
    modules: dict[str, dict[str, StoredTensor]] = {}
    ignored: list[Ignored] = []
    for tensor in shard.tensors:
        if tensor.name.endswith(".base_layer.weight"):
            ignored.append(
                Ignored(tensor, "PEFT's copy of the base's weight, which Olive passes on: no graph asks for it")
            )
            continue
        side = next((side for side in (A, B) if tensor.name.endswith(side)), None)
        if side is None:
            raise _unread(tensor)
        modules.setdefault(tensor.name.removesuffix(side), {})[side] = tensor
    updates: dict[Site, tuple[Update, ...]] = {}
    for module, parts in modules.items():
        for have, lack in ((A, B), (B, A)):
            if lack not in parts:
                tensor = parts[have]
                raise MalformedError(f"without its '{lack[1:]}'", file=tensor.file.path, tensor=tensor.name)
        down, up = parts[A], parts[B]
        if len(down.shape) != 2 or len(up.shape) != 2 or down.shape[1] != up.shape[0]:
            raise FitError(f"is {list(down.shape)}, its lora_B {list(up.shape)}", file=path, tensor=down.name)
        if not down.numel or not up.numel:
            ignored += [Ignored(tensor, "of rank 0: the graph adds nothing there") for tensor in (down, up)]
            continue
        inner = module.removeprefix(_PREFIX)
        site = Site(f"{inner}.weight", module_kind="embedding" if is_embedding(inner) else "linear")
        updates[site] = (_lora(down, up, embedding=is_embedding(inner)),)
    return Adapter(
        path=path,
        format="onnx-adapter",
        kind="LORA",
        updates=dict(sorted(updates.items())),
        tensors=shard.tensors,
        ignored=tuple(ignored),
        keeps_ties=False,
    )


def _lora(down: StoredTensor, up: StoredTensor, *, embedding: bool) -> LoRA:
    if embedding:  # the rows of the table are the tokens
        return LoRA(Factor.of(up), Factor.of(down), 1.0)
    rank = down.shape[1]
    return LoRA(
        Factor((down,), (rank, down.shape[0]), lambda t: t.T), Factor((up,), (up.shape[1], rank), lambda t: t.T), 1.0
    )


def _unread(tensor: StoredTensor) -> FitError:
    if ".quant." in tensor.name:
        why, hint = "factors as codes of 4 bits, as Olive makes them", "convert the adapter that they were made from"
    elif tensor.name.startswith("past_key_values."):
        why, hint = (
            "keys and values of a prefix, which no weight can hold",
            "`surgery run` takes such files as they are",
        )
    else:
        why, hint = _NO_FACTORS, "convert the adapter that it was made from"
    return FitError(why, file=tensor.file.path, tensor=tensor.name, hint=hint)
