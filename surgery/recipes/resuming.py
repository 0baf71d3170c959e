# SPDX-License-Identifier: Apache-2.0
"""What a killed run of a recipe had finished: a journal of steps, in the hidden folder beside the last output.

A step is known by its id: the verb with all its arguments, where it writes, the version, the ids of the steps that it uses, and of
every other input what tells its files apart without reading them. Its line in the journal holds the same of what it wrote. It
is kept if both are what they were and the files still have their hashes; whatever differs, or cannot be told, is done again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surgery._version import __version__
from surgery.recipes.apply_result import Place
from surgery.recipes.placing import adds_to, outputs_of
from surgery.recipes.recipe import Step
from surgery_formats.errors import SurgeryError
from surgery_formats.files.bounded_json import MANIFEST_LIMIT, read_object
from surgery_formats.files.output.kernel_copy import write_all
from surgery_formats.files.output.manifest import MANIFEST, file_digest, verify_files
from surgery_formats.files.remote.path import RemotePath, to_path
from surgery_formats.refs import resolve

__all__ = ["JOURNAL", "StepJournal", "finished_steps", "step_ids"]

_log = logging.getLogger("surgery.recipes")

JOURNAL = ".journal"
_MOST = 10_000  # files of an input or an output
_Seen = dict[str, list[int]]


class StepJournal:
    """The finished steps, by id.

    Attributes:
        resumed: Whether a killed run left it.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / JOURNAL
        self.resumed = self._path.exists()
        self._entries = dict(_entries(self._path.read_bytes())) if self.resumed else {}
        self._path.touch()

    def note(self, step_id: str | None, outputs: Sequence[Path], warnings: Sequence[str]) -> None:
        """A step is finished; nothing is noted of what could not be recognised.

        Nor is it where the disk does not take the line: the outputs are complete, and a run that is killed does the step again.
        """
        written = [_account(path) for path in outputs]
        if step_id is None or None in written:
            return
        line = json.dumps({"id": step_id, "outputs": written, "warnings": list(warnings)}, sort_keys=True)
        try:
            self._append(line)
        except OSError as error:
            _log.warning(
                "that a step is finished was not noted (%s): a run that is killed does it again", error.strerror
            )

    def _append(self, line: str) -> None:
        fd = os.open(self._path, os.O_WRONLY | os.O_CLOEXEC)
        try:  # a line begins with a line break, so that a line torn by a kill cannot swallow it
            write_all(fd, memoryview(f"\n{line}\n".encode()), os.fstat(fd).st_size)
            os.fsync(fd)
        finally:
            os.close(fd)

    def has(self, step_id: str | None, outputs: Sequence[Path], *, added: bool) -> bool:
        """Whether this step is finished, and its outputs are what it wrote.

        Args:
            step_id: Of the step.
            outputs: What it writes.
            added: Whether a later step adds files to them.
        """
        entry = self._entries.get(step_id) if step_id is not None else None
        if entry is None or len(entry.outputs) != len(outputs):
            return False
        return all(_is_intact(path, known, added=added) for path, known in zip(outputs, entry.outputs, strict=True))

    def warnings(self, step_id: str | None) -> tuple[str, ...]:
        """What a finished step had to say."""
        entry = self._entries.get(step_id) if step_id is not None else None
        return () if entry is None else entry.warnings


@dataclass(frozen=True, slots=True)
class _Entry:
    outputs: tuple[Mapping[str, Any], ...]
    warnings: tuple[str, ...]


def _entries(text: bytes) -> Iterator[tuple[str, _Entry]]:
    """The lines of a journal, but for torn ones."""
    for line in text.split(b"\n"):
        try:
            entry = json.loads(line)
            yield str(entry["id"]), _Entry(tuple(entry["outputs"]), tuple(map(str, entry["warnings"])))
        except (ValueError, KeyError, TypeError):
            continue


