# SPDX-License-Identifier: Apache-2.0
"""Read a compact folder (docs/compact.md) into the canonical form. Codes stay on disk until a factor is read."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, get_args

from surgery_formats.adapters.compact.files import CONFIG_FILE, MARK, TENSOR_FILE, VERSION
from surgery_formats.adapters.peft.carried import held_by_config, stored_transposed, task_of
from surgery_formats.canonical.adapter import Adapter, ModuleKind, Site
from surgery_formats.containers.weight_files import open_shard
from surgery_formats.errors import FitError, MalformedError, NotFoundError
from surgery_formats.files.bounded_json import INDEX_LIMIT, read_object
from surgery_formats.linalg.coding import CODINGS, Coding
from surgery_formats.models.sets_beside import sets_beside
from surgery_formats.tensors.coded import CodedTensor, quantised
from surgery_formats.tensors.tensor import StoredTensor, Tensor
from surgery_formats.text import listing, show
from surgery_formats.updates import DoRA, Factor, Held, LoRA, Offset, Replacement, Stacked, TokenRows, Update

__all__ = ["leaves", "read_compact", "stem_of"]

_MOST = 1 << 31  # of any size
_Choice = TypeVar("_Choice", bound=str)


def leaves(embedding: bool) -> tuple[str, str]:
    """PEFT's names of A and B, so that an embedding is recognised as one (its delta is ``(B A)^T``)."""
    return ("lora_embedding_B", "lora_embedding_A") if embedding else ("lora_A", "lora_B")


def stem_of(site: Site, position: int, *, wrapped: bool = False) -> str:
    """The prefix of the names of an update's tensors.

    Args:
        site: The update's site.
        position: The update's index in the site's chain.
        wrapped: Whether it is the output projection inside a wrapped ``torch.nn.MultiheadAttention``, which PEFT nests.
    """
    path = str(site)
    if wrapped:
        path = path.replace(".out_proj.", ".base_layer.out_proj.")
    return f"{path}#{position}" if position else path


def read_compact(path: Path) -> Adapter:
    """Read a folder with adapter.safetensors and compact.json.

    Raises:
        NotFoundError: one is missing.
        MalformedError: the two files contradict each other.
    """
    config = path / CONFIG_FILE
    file = path / TENSOR_FILE
    if not file.exists():
        raise NotFoundError(f"no {TENSOR_FILE}", file=path)
    raw = _Object(read_object(config, INDEX_LIMIT), config)
    if raw.get("format", str) != MARK:
        raise MalformedError(f"its format is not {MARK}", file=config)
    if (version := raw.get("version", int)) != VERSION:
        raise FitError(f"version {version} of the format is not known", file=config, hint="a newer surgery reads it")
    shard = open_shard(file)
    new_modules = raw.get("new_modules", list)
    if not all(isinstance(name, str) for name in new_modules):
        raise MalformedError("'new_modules' is not a list of names", file=config)
    tensors = {tensor.name: tensor for tensor in shard.tensors}
    state = _CompactReader(tensors, _coding(raw), file, raw.get("config", dict))
    updates: dict[Site, tuple[Update, ...]] = {}
    for entry in raw.objects("parameters"):
        records = entry.objects("updates")
        kind, kernel = _module_kind(records)
        site = Site(
            entry.get("path", str), entry.get("component", str, ""), entry.get("flat", bool, False), kind, kernel
        )
        if site in updates:
            raise MalformedError(f"'{show(site)}' twice", file=config)
        updates[site] = tuple(_update(site, position, record, state) for position, record in enumerate(records))
        if not updates[site]:
            raise MalformedError(f"'{show(site)}' without an update", file=config)
    if state.left:
        raise MalformedError(
            f"{len(state.left)} tensors have no use: {listing(sorted(state.left))}", file=file, tensor=min(state.left)
        )
    return Adapter(
        path=path,
        format="compact",
        kind=raw.get("kind", str),
        updates=updates,
        tensors=tuple(state.used),
        new_modules=frozenset(new_modules),
        base_name=raw.get("base", str),
        base_id=shard.metadata.get("surgery.base", ""),
        config=state.config,
        metadata=dict(shard.metadata),
        side_files=tuple(file for files in sets_beside(path).values() for file in files.values()),
        keeps_ties=raw.get("keeps_ties", bool),
        task=raw.get("task", str, task_of(state.config)),
        stored_transposed=raw.get("stored_transposed", bool, stored_transposed(state.config)),
    )


