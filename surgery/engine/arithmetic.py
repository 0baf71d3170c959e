# SPDX-License-Identifier: Apache-2.0
"""The arithmetic of one computed weight: block by block, in float32, rounded once (law 8)."""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field

import numpy
import xxhash

from surgery.engine.blocks import block_height
from surgery.engine.ledger import CodeChange, CodeError, Measurement
from surgery.engine.plan import Compute
from surgery.engine.quantised.requantise import WeightRequantiser
from surgery_formats.arrays import Array, assign, cast, dtype_of, empty, energy, namespace, to_cpu
from surgery_formats.binding.edits import prepared
from surgery_formats.dtypes import DType
from surgery_formats.errors import FitError
from surgery_formats.linalg.survival import Survival
from surgery_formats.storage.aligned import release
from surgery_formats.storage.base import PartBytes, Storage, read_block
from surgery_formats.storage.float8_codes import is_of_graphs
from surgery_formats.tensors.apply import Apply, apply_chain
from surgery_formats.tensors.views import View

__all__ = ["check_finite", "compute"]

_SAMPLE = 8  # one row of eight is measured; all rows of a tensor of one block

_AHEAD = 8
"""Blocks of one weight that are computed while earlier ones are written."""

_LARGEST = {DType.F64: 1e154, DType.F32: 3e38, DType.BF16: 3e38, DType.F16: 65504.0}
"""Values up to these fit the type."""

Write = Callable[[int, int, memoryview], None]
"""``write(part, offset within the part, bytes)``; it also proves that the bytes arrived."""


@numpy.errstate(divide="ignore", over="ignore", invalid="ignore")  # what is not finite is refused by name
def compute(
    label: str,
    step: Compute,
    write: Write,
    stop: Callable[[], bool],
    device: str = "cpu",
    values: Array | None = None,
    seen: Callable[[int, Array], None] | None = None,
    blocks: Executor | None = None,
) -> tuple[Measurement, ...]:
    """Compute one weight and hand the bytes of each of its stored tensors to `write` in order.

    Args:
        label: Name of the weight, for messages.
        step: What to compute.
        write: Takes each block of bytes.
        stop: Asked before each block; work ends early when it says yes.
        device: Where the arithmetic runs.
        values: Filled with the values that a reader will get, if given: ``(rows, cols)`` of the target's type.
        seen: Called with the first row of each block of numbers, and its values as they are stored; a weight that keeps
            its quantised format is not seen.
        blocks: Computes several blocks at a time, if given, where every row is on its own. What is measured is the same.

    Returns:
        What was measured of each stored tensor, in the order of `Encoding.parts`; what concerns the values is with the
        first.

    Raises:
        FitError: a value is NaN or Inf, in the base or after the update.
        ProofError: from `write`.
    """
    source, target = step.source, step.target
    output = _PartWriter(len(target.parts(label)), write)
    if not source.is_float:
        return _as_stored(step, output, values)  # strided integers of a pickle: no arithmetic touches them
    exact = DType.F64 if DType.F64 in (source.dtype, target.dtype) else DType.F32
    height = block_height(source.shape[1], step)
    chain = prepared(step.operations, source, exact, height, device)
    tally = _UpdateTally()
    if step.requantise is not None:
        return _requantised(label, step, chain, output, stop, device, values)
    buffers = _BlockBuffers(source, height, target.dtype, exact, device)
    work = _BlockWork(label, step, chain, height, buffers)
    alone = source.group == target.group == 1 and not getattr(source, "held_nbytes", 0)
    together = blocks if alone and device == "cpu" and values is None and seen is None else None
    for block in work.in_order(stop, together):
        if seen is not None:
            seen(block.start, block.stored)
        tally.add(block.tally)
        if values is not None:
            values[block.start : block.start + len(block.rounded)] = block.rounded
        output.write(block.encoded)
    release()  # a matrix that was turned
    return output.measured(tally)


@dataclass(frozen=True, slots=True)
class _ComputedBlock:
    """Rows of a weight: as stored before, as they will be read, and the bytes of them."""

    start: int
    stored: Array
    rounded: Array
    encoded: tuple[PartBytes, ...]
    tally: _UpdateTally


