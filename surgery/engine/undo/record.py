# SPDX-License-Identifier: Apache-2.0
"""``merge --reversible``: after the merged model is written, and before it appears, keep what it lost of its base.

This pass reads the merged model as `unmerge` will: opened from disk, with the adapters bound to it. What it cannot find
again that way is kept whole, so that the base comes back whatever the adapters did.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import xxhash

from surgery._version import __version__
from surgery.engine.blocks import block_height
from surgery.engine.execute import Run, default_workers
from surgery.engine.plan import Compute, Copy, Plan, PlannedTensor
from surgery.engine.undo.base_files import remember_shards, remember_side_files
from surgery.engine.undo.codes import encode_codes, stored_parts
from surgery.engine.undo.inverse import estimates, inverted, lost_by
from surgery.engine.undo.originals import comparable, original_bytes, pack_original
from surgery.engine.undo.residue import LINE, MARGIN, decode, encode
from surgery.engine.undo.sidecar import SidecarWriter
from surgery_formats.arrays import Array, dtype_of, empty
from surgery_formats.binding.bind import Binding, bind
from surgery_formats.binding.operation import Operation
from surgery_formats.dtypes import DType
from surgery_formats.errors import FitError, ProofError
from surgery_formats.files.output.folder import OutputFolder
from surgery_formats.models.checkpoint import Checkpoint, open_checkpoint
from surgery_formats.models.identity import content_id, fingerprint, shard_fingerprints
from surgery_formats.models.side_files import BASE_ROUNDING
from surgery_formats.storage.base import Storage
from surgery_formats.storage.quantised import Quantised, is_quantised
from surgery_formats.tensors.tensor import StoredTensor, as_bytes
from surgery_formats.text import without_local_paths
from surgery_formats.threads import one_thread

__all__ = [
    "adapters_of",
    "bound_again",
    "label_of",
    "lost_dtype",
    "operations_on",
    "record_base",
    "undone_height",
    "unmerge_facts",
]

Bound = Sequence[tuple[Any, float]]


def record_base(binding: Binding, plan: Plan, folder: OutputFolder, run: Run) -> int:
    """Write `BASE_ROUNDING` into the staged output; returns its size.

    Raises:
        ProofError: what was kept does not give the base back.
    """
    base, merged = binding.checkpoint, open_checkpoint(folder.staged)
    bound = bound_again(binding.adapters, merged)
    writer = SidecarWriter(folder)
    try:
        todo = _sorted_out(base, plan)
        stop = threading.Event()
        with one_thread(), ThreadPoolExecutor(run.workers or default_workers(), "surgery-record") as pool:
            digests = {
                id(t): pool.submit(_digest, t, stop) for c in base.components.values() for t in c.tensors.values()
            }
            weights = {
                label_of(component, name): pool.submit(
                    _Recorder(base, merged, bound, writer, stop).weight, component, name, tensors
                )
                for (component, name), tensors in todo.weights.items()
            }
            try:
                base_id = content_id(base, lambda tensor: digests[id(tensor)].result())
                records = {label: future.result() for label, future in weights.items()}
            except BaseException:
                stop.set()
                pool.shutdown(cancel_futures=True)
                raise
        tensors: dict[str, list[Any]] = {}
        for (component, name), stored in todo.weights.items():
            label = label_of(component, name)
            for tensor in stored:
                own = label_of(component, tensor.name)
                tensors[own] = (
                    ["original", records[label]["against"][tensor.name]]
                    if "against" in records[label]
                    else ["weight", label]
                )
        tensors |= {own: ["same", other] for own, other in todo.same.items()}
        facts = {
            "made_by": f"surgery {__version__}",
            "base": base_id,
            "adapters": adapters_of(binding.adapters),
            "files": remember_shards(base, writer),
            "side": remember_side_files(base, folder.staged, writer),
            "weights": {label: record for label, record in records.items() if "against" not in record},
            "tensors": tensors,
        }
        return writer.finish(folder, BASE_ROUNDING, facts)
    finally:
        writer.close()


def label_of(component: str, name: str) -> str:
    """``component:name``, as the manifest calls it."""
    return f"{component}:{name}" if component else name


def adapters_of(adapters: Bound) -> list[dict[str, Any]]:
    """What identifies the adapters of a merge: their files by content, their weights, and a name for messages."""
    return [
        {
            "name": adapter.path.name,
            "weight": weight,
            "files": sorted({fingerprint(file) for file in adapter.files}),
        }
        for adapter, weight in adapters
    ]


def unmerge_facts(adapters: Bound, merged: Checkpoint) -> dict[str, Any]:
    """What identifies the inputs of an unmerge: scales and switches of the adapters stand in their configurations."""
    return {
        "adapters": [
            {**told, "config": without_local_paths(adapter.config)}
            for told, (adapter, _) in zip(adapters_of(adapters), adapters, strict=True)
        ],
        "merged": shard_fingerprints(merged),
        "configs": {name: without_local_paths(component.config) for name, component in merged.components.items()},
    }


def bound_again(adapters: Bound, merged: Checkpoint) -> Binding | None:
    """The adapters bound to what they were merged into; None where they no longer fit."""
    try:
        return bind(adapters, merged)
    except FitError:
        return None


def operations_on(bound: Binding | None, component: str, name: str) -> tuple[Operation, ...]:
    """The operations on a weight of the merged model, as far as they did not replace it."""
    edit = bound.edits.get((component, name)) if bound is not None else None
    return edit.operations if edit is not None and edit.replaced is None and not edit.added else ()


def undone_height(before: Storage, operations: tuple[Operation, ...]) -> int:
    """Rows of a block, both when it is recorded and when it is restored."""
    return block_height(before.shape[1], Compute(before, operations, before))


@dataclass(frozen=True, slots=True)
class _Sorted:
    """What of a base is not in its merge as it was.

    Attributes:
        weights: Stored tensors to restore, by component and weight.
        same: Tensors that are another name of one, which is copied or restored itself.
    """

    weights: dict[tuple[str, str], list[StoredTensor]]
    same: dict[str, str]


def _sorted_out(base: Checkpoint, plan: Plan) -> _Sorted:
    outputs = {(tensor.component, tensor.name): tensor for tensor in plan.tensors}
    found = _Sorted({}, {})
    for component in base.components.values():
        places: dict[tuple[int, ...], str] = {}
        for tensor in component.tensors.values():
            if _is_copied(tensor, outputs.get((component.name, tensor.name))):
                places.setdefault(tensor.place, tensor.name)
        for tensor in component.tensors.values():
            if _is_copied(tensor, outputs.get((component.name, tensor.name))):
                continue
            twin = places.get(tensor.place) if tensor.nbytes else None
            if twin is not None and _alike(tensor, component.tensors[twin]):
                found.same[label_of(component.name, tensor.name)] = label_of(component.name, twin)
                continue
            places.setdefault(tensor.place, tensor.name)
            owner = component.owners[tensor.name]
            found.weights.setdefault((component.name, owner.name), []).append(tensor)
    return found


def _is_copied(tensor: StoredTensor, output: PlannedTensor | None) -> bool:
    return output is not None and isinstance(output.step, Copy) and output.step.source.place == tensor.place


def _alike(tensor: StoredTensor, other: StoredTensor) -> bool:
    return (tensor.dtype, tensor.shape, tensor.strides) == (other.dtype, other.shape, other.strides)


def _digest(tensor: StoredTensor, stop: threading.Event) -> str:
    """xxh3-128 of the bytes in C order."""
    state = xxhash.xxh3_128()
    for piece in original_bytes(tensor):
        if stop.is_set():
            break
        state.update(piece)
    return state.hexdigest()


@dataclass(frozen=True, slots=True)
class _Recorder:
    """Records weights, each in one thread."""

    base: Checkpoint
    merged: Checkpoint
    bound: Binding | None
    writer: SidecarWriter
    stop: threading.Event

    def weight(self, component: str, name: str, tensors: list[StoredTensor]) -> dict[str, Any]:
        """How a weight comes back; its segments are with the writer."""
        before = self.base.components[component].parameters[name].storage
        there = self.merged.components[component].parameters
        after = there[name].storage if name in there else None
        operations = operations_on(self.bound, component, name)
        key = f"weight/{label_of(component, name)}"
        whole = len(tensors) == len(before.sources)
        if after is not None and whole and (after.shape, after.sizes) == (before.shape, before.sizes):
            if _has_line(before) and _has_line(after):
                return self._values(key, before, after, operations)
            if type(after) is type(before) and is_quantised(before) and is_quantised(after):
                if (record := self._codes(key, before, after, operations)) is not None:
                    return record
                self.writer.drop(key)
        return self._originals(component, tensors)

    def _values(self, key: str, before: Storage, after: Storage, operations: tuple[Operation, ...]) -> dict[str, Any]:
        height = undone_height(before, operations)
        chain = inverted(operations, after, height, self._lost(key, operations, before, height))
        types, digest = (before.dtype, after.dtype), xxhash.xxh3_128()
        stored = empty((min(height, before.shape[0]), before.shape[1]), before.dtype)
        for start, stop, values, estimate, largest in estimates(after, chain, height):
            if self.stop.is_set():
                break
            digest.update(as_bytes(values))
            block = stored[: stop - start]
            before.read_into(block, start)
            bits, now = _bits(block), _bits(values)
            data = encode(bits, estimate.reshape(-1), now, types, MARGIN * largest if chain else 0.0)
            if not bool((decode(data, estimate.reshape(-1), now, types) == bits).all()):
                raise ProofError("what was kept of the base does not give it back", tensor=before.name)
            self.writer.add(key, data)
        return {"mode": "values", "height": height, "undone": len(operations), "xxh3": digest.hexdigest()}

    def _codes(
        self, key: str, before: Quantised, after: Quantised, operations: tuple[Operation, ...]
    ) -> dict[str, Any] | None:
        if before.parts(before.name) != after.parts(before.name):
            return None
        height = undone_height(before, operations)
        chain = inverted(operations, after, height, self._lost(key, operations, before, height))
        digest, own = xxhash.xxh3_128(), [xxhash.xxh3_128() for _ in before.sources]
        for start, stop, values, estimate, largest in estimates(after, chain, height):
            if self.stop.is_set():
                break
            digest.update(as_bytes(values))
            parts = stored_parts(before, start, stop)
            data = encode_codes(parts, after, start, estimate, MARGIN * largest if chain else 0.0)
            if data is None:
                return None
            for part, _, raw in parts:
                own[part].update(raw)
            self.writer.add(key, data)
        if [state.hexdigest() for state in own] != [_digest(source, self.stop) for source in before.sources]:
            return None  # the file holds bytes that its codec would not write
        return {"mode": "codes", "height": height, "undone": len(operations), "xxh3": digest.hexdigest()}

    def _lost(
        self, key: str, operations: tuple[Operation, ...], before: Storage, height: int
    ) -> tuple[Array | None, ...]:
        """What the inverse needs to know of the base, as it is kept: in float32, unless the base is as fine."""
        exact = lost_dtype(before)
        vectors = [None if v is None else v.astype(exact) for v in lost_by(operations, before, height)]
        for vector in vectors:
            self.writer.add(key, b"" if vector is None else vector.tobytes())
        return tuple(None if vector is None else vector.astype("<f8") for vector in vectors)

    def _originals(self, component: str, tensors: list[StoredTensor]) -> dict[str, Any]:
        against = {}
        for tensor in tensors:
            now = comparable(tensor, self.merged.components[component].tensors.get(tensor.name))
            against[tensor.name] = now is not None
            key = f"tensor/{label_of(component, tensor.name)}"
            self.writer.begin(key)
            for piece in pack_original(tensor, now):
                if self.stop.is_set():
                    break
                self.writer.add(key, piece)
        return {"against": against}


def lost_dtype(before: Storage) -> str:
    """Numpy's name of the type in which lengths are kept."""
    return "<f8" if before.dtype in (DType.F32, DType.F64) and not is_quantised(before) else "<f4"


def _has_line(storage: Storage) -> bool:
    return storage.elements is not None and storage.is_float


def _bits(values: Array) -> Array:
    return values.reshape(-1).view(LINE(dtype_of(values)).unsigned)
