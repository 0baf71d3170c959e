# SPDX-License-Identifier: Apache-2.0
"""Formats: each has a reader into the canonical form, a writer out of it, and a detector of its files."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

from surgery_formats.adapters.packing import Packing, packed_as_safetensors
from surgery_formats.arrays import Array
from surgery_formats.canonical.adapter import Adapter, Site
from surgery_formats.canonical.inserted import InsertedModule
from surgery_formats.dtypes import DType
from surgery_formats.linalg.coding import Coding
from surgery_formats.models.checkpoint import Checkpoint
from surgery_formats.tensors.tensor import StoredTensor
from surgery_formats.updates import Update

__all__ = [
    "Coded",
    "Entry",
    "Format",
    "InDialects",
    "Inheriting",
    "Inserting",
    "Moved",
    "NewTensor",
    "OnlyRead",
    "Outcome",
    "Rendering",
    "Scaled",
    "Scaling",
    "TakesAlpha",
    "reader_of",
    "what_to_tell",
]

Outcome = Literal["exact", "folded", "rounded", "approximated", "dropped"]


@dataclass(frozen=True, slots=True)
class Moved:
    """A `NewTensor.load` that only reads stored tensors, whose bytes in their files are the values in order.

    Attributes:
        tensors: The stored tensors, each behind the one before it.
        values: Reads them.
    """

    tensors: tuple[StoredTensor, ...]
    values: Callable[[], Array]

    def __call__(self) -> Array:
        """The values."""
        return self.values()


@dataclass(frozen=True, slots=True)
class NewTensor:
    """A tensor to be written, computed when it is written.

    Attributes:
        name: Key in the file.
        dtype: Stored type; `load` may return more precision, it is rounded once.
        shape: Sizes.
        load: Values, ``shape``; a `Moved` where they are those of stored tensors, which are then copied.
        made_with: Names what is solved for once for this and other tensors, which are made one after the other, wherever they
            lie in the file; empty where there is no such thing.
    """

    name: str
    dtype: DType
    shape: tuple[int, ...]
    load: Callable[[], Array]
    made_with: str = ""


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of a conversion's ledger.

    Attributes:
        site: As the source named it.
        outcome: ``exact`` (same factors), ``folded`` (same delta, with a scale or a part multiplied into a factor),
            ``rounded`` (either of these, in a type with fewer digits than the source's), ``approximated`` (another delta,
            as near as the format's type allows), or ``dropped``.
        detail: Where it went, or why it was dropped.
        error: Error of an approximated update, ``||delta - written|| / ||delta||`` (Frobenius), measured on the written
            tensors; None until then.
    """

    site: str
    outcome: Outcome
    detail: str = ""
    error: float | None = None


@dataclass(frozen=True, slots=True)
class Rendering:
    """An adapter as files of one format, not yet written.

    Attributes:
        tensor_file: Name of the file of weights; its ending is that of the file's container.
        tensors: Tensors of that file, in order.
        metadata: Free strings of that file (``__metadata__``).
        small_files: Whole contents of the other files (configuration).
        entries: What became of every update.
        held: The source's updates that the files hold: all but the dropped ones.
        stated: For sites with approximated updates, a function that returns the expected errors of their updates in
            `held`, in order (0 for an exact one). Such a format keeps sites and kinds as they are. A call before the
            tensors were loaded loads them.
        packing: How the tensors become that file.
        alpha: What a reader has to be told, where no file states a scale (`TakesAlpha`); else None.
        notes: What the user should know of it.
        filled: What a reader has to be told of the inputs of a graph (`ForGraph`), by name.
    """

    tensor_file: str
    tensors: tuple[NewTensor, ...]
    metadata: Mapping[str, str] = field(default_factory=dict)
    small_files: Mapping[str, bytes] = field(default_factory=dict)
    entries: tuple[Entry, ...] = ()
    held: Mapping[Site, tuple[Update, ...]] = field(default_factory=dict)
    stated: Mapping[Site, Callable[[], tuple[float, ...]]] = field(default_factory=dict)
    packing: Packing = packed_as_safetensors
    alpha: float | None = None
    notes: tuple[str, ...] = ()
    filled: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Scaling:
    """How to state the scales of an adapter: ``scale = alpha / rank``, or ``alpha / sqrt(rank)``.

    Attributes:
        alpha: The alpha of all modules; None uses each module's rank, which makes the scale 1 (rsLoRA: its root).
        rslora: Whether to divide by ``sqrt(rank)``.
        rank: The rank to state for the whole file where a module has it; by default the one that most have.
    """

    alpha: float | None = None
    rslora: bool = False
    rank: int | None = None

    def alpha_of(self, rank: int) -> float:
        """As written in the configuration."""
        return float(rank) if self.alpha is None else self.alpha

    def scale(self, rank: int) -> float:
        """The factor on ``B A``."""
        return self.alpha_of(rank) / (math.sqrt(rank) if self.rslora else rank)


