# SPDX-License-Identifier: Apache-2.0
"""Catalogue: every adapter format, container, model family and kind of update this installation knows.

Everything is read off the registries and the rooms' own docstrings, so that a new file appears here by itself.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from types import ModuleType
from typing import Any, ClassVar

from surgery.reports.result import elapsed, summarised, timed
from surgery.reports.sections import Column, Table
from surgery.reports.summary import Summary
from surgery.reports.to_json import plain
from surgery_formats import updates
from surgery_formats.adapters.format import OnlyRead
from surgery_formats.adapters.peft.dialects import BUILT_IN as DIALECTS
from surgery_formats.adapters.registry import BUILT_IN
from surgery_formats.adapters.registry import formats as adapter_formats
from surgery_formats.containers.registry import BUILT_IN as MODEL_CONTAINERS
from surgery_formats.containers.registry import containers
from surgery_formats.models.families import registry
from surgery_formats.storage.registry import BUILT_IN as STORAGES
from surgery_formats.storage.registry import storage_kinds

__all__ = ["AdapterFormat", "Catalogue", "ContainerEntry", "DialectEntry", "FamilyEntry", "UpdateKind", "formats"]


@dataclass(frozen=True, slots=True)
class AdapterFormat:
    """An adapter format.

    Attributes:
        name: As in ``surgery convert --to NAME``.
        title: One line.
        needs_base: Whether writing it needs the base's names.
        single_file: Whether an adapter is one file rather than a folder.
        only_read: Why it is not written; empty if it is.
        built_in: False for a plugin's.
    """

    name: str
    title: str
    needs_base: bool
    single_file: bool
    only_read: str
    built_in: bool


@dataclass(frozen=True, slots=True)
class DialectEntry:
    """A way in which PEFT's folders hold the LoRAs of experts.

    Attributes:
        name: As in ``surgery convert --dialect NAME``.
        title: Who reads it, and its shapes.
        limits: What it cannot hold as it is.
        source: Where that was read.
    """

    name: str
    title: str
    limits: str
    source: str


@dataclass(frozen=True, slots=True)
class ContainerEntry:
    """A way to store a model.

    Attributes:
        name: In short.
        files: What they are called.
        reads: Whether models are read from it.
        writes: Whether models are written to it; else outputs are of another.
        built_in: False for a plugin's.
    """

    name: str
    files: str
    reads: bool
    writes: bool
    built_in: bool


@dataclass(frozen=True, slots=True)
class StorageEntry:
    """A way to hold a weight in stored tensors, beside plain numbers.

    Attributes:
        name: As reports call it.
        title: The tensors of a weight.
        built_in: Whether it is part of this toolkit; the others are plugins.
    """

    name: str
    title: str
    built_in: bool


@dataclass(frozen=True, slots=True)
class FamilyEntry:
    """A model family whose names are known.

    Attributes:
        name: Of its file.
        title: One line.
        model_types: ``model_type`` (or ``_class_name``) values it covers.
        graphs: Whether it has a recipe, so that its models can be exported to ONNX and verified.
    """

    name: str
    title: str
    model_types: tuple[str, ...]
    graphs: bool


@dataclass(frozen=True, slots=True)
class UpdateKind:
    """A kind of update.

    Attributes:
        name: As ledgers call it.
        equation: ``W' = W + s B A``.
        title: The whole line, with its source.
        needs_weight: Whether it looks at the base's weight first.
    """

    name: str
    equation: str
    title: str
    needs_weight: bool


@summarised
@dataclass(frozen=True)
class Catalogue:
    """The formats, containers, storages, families and updates of this installation.

    Attributes:
        formats: Adapter formats, all of which are read.
        dialects: In which PEFT's folders hold experts, all of which are read and written.
        containers: Of models.
        storages: Of weights that are not plain numbers.
        families: Whose names are known; other models are read by their names alone.
        updates: Kinds of update that can be merged.
        seconds: How long it took.
    """

    formats: tuple[AdapterFormat, ...]
    dialects: tuple[DialectEntry, ...]
    containers: tuple[ContainerEntry, ...]
    storages: tuple[StorageEntry, ...]
    families: tuple[FamilyEntry, ...]
    updates: tuple[UpdateKind, ...]
    seconds: float = elapsed()

    warnings: ClassVar[tuple[str, ...]] = ()
    nbytes: ClassVar[int] = 0  # no files were looked at

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {"type": "catalogue", **plain(self)}

    def summary(self, *, verbose: bool = False) -> Summary:
        """A table of each sort."""
        formats = (
            (
                entry.name,
                entry.title + ("" if entry.built_in else " (plugin)"),
                "file" if entry.single_file else "folder",
                "only read" if entry.only_read else "needs --base" if entry.needs_base else "",
            )
            for entry in sorted(self.formats, key=lambda entry: entry.name)
        )
        containers = (
            (entry.name, entry.files + ("" if entry.built_in else " (plugin)"), entry.reads, entry.writes)
            for entry in self.containers
        )
        storages = (
            (storage.name, storage.title + ("" if storage.built_in else " (plugin)")) for storage in self.storages
        )
        families = ((family.name, family.graphs, ", ".join(family.model_types)) for family in self.families)
        updates = ((update.name, update.equation or update.title) for update in self.updates)
        dialects = ((dialect.name, dialect.title) for dialect in self.dialects)
        tables = (
            Table((Column("adapter format"), Column("title"), Column("as"), Column("to write it")), tuple(formats)),
            Table((Column("dialect of experts"), Column("title")), tuple(dialects)),
            Table(
                (Column("container"), Column("files"), Column("read", "flag"), Column("written", "flag")),
                tuple(containers),
            ),
            *([Table((Column("storage"), Column("tensors of a weight")), tuple(storages))] if self.storages else []),
            Table((Column("family"), Column("to ONNX", "flag"), Column("model types")), tuple(families)),
            Table((Column("update"), Column("equation")), tuple(updates)),
        )
        return Summary("Formats", tables)


@timed
def formats() -> Catalogue:
    """List what this installation can read and write, plugins included.

    Raises:
        SurgeryError: a plugin cannot be imported.
    """
    return Catalogue(
        formats=tuple(
            AdapterFormat(
                adapter_format.name,
                adapter_format.title,
                adapter_format.needs_base,
                adapter_format.single_file,
                adapter_format.only_read if isinstance(adapter_format, OnlyRead) else "",
                adapter_format in BUILT_IN,
            )
            for adapter_format in adapter_formats().values()
        ),
        dialects=tuple(DialectEntry(d.name, d.title, d.limits, d.source) for d in DIALECTS),
        containers=tuple(
            ContainerEntry(
                container.name,
                container.title,
                True,
                container.written_as == container.name,
                container in MODEL_CONTAINERS,
            )
            for container in containers().values()
        ),
        storages=tuple(StorageEntry(kind.name, kind.title, kind in STORAGES) for kind in storage_kinds().values()),
        families=tuple(sorted(_families(), key=lambda entry: (entry.name, not entry.graphs, entry.model_types))),
        updates=tuple(_updates()),
    )


def _families() -> list[FamilyEntry]:
    """One per record; a file may hold several (with a recipe, and of names alone)."""
    return [
        FamilyEntry(module.__name__.rpartition(".")[2], _first_line(module), record.names, record.recipe is not None)
        for module in registry.modules()
        for record in registry.families(module)
    ]


def _updates() -> list[UpdateKind]:
    """Kinds with names of their own, one or several; a share or a stack of another kind has that kind's."""
    kinds: list[UpdateKind] = []
    for exported in updates.__all__:
        kind: Any = getattr(updates, exported)
        own = getattr(kind, "kind", None)
        names = (own,) if isinstance(own, str) else getattr(kind, "kinds", ())
        title = _first_line(sys.modules[kind.__module__]) if names else ""
        equation = re.search(r"``(.+?)``", title)
        kinds += [UpdateKind(name, equation[1] if equation else "", title, kind.needs_weight) for name in names]
    return kinds


def _first_line(room: ModuleType) -> str:
    return (room.__doc__ or "").strip().partition("\n")[0]
