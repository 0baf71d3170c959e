# SPDX-License-Identifier: Apache-2.0
"""The arithmetic of one computed tensor: block by block, in float32, rounded once (law 8)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import xxhash

from surgery.engine.ledger import Measurement
from surgery.engine.plan import Compute, PlannedTensor
from surgery_formats.binding.edits import Operation
from surgery_formats.dtypes import DType
from surgery_formats.errors import FitError
from surgery_formats.linalg.noise import measure_survival
from surgery_formats.linalg.survival import Survival
from surgery_formats.storage.plain import Plain
from surgery_formats.tensors.apply import Apply, apply_chain
from surgery_formats.tensors.tensor import as_bytes
from surgery_formats.tensors.views import View
from surgery_formats.updates import Mixing, blend
from surgery_formats.updates.weights import WeightView

__all__ = ["BLOCK_ELEMENTS", "block_bytes", "compute"]

BLOCK_ELEMENTS = 1 << 19
"""Elements per block: 2 MB of float32, which stays in a core's cache between the steps. Fixed, so that results depend on nothing else."""
_SAMPLE = 8  # one row of eight is measured; all rows of a tensor of one block

Write = Callable[[int, memoryview], None]
"""``write(offset within the tensor, bytes)``; it also proves that the bytes arrived."""


def block_bytes(tensor: PlannedTensor) -> int:
    """Upper bound of the memory `compute` takes for a tensor, factors included."""
    assert isinstance(tensor.step, Compute)
    width = math.prod(tensor.shape[1:]) if len(tensor.shape) > 1 else 1
    block = _height(width, tensor.step.operations) * width * 8
    used = {t for operation in tensor.step.operations for t in operation.update.tensors}
    factors = sum(t.numel * 8 for t in used)
    mixing = [operation.update for operation in tensor.step.operations if isinstance(operation.update, Mixing)]
    return 5 * block + factors + sum(update.shape[1] * update.group * 8 * 5 for update in mixing)


