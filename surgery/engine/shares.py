# SPDX-License-Identifier: Apache-2.0
"""A merge in shares: workers with a common file system compute parts of it, in any order, independently.

Neither open files nor closures travel: a worker gets a `MergeRequest` (references and options), plans again, and
compares the plan's id. Its share is a folder beside the output, which appears complete or not at all and which a rerun
of a killed worker resumes, as any output:

    .OUT.surgery-<job>.share-<i>-of-<n>/    weights, surgery_manifest.json

Then one process merges as ever, with an engine that takes computed weights from the shares. It copies, proves and
commits, so the result has the bytes that a single process writes.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import xxhash

from surgery.engine.execute import Run, remembered, write_weights
from surgery.engine.jobs import ComputeWeight, Write
from surgery.engine.ledger import Measurement
from surgery.engine.merge.merge_plan import planned_merge
from surgery.engine.plan import SHARE_FILE, Compute, Plan, PlannedTensor
from surgery.engine.quantised.output import quantised_output
from surgery_formats.binding.bind import Binding
from surgery_formats.errors import FitError, ProofError
from surgery_formats.files.output.folder import output_folder
from surgery_formats.files.output.manifest import MANIFEST, verify_folder
from surgery_formats.files.raw import File, open_file
from surgery_formats.text import listing

__all__ = ["MergeRequest", "Shares", "merge_share"]

_BLOCK = 16 << 20


@dataclass(frozen=True, slots=True)
class MergeRequest:
    """All that decides a merge, as plain values that can be sent.

    Attributes:
        base: Reference of the base.
        adapters: References with their weights, in order.
        dtype: As `surgery.merge` takes it.
        shard_size: As `surgery.merge` takes it.
        layout: ``keep`` or ``packed``.
        quantized: As `surgery.merge` takes it.
        only_touched: As `surgery.merge` takes it.
        rounding: As `surgery.merge` takes it.
        rank: As `surgery.merge` takes it.
        max_error: As `surgery.merge` takes it.
        calibration: Reference of the file that `surgery.merge` takes.
        reversible: As `surgery.merge` takes it.
        as_trained: As `surgery.merge` takes it: a rule, or a reference.
        without: As `surgery.merge` takes it.
    """

    base: str
    adapters: tuple[tuple[str, float], ...]
    dtype: str = "keep"
    shard_size: int | None = None
    layout: str = "keep"
    quantized: str = "dequantize"
    only_touched: bool = False
    rounding: str | None = None
    rank: int | None = None
    max_error: float | None = None
    calibration: str | None = None
    reversible: bool = False
    as_trained: str | None = None
    without: tuple[str, ...] = ()

    def planned(self) -> tuple[Binding, Plan]:
        """The binding and the plan; opens the inputs.

        Raises:
            FitError, InputError: see `surgery.merge`.
        """
        quantised = quantised_output(
            self.quantized,
            only_touched=self.only_touched,
            rounding=self.rounding,
            rank=self.rank,
            max_error=self.max_error,
            calibration=self.calibration,
        )
        return planned_merge(
            self.base,
            self.adapters,
            self.dtype,
            self.shard_size,
            self.layout,
            quantised,
            self.reversible,
            self.as_trained,
            self.without,
        )


def merge_share(
    request: MergeRequest,
    plan_id: str,
    index: int,
    count: int,
    output: str | os.PathLike[str],
    run: Run | None = None,
) -> Path:
    """Compute the share `index` of `count` of a merge into `output`, unless that was done before.

    Args:
        request: The merge.
        plan_id: Of the plan that the other workers have (``ledger.plan.id`` of a dry run).
        index: Which share, from 0.
        count: How many there are.
        output: The output of the whole merge; the share is written beside it.
        run: How.

    Returns:
        The folder of the share.

    Raises:
        ProofError: planned here, it is another merge.
        FitError, InputError, OutputExistsError, ResourceError: as `surgery.merge`; nothing is left behind.
    """
    _, plan = request.planned()
    if plan.id != plan_id:
        raise ProofError(
            f"planned here, it is another merge ({plan.id[:16]} instead of {plan_id[:16]})",
            hint="inputs, options and the version of surgery must be the same everywhere",
        )
    share, folder = plan.share(index, count), _folder(plan, Path(output), index, count)
    if not (folder / MANIFEST).exists():
        # every tensor has a hash, which is compared when it is read
        with output_folder(folder, _id(plan), inputs=plan.roots, hashes=()) as staged:
            write_weights(share, staged, run or Run())
            for file in plan.inputs:
                file.check_unchanged()
            staged.commit({"share": [index, count], "job": _id(plan)})
    return folder


def _folder(plan: Plan, output: Path, index: int, count: int) -> Path:
    """Named after the plan on these very files, so that shares of another merge are never taken for it."""
    return output.parent / f".{output.name}.surgery-{_id(plan)[:16]}.share-{index}-of-{count}"


def _id(plan: Plan) -> str:
    """Digest of the plan, and of the inputs' sizes and times.

    Unlike an inode, these are the same on every machine of a file system.
    """
    inputs = sorted((file.path.name, *file.identity[2:]) for file in plan.inputs)
    return hashlib.sha256(json.dumps([plan.id, inputs]).encode()).hexdigest()


class _Piece(NamedTuple):
    """A computed tensor, where its share holds it."""

    file: File
    tensor: PlannedTensor
    measured: Measurement


@dataclass(frozen=True, slots=True)
class Shares:
    """The engine that takes computed weights from `count` shares, and removes these when the output is committed."""

    count: int

    def __post_init__(self) -> None:
        if self.count < 1:
            raise FitError(f"there is no merge in {self.count} shares")

    @contextlib.contextmanager
    def computing(self, plan: Plan, output: Path) -> Iterator[ComputeWeight]:
        """Read a weight from its share.

        Raises:
            FitError: a share is missing.
            ProofError: a share is not what its worker wrote.
        """
        folders = [_folder(plan, output, index, self.count) for index in range(self.count)]
        if missing := [str(index) for index, folder in enumerate(folders) if not (folder / MANIFEST).exists()]:
            raise FitError(f"of {self.count} shares these are missing: {listing(missing)}", hint="run them again")
        pieces: dict[str, list[_Piece]] = {}
        for index, folder in enumerate(folders):
            manifest = verify_folder(folder)
            if (manifest.get("share"), manifest.get("job")) != ([index, self.count], _id(plan)):
                raise ProofError(
                    "holds another share, or one of another merge",
                    file=folder,
                    hint="remove it and run the share again",
                )
            measured = remembered(manifest["files"][SHARE_FILE])
            file = open_file(folder / SHARE_FILE)
            for tensor in plan.share(index, self.count).tensors:
                pieces.setdefault(tensor.weight_label, []).append(_Piece(file, tensor, measured[tensor.label]))

        def read(
            label: str, step: Compute, write: Write, stop: Callable[[], bool], device: str
        ) -> tuple[Measurement, ...]:
            parts = sorted(pieces[label], key=lambda piece: piece.tensor.part)
            for piece in parts:
                _copy(piece, write, stop)
            return tuple(piece.measured for piece in parts)

        yield read
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)  # the merge is complete: what is left is only space


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