class Format(Protocol):
    """One on-disk adapter format. Adding one is adding a file with an object like this to `registry.BUILT_IN`.

    Attributes:
        name: As in ``surgery convert --to NAME``.
        title: One line for ``surgery formats``.
        needs_base: Whether `render` must know the base's names.
        single_file: Whether an adapter is one file rather than a folder.
        file_stems: Names of its weight files up to the first dot, or to the last one, as patterns of `fnmatch`: a folder with
            such a file is no plain model, whatever else it holds.
    """

    @property
    def name(self) -> str: ...
    @property
    def title(self) -> str: ...
    @property
    def needs_base(self) -> bool: ...
    @property
    def single_file(self) -> bool: ...
    @property
    def file_stems(self) -> tuple[str, ...]: ...

    def detect(self, path: Path) -> bool:
        """Whether `path` (file or folder) is of this format, by content; cheap, and never raises for foreign files."""

    def read(self, path: Path) -> Adapter:
        """The canonical form. Only headers are read.

        Raises:
            InputError: the files do not follow the format.
            FitError: the content cannot be expressed (a kind that has no merge).
        """

    def render(self, adapter: Adapter, base: Checkpoint | None) -> Rendering:
        """The adapter in this format. Every update that it cannot hold has an entry with outcome ``dropped``.

        If a base is known, `adapter` already has the sizes that only a base can supply (`binding.sizes.sized`).

        Raises:
            FitError: a base is needed and not given, or is the wrong one.
        """


@runtime_checkable
class Coded(Format, Protocol):
    """A format that stores factors as codes, in one of several types.

    Attributes:
        coding: The type it stores now.
    """

    @property
    def coding(self) -> Coding: ...

    def with_factors(self, factors: str) -> Format:
        """The same format with factors of the type `factors` (``int8``, ``int4``).

        Raises:
            FitError: no such type.
        """


@runtime_checkable
class InDialects(Format, Protocol):
    """A format whose programs hold the experts of a mixture in several ways, each of which has a name."""

    @property
    def dialects(self) -> tuple[str, ...]:
        """Their names."""

    def with_dialect(self, name: str) -> Format:
        """The same format, holding experts as the dialect `name` does.

        Raises:
            NotFoundError: no such dialect.
        """


@runtime_checkable
class Scaled(Format, Protocol):
    """A format whose configuration states ranks and scales, in more than one way."""

    def with_scaling(self, scaling: Scaling) -> Scaled:
        """The same format, stating them by `scaling` wherever an update's scale allows it."""

    def described(self, adapter: Adapter) -> Adapter:
        """`adapter` with the configuration, modules and known issues that a file of this format would give it."""


@runtime_checkable
class TakesAlpha(Format, Protocol):
    """A format some of whose files do not state their scale: who trained them knows it."""

    def with_alpha(self, alpha: float) -> Format:
        """The same format, reading files that state none with this alpha."""


@runtime_checkable
class ForGraph(Format, Protocol):
    """A format whose files are for the inputs of a graph."""

    @property
    def element(self) -> DType | None:
        """The type that the graph takes; None without a graph."""

    def for_graph(self, path: Path) -> Format:
        """The same format, written for the graph `path`: under the names of its inputs, in their shapes and type.

        Raises:
            InputError: the graph cannot be read.
            FitError: it has no inputs for an adapter.
        """

    def reading(self, filled: Mapping[str, Any]) -> Format:
        """The same format, told what each input is (`Rendering.filled`)."""


@runtime_checkable
class OnlyRead(Format, Protocol):
    """A format that is not written: its `render` drops everything (`writing.nothing_written`).

    Attributes:
        only_read: Why.
    """

    @property
    def only_read(self) -> str: ...


@runtime_checkable
class Inserting(Format, Protocol):
    """A format whose adapters may insert modules into a network."""

    def inserted(self, adapter: Adapter) -> tuple[InsertedModule, ...]:
        """The modules that an adapter of this format inserts; none for most.

        Raises:
            FitError, MalformedError: one that has no meaning, or that no graph can hold.
        """


@runtime_checkable
class Inheriting(Format, Protocol):
    """A format whose adapters can inherit configuration from the adapters they were made from."""

    def inherited(self, adapters: Sequence[Adapter], updates: Mapping[Site, tuple[Update, ...]]) -> Mapping[str, Any]:
        """The configuration (`Adapter.config`) of an adapter with `updates`, made from `adapters` of this format.

        Raises:
            FitError: no one configuration describes such an adapter.
        """


@runtime_checkable
class Spelling(Format, Protocol):
    """A format whose files spell each module their own way, and keep that spelling when they are written again."""

    def spelt_as(self, adapters: Sequence[Adapter]) -> Mapping[str, Any]:
        """The spelling (`Adapter.spelling`, of this format) of an adapter that was made from `adapters`."""


def reader_of(rendering: Rendering, target: Format) -> Format:
    """The format that reads what was rendered: `target`, told what its files do not state."""
    if rendering.filled and isinstance(target, ForGraph):
        return target.reading(rendering.filled)
    if rendering.alpha is None or not isinstance(target, TakesAlpha):
        return target
    return target.with_alpha(rendering.alpha)


def what_to_tell(rendering: Rendering, target: Format) -> tuple[str, ...]:
    """What the user has to keep beside the files, for whoever reads them."""
    if rendering.alpha is None:
        return rendering.notes
    return (
        *rendering.notes,
        f"files of {target.name} state no scale: this one is read with alpha {rendering.alpha:.9g}",
    )
