# SPDX-License-Identifier: Apache-2.0
"""Where a graph and its weights go.

onnxruntime looks for weights in the graph's own folder and nowhere else: not behind ``..``, not behind a link that leads out of it. So a
graph is written beside the weights, or the weights come to the graph: their blocks shared where the file system can, a hard link, a copy,
or inside the graph.
"""

from __future__ import annotations

import contextlib
import filecmp
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import xxhash

from surgery.engine.execute import Run, still_good, write_side_file, write_weights
from surgery.engine.ledger import Ledger
from surgery.engine.plan import Plan, SideFile
from surgery.onnx.export.prompts import WeightLocation
from surgery_formats.errors import FitError, OutputExistsError, ProofError
from surgery_formats.files.output.folder import OutputFolder, output_folder
from surgery_formats.files.output.kernel_copy import rename_new, sync_folder
from surgery_formats.files.output.output_file import OutputFile, output_faults
from surgery_formats.files.raw import File
from surgery_formats.text import nbytes as human
from surgery_formats.text import show

if TYPE_CHECKING:
    import onnx

__all__ = ["LEDGER", "MODES", "ExportJob", "ExportOutcome", "Mode", "choose_mode", "embed", "place"]

LEDGER = "surgery_export.json"
"""In a folder that was only added to: what a manifest would say of computed weights, adapters and the graphs that hold them."""

Mode = Literal["reference", "link", "copy", "embed"]
MODES = ("auto", "reference", "link", "copy", "embed")

_COMPARED = 16 << 20  # bytes of a copy looked at at a time
_PROTOBUF_LIMIT = 2_000_000_000  # bytes of one message; readers refuse 2 GiB


@dataclass(frozen=True)
class ExportJob:
    """What an export writes.

    Attributes:
        names: Of the graphs and small files that `make` makes.
        make: Called once all weights are there, with their place; gives those files, the one that makes the folder complete last.
        weights: Weight files of the base that the graphs point at.
        plan: Weights that are computed, or None.
        judge: Called with what was measured of them; may refuse the result.
        side_files: What is carried along: tokenizer, configuration.
        facts: For the manifest.
        id: Digest of inputs and options.
    """

    names: Sequence[str]
    make: Callable[[WeightLocation], Mapping[str, bytes]]
    weights: Sequence[File]
    plan: Plan | None
    judge: Callable[[Ledger], None]
    side_files: Sequence[SideFile]
    facts: Mapping[str, Any]
    id: str


@dataclass(frozen=True)
class ExportOutcome:
    """What was written.

    Attributes:
        files: Graphs and small files with their sizes.
        ledger: Of computed weights, or None.
        nbytes: Everything, shared blocks of weights included.
    """

    files: Mapping[str, int]
    ledger: Ledger | None
    nbytes: int


def choose_mode(asked: str, output: Path, home: Path, weights: Sequence[File]) -> Mode:
    """How weights get to `output`.

    Args:
        asked: One of `MODES`.
        output: Folder to write to.
        home: The folder they lie in.
        weights: The files.

    Raises:
        FitError: what was asked for cannot be.
    """
    if asked not in MODES:
        raise FitError(f"no way '{show(asked)}' to place weights", hint=f"one of {', '.join(MODES)}")
    at_home = _same_folder(output, home)
    if asked == "embed":
        return "embed"
    if not at_home:
        if asked == "reference":
            raise FitError(
                "a graph can refer to weights of its own folder only",
                file=output,
                hint=f"-o {show(home, 200)}, or --weights copy or link",
            )
        return "link" if asked == "link" else "copy"
    if asked in ("link", "copy"):
        raise FitError("the weights are in this folder already", file=output, hint="--weights reference")
    for file in weights:
        if os.path.realpath(file.path.parent) != os.path.dirname(os.path.realpath(file.path)):
            raise FitError(
                "is a link out of its folder, which onnxruntime refuses to follow",
                file=file.path,
                hint="write to another folder: blocks are shared where the file system can",
            )
    return "reference"


def place(parcel: ExportJob, output: Path, mode: Mode, home: Path, run: Run) -> ExportOutcome:
    """Write all of it, or nothing.

    Raises:
        OutputExistsError: something of it is already there.
        NothingChangedError: see `ExportJob.judge`.
        ResourceError, ProofError, FitError: see `surgery_formats.files.output.folder`.
    """
    if _same_folder(output, home):
        return _add(parcel, output, mode, run)
    with output_folder(output, _job(parcel, mode), overwrite=run.overwrite, inputs=[home], verify=still_good) as folder:
        written = _bring_weights(folder, parcel, mode, run.verify_copies)
        ledger = _compute(parcel, folder, run)
        for side in parcel.side_files:
            write_side_file(side, folder)
            written += len(side.data) if side.source is None else side.source.stat().st_size
        files = parcel.make(WeightLocation(home if mode == "embed" else folder.staged))
        for name, data in files.items():
            folder.write_small(name, data)
        _check_inputs(parcel)
        folder.commit({"export": dict(parcel.facts), **({"ledger": ledger.as_json()} if ledger else {})})
    return _placed(files, ledger, written)


def _placed(files: Mapping[str, bytes], ledger: Ledger | None, written: int) -> ExportOutcome:
    sizes = {name: len(data) for name, data in files.items()}
    return ExportOutcome(sizes, ledger, written + sum(sizes.values()) + (ledger.plan.nbytes if ledger else 0))