def finished_steps(
    placed: Sequence[tuple[Step, Place]], ids: Mapping[int, str | None], folder: Path, journal: StepJournal
) -> frozenset[int]:
    """The numbers of the steps that need not be done: those a killed run finished, and what only they use."""
    finished: set[int] = set()
    for step, place in reversed(placed):
        later = [one for one, _ in placed if one.number > step.number]
        users = {one.number for one in later if step.name and step.name in _names(one)}
        added = [one.number for one in later if adds_to(one, step)]
        unused = place not in ("output", "check") and users <= finished
        if unused or finished.intersection(added):
            finished.add(step.number)
        elif place in ("output", "temporary"):
            outputs = outputs_of(step, place, folder)
            if journal.has(ids[step.number], outputs, added=bool(added)):
                finished.add(step.number)
    return frozenset(finished)


def step_ids(placed: Sequence[tuple[Step, Place]], inputs: Mapping[str, Path], folder: Path) -> dict[int, str | None]:
    """The id of every step by its number; None where it reads what cannot be recognised, such as an object in a bucket."""
    by_name: dict[str, str | None] = {}
    ids: dict[int, str | None] = {}
    for step, place in placed:
        outputs = outputs_of(step, place, folder) if place in ("output", "temporary") else ()
        ids[step.number] = _id(step, outputs, inputs, by_name)
        if step.name:
            by_name[step.name] = ids[step.number]
    return ids


def _id(
    step: Step, outputs: Iterable[Path], inputs: Mapping[str, Path], by_name: Mapping[str, str | None]
) -> str | None:
    read: list[Any] = []
    for name, given in sorted(step.operands.items()):
        for operand in given:
            text = operand.text
            source = text.removesuffix(".adapter")
            seen = by_name[source] if source in by_name else _seen_input(inputs.get(text, text))
            if seen is None:
                return None
            read.append([name, text, operand.weight, seen])
    files = {text: inputs.get(text, text) for value in step.arguments.values() for text in _texts(value)}
    read += [[text, _seen_input(path)] for text, path in sorted(files.items()) if os.path.exists(path)]
    told = [__version__, step.verb, dict(step.arguments), [os.path.abspath(path) for path in outputs], read]
    return hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()


def _names(step: Step) -> set[str]:
    return {one.text.removesuffix(".adapter") for given in step.operands.values() for one in given}


def _texts(value: Any) -> Iterator[str]:
    """The texts of an argument that may be names of files; of ``trim=FILE`` the file."""
    if isinstance(value, str):
        yield value.partition("=")[2] or value
    elif isinstance(value, Mapping | list | tuple):
        for inner in value.values() if isinstance(value, Mapping) else value:
            yield from _texts(inner)


def _seen_input(reference: str | Path) -> _Seen | None:
    try:
        path = to_path(resolve(reference) if isinstance(reference, str) else reference)
    except SurgeryError:  # the step says what is wrong with it
        return None
    return None if isinstance(path, RemotePath) else _seen(path)


def _seen(path: Path) -> _Seen | None:
    """What tells the files at `path` from others, and from themselves once they were written to; None without any."""
    if path.is_file():
        return {"": _identity(path)}
    found: _Seen = {}
    try:
        for at, _, names in os.walk(path, followlinks=True):
            for name in names:
                found[os.path.relpath(os.path.join(at, name), path)] = _identity(Path(at, name))
            if len(found) > _MOST:
                return None
    except OSError:
        return None
    return found or None


def _identity(path: Path) -> list[int]:
    status = os.stat(path)
    return [status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns]


def _account(path: Path) -> dict[str, Any] | None:
    """What is noted of an output: its files, and the hash of what has no manifest that holds hashes."""
    files = _seen(path)
    if files is None or not (path.is_file() or MANIFEST in files):
        return None
    return {"files": files, "xxh3": file_digest(path if path.is_file() else path / MANIFEST, "xxh3")}


def _is_intact(path: Path, known: Mapping[str, Any], *, added: bool) -> bool:
    files, noted = _seen(path), known.get("files")
    if files is None or not isinstance(noted, dict):
        return False
    if files != noted and not (added and noted.items() <= files.items()):
        return False
    try:
        if path.is_file():
            return file_digest(path, "xxh3") == known.get("xxh3")
        source = path / MANIFEST
        if file_digest(source, "xxh3") != known.get("xxh3"):
            return False
        verify_files(path, read_object(source, MANIFEST_LIMIT)["files"], source)
    except SurgeryError:
        return False
    return True