@dataclass(frozen=True, slots=True)
class _BlockWork:
    """The arithmetic of the blocks of one weight."""

    label: str
    step: Compute
    chain: list[tuple[View, Apply]]
    height: int
    buffers: _BlockBuffers
    _of_threads: threading.local = field(default_factory=threading.local)

    def in_order(self, stop: Callable[[], bool], together: Executor | None) -> Iterator[_ComputedBlock]:
        """Every block, until it is time to stop; `together` computes some while earlier ones are used."""
        starts = range(0, self.step.source.shape[0], self.height)
        if together is None:
            for start in starts:
                if stop():
                    return
                yield self.compute(start, self.buffers)
            return
        ahead: deque[Future[_ComputedBlock]] = deque()
        try:
            for start in starts:
                if stop():
                    return
                ahead.append(together.submit(self._apart, start))
                if len(ahead) > _AHEAD:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            for future in ahead:
                future.cancel()

    def compute(self, start: int, buffers: _BlockBuffers) -> _ComputedBlock:
        """The block that begins with the row `start`; it is good until the next one in these buffers."""
        source, target, tally = self.step.source, self.step.target, _UpdateTally()
        rows = source.shape[0]
        end, sampled = min(start + self.height, rows), _SAMPLE if rows > self.height else 1
        stored, block, rounded = buffers.load(start, end)
        before = namespace(block).asarray(block[::sampled], copy=True) if self.chain else None
        apply_chain(self.chain, block, start, end)
        check_finite(block, target.dtype, self.label)
        encoded = target.put(start, block, rounded)
        tally.note_change(stored, rounded)
        if is_of_graphs(target):
            tally.note_codes(block, rounded)
        if before is not None:
            tally.note_update(before, block[::sampled], rounded[::sampled])
        return _ComputedBlock(start, stored, rounded, encoded, tally)

    @numpy.errstate(divide="ignore", over="ignore", invalid="ignore")
    def _apart(self, start: int) -> _ComputedBlock:
        """As `compute`, in buffers of this thread but for what is handed on."""
        kept = self._of_threads.__dict__
        if "buffers" not in kept:
            kept["buffers"] = self.buffers.like()
        return self.compute(start, kept["buffers"].with_new_output())


class _PartWriter:
    """Hashes the bytes of every part of a weight on their way to the output."""

    def __init__(self, parts: int, write: Write) -> None:
        self._hashers = [xxhash.xxh3_128() for _ in range(parts)]
        self._write = write

    def write(self, encoded: tuple[PartBytes, ...]) -> None:
        """The bytes of one block."""
        for chunk in encoded:
            self._hashers[chunk.part].update(chunk.data)
            self._write(chunk.part, chunk.offset, chunk.data)

    def measured(self, tally: _UpdateTally, codes: CodeChange | None = None) -> tuple[Measurement, ...]:
        """One measurement per part: the sums with the first, so that a weight counts once."""
        first, *rest = (hasher.hexdigest() for hasher in self._hashers)
        return (tally.result(first, codes), *(Measurement(xxh3, tally.changed) for xxh3 in rest))


def _requantised(
    label: str,
    step: Compute,
    chain: list[tuple[View, Apply]],
    output: _PartWriter,
    stop: Callable[[], bool],
    device: str,
    values: Array | None,
) -> tuple[Measurement, ...]:
    """A weight that keeps its quantised format."""
    tally = _UpdateTally()
    weight = WeightRequantiser(step, chain, device)
    for done in weight.blocks(lambda block: check_finite(block, step.target.dtype, label)):
        if stop():
            break
        tally.note_change(done.stored, done.rounded)
        if chain:
            sampled = slice(None, None, weight.sampled)
            tally.note_update(done.stored[sampled], done.wanted[sampled], done.rounded[sampled])
        if values is not None:
            values[done.start : done.start + len(done.rounded)] = done.rounded
        output.write(done.encoded)
    release()
    return output.measured(tally, weight.account())


def _as_stored(step: Compute, output: _PartWriter, values: Array | None) -> tuple[Measurement, ...]:
    """The stored values, only put in order."""
    stored = read_block(step.source, 0, step.source.shape[0])
    output.write(step.target.put(0, stored, empty(stored.shape, dtype_of(stored))))
    if values is not None:
        values[...] = stored
    return output.measured(_UpdateTally())