def _compute(parcel: ExportJob, folder: OutputFolder, run: Run) -> Ledger | None:
    if parcel.plan is None:
        return None
    ledger = Ledger(parcel.plan, write_weights(parcel.plan, folder, run))
    parcel.judge(ledger)
    return ledger


def _check_inputs(parcel: ExportJob) -> None:
    for file in {*parcel.weights, *(parcel.plan.inputs if parcel.plan else ())}:
        file.check_unchanged()


def _bring_weights(folder: OutputFolder, parcel: ExportJob, mode: Mode, verify: bool) -> int:
    if mode not in ("copy", "link"):
        return 0
    for file in parcel.weights:
        if mode == "link":
            folder.link(file.path.name, file)
        elif file.path.name not in folder.finished:
            out = folder.create(file.path.name, file.size)
            out.copy_from(file, 0, 0, file.size)
            out.finish({"xxh3": _compared(out, file)} if verify else {})
    return sum(file.size for file in parcel.weights) if mode == "copy" else 0


def _compared(out: OutputFile, source: File) -> str:
    """xxh3-128 of a copy, hexadecimal, for whoever verifies it later.

    Raises:
        ProofError: it is not its source.
    """
    state = xxhash.xxh3_128()
    for start in range(0, source.size, _COMPARED):
        count = min(_COMPARED, source.size - start)
        found = out.readback(start, count)
        if found != source.read(start, count):
            raise ProofError(f"bytes {start} to {start + count} differ from their source", file=source.path.name)
        state.update(found)
    return state.hexdigest()


def _job(parcel: ExportJob, mode: Mode) -> str:
    seen = [[file.path.name, *file.identity] for file in parcel.weights]
    seen += [[file.path.name, *file.identity] for file in (parcel.plan.inputs if parcel.plan else ())]
    return hashlib.sha256(json.dumps([mode, seen, parcel.id], sort_keys=True).encode()).hexdigest()


def _same_folder(one: Path, other: Path) -> bool:
    try:
        return os.path.samefile(one, other)
    except OSError:
        return False


def _add(parcel: ExportJob, folder: Path, mode: Mode, run: Run) -> ExportOutcome:
    """Add files to a folder that has others, each complete or not at all, none replaced; those added go again if a later one fails.

    All of them are staged in a folder within, so that they lie on its file system and the graph can already read computed weights there.
    The one that makes the rest complete comes last: without it, files that a killed run left are taken for what they are.
    """
    if os.path.lexists(folder / parcel.names[-1]):
        raise _taken(folder / parcel.names[-1])
    planned = [file.name for file in parcel.plan.files] if parcel.plan else []
    added: list[Path] = []
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with output_folder(folder / "surgery-export", _job(parcel, mode), verify=still_good) as stage:
            ledger = _compute(parcel, stage, run)
            here = WeightLocation(folder, stage.staged.name, frozenset(planned)) if planned else WeightLocation(folder)
            files = parcel.make(here)
            _check_inputs(parcel)
            if ledger is not None or parcel.facts["adapters"]:
                files = {LEDGER: _account(parcel, ledger, files), **files}
            for name, data in files.items():
                stage.write_small(name, data)
            for name in (*planned, *files):
                _move(stage.staged / name, folder / name, added)
        sync_folder(fd)
    except BaseException:
        for path in reversed(added):
            _remove(path)
        raise
    finally:
        os.close(fd)
    return _placed(files, ledger, 0)


def _account(parcel: ExportJob, ledger: Ledger | None, files: Mapping[str, bytes]) -> bytes:
    """What a manifest would say of the files that are added: sizes, hashes, and what became of each tensor."""
    entries: dict[str, Any] = {
        name: {"size": len(data), "xxh3": xxhash.xxh3_128_hexdigest(data)} for name, data in files.items()
    }
    measured = ledger.measured if ledger else {}
    for file in ledger.plan.files if ledger else ():
        hashes = {one.name: measured[one.label].xxh3 for one in file.tensors if one.label in measured}
        entries[file.name] = {"size": file.nbytes, "tensors": {name: {"xxh3": one} for name, one in hashes.items()}}
    found = {"export": dict(parcel.facts), "files": entries, **({"ledger": ledger.as_json()} if ledger else {})}
    return json.dumps(found, indent=1, sort_keys=True).encode() + b"\n"


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):  # a folder that others have put something into stays
        path.rmdir() if path.is_dir() else path.unlink()


def _move(staged: Path, path: Path, added: list[Path]) -> None:
    """Give a staged file its name, unless a killed run did so before."""
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
        "already there; a folder of weights is only added to",
        file=path,
        hint="remove it yourself, or write to another folder",
    )


def embed(model: onnx.ModelProto, files: Sequence[File]) -> None:
    """Move the bytes of a model's weights into it.

    Raises:
        FitError: more than one file of protocol buffers can hold.
    """
    by_name = {file.path.name: file for file in files}
    total = 0
    for tensor in model.graph.initializer:
        if not tensor.external_data:
            continue
        entry = {one.key: one.value for one in tensor.external_data}
        total += int(entry["length"])
        if total > _PROTOBUF_LIMIT:
            raise FitError(
                f"the weights have more than the {human(_PROTOBUF_LIMIT)} that one file can hold",
                hint="--weights copy or link",
            )
        tensor.raw_data = bytes(by_name[entry["location"]].read(int(entry["offset"]), int(entry["length"])))
        del tensor.external_data[:]
        tensor.ClearField("data_location")
