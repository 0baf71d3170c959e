# SPDX-License-Identifier: Apache-2.0
"""Where a graph and its weights go.

onnxruntime looks for weights in the graph's own folder and nowhere else: not behind ``..``, not behind a link that leads out of it. So a
graph is written beside the weights, or the weights come to the graph: their blocks shared where the file system can, a hard link, a copy,
or inside the graph.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from surgery_formats.errors import FitError, OutputExistsError
from surgery_formats.files.folder import OutputFolder, output_folder
from surgery_formats.files.kernel_copy import rename_new, sync_folder
from surgery_formats.files.output_file import output_faults
from surgery_formats.files.raw import File, open_file
from surgery_formats.text import nbytes as human
from surgery_formats.text import show

if TYPE_CHECKING:
    import onnx

    from surgery.ledger import Ledger
    from surgery.onnx.parts import Merged
    from surgery_formats.checkpoint import Checkpoint

__all__ = ["MODES", "Mode", "Parcel", "choose_mode", "embed", "place", "place_merged"]

Mode = Literal["reference", "link", "copy", "embed"]
MODES = ("auto", "reference", "link", "copy", "embed")

_PROTOBUF_LIMIT = 2_000_000_000  # bytes of one message; readers refuse 2 GiB


@dataclass(frozen=True)
class Parcel:
    """What an export writes.

    Attributes:
        files: Graphs and small files by name; the last one makes the folder complete.
        weights: Weight files the graphs point at.
        side_files: ``(name, path)`` of what is carried along: tokenizer, configuration.
        facts: For the manifest.
    """

    files: Mapping[str, bytes]
    weights: Sequence[File]
    side_files: Sequence[tuple[str, Path]]
    facts: Mapping[str, Any]


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


def place(
    parcel: Parcel,
    output: Path,
    mode: Mode,
    checkpoint: Checkpoint,
    *,
    overwrite: bool = False,
    merged: Merged | None = None,
) -> int:
    """Write all of it, or nothing.

    Args:
        parcel: What to write.
        output: Folder.
        mode: How weights get there.
        checkpoint: The base.
        overwrite: Replace an existing output.
        merged: Writes its delta file beside the base's weights; None for no merge.

    Returns:
        Bytes written, shared blocks of weights included.

    Raises:
        OutputExistsError: something of it is already there.
        NothingChangedError: a merge would change no weight.
        ResourceError, ProofError, FitError: see `surgery_formats.files.folder`.
    """
    home = checkpoint.main.folder
    if _same_folder(output, home):
        return _add(parcel, output, checkpoint, merged)
    with output_folder(output, _job(parcel, mode), overwrite=overwrite, inputs=[home]) as folder:
        written = _bring_weights(folder, parcel, mode)
        facts = dict(parcel.facts)
        if merged is not None:
            ledger = _write_delta(folder, merged, checkpoint)
            facts["merged"] = ledger.as_json()
            written += merged.delta.nbytes
        for name, path in parcel.side_files:
            data = bytes((found := open_file(path)).read(0, found.size))
            folder.write_small(name, data)
            written += len(data)
        for name, data in parcel.files.items():
            folder.write_small(name, data)
            written += len(data)
        for file in parcel.weights:
            file.check_unchanged()
        folder.commit({"export": facts})
    return written


def place_merged(
    parcel: Parcel, merged: Merged, checkpoint: Checkpoint, output: Path, *, overwrite: bool = False
) -> int:
    """Write a merged checkpoint with its graphs, as `surgery.merge` does.

    Raises:
        As `place`.
    """
    from surgery.execute import Run, execute
    from surgery.merge import judge

    def finish(ledger: Ledger) -> Mapping[str, bytes]:
        judge(ledger, checkpoint, merged.weights)
        return parcel.files

    execute(merged.full, output, Run(overwrite=overwrite), finish)
    return merged.full.nbytes + sum(map(len, parcel.files.values()))


def _write_delta(folder: OutputFolder, merged: Merged, checkpoint: Checkpoint) -> Ledger:
    from surgery.execute import Run, write_weights
    from surgery.ledger import Ledger
    from surgery.merge import judge

    ledger = Ledger(merged.delta, write_weights(merged.delta, folder, Run()))
    judge(ledger, checkpoint, merged.weights)
    for file in merged.delta.inputs:
        file.check_unchanged()
    return ledger


def _bring_weights(folder: OutputFolder, parcel: Parcel, mode: Mode) -> int:
    if mode not in ("copy", "link"):
        return 0
    for file in parcel.weights:
        if mode == "link":
            folder.link(file.path.name, file)
        elif file.path.name not in folder.finished:
            out = folder.create(file.path.name, file.size)
            out.copy_from(file, 0, 0, file.size)
            out.finish({})
    return sum(file.size for file in parcel.weights) if mode == "copy" else 0


def _job(parcel: Parcel, mode: Mode) -> str:
    seen = [[file.path.name, *file.identity] for file in parcel.weights]
    graphs = {name: hashlib.sha256(data).hexdigest() for name, data in parcel.files.items()}
    return hashlib.sha256(json.dumps([mode, seen, graphs], sort_keys=True).encode()).hexdigest()


def _same_folder(one: Path, other: Path) -> bool:
    try:
        return os.path.samefile(one, other)
    except OSError:
        return False


def _add(parcel: Parcel, folder: Path, checkpoint: Checkpoint, merged: Merged | None) -> int:
    """Add files to a folder that has others, each complete or not at all, none replaced; those added go again if a later one fails."""
    delta = [file.name for file in merged.delta.files] if merged else []
    for name in (*delta, *parcel.files):
        if os.path.lexists(folder / name):
            raise _taken(folder / name)
    added: list[Path] = []
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        if merged is not None:
            added += _add_delta(folder, merged, checkpoint)
        for name, data in parcel.files.items():
            _add_one(folder / name, data)
            added.append(folder / name)
        for file in parcel.weights:
            file.check_unchanged()
        sync_folder(fd)
    except BaseException:
        for path in added:
            path.unlink(missing_ok=True)
        raise
    finally:
        os.close(fd)
    return sum(map(len, parcel.files.values())) + (merged.delta.nbytes if merged else 0)


def _add_delta(folder: Path, merged: Merged, checkpoint: Checkpoint) -> list[Path]:
    """The delta file, written and proved in a hidden folder first."""
    hidden = folder / f".surgery-delta-{merged.delta.id[:16]}"
    with output_folder(hidden, merged.delta.id, overwrite=True, inputs=merged.delta.roots) as stage:
        ledger = _write_delta(stage, merged, checkpoint)
        stage.commit({"plan": merged.delta.id, "ledger": ledger.as_json()})
    try:
        made = []
        for file in merged.delta.files:
            rename_new(hidden / file.name, folder / file.name)
            made.append(folder / file.name)
        return made
    except FileExistsError as error:
        raise _taken(folder / file.name) from error
    finally:
        shutil.rmtree(hidden, ignore_errors=True)


def _add_one(path: Path, data: bytes) -> None:
    with output_faults(path, len(data)):
        fd, staged = tempfile.mkstemp(prefix=f".{path.name}.surgery-", dir=path.parent)
        try:
            with os.fdopen(fd, "wb") as out:
                out.write(data)
                out.flush()
                os.fsync(out.fileno())
                os.fchmod(out.fileno(), 0o666 & ~_umask())
            rename_new(staged, path)
        except FileExistsError as error:
            raise _taken(path) from error
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(staged)


def _umask() -> int:
    found = os.umask(0o022)
    os.umask(found)
    return found


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
