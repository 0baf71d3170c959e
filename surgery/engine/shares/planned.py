# SPDX-License-Identifier: Apache-2.0
"""A plan in shares: each is some of its files, complete, or holds computed weights of it.

Files become files of the output without being read again: they are linked, or copied by the store. Computed weights, and files
where there are no links, are copied and compared with their hashes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import xxhash

from surgery.engine.execute import Run, write_weights
from surgery.engine.finished import remembered
from surgery.engine.jobs import ComputeWeight, Write
from surgery.engine.ledger import Measurement
from surgery.engine.plan import Compute, Plan, PlannedFile, PlannedTensor
from surgery.engine.shares.work import Cluster, WorkRequest
from surgery.engine.sharing import one_of_shares
from surgery_formats.errors import MalformedError, ProofError
from surgery_formats.files.bounded_json import MANIFEST_LIMIT, read_object
from surgery_formats.files.output.folder import FileRecord, OutputFolder
from surgery_formats.files.output.manifest import MANIFEST
from surgery_formats.files.output.resume import same_digest
from surgery_formats.files.places import size_and_version
from surgery_formats.files.raw import File, open_file

__all__ = ["InShares", "PlannedWork", "work_of_output"]

_BLOCK = 16 << 20
_AGAIN = "remove its folder, and run the share again"


@dataclass(frozen=True)
class PlannedWork:
    """A plan, as work that can be done in shares.

    Attributes:
        plan: What to do.
        makes_files: See `Work.makes_files`.
    """

    plan: Plan
    makes_files: bool = False

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
        """Bytes of files, or of computed tensors."""
        if self.makes_files:
            return self.plan.nbytes
        return sum(tensor.nbytes for tensor in self.plan.tensors if isinstance(tensor.step, Compute))

    @cached_property
    def pieces(self) -> int:
        """Files, or computed weights."""
        return len(self.plan.files) if self.makes_files else len(self.plan.computed())

    @cached_property
    def piece_memory(self) -> int:
        """Of the weight that takes most."""
        from surgery.engine.blocks import block_bytes  # it knows updates

        return max((block_bytes(tensor) for tensor in self.plan.computed()), default=0)

    def shares(self, count: int) -> tuple[Plan, ...]:
        """All `count` of them, as plans."""
        return self.plan.shares_of_files(count) if self.makes_files else self.plan.shares(count)

    def write_share(self, index: int, count: int, staged: OutputFolder, run: Run) -> Mapping[str, Any]:
        """See `Work.write_share`."""
        share = one_of_shares(self.shares(count), index)
        write_weights(share, staged, run)
        if not self.makes_files:
            return {}
        return {"versions": {file.name: staged.version(file.name) for file in share.files}}


def work_of_output(plan: Plan) -> PlannedWork:
    """The work of a plan whose files are the weight files of an output."""
    return PlannedWork(plan, plan.is_of_whole_files)


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
    def computing(self, plan: Plan, output: Path, into: OutputFolder | None = None) -> Iterator[ComputeWeight]:
        """Take the files of shares for files of the output, or read a weight from its share.

        Raises:
            SurgeryError: see `Cluster.shares`.
            ProofError: a share is not what its worker wrote.
        """
        if not plan.computed():
            yield _nothing
            return
        work = PlannedWork(plan) if into is None else work_of_output(plan)
        with self.cluster.shares(self.request, work, output, self.run) as folders:
            yield _reader(_located(work, folders, into))


def _nothing(label: str, step: Compute, write: Write, stop: Callable[[], bool], device: str) -> tuple[Measurement, ...]:
    raise ProofError("is computed, and the plan says that nothing is", tensor=label)


def _located(work: PlannedWork, folders: Sequence[Path], into: OutputFolder | None) -> Mapping[str, list[_Piece]]:
    """The tensors of every weight, in order, where they lie, but for those of files that were taken over."""
    pieces: dict[str, list[_Piece]] = {}
    for share, folder in zip(work.shares(len(folders)), folders, strict=True):
        manifest = read_object(folder / MANIFEST, MANIFEST_LIMIT)
        for file in share.files:
            if work.makes_files and into is not None and _taken(file, folder, manifest, into):
                continue
            try:
                measured = remembered(manifest["files"][file.name])
            except (KeyError, TypeError, AttributeError) as error:
                raise _no_manifest(folder) from error
            source = open_file(folder / file.name)
            for tensor in file.tensors:
                if not isinstance(tensor.step, Compute):
                    continue
                if tensor.label not in measured or tensor.offset + tensor.nbytes > source.size:
                    raise ProofError("is not in its share", file=folder, tensor=tensor.label, hint="remove that folder")
                pieces.setdefault(tensor.weight_label, []).append(_Piece(source, tensor, measured[tensor.label]))
    return {label: sorted(parts, key=lambda piece: piece.tensor.part) for label, parts in pieces.items()}


def _taken(file: PlannedFile, folder: Path, manifest: Mapping[str, Any], into: OutputFolder) -> bool:
    """Whether a file of a share is one of the output now.

    It is what its worker wrote and proved if its size and its version, the time of modification or the etag, are those that
    the worker saw; where a file system has other times for another machine, if its bytes have the hash.

    Raises:
        MalformedError: the manifest is none of a share.
        ProofError: the file is another one.
    """
    try:
        details, version = dict(manifest["files"][file.name]), manifest.get("versions", {}).get(file.name)
        record = FileRecord(file.name, details.pop("size"), details)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise _no_manifest(folder) from error
    path = folder / file.name
    size, now = size_and_version(path)
    if record.size != file.nbytes or size != file.nbytes:
        raise ProofError(f"is not the file of {file.nbytes} bytes that a worker wrote", file=path, hint=_AGAIN)
    if now != version and not same_digest(path, record):
        raise ProofError("is not what the worker wrote", file=path, hint=_AGAIN)
    return into.take(path, record)


def _no_manifest(folder: Path) -> MalformedError:
    return MalformedError("not the manifest of a share", file=folder / MANIFEST)


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
