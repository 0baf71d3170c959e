# SPDX-License-Identifier: Apache-2.0
"""Where a graph and its weights are written.

onnxruntime looks for weights only in the graph's own folder: not through ``..``, and not through a link that leads out
of it. So a graph is written beside the weights, or the weights come to the graph: as shared blocks where the file
system supports them, a hard link, a copy, or inside the graph.
"""

from __future__ import annotations

import contextlib
import filecmp
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from surgery.engine.card import CARD
from surgery.engine.execute import Engine, Run, ThisProcess, write_side_file, write_weights
from surgery.engine.finished import still_good
from surgery.engine.jobs import ComputeWeight
from surgery.engine.ledger import Ledger
from surgery.engine.plan import Plan, SideFile
from surgery.engine.recorded import recorded_recipe
from surgery.onnx.export.prompt_past import WeightLocation
from surgery.onnx.run.adapter_file import SmallFiles, write_small_files
from surgery_formats.errors import FitError, OutputExistsError, ProofError
from surgery_formats.files.output.folder import SIGNED, OutputFolder, output_folder
from surgery_formats.files.output.kernel_copy import rename_new, sync_folder
from surgery_formats.files.output.output_file import OutputFile, output_faults
from surgery_formats.files.output.scratch import stages_of, sweep
from surgery_formats.files.raw import File
from surgery_formats.models.identity import fingerprint
from surgery_formats.models.side_files import EXPORT_ACCOUNT
from surgery_formats.text import show
from surgery_formats.whole import whole

if TYPE_CHECKING:
    pass

__all__ = ["MODES", "ExportJob", "ExportOutcome", "Mode", "choose_mode", "write_export"]

_STAGED = "surgery-export"  # files on their way into an existing folder

Mode = Literal["reference", "link", "copy", "embed"]
MODES = ("auto", "reference", "link", "copy", "embed")

_COMPARED = 16 << 20  # bytes of a copy compared at a time


@dataclass(frozen=True)
class ExportJob:
    """What an export writes.

    Attributes:
        names: Names of the graphs and small files.
        make: Called with the location of the weights once they are written; returns those files, ending with the one
            that makes the folder complete.
        weights: Weight files of the base that the graphs refer to.
        plan: The plan of computed weights, or None.
        judge: Called with their measurements; may refuse the result.
        side_files: Files to carry along: tokenizer, configuration.
        inputs: Folders and files that are read beside the base; the output may not lie in them.
        facts: Facts for the manifest.
        id: Digest of the graphs and options; it covers headers of weight files, but not their values.
        card: Makes the model card of a folder of its own; the card of the base's folder is its owner's.
        placed: Paths in the output of weight files that get another name.
    """

    names: Sequence[str]
    make: Callable[[WeightLocation], SmallFiles]
    weights: Sequence[File]
    plan: Plan | None
    judge: Callable[[Ledger], None]
    side_files: Sequence[SideFile]
    inputs: Sequence[Path]
    facts: Mapping[str, Any]
    id: str
    card: Callable[[Ledger | None], bytes]
    placed: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class ExportOutcome:
    """What an export wrote.

    Attributes:
        files: Sizes of graphs and small files.
        ledger: Ledger of computed weights, or None.
        nbytes: Total size, including shared blocks of weights.
    """

    files: Mapping[str, int]
    ledger: Ledger | None
    nbytes: int


def choose_mode(requested: str, output: Path, home: Path, weights: Sequence[File]) -> Mode:
    """Choose how weights get from `home` to `output`.

    Raises:
        FitError: the requested mode is not possible.
    """
    if requested not in MODES:
        raise FitError(f"'{show(requested)}' is not a way to place weights", hint=f"one of {', '.join(MODES)}")
    in_place = _same_folder(output, home)
    if requested == "embed":
        return "embed"
    if not in_place:
        if requested == "reference":
            raise FitError(
                "a graph can refer only to weights in its own folder",
                file=output,
                hint=f'`output={show(home, 200)}`, or `weights="copy"` or link',
            )
        return "link" if requested == "link" else "copy"
    if requested in ("link", "copy"):
        raise FitError("the weights are already in this folder", file=output, hint='`weights="reference"`')
    for file in weights:
        if os.path.realpath(file.path.parent) != os.path.dirname(os.path.realpath(file.path)):
            raise FitError(
                "is a link out of its folder, which onnxruntime does not follow",
                file=file.path,
                hint="write to another folder: blocks are shared if the file system supports it",
            )
    return "reference"


