# SPDX-License-Identifier: Apache-2.0
"""A plan in shares: each holds computed weights of it, and the driver takes them from there."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import xxhash

from surgery.engine.execute import Run, remembered, write_weights
from surgery.engine.jobs import ComputeWeight, Write
from surgery.engine.ledger import Measurement
from surgery.engine.plan import SHARE_FILE, Compute, Plan, PlannedTensor
from surgery.engine.shares.work import Cluster, WorkRequest
from surgery_formats.errors import MalformedError, ProofError
from surgery_formats.files.bounded_json import MANIFEST_LIMIT, read_object
from surgery_formats.files.output.folder import OutputFolder
from surgery_formats.files.output.manifest import MANIFEST
from surgery_formats.files.raw import File, open_file

__all__ = ["InShares", "PlannedWork"]

_BLOCK = 16 << 20


@dataclass(frozen=True)
class PlannedWork:
    """The computed weights of a plan, as work that can be done in shares."""

    plan: Plan

    @property
    def id(self) -> str:
        """The plan's."""
        return self.plan.id

    @property
    def inputs(self) -> Sequence[File]:
        """The plan's."""
        return self.plan.inputs

    @property
    def roots(self) -> Sequence[Path]:
        """The plan's."""
        return self.plan.roots

    @cached_property
    def nbytes(self) -> int:
        """Bytes of computed tensors."""
        return sum(tensor.nbytes for tensor in self.plan.tensors if isinstance(tensor.step, Compute))

    @cached_property
    def pieces(self) -> int:
        """Computed weights."""
        return len(self.plan.computed())

    @cached_property
    def piece_memory(self) -> int:
        """Of the weight that takes most."""
        from surgery.engine.blocks import block_bytes  # it knows updates

        return max((block_bytes(tensor) for tensor in self.plan.computed()), default=0)

    def write_share(self, index: int, count: int, staged: OutputFolder, run: Run) -> Mapping[str, Any]:
        """See `Work.write_share`."""
        write_weights(self.plan.share(index, count), staged, run)
        return {}


class _Piece(NamedTuple):
    """A computed tensor, where its share holds it."""

    file: File
    tensor: PlannedTensor
    measured: Measurement


@dataclass(frozen=True, slots=True)
class InShares:
    """The engine of a plan whose weights a cluster computes.

    Attributes:
        cluster: Has the shares done.
        request: What workers plan again; its work is a `PlannedWork`.
        run: How.
    """

    cluster: Cluster
    request: WorkRequest
    run: Run

    @contextlib.contextmanager
    def computing(self, plan: Plan, output: Path) -> Iterator[ComputeWeight]:
        """Read a weight from its share.

        Raises:
            SurgeryError: see `Cluster.shares`.
            ProofError: a share is not what its worker wrote.
        """
        if not plan.computed():
            yield _nothing
            return
        with self.cluster.shares(self.request, PlannedWork(plan), output, self.run) as folders:
            yield _reader(_located(plan, folders))


def _nothing(label: str, step: Compute, write: Write, stop: Callable[[], bool], device: str) -> tuple[Measurement, ...]:
    raise ProofError("is computed, and the plan says that nothing is", tensor=label)


def _located(plan: Plan, folders: Sequence[Path]) -> Mapping[str, list[_Piece]]:
    """The tensors of every weight, in order, where they lie."""
    pieces: dict[str, list[_Piece]] = {}
    for share, folder in zip(plan.shares(len(folders)), folders, strict=True):
        measured = _measured(folder)
        file = open_file(folder / SHARE_FILE)
        for tensor in share.tensors:
            if tensor.label not in measured or tensor.offset + tensor.nbytes > file.size:
                raise ProofError("is not in its share", file=folder, tensor=tensor.label, hint="remove that folder")
            pieces.setdefault(tensor.weight_label, []).append(_Piece(file, tensor, measured[tensor.label]))
    return {label: sorted(parts, key=lambda piece: piece.tensor.part) for label, parts in pieces.items()}


def _measured(folder: Path) -> Mapping[str, Measurement]:
    manifest = read_object(folder / MANIFEST, MANIFEST_LIMIT)
    try:
        return remembered(manifest["files"][SHARE_FILE])
    except (KeyError, TypeError, AttributeError) as error:
        raise MalformedError("not the manifest of a share", file=folder / MANIFEST) from error


def _reader(pieces: Mapping[str, Sequence[_Piece]]) -> ComputeWeight:
    def read(label: str, step: Compute, write: Write, stop: Callable[[], bool], device: str) -> tuple[Measurement, ...]:
        for piece in pieces[label]:
            _copy(piece, write, stop)
        return tuple(piece.measured for piece in pieces[label])

    return read


def _copy(piece: _Piece, write: Write, stop: Callable[[], bool]) -> None:
    """The bytes of a tensor, which must be those that its worker measured."""
    tensor, digest = piece.tensor, xxhash.xxh3_128()
    for at in range(0, tensor.nbytes, _BLOCK):
        if stop():
            return
        block = piece.file.read(tensor.offset + at, min(_BLOCK, tensor.nbytes - at))
        digest.update(block)
        write(tensor.part, at, memoryview(block))
    if digest.hexdigest() != piece.measured.xxh3:
        raise ProofError("is not what the worker computed", file=piece.file.path, tensor=tensor.label)