def compute(tensor: PlannedTensor, write: Write, stop: Callable[[], bool], device: str = "cpu") -> Measurement:
    """Compute one tensor and hand its bytes to `write` in order.

    Args:
        tensor: Its step is a `Compute`.
        write: Takes each block of bytes.
        stop: Asked before each block; work ends early when it says yes.
        device: Where the arithmetic runs.

    Raises:
        FitError: a value is NaN or Inf, in the base or after the update.
        ProofError: from `write`.
    """
    step = tensor.step
    assert isinstance(step, Compute)
    storage = Plain.of(step.source, stacked=step.stacked)
    exact = torch.float64 if DType.F64 in (step.source.dtype, tensor.dtype) else torch.float32
    height = _height(storage.shape[1], step.operations)
    chain: list[tuple[View, Apply]] = []
    for operation in step.operations:
        seen = WeightView(storage, tuple(chain), operation.view, exact, device, height)
        apply = operation.update.prepare(seen)
        chain.append((operation.view, apply if operation.share == 1.0 else blend(apply, operation.share)))
    if not chain and tensor.dtype is step.source.dtype and not step.source.dtype.is_float:
        return _as_stored(storage, write)  # strided integers of a pickle: no arithmetic touches them
    tally = _UpdateTally()
    scratch = _BlockBuffers(storage, height, tensor.dtype, exact, device)
    sampled = _SAMPLE if storage.shape[0] > scratch.height else 1
    hasher = xxhash.xxh3_128()
    for start in range(0, storage.shape[0], scratch.height):
        if stop():
            break
        end = min(start + scratch.height, storage.shape[0])
        stored, block = scratch.load(start, end)
        before = block[::sampled].clone() if chain else None
        apply_chain(chain, block, start, end)
        rounded = scratch.round(block)
        _check_finite(block, tensor)
        tally.note_change(stored, rounded)
        if before is not None:
            tally.note_update(before, block[::sampled], rounded[::sampled])
        raw = as_bytes(rounded)
        hasher.update(raw)
        write(start * storage.shape[1] * tensor.dtype.bits // 8, raw)
    return tally.result(hasher.hexdigest())


def _height(width: int, operations: Sequence[Operation]) -> int:
    """Storage rows per block: a multiple of the groups of columns that are mixed, where columns are what storage holds as rows."""
    height = max(1, BLOCK_ELEMENTS // max(width, 1))
    mixed = [operation for operation in operations if operation.view.transposed]
    group = math.lcm(*(one.update.group for one in mixed if isinstance(one.update, Mixing)))
    return -(-height // group) * group


def _as_stored(storage: Plain, write: Write) -> Measurement:
    """The stored values, only put in order."""
    raw = as_bytes(storage.tensor.read().contiguous())
    write(0, raw)
    return Measurement(xxhash.xxh3_128_hexdigest(raw), changed=False)


class _BlockBuffers:
    """The buffers of one tensor's blocks, used again for each: fresh memory would cost more than the arithmetic."""

    def __init__(self, storage: Plain, height: int, dtype: DType, exact: torch.dtype, device: str) -> None:
        rows, width = storage.shape
        self.height = height
        self._storage = storage
        shape = (min(self.height, rows), width)
        self._stored = torch.empty(shape, dtype=storage.tensor.dtype.torch)
        self._block = torch.empty(shape, dtype=exact, device=device)
        self._rounded = torch.empty(shape, dtype=dtype.torch)

    def load(self, start: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows ``[start, end)`` as stored, and in the precision of the arithmetic."""
        stored = self._stored[: end - start]
        self._storage.read_into(stored, start)
        return stored, self._block[: end - start].copy_(stored)

    def round(self, block: torch.Tensor) -> torch.Tensor:
        """`block` in the output's type, on the CPU."""
        return self._rounded[: len(block)].copy_(block)


def _check_finite(block: torch.Tensor, tensor: PlannedTensor) -> None:
    """Refuse NaN, Inf, and finite values that the stored type would turn into Inf.

    Raises:
        FitError: one of them.
    """
    if not block.numel():
        return
    extremes = torch.stack(torch.aminmax(block))  # one pass; NaN if any value is
    if bool(torch.isfinite(extremes.to(tensor.dtype.torch).double()).all()):
        return
    largest = float(extremes.abs().max())
    if math.isfinite(largest):
        raise FitError(
            f"after the update a value of {largest:.3g} does not fit {tensor.dtype.label}",
            tensor=tensor.label,
            hint="use --dtype bf16 or fp32",
        )
    raise FitError(
        f"after the update a value is {largest}", tensor=tensor.label, hint="is the base, or the adapter, damaged?"
    )


class _UpdateTally:
    """Sums over the sampled rows (what they mean: `surgery.engine.ledger.Measurement`)."""

    def __init__(self) -> None:
        self.changed = False
        self.sampled = self.moved = 0
        self.kept = Survival()

    def note_change(self, stored: torch.Tensor, rounded: torch.Tensor) -> None:
        """Whether the values of a block on disk differ from those that will be stored; another type alone is no difference."""
        if not self.changed:
            same = stored.dtype == rounded.dtype
            self.changed = not torch.equal(stored if same else stored.double(), rounded if same else rounded.double())

    def note_update(self, before: torch.Tensor, after: torch.Tensor, rounded: torch.Tensor) -> None:
        """Sampled rows before and after the updates, and as they will be stored. `before` is used up."""
        stored = rounded.to(before.device, before.dtype).sub(before)
        self.sampled += stored.numel()
        self.moved += int(torch.count_nonzero(stored))
        self.kept = Survival.total((self.kept, measure_survival(after.sub(before), stored)))

    def result(self, xxh3: str) -> Measurement:
        """The sums so far."""
        return Measurement(xxh3, self.changed, self.sampled, self.moved, *self.kept)
