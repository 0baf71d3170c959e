# SPDX-License-Identifier: Apache-2.0
"""The plan plus what was measured: what the user sees and a machine can read."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from surgery.engine.plan import Compute, Copy, Plan, PlannedTensor
from surgery_formats.linalg.survival import Survival
from surgery_formats.tensors.tensor import StoredTensor, origin

__all__ = ["CodeChange", "CodeError", "Ledger", "Measurement", "Row"]

_RANGES = 16  # of a tensor that are listed


@dataclass(frozen=True, slots=True)
class CodeChange:
    """What became of the codes of one requantised weight, over a fixed sample of its outputs.

    Attributes:
        codes: Number of codes in the sample.
        moved: How many of them differ from the base's.
        rounding: ``nearest`` or ``feedback``.
        scales: ``kept`` or ``fresh``.
        update: As `Measurement.update`, of what is left of both in the inputs that the adapter listens to; 0 where no
            update says which these are.
        stored: As `Measurement.stored`, there.
        noise: As `Measurement.noise`, there.
    """

    codes: int
    moved: int
    rounding: str
    scales: str
    update: float = 0.0
    stored: float = 0.0
    noise: float = 0.0

    @property
    def inside(self) -> Survival:
        """The three sums together."""
        return Survival(self.update, self.stored, self.noise)

    def as_json(self) -> dict[str, Any]:
        """The account as plain values."""
        account: dict[str, Any] = {
            "rounding": self.rounding,
            "scales": self.scales,
            "moved": round(self.moved / max(self.codes, 1), 6),
        }
        if self.update > 0:
            account["inside"] = {
                "correlation": round(self.inside.correlation, 6),
                "error": round(self.inside.rounding, 6),
            }
        return account


@dataclass(frozen=True, slots=True)
class CodeError:
    """How far codes, or other numbers, are from the values of a weight that they stand for, over all of it.

    Attributes:
        energy: ``sum(W * W)``.
        error: ``sum((Q - W) ** 2)``.
        worst: ``max(abs(Q - W))``.
    """

    energy: float
    error: float
    worst: float

    @property
    def relative(self) -> float:
        """Relative to the values, in the norm of Frobenius; infinite where these are zeros and the codes are not."""
        if not self.energy:
            return math.inf if self.error else 0.0
        return math.sqrt(self.error / self.energy)

    def __add__(self, other: CodeError) -> CodeError:
        return CodeError(self.energy + other.energy, self.error + other.error, max(self.worst, other.worst))

    def as_json(self) -> dict[str, float]:
        """The account as plain values."""
        return {"error": float(f"{self.relative:.6g}"), "worst": float(f"{self.worst:.6g}")}


@dataclass(frozen=True, slots=True)
class Measurement:
    """What the executor found out about one computed tensor. The sums of a weight are with its first tensor.

    The sums run over a fixed sample of its rows (all of a small tensor). With T the exact update and D the stored one
    (rounded result minus what was stored before):

    Attributes:
        xxh3: xxh3-128 of its bytes, as written and read back.
        changed: Whether any stored value differs from the source's.
        sampled: Number of values in the sample.
        moved: How many of them differ from the source's.
        update: ``sum(T * T)``.
        stored: ``sum(D * T)``.
        noise: ``sum((D - T) ** 2)``.
        codes: What became of its codes, if it keeps its quantised format.
        coded: What became of its values, if they are written as codes anew.
    """

    xxh3: str
    changed: bool
    sampled: int = 0
    moved: int = 0
    update: float = 0.0
    stored: float = 0.0
    noise: float = 0.0
    codes: CodeChange | None = None
    coded: CodeError | None = None

    def as_record(self) -> dict[str, Any]:
        """The record that a finished file keeps of it."""
        record = {name: getattr(self, name) for name in self.__slots__ if name not in ("codes", "coded")}
        record |= {} if self.codes is None else {"codes": asdict(self.codes)}
        return record if self.coded is None else record | {"coded": asdict(self.coded)}

    @classmethod
    def of_record(cls, record: Mapping[str, Any]) -> Measurement:
        """The measurement that `as_record` recorded."""
        codes, coded = record.get("codes"), record.get("coded")
        own = {
            "codes": None if codes is None else CodeChange(**codes),
            "coded": None if coded is None else CodeError(**coded),
        }
        return cls(**{**record, **own})

    @property
    def kept(self) -> Survival:
        """The three sums together."""
        return Survival(self.update, self.stored, self.noise)

    @property
    def survival(self) -> float:
        """Share of the update that the stored values keep: 1 is all of it, 0 is rounded away."""
        return self.kept.survival

    @property
    def rounding(self) -> float:
        """Rounding noise relative to the update."""
        return self.kept.rounding


@dataclass(frozen=True, slots=True)
class Row:
    """One output tensor."""

    tensor: PlannedTensor
    measured: Measurement | None = None

    def as_json(self) -> dict[str, Any]:
        """The row as plain values, without paths, for the manifest and ``--json``."""
        tensor = self.tensor
        row: dict[str, Any] = {
            "class": tensor.outcome,
            "dtype": tensor.dtype.label,
            "shape": list(tensor.shape),
            "nbytes": tensor.nbytes,
        }
        if tensor.weight != tensor.name:
            row["weight"] = tensor.weight
        if tensor.why:
            row["why"] = tensor.why
        if isinstance(tensor.step, Copy):
            row |= _source(tensor.step.source)
        else:
            row["updates"] = [_update(tensor.step, i) for i in range(len(tensor.step.operations))]
        if self.measured is not None:
            row |= {"xxh3": self.measured.xxh3, "changed": self.measured.changed}
            if self.measured.update > 0:
                row |= {
                    "survival": round(self.measured.survival, 6),
                    "rounding": round(self.measured.rounding, 6),
                    "moved": round(self.measured.moved / max(self.measured.sampled, 1), 6),
                }
            if self.measured.codes is not None:
                correlation = round(self.measured.kept.correlation, 6)
                row["codes"] = {"correlation": correlation} | self.measured.codes.as_json()
            if self.measured.coded is not None:
                row["quantised"] = self.measured.coded.as_json()
        return row


def _source(source: StoredTensor) -> dict[str, Any]:
    """Where the bytes of a copied tensor lay; of one that is made of many ranges, how many."""
    if not source.file.pieces:
        return {"source": {"file": source.file.path.name, "tensor": source.name, "offset": source.offset}}
    ranges = [
        {"made": nbytes} if file.nameless else {"file": file.path.name, "offset": at, "nbytes": nbytes}
        for file, at, nbytes in source.file.ranges(source.offset, source.nbytes)
    ]
    if len(ranges) > _RANGES:
        return {"ranges": len(ranges)}
    return {"sources": ranges}


def _update(step: Compute, index: int) -> dict[str, Any]:
    operation = step.operations[index]
    update = operation.update
    scale = update.scale if update.effect == "adds" else None  # of a DoRA it acts before rows get their lengths
    facts = {"kind": update.kind, "site": str(operation.site), "adapter": operation.adapter}
    return facts | {name: value for name, value in (("rank", update.rank), ("scale", scale)) if value is not None}


@dataclass(frozen=True)
class Ledger:
    """Every output tensor, and every input without one."""

    plan: Plan
    measured: Mapping[str, Measurement] = field(default_factory=dict)

    @property
    def rows(self) -> tuple[Row, ...]:
        """All rows, in file order."""
        tensors = (tensor for tensor in self.plan.tensors if tensor.outcome != "between")
        return tuple(Row(tensor, self.measured.get(tensor.label)) for tensor in tensors)

    @property
    def classes(self) -> dict[str, int]:
        """Number of weights per outcome, and of inputs without an output.

        The stored tensors that make up a weight count as one.
        """
        counts = Counter(tensor.outcome for tensor in self.plan.weights)
        counts.update(account.outcome for account in self.plan.accounts if account.outcome != "source")
        return dict(sorted(counts.items()))

    @property
    def adapter_tensors(self) -> int:
        """Adapter tensors consumed, also those in a LoRA beside the model.

        Values that a model gives in the place of the base's (`as_trained`) are no adapter's.
        """
        count = len(self.plan.facts.get("as_trained", {}).get("files", ()))
        others = {file.identity for file in self.plan.inputs[len(self.plan.inputs) - count :]}
        used = {
            origin(tensor)
            for planned in self.plan.computed()
            if isinstance(planned.step, Compute)
            for operation in planned.step.operations
            for tensor in operation.update.tensors
        }
        used |= {
            origin(source)
            for tensor in self.plan.weights
            if tensor.outcome in ("replaced", "added")
            for source in tensor.step.sources
            if source.file.identity not in others
        }
        return len(used) + self.plan.in_lora

    @property
    def kept(self) -> Survival:
        """The survival of all updates together."""
        return Survival.total(measured.kept for measured in self.measured.values())

    @property
    def survival(self) -> float:
        """Share of all updates that storage keeps, weighted by their energy; NaN if nothing was measured."""
        return self.kept.survival

    @property
    def rounding(self) -> float:
        """Rounding noise of all updates together relative to their norm."""
        return self.kept.rounding

    @property
    def requantised(self) -> tuple[tuple[PlannedTensor, Measurement, CodeChange], ...]:
        """Every weight whose codes were chosen again for an update."""
        found = []
        for tensor in self.plan.weights:
            measured = self.measured.get(tensor.label)
            if measured is not None and measured.codes is not None and measured.update > 0:
                found.append((tensor, measured, measured.codes))
        return tuple(found)

    @property
    def coded(self) -> tuple[tuple[PlannedTensor, CodeError], ...]:
        """Every weight that is written as codes anew."""
        found = ((tensor, self.measured.get(tensor.label)) for tensor in self.plan.weights)
        return tuple((tensor, measured.coded) for tensor, measured in found if measured and measured.coded is not None)

    def unmoved(self) -> tuple[str, ...]:
        """Updated weights of which no stored value changed."""
        return tuple(
            tensor.label
            for tensor in self.plan.weights
            if tensor.outcome == "updated"
            and (measured := self.measured.get(tensor.label)) is not None
            and not measured.changed
        )

    def as_json(self) -> dict[str, Any]:
        """The machine's copy; the same bytes for the same inputs and options."""
        survival = self.survival
        account = {
            "verb": self.plan.verb,
            "classes": self.classes,
            "survival": None if math.isnan(survival) else round(survival, 6),
            "rounding": None if math.isnan(survival) else round(self.rounding, 6),
            "tensors": {row.tensor.label: row.as_json() for row in self.rows},
            "without_output": {
                account.label: {"class": account.outcome, "why": account.why} for account in self.plan.accounts
            },
            "ignored": {entry.label: entry.reason for entry in self.plan.ignored},
            "warnings": list(self.plan.warnings),
        }
        account |= {"notes": list(self.plan.notes)} if self.plan.notes else {}
        account |= {"between_nbytes": between} if (between := self.plan.between_nbytes) else {}
        account |= {"quantised": _coded(coded)} if (coded := self.coded) else {}
        return account | ({"requantised": _requantised(self)} if self.requantised else {})


def _requantised(ledger: Ledger) -> dict[str, Any]:
    """The account of all codes together."""
    weights = ledger.requantised
    whole = Survival.total(measured.kept for _, measured, _ in weights)
    inside = Survival.total(change.inside for _, _, change in weights)
    account: dict[str, Any] = {
        "weights": len(weights),
        "feedback": sum(change.rounding == "feedback" for _, _, change in weights),
        "fresh_scales": sum(change.scales == "fresh" for _, _, change in weights),
        "moved": round(sum(c.moved for _, _, c in weights) / max(sum(c.codes for _, _, c in weights), 1), 6),
        "survival": round(whole.survival, 6),
        "correlation": round(whole.correlation, 6),
        "error": round(whole.rounding, 6),
    }
    if inside.update > 0:
        account["inside"] = {"correlation": round(inside.correlation, 6), "error": round(inside.rounding, 6)}
    return account


def _coded(coded: Sequence[tuple[PlannedTensor, CodeError]]) -> dict[str, Any]:
    """The account of all values that became codes, see `Ledger.coded`."""
    total = sum((error for _, error in coded), CodeError(0.0, 0.0, 0.0))
    return {"weights": len(coded), **total.as_json()}
