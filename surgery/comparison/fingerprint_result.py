# SPDX-License-Identifier: Apache-2.0
"""What `fingerprint` found: an id for each model, and the tensors that differ from another's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from surgery.reports.result import elapsed, summarised
from surgery.reports.sections import Column, Facts, Note, Section, Table
from surgery.reports.summary import Summary
from surgery.reports.values import Name, Value
from surgery_formats.models.content import TensorContent

__all__ = ["FingerprintResult", "ModelContent"]

_SHOWN = 20


@dataclass(frozen=True)
class ModelContent:
    """The content of a model, an adapter or a graph.

    Attributes:
        path: Where it lies.
        id: The root over all tensors, in hexadecimal.
        tensors: By name.
        changed: Names of tensors that the other model has with another type, shape or values.
        missing: Names that only the other has.
        added: Names that the other has not.
    """

    path: Path
    id: str
    tensors: Mapping[str, TensorContent] = field(repr=False)
    changed: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    added: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def equal(self) -> bool:
        """Whether it holds what the other does."""
        return not (self.changed or self.missing or self.added)

    def as_json(self, *, compared: bool) -> dict[str, Any]:
        """As plain values."""
        difference = {"changed": list(self.changed), "missing": list(self.missing), "added": list(self.added)}
        return {
            "path": str(self.path),
            "id": self.id,
            "nbytes": self.nbytes,
            "tensors": {name: tensor.as_json() for name, tensor in self.tensors.items()},
            **({"equal": self.equal, **difference} if compared else {}),
        }


@summarised
@dataclass(frozen=True)
class FingerprintResult:
    """The contents of models, and how they differ from another's.

    Attributes:
        models: In the order in which they were named.
        against: What they were compared with, or None.
        seconds: How long it took.
    """

    models: tuple[ModelContent, ...]
    against: ModelContent | None = None
    seconds: float = elapsed()

    @property
    def nbytes(self) -> int:
        """Bytes that were read."""
        return sum(model.nbytes for model in (*self.models, *([self.against] if self.against else [])))

    @property
    def equal(self) -> bool:
        """Whether all hold the same: what `against` does, or what the first does."""
        ids = {model.id for model in (*self.models, *([self.against] if self.against else []))}
        return len(ids) == 1

    @property
    def warnings(self) -> tuple[str, ...]:
        """None."""
        return ()

    def as_json(self) -> dict[str, Any]:
        """The result as plain values, for ``--json``."""
        compared = self.against is not None
        other = {} if self.against is None else {"against": {"path": str(self.against.path), "id": self.against.id}}
        return {"equal": self.equal, "models": [model.as_json(compared=compared) for model in self.models], **other}

    def summary(self, *, verbose: bool = False) -> Summary:
        """An id for each model; of those that differ, the tensors."""
        listed = [*self.models, *([self.against] if self.against else [])]
        columns = (Column("", "name"), Column("id"), Column("tensors", "integer"), Column("size", "bytes"))
        rows = tuple((str(model.path), model.id, len(model.tensors), model.nbytes) for model in listed)
        sections: list[Section] = [Table(columns, rows)]
        for model in self.models if self.against is not None else ():
            if model.equal:
                sections.append(Facts(((Name(model.path), "the same tensors"),)))
                continue
            found = [(name, "other values") for name in model.changed]
            found += [(name, "only in the other") for name in model.missing]
            found += [(name, "not in the other") for name in model.added]
            sections.append(Facts(((Name(model.path), (Value(len(found), "integer"), " tensors differ")),)))
            shown = found if verbose else found[:_SHOWN]
            sections.append(Table((Column("tensor", "name"), Column("what differs")), tuple(sorted(shown))))
            if len(shown) < len(found):
                sections.append(Note(f"{len(found) - len(shown)} more", "omitted"))
        return Summary("Fingerprint", tuple(sections))
