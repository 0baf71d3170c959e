# SPDX-License-Identifier: Apache-2.0
"""What an operation will do, as data: every output tensor with its source, its step and its outcome.

``--dry-run`` prints a plan, the executor runs it, the ledger is the plan plus what was measured, so the three cannot
drift apart.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from surgery.engine.sharing import shared_out
from surgery_formats.dtypes import DType
from surgery_formats.errors import FitError
from surgery_formats.files.raw import File
from surgery_formats.tensors.tensor import StoredTensor, Tensor, origin
from surgery_formats.text import listing

if TYPE_CHECKING:
    from surgery_formats.binding.bind import Binding
    from surgery_formats.binding.operation import Operation
    from surgery_formats.canonical.adapter import Ignored
    from surgery_formats.storage.base import Encoding, Storage

__all__ = [
    "SEVERAL",
    "SHARE_FILE",
    "SHARE_MAGIC",
    "Account",
    "Compute",
    "Copy",
    "Plan",
    "PlannedFile",
    "PlannedTensor",
    "Requantise",
    "SideFile",
    "TensorOutcome",
    "check_conservation",
    "is_coded",
]

SHARE_FILE, SHARE_MAGIC = "weights", b"surgery share 1\n"  # the one file of a share, and its first bytes

SEVERAL = 4
"""Weight files from which on a share is some of them: of fewer, a file for each worker would leave most workers without one."""

TensorOutcome = Literal[
    "copied",
    "cast",
    "updated",
    "replaced",
    "added",
    "source",
    "alias",
    "derivable",
    "superseded",
    "referenced",
    "restored",
    "moved",
    "quantised",
    "dropped",
    "between",
]
"""What became of a tensor (law 1). Output tensors are copied, moved (copied from ranges of others), cast, quantised, updated, replaced,
added or (of an unmerge) restored; the others are inputs without an output. Bytes between the tensors of a file that is rewritten in place
are no tensor's: they are copied, and counted in bytes alone."""