@dataclass(frozen=True, slots=True)
class _Object:
    """An object of compact.json whose fields are checked when they are read."""

    raw: Mapping[str, Any]
    file: Path

    def get(self, key: str, kind: type, default: object = None) -> Any:
        """The value, of exactly this type.

        Raises:
            MalformedError: absent without a default, or of another type.
        """
        value = self.raw.get(key, default)
        if type(value) is not kind:
            what = "is missing" if key not in self.raw else f"is {show(repr(value), 40)}"
            raise MalformedError(f"'{key}' {what}, {kind.__name__} was expected", file=self.file)
        return value

    def number(self, key: str) -> float:
        """A finite number."""
        value = self.raw.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e300:
            raise MalformedError(f"'{key}' is {show(repr(value), 40)}, not a number below 1e300", file=self.file)
        return float(value)

    def choice(self, key: str, allowed: tuple[_Choice, ...]) -> _Choice:
        """One of `allowed`."""
        for value in allowed:
            if self.raw.get(key) == value:
                return value
        raise MalformedError(
            f"'{key}' is {show(repr(self.raw.get(key)), 40)}, not one of {listing(allowed)}", file=self.file
        )

    def size(self, value: object, key: str, least: int = 1) -> int:
        """A whole number of at least `least`."""
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value < _MOST:
            raise MalformedError(f"'{key}' is {show(repr(value), 40)}, not a size", file=self.file)
        return value

    def sizes(self, key: str, least: int = 1) -> tuple[int, ...]:
        """A list of whole numbers."""
        return tuple(self.size(value, key, least) for value in self.get(key, list))

    def objects(self, key: str) -> list[_Object]:
        """A list of objects."""
        records = self.get(key, list)
        if not all(isinstance(record, dict) for record in records):
            raise MalformedError(f"'{key}' is not a list of objects", file=self.file)
        return [_Object(record, self.file) for record in records]


def _coding(raw: _Object) -> Coding:
    name = raw.get("factors", str)
    if name not in CODINGS:
        raise FitError(f"factors of type '{show(name, 40)}' are not known", file=raw.file)
    group = raw.size(raw.raw.get("group"), "group")
    return Coding(name, CODINGS[name].bits, group)


@dataclass
class _CompactReader:
    """The tensors of the file that are not used yet, and the updates read from the others."""

    left: dict[str, StoredTensor]
    coding: Coding
    file: Path
    config: Mapping[str, Any] = field(default_factory=dict)
    used: list[Tensor] = field(default_factory=list)

    def take(self, name: str) -> StoredTensor:
        """Take a tensor of the file; each can be taken once."""
        if name not in self.left:
            raise MalformedError(f"no tensor '{show(name)}'", file=self.file)
        return self.left.pop(name)

    def plain(self, name: str) -> StoredTensor:
        """A tensor that is stored as it is."""
        tensor = self.take(name)
        self.used.append(tensor)
        return tensor


def _update(site: Site, position: int, record: _Object, state: _CompactReader) -> Update:
    kind = record.get("kind", str)
    stem = stem_of(site, position, wrapped=record.get("wrapped", bool, False))
    if kind in ("LoRA", "DoRA"):
        return _low_rank(stem, kind, record, state)
    if kind == "offset":
        return Offset(_factor(state.plain(f"{stem}.offset"), (1, 2)), record.number("scale"))
    if kind == "replacement":
        stated = "held" in record.raw
        held = record.choice("held", get_args(Held)) if stated else held_by_config(site.path, state.config)
        return Replacement(Factor.of(state.plain(f"{stem}.value")), held)
    if kind == "token rows":
        value = _factor(state.plain(f"{stem}.rows"), (2,))
        indices = record.sizes("indices", 0)
        if len(indices) != value.shape[0] or len(set(indices)) != len(indices):
            raise MalformedError(
                f"{value.shape[0]} token rows for {len(set(indices))} indices",
                file=state.file,
                tensor=value.tensors[0].name,
            )
        return TokenRows(value, indices, record.size(record.raw.get("vocabulary"), "vocabulary", 0))
    raise FitError(f"updates of kind '{show(kind)}' are not known", file=record.file, tensor=str(site))


