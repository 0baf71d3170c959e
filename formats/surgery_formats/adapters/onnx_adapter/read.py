# SPDX-License-Identifier: Apache-2.0
"""Read an ``.onnx_adapter`` file into the canonical form.

Its arrays are inputs of a graph, ``MODULE.lora_A.weight`` (in, rank) and ``MODULE.lora_B.weight`` (rank, out). The names are those of
Olive's ``convert-adapters`` (``olive/cli/convert_adapters.py``): PEFT's, without ``base_model.model.`` where ``model.`` follows; other
exporters' are in `names`. The scale is in B. Of an embedding A is ``(V, rank)``, one row for each token; of a convolution both are
as PEFT has them. Heads, biases and norms that an adapter gives in full are arrays under their own names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from surgery_formats.adapters.embeddings import is_embedding
from surgery_formats.adapters.onnx_adapter.names import (
    HEADS,
    canonical_module,
    factor_name,
    is_of_head,
    is_parameter,
)
from surgery_formats.canonical.adapter import Adapter, Ignored, Site
from surgery_formats.containers.onnx_adapter import open_onnx_adapter
from surgery_formats.errors import FitError, MalformedError
from surgery_formats.tensors.tensor import StoredTensor
from surgery_formats.updates import Factor, LoRA, Replacement, Update

__all__ = ["A", "B", "FilledSlot", "read_onnx_adapter"]

A, B = ".lora_A.weight", ".lora_B.weight"
BUILDERS = "MatMul"  # between lora_A and weight, where the genai builder names the module


@dataclass(frozen=True, slots=True)
class FilledSlot:
    """What a pair of inputs is to an adapter.

    Attributes:
        site: The weight.
        rank_first: Whether A is ``(rank, in ...)`` and B ``(out, rank ...)``, as PEFT has them.
        shared: Of a pair that several weights share: each with its ranks and its columns of B, ends excluded.
    """

    site: Site
    rank_first: bool = False
    shared: tuple[tuple[Site, tuple[int, int], tuple[int, int]], ...] = ()


_NO_FACTORS = "neither lora_A nor lora_B of a module: what the graph makes of this input is not known here"


def read_onnx_adapter(path: Path, filled: Mapping[str, FilledSlot] | None = None) -> Adapter:
    """Read one file. Only names, types and sizes are read.

    Args:
        path: The file.
        filled: What the inputs of its graph are, by the name of A, where that is known; what is not there adds nothing.

    Raises:
        NotFoundError, MalformedError: no such file, or a factor without the other.
        FitError: an input that is no factor of a LoRA, or factors as codes.
    """
    shard = open_onnx_adapter(path)
    pairs: dict[str, dict[str, StoredTensor]] = {}
    ignored: list[Ignored] = []
    replaced: dict[Site, tuple[Update, ...]] = {}
    for tensor in shard.tensors:
        if tensor.name.endswith(".base_layer.weight"):
            ignored.append(
                Ignored(tensor, "PEFT's copy of the base's weight, which Olive passes on: no graph asks for it")
            )
            continue
        found = factor_name(tensor.name)
        if found is None and _is_parameter(tensor):
            replaced[Site(tensor.name)] = (
                Replacement(Factor.of(tensor), "copy" if is_of_head(tensor.name) else "in place"),
            )
            continue
        if found is None:
            raise _unread(tensor)
        head, _, tail = tensor.name.rpartition(f".lora_{found.side}")
        pairs.setdefault(f"{head}.lora_A{tail}", {})[found.side] = tensor
    updates: dict[Site, tuple[Update, ...]] = {}
    for name, parts in pairs.items():
        for have, lack in (("A", "B"), ("B", "A")):
            if lack not in parts:
                tensor = parts[have]
                raise MalformedError(f"without its 'lora_{lack}.weight'", file=tensor.file.path, tensor=tensor.name)
        down, up = parts["A"], parts["B"]
        slot = _guessed(name, down, up, path) if filled is None else filled.get(name)
        if slot is None:
            ignored += [Ignored(tensor, "zeros for a slot that the adapter does not fill") for tensor in (down, up)]
            continue
        if not down.numel or not up.numel:
            ignored += [Ignored(tensor, "of rank 0: the graph adds nothing there") for tensor in (down, up)]
            continue
        for site, ranks, columns in slot.shared:
            updates[site] = (_part(down, up, ranks, columns),)
        if slot.shared:
            continue
        if slot.site in updates:
            raise MalformedError("two pairs of factors are of one module", file=path, tensor=down.name)
        updates[slot.site] = (_lora(down, up, slot),)
    return Adapter(
        path=path,
        format="onnx-adapter",
        kind="LORA",
        updates=dict(sorted((updates | replaced).items())),
        tensors=shard.tensors,
        ignored=tuple(ignored),
        new_modules=HEADS,
        keeps_ties=False,
    )


def _is_parameter(tensor: StoredTensor) -> bool:
    """Whether an array is a small parameter that an adapter gives in full: of a head, a bias or a norm."""
    whole = len(tensor.shape) == 1 or (len(tensor.shape) == 2 and is_of_head(tensor.name))
    return whole and is_parameter(tensor.name)


def _guessed(name: str, down: StoredTensor, up: StoredTensor, path: Path) -> FilledSlot:
    """What a pair of factors is by its names and shapes.

    Raises:
        FitError: the shapes are not those of two factors.
    """
    found = factor_name(name)
    assert found is not None
    module = canonical_module(found.module) if found.infix == BUILDERS else found.module
    A, B = down.shape, up.shape
    if len(A) == len(B) > 2 and A[0] == B[1] and not set(B[2:]) - {1}:
        site = Site(f"{module}.weight", module_kind="convolution", kernel=tuple(A[2:]))
        return FilledSlot(site, rank_first=True)
    if len(A) == len(B) == 2 and (A[1] == B[0] or A[0] == B[1]):
        embedding = is_embedding(module)
        site = Site(f"{module}.weight", module_kind="embedding" if embedding else "linear")
        return FilledSlot(site, rank_first=A[1] != B[0])
    raise FitError(f"is {list(A)}, its lora_B {list(B)}", file=path, tensor=down.name)


def _lora(down: StoredTensor, up: StoredTensor, slot: FilledSlot) -> LoRA:
    embedding = slot.site.module_kind == "embedding"
    if slot.rank_first:  # as PEFT has them
        rank, out = down.shape[0], up.shape[0]
        A = Factor((down,), (rank, down.numel // rank), lambda t: t.reshape(rank, -1))
        return LoRA(A, Factor((up,), (out, rank), lambda t: t.reshape(out, rank)), 1.0)
    if embedding:  # the rows of the table are the tokens
        return LoRA(Factor.of(up), Factor.of(down), 1.0)
    rank = down.shape[1]
    return LoRA(
        Factor((down,), (rank, down.shape[0]), lambda t: t.T), Factor((up,), (up.shape[1], rank), lambda t: t.T), 1.0
    )


def _part(down: StoredTensor, up: StoredTensor, ranks: tuple[int, int], columns: tuple[int, int]) -> LoRA:
    """Of one weight, from the factors of several: side by side in A, blocks on the diagonal of B."""
    mine, own = slice(*ranks), slice(*columns)
    rank, out = ranks[1] - ranks[0], columns[1] - columns[0]
    A = Factor((down,), (rank, down.shape[0]), lambda t: t[:, mine].T)
    return LoRA(A, Factor((up,), (out, rank), lambda t: t[mine, own].T), 1.0)


def _unread(tensor: StoredTensor) -> FitError:
    if ".quant." in tensor.name:
        why, hint = "factors as codes of 4 bits, as Olive makes them", "convert the adapter that they were made from"
    elif ".adapters" in tensor.name or ".invertible_adapters" in tensor.name:
        why = "of a module that is inserted into a graph, which no weight can hold"
        hint = "`surgery run` takes such files as they are; convert the adapter that it was made from"
    elif tensor.name.startswith("past_key_values."):
        why, hint = (
            "keys and values of a prefix, which no weight can hold",
            "`surgery run` takes such files as they are",
        )
    else:
        why, hint = _NO_FACTORS, "convert the adapter that it was made from"
    return FitError(why, file=tensor.file.path, tensor=tensor.name, hint=hint)