class _BlockBuffers:
    """The buffers of one tensor's blocks, used again for each: fresh memory would cost more than the arithmetic."""

    def __init__(self, storage: Storage, height: int, dtype: DType, exact: DType, device: str) -> None:
        self._of = storage, height, dtype, exact, device
        rows, width = storage.shape
        shape = (min(height, rows), width)
        self._storage = storage
        self._stored = empty(shape, storage.dtype)
        self._block = empty(shape, exact, device)
        self._rounded = empty(shape, dtype)

    def like(self) -> _BlockBuffers:
        """Others for the same blocks."""
        return _BlockBuffers(*self._of)

    def with_new_output(self) -> _BlockBuffers:
        """These, but the output has memory of its own from now on."""
        self._rounded = empty(self._rounded.shape, self._of[2])
        return self

    def load(self, start: int, end: int) -> tuple[Array, Array, Array]:
        """Rows ``[start, end)``: as stored, in the precision of the arithmetic, and a CPU buffer for the output."""
        count = end - start
        stored = self._stored[:count]
        self._storage.read_into(stored, start)
        block = self._block[:count]
        assign(block, stored)
        return stored, block, self._rounded[:count]


def check_finite(block: Array, dtype: DType, label: str) -> None:
    """Refuse NaN, Inf, and finite values that the stored type would turn into Inf.

    Raises:
        FitError: one of them.
    """
    if energy(block) < _LARGEST.get(dtype, 0.0) ** 2 or not len(block):
        return
    xp = namespace(block)
    extremes = xp.stack([xp.min(block), xp.max(block)])  # NaN if any value is
    if bool(xp.isfinite(cast(cast(extremes, dtype), DType.F64)).all()):
        return
    largest = float(xp.max(abs(extremes)))
    if math.isfinite(largest):
        raise FitError(
            f"after the update a value of {largest:.3g} does not fit {dtype.label}",
            tensor=label,
            hint='use `dtype="bf16"` or fp32; a graph has to be exported in one of these',
        )
    raise FitError(f"after the update a value is {largest}", tensor=label, hint="is the base, or the adapter, damaged?")


class _UpdateTally:
    """Sums over the sampled rows (what they mean: `surgery.engine.ledger.Measurement`)."""

    def __init__(self) -> None:
        self.changed = False
        self.sampled = self.moved = 0
        self.kept = Survival()
        self.coded: CodeError | None = None

    def add(self, later: _UpdateTally) -> None:
        """What was noted of a later block."""
        self.changed |= later.changed
        self.sampled += later.sampled
        self.moved += later.moved
        self.kept = self.kept.plus(later.kept)
        if later.coded is not None:
            self.coded = later.coded if self.coded is None else self.coded + later.coded

    def note_codes(self, wanted: Array, rounded: Array) -> None:
        """Values of a block, and the numbers that its codes stand for."""
        difference = rounded - to_cpu(wanted)
        found = CodeError(energy(wanted), energy(difference), float(abs(difference).max(initial=0.0)))
        self.coded = found if self.coded is None else self.coded + found

    def note_change(self, stored: Array, rounded: Array) -> None:
        """Whether the values of a block on disk differ from those that will be stored.

        Another type alone is no difference.
        """
        if not self.changed:
            same = stored.dtype == rounded.dtype
            old, new = (stored, rounded) if same else (cast(stored, DType.F64), cast(rounded, DType.F64))
            self.changed = bool((old[:1] != new[:1]).any() or (old != new).any())  # one row tells mostly

    def note_update(self, before: Array, after: Array, rounded: Array) -> None:
        """Sampled rows before and after the updates, and as they will be stored."""
        stored = namespace(before).empty_like(before)
        assign(stored, rounded)
        stored -= before
        self.sampled += math.prod(stored.shape)
        self.moved += int(namespace(stored).count_nonzero(stored != 0))
        self.kept = self.kept.plus(Survival.of(after - before, stored))

    def result(self, xxh3: str, codes: CodeChange | None = None) -> Measurement:
        """The sums so far."""
        return Measurement(xxh3, self.changed, self.sampled, self.moved, *self.kept, codes, self.coded)
