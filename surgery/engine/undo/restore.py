# SPDX-License-Identifier: Apache-2.0
"""The plan of an unmerge with what the merge kept, and the engine that runs it: the base, bit for bit."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from surgery._version import __version__
from surgery.engine.jobs import ComputeWeight, Write
from surgery.engine.ledger import Measurement
from surgery.engine.plan import Compute, Copy, Plan, PlannedFile, PlannedTensor, SideFile, TensorOutcome
from surgery.engine.undo.base_files import kept_file
from surgery.engine.undo.codes import decode_codes
from surgery.engine.undo.coding import unpack_bytes
from surgery.engine.undo.inverse import Chain, estimates, inverted
from surgery.engine.undo.originals import unpack_original
from surgery.engine.undo.record import (
    adapters_of,
    bound_again,
    label_of,
    lost_dtype,
    operations_on,
    unmerge_facts,
)
from surgery.engine.undo.residue import LINE, decode
from surgery.engine.undo.sidecar import Segments, Sidecar
from surgery_formats.arrays import Array, dtype_of
from surgery_formats.binding.bind import Binding
from surgery_formats.binding.operation import Operation
from surgery_formats.canonical.adapter import Adapter
from surgery_formats.dtypes import DType
from surgery_formats.errors import FitError, MalformedError, ProofError, SurgeryError
from surgery_formats.files.output.folder import OutputFolder
from surgery_formats.models.checkpoint import Checkpoint, open_checkpoint
from surgery_formats.models.identity import content_id, fingerprint
from surgery_formats.storage.base import Storage
from surgery_formats.storage.plain import Elements, Plain
from surgery_formats.storage.quantised import is_quantised
from surgery_formats.tensors.tensor import StoredTensor, as_bytes, matrix_of
from surgery_formats.text import exact, show

__all__ = ["Restoration", "check_adapters", "described", "prove_base", "restoration"]

_OTHER = "is not the model that this file was kept for"
Restore = Callable[[Write, Callable[[], bool]], tuple[Measurement, ...]]


@dataclass(frozen=True)
class Restoration:
    """A planned unmerge; as an engine it computes the weights of its plan.

    Attributes:
        plan: What to write.
        base_id: Content id that the result must have.
        restored: How each computed step comes back, by the step's ``id``.
    """

    plan: Plan
    base_id: str
    restored: Mapping[int, Restore] = field(repr=False)

    def computing(
        self, plan: Plan, output: Path, into: OutputFolder | None = None
    ) -> AbstractContextManager[ComputeWeight]:
        """See `surgery.engine.execute.Engine`."""
        return contextlib.nullcontext(self.compute)

    def compute(
        self, label: str, step: Compute, write: Write, stop: Callable[[], bool], device: str
    ) -> tuple[Measurement, ...]:
        """Hand the bytes of one weight to `write`, as `surgery.engine.arithmetic.compute` does."""
        try:
            return self.restored[id(step)](write, stop)
        except MalformedError as error:
            raise FitError(f"{_OTHER}: {error.message}", tensor=label) from error
        except SurgeryError:
            raise
        except (ArithmeticError, LookupError, ValueError) as error:  # numbers of a record that do not fit the model
            raise FitError(f"{_OTHER} ({type(error).__name__})", tensor=label) from error


def restoration(merged: Checkpoint, adapters: Sequence[tuple[Adapter, float]], sidecar: Sidecar) -> Restoration:
    """Plan to write the base that `sidecar` was kept for.

    Raises:
        FitError: other adapters, other weights of them, or another model.
        MalformedError: the file is damaged.
    """
    try:
        check_adapters(sidecar.facts["adapters"], adapters, sidecar.path)
        return _Planner(merged, adapters, sidecar).restoration()
    except SurgeryError:
        raise
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise MalformedError(f"is damaged ({type(error).__name__})", file=sidecar.path) from error


def check_adapters(recorded: Sequence[Mapping[str, Any]], given: Sequence[tuple[Adapter, float]], source: Path) -> None:
    """Refuse other adapters than those of a merge, another order, and other weights.

    Args:
        recorded: ``files`` (fingerprints), ``weight`` and perhaps ``name`` of each.
        given: The adapters to take back.
        source: The file that has the record.

    Raises:
        FitError: what differs.
    """
    if len(recorded) != len(given):
        raise FitError(
            f"{len(recorded)} adapters were merged, {len(given)} are given",
            file=source,
            hint="name all, in their order",
        )
    for record, (adapter, weight), mine in zip(recorded, given, adapters_of(given), strict=True):
        if list(record["files"]) != mine["files"]:
            own = ", ".join(each[:8] for each in mine["files"][:2])
            raise FitError(
                f"another adapter was merged: {described(record)}; this one has the content {own}",
                file=adapter.path,
                hint="name that one",
            )
        if float(record["weight"]) != weight:
            raise FitError(
                f"was merged with the weight {exact(record['weight'])}, not {exact(weight)}",
                file=adapter.path,
                hint=f"write {show(adapter.path, 200)}={exact(record['weight'])}",
            )


def described(record: Mapping[str, Any]) -> str:
    """``'style' with the weight 0.7 (content abfd65e8)``, or, of a manifest, which knows no names, ``a peft LORA ...``."""
    name, kind, format_name = (record.get(key) for key in ("name", "kind", "format"))
    files = ", ".join(show(each[:8], 8) for each in record["files"][:2])
    what = f"'{show(str(name), 100)}'" if name else f"a {show(str(format_name), 40)} {show(str(kind), 40)}"
    weight = "" if record["weight"] == 1 else f" with the weight {exact(record['weight'])}"
    return f"{what}{weight} (content {files})"


def prove_base(folder: OutputFolder, base_id: str) -> None:
    """Read back what was written.

    Raises:
        ProofError: it is not the base.
    """
    found = content_id(open_checkpoint(folder.staged))
    if found != base_id:
        raise ProofError(
            f"what came back has the content id {found[:16]}..., the base has {base_id[:16]}...",
            hint="the merged model, an adapter or the file that was kept has changed",
        )


class _Planner:
    """Makes the plan; the record it reads is not trusted, and errors of its structure are caught by `restoration`."""

    def __init__(self, merged: Checkpoint, adapters: Sequence[tuple[Adapter, float]], sidecar: Sidecar) -> None:
        self._merged, self._adapters, self._sidecar = merged, adapters, sidecar
        self._bound: Binding | None = bound_again(adapters, merged)
        self._restored: dict[int, Restore] = {}
        self._steps: dict[str, Compute] = {}

    def restoration(self) -> Restoration:
        """All of it."""
        facts = self._sidecar.facts
        files = tuple(self._file(entry) for entry in facts["files"])
        side_files = tuple(
            SideFile(str(entry["name"]), data=kept_file(entry, self._sidecar, self._merged.path))
            for entry in facts["side"]
        )
        inputs = [shard.file for component in self._merged.components.values() for shard in component.shards]
        inputs += list({file.identity: file for adapter, _ in self._adapters for file in adapter.files}.values())
        inputs.append(self._sidecar.file)
        about = {
            "base": str(facts["base"]),
            **unmerge_facts(self._adapters, self._merged),
            "base_rounding": fingerprint(self._sidecar.file),
        }
        plan = Plan(
            verb="unmerge",
            files=files,
            side_files=side_files,
            accounts=(),
            ignored=(),
            inputs=tuple(inputs),
            roots=(self._merged.path, *(adapter.path for adapter, _ in self._adapters)),
            id=hashlib.sha256(json.dumps([__version__, "unmerge", about], sort_keys=True).encode()).hexdigest(),
            facts=about,
        )
        return Restoration(plan, str(facts["base"]), self._restored)

    def _file(self, entry: Mapping[str, Any]) -> PlannedFile:
        name, component = str(entry["name"]), str(entry["component"])
        header = unpack_bytes(self._sidecar.segments(f"header/{name}").take(), int(entry["header"]))
        tensors = []
        for own, label, shape, offset, nbytes in entry["tensors"]:
            tensors.append(
                self._tensor(component, str(own), _by_label(label), tuple(map(int, shape)), int(offset), int(nbytes))
            )
        padding = tuple((int(offset), int(nbytes)) for offset, nbytes in entry.get("padding", ()))
        return PlannedFile(name, header, int(entry["nbytes"]), tuple(tensors), padding)

    def _tensor(
        self, component: str, name: str, dtype: DType, shape: tuple[int, ...], offset: int, nbytes: int
    ) -> PlannedTensor:
        step, weight, part = self._step(component, name, dtype, shape)
        outcome: TensorOutcome = "copied" if isinstance(step, Copy) else "restored"
        return PlannedTensor(name, component, weight, dtype, shape, step, outcome, offset, nbytes, "", part)

    def _step(self, component: str, name: str, dtype: DType, shape: tuple[int, ...]) -> tuple[Copy | Compute, str, int]:
        """The step of a tensor, its weight, and its position among the weight's."""
        label = label_of(component, name)
        how = self._sidecar.facts["tensors"].get(label)
        if how is None:
            source = self._stored(component, name, dtype, shape)
            return Copy(source, self._merged.components[component].owners[name]), name, 0
        if how[0] == "same":
            other = str(how[1]).removeprefix(f"{component}:") if component else str(how[1])
            step, weight, part = self._step(component, other, dtype, shape)
            if isinstance(step, Copy):
                return step, name, 0
            twin = Compute(step.source, step.operations, step.target)
            self._restored[id(twin)] = self._restored[id(step)]
            self._steps[f"{label}#same"] = twin  # kept, so that its id stays its own
            return twin, weight, part
        if how[0] == "original":
            return self._original(component, name, dtype, shape, bool(how[1])), name, 0
        owner = str(how[1])
        weight = owner.removeprefix(f"{component}:") if component else owner
        step = self._steps.get(owner) or self._weight(owner, component, weight, dtype, shape)
        parts = [part.name for part in step.target.parts(weight)]
        return step, weight, parts.index(name)

    def _stored(self, component: str, name: str, dtype: DType, shape: tuple[int, ...]) -> StoredTensor:
        """The tensor of the merged model that is the base's."""
        network = self._merged.components.get(component)
        tensor = network.tensors.get(name) if network is not None else None
        if tensor is None or (tensor.dtype, tensor.shape) != (dtype, shape) or tensor.strides is not None:
            raise FitError(_OTHER, file=self._merged.path, tensor=name)
        return tensor

    def _original(self, component: str, name: str, dtype: DType, shape: tuple[int, ...], differs: bool) -> Compute:
        label = label_of(component, name)
        segments = self._sidecar.segments(f"tensor/{label}")
        kept = self._sidecar.parts[f"tensor/{label}"]
        now = self._stored(component, name, dtype, shape) if differs else None
        target = Elements(shape, matrix_of(shape), dtype)
        nbytes, width = target.parts(name)[0].nbytes, max(dtype.bits // 8, 1)
        step = self._steps[label] = Compute(Plain.of(kept), (), target)

        def restore(write: Write, stop: Callable[[], bool]) -> tuple[Measurement, ...]:
            digest, at = xxhash.xxh3_128(), 0
            while at < nbytes and not stop():
                piece = unpack_original(segments.take(), at, nbytes, width, now)
                digest.update(piece)
                write(0, at, memoryview(piece))
                at += len(piece)
            return (Measurement(digest.hexdigest(), True),)

        self._restored[id(step)] = restore
        return step

    def _weight(self, label: str, component: str, weight: str, dtype: DType, shape: tuple[int, ...]) -> Compute:
        record = self._sidecar.facts["weights"][label]
        network = self._merged.components.get(component)
        if network is None or weight not in network.parameters:
            raise FitError(_OTHER, file=self._merged.path, tensor=weight)
        after = network.parameters[weight].storage
        operations = operations_on(self._bound, component, weight)
        if len(operations) != record["undone"]:
            raise FitError(_OTHER, file=self._merged.path, tensor=weight)
        coded = record["mode"] == "codes"
        if coded and not is_quantised(after):
            raise FitError(_OTHER, file=self._merged.path, tensor=weight)
        target = after if coded else Elements(shape, after.shape, dtype)
        step = self._steps[label] = Compute(after, operations, target)
        if int(record["height"]) < 1:
            raise ValueError("no rows")
        weighed = _Weighed(self._sidecar, label, after, operations, int(record["height"]), str(record["xxh3"]))
        if coded:
            self._restored[id(step)] = weighed.codes
        else:
            self._restored[id(step)] = lambda write, stop: weighed.values(dtype, write, stop)
        return step


def _by_label(label: str) -> DType:
    return {dtype.label: dtype for dtype in DType}[label]


@dataclass(frozen=True, slots=True)
class _Weighed:
    """One weight that is computed back."""

    sidecar: Sidecar
    label: str
    after: Storage
    operations: tuple[Operation, ...]
    height: int
    xxh3: str

    def values(self, dtype: DType, write: Write, stop: Callable[[], bool]) -> tuple[Measurement, ...]:
        """The elements before the merge."""
        segments = self.sidecar.segments(f"weight/{self.label}")
        chain = self._chain(segments, "<f8" if dtype in (DType.F32, DType.F64) else "<f4")
        seen, digest, at = xxhash.xxh3_128(), xxhash.xxh3_128(), 0
        types = (dtype, self.after.dtype)
        for _, _, values, estimate, _ in estimates(self.after, chain, self.height):
            if stop():
                break
            seen.update(as_bytes(values))
            bits = decode(segments.take(), estimate.reshape(-1), _bits(values), types)
            data = as_bytes(bits)
            digest.update(data)
            write(0, at, data)
            at += len(data)
        self._check(seen.hexdigest(), stop)
        return (Measurement(digest.hexdigest(), True),)

    def codes(self, write: Write, stop: Callable[[], bool]) -> tuple[Measurement, ...]:
        """The stored tensors before the merge."""
        if not is_quantised(self.after):
            raise MalformedError("a weight is not quantised")
        segments = self.sidecar.segments(f"weight/{self.label}")
        chain = self._chain(segments, lost_dtype(self.after))
        seen, digests = xxhash.xxh3_128(), [xxhash.xxh3_128() for _ in self.after.sources]
        for start, _, values, estimate, _ in estimates(self.after, chain, self.height):
            if stop():
                break
            seen.update(as_bytes(values))
            for part, at, data in decode_codes(segments.take(), self.after, start, estimate):
                digests[part].update(data)
                write(part, at, memoryview(data))
        self._check(seen.hexdigest(), stop)
        return tuple(Measurement(digest.hexdigest(), True) for digest in digests)

    def _chain(self, segments: Segments, exact: str) -> Chain:
        import numpy

        vectors = [segments.take() for _ in self.operations]
        lost = [numpy.frombuffer(vector, exact).astype(numpy.float64) if vector else None for vector in vectors]
        return inverted(self.operations, self.after, self.height, lost)

    def _check(self, seen: str, stop: Callable[[], bool]) -> None:
        if seen != self.xxh3 and not stop():
            raise MalformedError("the merged values are others")


def _bits(values: Array) -> Array:
    return values.reshape(-1).view(LINE(dtype_of(values)).unsigned)