@dataclass(frozen=True, slots=True)
class Copy:
    """The bytes of a stored tensor as they are.

    Attributes:
        source: The tensor.
        weight: The weight of the base that it is, or is a part of.
    """

    source: StoredTensor
    weight: Storage

    @property
    def sources(self) -> tuple[StoredTensor, ...]:
        """The source alone."""
        return (self.source,)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Sizes of the weight."""
        return self.weight.sizes


@dataclass(frozen=True, slots=True)
class Requantise:
    """How codes are chosen for a weight that keeps its quantised format.

    Attributes:
        rounding: ``feedback`` makes up for errors along the inputs where that keeps more of the update.
        inputs: What a calibration file has for the module, by part; empty without one.
    """

    rounding: Literal["feedback", "nearest"] = "feedback"
    inputs: Mapping[str, StoredTensor] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Compute:
    """The source's values through a chain of updates, rounded once. All tensors of one weight share one step.

    Attributes:
        source: The weight of the base, or what replaces it.
        operations: In order; empty for a change of type alone.
        target: How the output stores it.
        requantise: How its codes are chosen, if `target` is the base's weight and stored as codes.
    """

    source: Storage
    operations: tuple[Operation, ...]
    target: Encoding
    requantise: Requantise | None = None

    @property
    def sources(self) -> tuple[StoredTensor, ...]:
        """The stored tensors that the values come from."""
        return self.source.sources

    @property
    def sizes(self) -> tuple[int, ...]:
        """Sizes of the weight as it will be written."""
        return self.target.sizes


def is_coded(step: Copy | Compute) -> bool:
    """Whether a weight is written as codes."""
    written = step.weight if isinstance(step, Copy) else step.target
    return getattr(written, "elements", written) is None  # an encoding alone is one of elements


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """One tensor of the output.

    Attributes:
        name: Key in its file.
        component: Part of a pipeline, or empty.
        weight: Name of the weight that it is, or is a part of.
        dtype: As it will be stored.
        shape: As it will be stored.
        step: How its bytes come about.
        outcome: What became of the weight.
        offset: First byte in its file.
        nbytes: Length.
        why: For the ledger, where it is not plain.
        part: Position among the tensors of its weight.
    """

    name: str
    component: str
    weight: str
    dtype: DType
    shape: tuple[int, ...]
    step: Copy | Compute
    outcome: TensorOutcome
    offset: int
    nbytes: int
    why: str = ""
    part: int = 0

    @property
    def label(self) -> str:
        """``component:name``, as shown and as the manifest calls it."""
        return f"{self.component}:{self.name}" if self.component else self.name

    @property
    def weight_label(self) -> str:
        """``component:weight``, for messages."""
        return f"{self.component}:{self.weight}" if self.component else self.weight


@dataclass(frozen=True, slots=True)
class PlannedFile:
    """One weight file of the output.

    Attributes:
        name: Relative to the output folder.
        header: Its first bytes.
        nbytes: Length of the whole file.
        tensors: In order.
        padding: See `FileLayout.padding`.
    """

    name: str
    header: bytes
    nbytes: int
    tensors: tuple[PlannedTensor, ...]
    padding: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True)
class SideFile:
    """A file that is not weights: copied from `source`, or made of `data`."""

    name: str
    source: Path | None = None
    data: bytes = b""


@dataclass(frozen=True, slots=True)
class Account:
    """An input tensor that has no output of its own, and why."""

    tensor: StoredTensor
    outcome: TensorOutcome
    why: str
    component: str = ""

    @property
    def label(self) -> str:
        """As `PlannedTensor.label`."""
        return f"{self.component}:{self.tensor.name}" if self.component else self.tensor.name


@dataclass(frozen=True)
class Plan:
    """All of one operation.

    Attributes:
        verb: ``merge``, ...
        files: Weight files.
        side_files: Everything else in the output folder.
        accounts: Inputs without an output of their own.
        ignored: Adapter tensors that rightly do nothing.
        inputs: Open files that must not change before the commit.
        roots: Files and folders the user named; the output may not lie in them.
        id: Digest of inputs and options: equal plans have equal outputs.
        facts: What the manifest says about the inputs, as JSON has it.
        warnings: What the user should know.
        in_lora: Number of adapter tensors that are in no weight, but in a LoRA beside the model.
        notes: What looks odd, and is as it should be.
    """

    verb: str
    files: tuple[PlannedFile, ...]
    side_files: tuple[SideFile, ...]
    accounts: tuple[Account, ...]
    ignored: tuple[Ignored, ...]
    inputs: tuple[File, ...]
    roots: tuple[Path, ...]
    id: str
    facts: Mapping[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    in_lora: int = 0
    notes: tuple[str, ...] = ()

    @property
    def tensors(self) -> tuple[PlannedTensor, ...]:
        """Every output tensor, in file order."""
        return tuple(tensor for file in self.files for tensor in file.tensors)

    @property
    def weights(self) -> tuple[PlannedTensor, ...]:
        """The first tensor of every weight, in file order: all of them, unless a weight is stored in several."""
        return tuple(tensor for tensor in self.tensors if not tensor.part and tensor.outcome != "between")

    @property
    def between_nbytes(self) -> int:
        """Bytes that lie between the tensors and are copied: a graph's nodes and names, padding."""
        return sum(tensor.nbytes for tensor in self.tensors if tensor.outcome == "between")

    @property
    def nbytes(self) -> int:
        """Bytes of all weight files."""
        return sum(file.nbytes for file in self.files)

    def computed(self) -> tuple[PlannedTensor, ...]:
        """The first tensor of every weight that is not copied as it is."""
        return tuple(tensor for tensor in self.weights if isinstance(tensor.step, Compute))

    def shares(self, count: int) -> tuple[Plan, ...]:
        """The plan in `count` shares, each a plan of one file.

        Every computed weight is in one share; shares are about equally large. Equal plans have equal shares, wherever
        they were made.
        """
        weights: dict[int, list[PlannedTensor]] = {}
        for tensor in self.tensors:
            if isinstance(tensor.step, Compute):
                weights.setdefault(id(tensor.step), []).append(tensor)
        ordered = sorted(weights.values(), key=lambda tensors: tensors[0].label)
        sizes = [sum(tensor.nbytes for tensor in tensors) for tensors in ordered]
        files = (_share_file(chain(*(ordered[piece] for piece in own))) for own in shared_out(sizes, count))
        return tuple(replace(self, files=(file,), side_files=(), accounts=()) for file in files)

    @property
    def is_of_whole_files(self) -> bool:
        """Whether its weight files can be made apart: there are several, and no computed weight lies in two of them."""
        if len(self.files) < SEVERAL:
            return False
        homes: dict[int, str] = {}
        return all(
            homes.setdefault(id(tensor.step), file.name) == file.name
            for file in self.files
            for tensor in file.tensors
            if isinstance(tensor.step, Compute)
        )

    def shares_of_files(self, count: int) -> tuple[Plan, ...]:
        """The plan in `count` shares of whole files, about equally large; equal plans have equal ones."""
        shared = shared_out([file.nbytes for file in self.files], count)
        own = (tuple(self.files[number] for number in sorted(numbers)) for numbers in shared)
        return tuple(replace(self, files=files, side_files=(), accounts=()) for files in own)