def _module_kind(records: list[_Object]) -> tuple[ModuleKind, tuple[int, ...]]:
    """The module kind that the records of one parameter imply."""
    for record in records:
        if record.get("kind", str) in ("LoRA", "DoRA"):
            if record.get("wrapped", bool, False):
                return "attention output", ()
            if record.get("embedding", bool, False):
                return "embedding", ()
            kernel = record.sizes("shape")[2:]
            return "experts" if "experts" in record.raw else "convolution" if kernel else "linear", kernel
    return "", ()


def _factor(tensor: StoredTensor, axes: tuple[int, ...]) -> Factor:
    if len(tensor.shape) not in axes:
        raise MalformedError(f"is {list(tensor.shape)}", file=tensor.file.path, tensor=tensor.name)
    return Factor.of(tensor)


def _low_rank(stem: str, kind: str, record: _Object, state: _CompactReader) -> Update:
    rank = record.size(record.raw.get("rank"), "rank")
    shape = record.sizes("shape")
    stacked = "experts" in record.raw
    count = record.size(record.raw["experts"], "experts") if stacked else 1
    if len(shape) < 2 or (stacked and (len(shape) > 2 or kind == "DoRA")):
        raise MalformedError(f"'{show(stem)}' is a {kind} of shape {list(shape)}", file=record.file)
    out, inputs = shape[0], math.prod(shape[1:])
    names = [f"{stem}.{leaf}" for leaf in leaves(record.get("embedding", bool, False))]
    a = _quantised(names[0], "A", (count, inputs, rank), (count * rank, *shape[1:]), state)
    b = _quantised(names[1], "B", (count, out, rank), (out, rank * count), state)
    scale = record.number("scale")
    alpha = record.number("alpha") if "alpha" in record.raw else None
    if stacked:
        either_way = record.get("either_way", bool)
        return _stacked(a, b, (count, out, inputs, rank), scale, alpha, either_way=either_way)
    lora = LoRA(Factor((a,), (rank, inputs)), Factor.of(b), scale, alpha)
    if kind == "LoRA":
        return lora
    magnitude = _factor(state.plain(f"{stem}.lora_magnitude_vector"), (1,))
    per_row = record.get("per_row", bool)
    allowed = (out,) if per_row else (inputs, shape[1])  # of a convolution: one for all columns of an input channel
    if magnitude.shape[0] not in allowed:
        raise MalformedError(
            f"{magnitude.shape[0]} magnitudes for {allowed[0]} {'rows' if per_row else 'columns'}",
            file=state.file,
            tensor=magnitude.tensors[0].name,
        )
    return DoRA(lora, magnitude, per_row)


def _quantised(
    name: str, side: Any, sizes: tuple[int, int, int], shape: tuple[int, ...], state: _CompactReader
) -> CodedTensor:
    codes, scales = state.take(f"{name}.codes"), state.take(f"{name}.scales")
    factor = quantised(name, codes, scales, state.coding, side, sizes, shape)
    state.used.append(factor)
    return factor


def _stacked(
    a: CodedTensor,
    b: CodedTensor,
    sizes: tuple[int, int, int, int],
    scale: float,
    alpha: float | None,
    *,
    either_way: bool,
) -> Stacked:
    """All experts of one parameter; `either_way` where only the base can tell which factor is which."""
    count, out, inputs, rank = sizes

    def forward(e: int) -> LoRA:
        A = Factor((a,), (rank, inputs), lambda t: t.reshape(count, rank, -1)[e])
        return LoRA(A, Factor((b,), (out, rank), lambda t: t.reshape(-1, rank, count)[:, :, e]), scale, alpha)

    def backward(e: int) -> LoRA:
        A = Factor((b,), (rank, out), lambda t: t.reshape(-1, rank, count)[:, :, e].T)
        return LoRA(A, Factor((a,), (inputs, rank), lambda t: t.reshape(count, rank, -1)[e].T), scale, alpha)

    turned = tuple(backward(e) for e in range(count)) if either_way else ()
    return Stacked(tuple(forward(e) for e in range(count)), turned)