def write_export(
    job: ExportJob, output: Path, mode: Mode, home: Path, run: Run, engine: Engine | None = None
) -> ExportOutcome:
    """Write all files, or nothing; weights are computed by `engine`, which is this process if there is none.

    Raises:
        OutputExistsError: a file of the export already exists.
        NothingChangedError: see `ExportJob.judge`.
        ResourceError, ProofError, FitError: see `surgery_formats.files.output.folder`.
    """
    computing = _computing(job, output, engine or ThisProcess())
    if _same_folder(output, home):
        return _add(job, output, mode, run, computing)
    staged = output_folder(
        output,
        _stage_id(job, mode),
        overwrite=run.overwrite,
        inputs=[home, *job.inputs],
        verify=still_good,
        hashes=run.hashes,
    )
    # the place is taken first: nobody wants to hear at the end that it is in use
    with staged as folder, computing as compute:
        written = _bring_weights(folder, job, mode, run.verify_copies)
        for side in job.side_files:
            write_side_file(side, folder)
            written += len(side.data) if side.source is None else side.source.stat().st_size
        if mode == "embed" and job.plan is not None:
            ledger, files = _inside(job, output, home, run, compute)
        else:
            ledger = _compute(job, folder, run, compute)
            files = job.make(WeightLocation(home if mode == "embed" else folder.staged, names=job.placed))
        write_small_files(folder, files)
        text = job.card(ledger)
        folder.write_small(CARD, text)
        written += len(text)
        _check_unchanged(job)
        account = {"ledger": ledger.as_json()} if ledger else {}
        folder.commit({"plan": _content_id(job, mode), "export": dict(job.facts), **account} | recorded_recipe())
    return _outcome(files, ledger if mode != "embed" else None, written, ledger)


def _computing(job: ExportJob, output: Path, engine: Engine) -> AbstractContextManager[ComputeWeight | None]:
    """What computes the weights of the job; None if it has none."""
    return contextlib.nullcontext() if job.plan is None else engine.computing(job.plan, output)


def _outcome(files: SmallFiles, ledger: Ledger | None, written: int, account: Ledger | None) -> ExportOutcome:
    """The outcome; `ledger` is that of weights in files of their own, `account` that of all."""
    sizes = {name: len(data) for name, data in files.items()}
    return ExportOutcome(sizes, account, written + sum(sizes.values()) + (ledger.plan.nbytes if ledger else 0))


def _inside(
    job: ExportJob, output: Path, home: Path, run: Run, compute: ComputeWeight | None
) -> tuple[Ledger | None, SmallFiles]:
    """Compute weights into a folder that goes when the graphs hold them."""
    beside = output.with_name(f"{output.name}.weights")
    with output_folder(beside, _stage_id(job, "embed"), inputs=[home, *job.inputs], verify=still_good) as scratch:
        ledger = _compute(job, scratch, run, compute)
        return ledger, job.make(WeightLocation(scratch.staged, names=job.placed))


def _compute(job: ExportJob, folder: OutputFolder, run: Run, compute: ComputeWeight | None) -> Ledger | None:
    if job.plan is None or compute is None:
        return None
    ledger = Ledger(job.plan, write_weights(job.plan, folder, run, compute))
    job.judge(ledger)
    return ledger


def _check_unchanged(job: ExportJob) -> None:
    for file in {*job.weights, *(job.plan.inputs if job.plan else ())}:
        file.check_unchanged()


def _bring_weights(folder: OutputFolder, job: ExportJob, mode: Mode, verify: bool) -> int:
    if mode not in ("copy", "link"):
        return 0
    for file in job.weights:
        name = job.placed.get(file.path.name, file.path.name)
        if mode == "link":
            folder.link(name, file)
        elif name not in folder.finished:
            out = folder.create(name, file.size)
            out.copy_from(file, 0, 0, file.size)
            if verify:
                _compare(out, file)
            out.finish({})
    return sum(file.size for file in job.weights) if mode == "copy" else 0


def _compare(out: OutputFile, source: File) -> None:
    """Compare a copy with its source.

    Raises:
        ProofError: they differ.
    """
    for start in range(0, source.size, _COMPARED):
        count = min(_COMPARED, source.size - start)
        if out.readback(start, count) != source.read(start, count):
            raise ProofError(f"bytes {start} to {start + count} differ from their source", file=source.path.name)