def _share_file(tensors: Iterable[PlannedTensor]) -> PlannedFile:
    placed, end = [], len(SHARE_MAGIC)
    for tensor in tensors:
        placed.append(replace(tensor, offset=end))
        end += tensor.nbytes
    return PlannedFile(SHARE_FILE, SHARE_MAGIC, end, tuple(placed))


def check_conservation(binding: Binding, plan: Plan) -> None:
    """Law 1, on the plan: nothing of the base and nothing of an adapter ends nowhere, or twice.

    Raises:
        FitError: a tensor of the base that is neither an output of its name nor accounted for; two outputs of one name;
            a weight of which only some tensors would be written; a tensor of an adapter that no step uses.
    """
    labels = [(tensor.component, tensor.name) for tensor in plan.tensors]
    if len(set(labels)) != len(labels):
        twice = next(label for label in labels if labels.count(label) > 1)
        raise FitError("would be written twice", tensor=twice[1])
    outputs = set(labels)
    for tensor in plan.computed():
        assert isinstance(tensor.step, Compute)
        for part in tensor.step.target.parts(tensor.weight):
            if (tensor.component, part.name) not in outputs:
                raise FitError(f"would be written without its '{part.name}'", tensor=tensor.weight)
    excused = {origin(account.tensor) for account in plan.accounts}
    lost: list[Tensor] = [
        tensor
        for name, component in binding.checkpoint.components.items()
        for tensor in component.tensors.values()
        if (name, tensor.name) not in outputs and origin(tensor) not in excused
    ]
    changed = [tensor for tensor in plan.tensors if tensor.outcome != "copied"]
    used = {origin(source) for tensor in changed for source in tensor.step.sources}
    used |= {
        origin(trained)
        for tensor in changed
        if isinstance(tensor.step, Compute)
        for operation in tensor.step.operations
        for trained in operation.update.tensors
    }
    used |= {origin(trained) for trained in binding.settled}
    used |= {origin(entry.tensor) for entry in binding.ignored}
    lost += [trained for adapter, _ in binding.adapters for trained in adapter.tensors if origin(trained) not in used]
    if lost:
        raise FitError(
            f"{len(lost)} tensors would end nowhere: {listing(tensor.name for tensor in lost)}",
            file=lost[0].path,
            tensor=lost[0].name,
        )
