# SPDX-License-Identifier: Apache-2.0
"""Weights that a graph has as codes: what they stand for, computed apart from what wrote them.

The codes of a row follow each other, low bits first; the last block of a row may be longer than the row is.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from surgery.onnx.export.merged import with_biases
from surgery.onnx.graph.weights import ACROSS
from surgery.onnx.run.opening import side_folder
from surgery.reference import Reference
from surgery.verification.bytes import data_shard
from surgery.verification.embedded_weights import ReadableTensor, embedded_tensors, stacked_tensors
from surgery.verification.sentence import own_task
from surgery.verification.session import GraphFile
from surgery_formats.dtypes import DType
from surgery_formats.errors import MalformedError, ProofError
from surgery_formats.files.bounded_json import read_object
from surgery_formats.models.families.parameters import model_of, projections
from surgery_formats.models.families.recipe import LanguageHead, Model, Projection
from surgery_formats.models.families.registry import family_of
from surgery_formats.models.names import Names
from surgery_formats.storage.parameter import Parameter
from surgery_formats.tensors.computed import zeros
from surgery_formats.text import listing, show

__all__ = ["HEAD", "CodedWeights", "coded_reference", "is_written_anew"]

_PARTS = ("codes", "scales", "zero_points")
HEAD = "of the head"  # behind the name of a table that its head has as codes, and lookups do not


@dataclass(frozen=True)
class _WeightCodes:
    """One weight.

    Attributes:
        parts: Codes, scales, and zero points if there are any.
        bits: Of a code.
        block: Inputs that share a scale; 0 for all.
        floats: Whether codes are numbers themselves, of 8 bits.
    """

    parts: Mapping[str, ReadableTensor]
    bits: int
    block: int
    floats: bool = False

    def values(self, inputs: int, start: int, stop: int) -> torch.Tensor:
        """Rows ``[start, stop)`` of ``(out, in)``, float32."""
        if self.floats:
            numbers = torch.from_numpy(np.array(self.parts["codes"].read(start, stop)).view(np.uint8))
            scales = torch.from_numpy(np.array(self.parts["scales"].read(start, stop)).reshape(stop - start, -1))
            spread = scales.repeat_interleave(self.block, 1)[:, :inputs] if self.block else scales
            return numbers.view(torch.float8_e4m3fn).float() * spread
        raw = self.parts["codes"].read(start, stop).reshape(stop - start, -1)
        scales = self.parts["scales"].read(start, stop).astype(np.float32)
        codes = self._integers(raw)[:, :inputs]
        middle = np.full(scales.shape, float(1 << (self.bits - 1)))
        stored = self.parts.get("zero_points")
        zeros = middle if stored is None else self._integers(stored.read(start, stop))[:, : scales.shape[1]]
        place = np.arange(inputs) // self.block
        return torch.from_numpy(((codes - zeros[:, place]) * scales[:, place]).astype(np.float32))

    def _integers(self, raw: Any) -> Any:
        """As float64, which holds what comes next exactly."""
        bits = np.unpackbits(raw, axis=1, bitorder="little").reshape(len(raw), -1, self.bits)
        return bits @ (2.0 ** np.arange(self.bits))


class CodedWeights:
    """Weights of a graph's files: codes by what they stand for, others as they are."""

    def __init__(
        self,
        tensors: Mapping[str, ReadableTensor],
        codes: Mapping[str, _WeightCodes],
        names: Names,
        dtype: DType | None = None,
    ) -> None:
        self._tensors, self._codes, self._resolver, self._dtype = tensors, codes, names, dtype
        self.shapes: dict[str, tuple[int, int]] = {}
        """``(out, in)`` of each weight of codes, by the recipe's name."""
        self.turned: set[str] = set()
        self.stacks: dict[str, int] = {}
        """How many matrices lie one under the other, of the stacks among them."""

    @property
    def names(self) -> Collection[str]:
        """All names."""
        return {*(name.removesuffix(ACROSS) for name in self._tensors), *self._codes}

    def stored(self, name: str) -> str:
        """The name in the files of a weight that the recipe calls `name`."""
        if name in self._tensors or name in self._codes or f"{name}{ACROSS}" in self._tensors:
            return name
        slices = self._resolver.resolve(name)
        return slices[0].parameter.name if len(slices) == 1 else name

    def load(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Load rows ``[start, stop)`` as float32; see `surgery.reference.weights.ReferenceWeights`."""
        stored, of_head = self.stored(name.removesuffix(f" {HEAD}")), name.endswith(HEAD)
        if self.is_across(stored):
            return torch.from_numpy(
                np.ascontiguousarray(self._tensors[f"{stored}{ACROSS}"].read().astype(np.float32).T)[start:stop]
            )
        if stored in self._tensors and not of_head:
            return torch.from_numpy(np.asarray(self._tensors[stored].read(start, stop)).astype(np.float32))
        outputs, inputs = self.shapes[name.removesuffix(f" {HEAD}")]
        if count := self.stacks.get(name):
            first, last, _ = slice(start, stop).indices(count)
            values = self._codes[stored].values(inputs, first * outputs, last * outputs)
            values = values.reshape(last - first, outputs, inputs)
            return values.mT if name in self.turned else values
        if name in self.turned:
            return self._codes[stored].values(inputs, 0, outputs).T[start:stop]
        return self._codes[stored].values(inputs, start, outputs if stop is None else min(stop, outputs))

    def kept_type(self, name: str) -> DType | None:
        """The type that a weight is kept in; None for one of which there are only codes, or nothing."""
        stored = self.stored(name)
        tensor = self._tensors.get(stored, self._tensors.get(f"{stored}{ACROSS}"))
        return None if tensor is None else tensor.dtype

    def in_type_of(self, name: str, number: float) -> float:
        """`number`, rounded to the type that a weight is stored in; of codes to the model's, as config.json says it."""
        kind = self.kept_type(name) or self._dtype
        short = {DType.F16: torch.float16, DType.BF16: torch.bfloat16}.get(kind) if kind else None
        return float(torch.tensor(number, dtype=short)) if short else number

    def is_across(self, name: str) -> bool:
        """Whether a weight is kept with its axes exchanged alone."""
        stored = self.stored(name)
        return stored not in self._tensors and f"{stored}{ACROSS}" in self._tensors

    def codes_of(self, stored: str) -> _WeightCodes:
        """The codes of a weight by its name in the files."""
        return self._codes[stored]

    def parted(self, name: str) -> bool:
        """Whether a weight is there as codes and as numbers."""
        return self.stored(name) in self._tensors and self.stored(name) in self._codes


def coded_reference(graphs: Sequence[GraphFile], names: Sequence[str]) -> Reference:
    """The model that graphs of codes are together, the main one first; `names` are those of all their files.

    Raises:
        ProofError: the contract names a weight that the files lack, or the model.
        MalformedError: codes and scales of other sizes than they must have.
    """
    graph = graphs[0]
    config = read_object(side_folder(graph.path) / "config.json")
    found = _tensors(graphs, names, config)
    codes: dict[str, _WeightCodes] = {}
    for entry in graph.contract.quantised:
        for name in entry["weights"]:
            parts = {part: found.pop(f"{name}.{part}") for part in _PARTS if f"{name}.{part}" in found}
            if {"codes", "scales"} - set(parts) or ("zero_points" in parts) == entry["symmetric"]:
                raise ProofError(f"the codes of '{show(name)}' are not in the graph's files", file=graph.path)
            codes[name] = _WeightCodes(parts, entry["bits"], entry["block"], "type" in entry)
    kept = {name: tensor for name, tensor in found.items() if tensor.dtype.is_float}
    bare = {name.removesuffix(ACROSS): tensor for name, tensor in kept.items()}
    known = {name: Parameter.of(zeros(name, DType.F32, (1, 1))) for name in {*bare, *codes}}  # only names are looked at
    weights = CodedWeights(kept, codes, Names(known, {}, family_of(config), config=config), _type_in(config))
    model = with_biases(model_of(config, weights.names, own_task(graph.contract)), weights.names)
    model = _with_stored_scales(with_head_of_codes(model, weights), weights)
    for name, (outputs, inputs), turned, count in _matrices(model):
        if weights.stored(name.removesuffix(f" {HEAD}")) not in codes:
            continue
        weights.shapes[name.removesuffix(f" {HEAD}")] = outputs, inputs
        weights.turned |= {name} if turned else set()
        weights.stacks |= {name: count} if count else {}
        _check(weights.codes_of(weights.stored(name.removesuffix(f" {HEAD}"))), outputs * (count or 1), inputs, graph)
    compared = {weights.stored(name) for name in weights.shapes}
    if unread := sorted(codes.keys() - compared):
        raise ProofError(f"the contract has codes that the model does not read: {listing(unread)}", file=graph.path)
    return Reference(model, weights)


def is_written_anew(graph: GraphFile) -> bool:
    """Whether all weights of a graph were written for it, as codes or with their axes exchanged."""
    across = any(ACROSS in tensor.name for tensor in graph.model.graph.initializer)
    return bool(graph.contract.quantised) or across


def _tensors(graphs: Sequence[GraphFile], names: Sequence[str], config: Mapping[str, Any]) -> dict[str, ReadableTensor]:
    """All weights of graphs, of their files or inside them, by name in the checkpoint."""
    graph = graphs[0]
    if names:
        return {t.name: t for name in names for t in data_shard(graph.path.parent / name).tensors}
    stated = {name for entry in graph.contract.quantised for name in entry["weights"]}
    model = model_of(config, stated, own_task(graph.contract))
    rows = {each.weight: each.outputs for each in projections(model)}
    rows |= {each.bias: each.outputs for each in projections(model)}
    stacks = {name: each.stack[1] for each in projections(model) if each.stack for name in (each.weight, each.bias)}
    found = {name: tensor for one in graphs for name, tensor in embedded_tensors(one, rows).items()}
    return {**found, **stacked_tensors(found, stacks)}


def with_head_of_codes(model: Model, weights: CodedWeights) -> Model:
    """The model with a head of its own, where the head has the table as codes, and lookups as numbers."""
    head, table = model.head, model.embedding.tokens
    if not isinstance(head, LanguageHead) or head.projection.weight != table or not weights.parted(table):
        return model
    return replace(model, head=replace(head, projection=replace(head.projection, weight=f"{table} {HEAD}")))


def _with_stored_scales(model: Model, weights: CodedWeights) -> Model:
    """The model with factors on tables as they were rounded to the tables' types, which values of codes no longer tell."""
    table = model.embedding
    if table.scale_rounded:
        table = replace(table, scale=weights.in_type_of(table.tokens, table.scale))
    if (own := table.per_layer) is not None:
        table = replace(table, per_layer=replace(own, scale=weights.in_type_of(own.table, own.scale)))
    return replace(model, embedding=table)


def _type_in(config: Mapping[str, Any]) -> DType | None:
    """The type that config.json says the model is stored in, under the name of today or of before, if it does."""
    holders = [holder for holder in (config, config.get("text_config")) if isinstance(holder, Mapping)]
    found = (holder.get(key) for holder in holders for key in ("dtype", "torch_dtype"))
    name = next((one for one in found if isinstance(one, str)), None)
    return next((one for one in (DType.F32, DType.F16, DType.BF16) if one.torch_name == name), None)


def _check(codes: _WeightCodes, outputs: int, inputs: int, graph: GraphFile) -> None:
    count = -(-inputs // codes.block) if codes.block else 1
    wanted: dict[str, tuple[int, ...]] = {
        "codes": (outputs, count, codes.block * codes.bits // 8),
        "scales": (outputs, count),
        "zero_points": (outputs, -(-count * codes.bits // 8)),
    }
    if codes.floats:
        wanted = {"codes": (outputs, inputs), "scales": (outputs, count) if codes.block else (outputs,)}
    for part, tensor in codes.parts.items():
        if tensor.shape != wanted[part]:
            raise MalformedError(
                f"has the shape {list(tensor.shape)}, not {list(wanted[part])}", file=graph.path, tensor=tensor.name
            )


def _matrices(model: Model) -> Iterator[tuple[str, tuple[int, int], bool, int]]:
    """Of every matrix that can be codes: name, ``(out, in)``, whether the model has it the other way round, how many are stacked."""
    for projection in projections(model):
        count = projection.stack[1] if projection.stack else 0
        yield projection.weight, (projection.outputs, projection.inputs), projection.transposed, count
    table = model.embedding
    width = table.projection.inputs if isinstance(table.projection, Projection) else model.hidden
    yield table.tokens, (model.vocabulary, width), False, 0