def _content_id(job: ExportJob, mode: Mode) -> str:
    """Identify the job by what its inputs hold, wherever they lie."""
    weights = [fingerprint(file) for file in job.weights]
    return _digest([mode, weights, job.plan.id if job.plan else "", job.id])


def _stage_id(job: ExportJob, mode: Mode) -> str:
    """Identify the job by its input files as they are now, and by how weights are computed, so that a resumed run never mixes."""
    identities = [[file.path.name, *file.identity] for file in job.weights]
    identities += [[file.path.name, *file.identity] for file in (job.plan.inputs if job.plan else ())]
    return _digest([mode, identities, job.plan.id if job.plan else "", job.id])


def _digest(values: list[Any]) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()


def _same_folder(first: Path, second: Path) -> bool:
    try:
        return os.path.samefile(first, second)
    except OSError:
        return False


def _add(
    job: ExportJob, folder: Path, mode: Mode, run: Run, computing: AbstractContextManager[ComputeWeight | None]
) -> ExportOutcome:
    """Add files to an existing folder: each complete or not at all, none replaced, all removed if a later one fails.

    They are staged in a folder within, so that they lie on the same file system and the graph can already read computed
    weights there. The file that completes the others comes last: without it, files of a killed run are recognised as
    leftovers.
    """
    if os.path.lexists(folder / job.names[-1]):
        with contextlib.suppress(OSError):  # a run may have been killed when all was there but its own folder gone
            sweep(folder, stages_of(_STAGED))
        raise _taken(folder / job.names[-1])
    planned = [file.name for file in job.plan.files] if job.plan else []
    added: list[Path] = []
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        staged = output_folder(folder / _STAGED, _stage_id(job, mode), verify=still_good)
        with staged as stage, computing as compute:
            ledger = _compute(job, stage, run, compute)
            location = (
                WeightLocation(folder, stage.staged.name, frozenset(planned)) if planned else WeightLocation(folder)
            )
            files = job.make(location)
            _check_unchanged(job)
            write_small_files(stage, files)
            if ledger is not None or job.facts["adapters"]:
                account = _account(job, ledger, files, stage)
                stage.write_small(EXPORT_ACCOUNT, account)
                files = {EXPORT_ACCOUNT: account, **files}
            for name in (*planned, *files):
                _move(stage.staged / name, folder / name, added)
        sync_folder(fd)
    except BaseException:
        _take_back(added)
        raise
    finally:
        os.close(fd)
    return _outcome(files, ledger, 0, ledger)


def _account(job: ExportJob, ledger: Ledger | None, files: SmallFiles, stage: OutputFolder) -> bytes:
    """The account of the added files: sizes, hashes, and the outcome of each tensor."""
    entries: dict[str, Any] = {name: {"size": len(data), **stage.record(name).record} for name, data in files.items()}
    measured = ledger.measured if ledger else {}
    for file in ledger.plan.files if ledger else ():
        hashes = {tensor.name: measured[tensor.label].xxh3 for tensor in file.tensors if tensor.label in measured}
        entries[file.name] = {
            **{kind: digest for kind, digest in stage.record(file.name).record.items() if kind in SIGNED},
            "size": file.nbytes,
            "tensors": {name: {"xxh3": xxh3} for name, xxh3 in hashes.items()},
        }
    account = {"export": dict(job.facts), "files": entries, **({"ledger": ledger.as_json()} if ledger else {})}
    return json.dumps(account, indent=1, sort_keys=True).encode() + b"\n"


@whole
def _take_back(added: Sequence[Path]) -> None:
    for path in reversed(added):
        with contextlib.suppress(OSError):  # keep a folder that others have added files to
            path.rmdir() if path.is_dir() else path.unlink()


@whole
def _move(staged: Path, path: Path, added: list[Path]) -> None:
    """Rename a staged file, unless a killed run already did."""
    with output_faults(path):
        if not path.parent.is_dir():
            path.parent.mkdir()
            added.append(path.parent)
        try:
            rename_new(os.fspath(staged), path)
            added.append(path)
        except FileExistsError as error:
            if not path.is_file() or path.is_symlink() or not filecmp.cmp(staged, path, shallow=False):
                raise _taken(path) from error


def _taken(path: Path) -> OutputExistsError:
    return OutputExistsError(
        "already exists; files are only added to a folder of weights",
        file=path,
        hint="remove it yourself, or write to another folder",
    )
