# SPDX-License-Identifier: Apache-2.0
"""A file of the inputs that the modules of a model get, see docs/extraction.md; only its header is read until they are needed."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from surgery_formats.arrays import Array
from surgery_formats.containers.sharded import open_shards
from surgery_formats.errors import MalformedError, NotFoundError
from surgery_formats.files.raw import File
from surgery_formats.models.identity import fingerprint
from surgery_formats.tensors.tensor import StoredTensor
from surgery_formats.text import show

__all__ = ["JUDGING", "Calibration", "open_calibration", "raw_inputs"]

JUDGING = 4
"""Of so many raw inputs one may be kept back, to judge by."""
_READ = 1 << 21  # raw inputs held at a time, in numbers
_PARTS = ("activations", "gram", "mean")


@dataclass(frozen=True, slots=True)
class Calibration:
    """A calibration file; only its header has been read.

    Attributes:
        path: The file.
        files: The open file.
        modules: Tensors by module, as the file names it, and part.
        id: Fingerprint of its content.
    """

    path: Path
    files: tuple[File, ...]
    modules: Mapping[str, Mapping[str, StoredTensor]]
    id: str

    def of(self, *names: str) -> Mapping[str, StoredTensor] | None:
        """The parts that the file has for a module with any of these names, or None."""
        return next((self.modules[name] for name in names if name in self.modules), None)

    def check_unchanged(self) -> None:
        """Raise ProofError if the file has changed since it was opened."""
        for file in self.files:
            file.check_unchanged()


def open_calibration(path: str | os.PathLike[str]) -> Calibration:
    """Open a calibration file.

    Raises:
        InputError: it is missing, malformed, or another kind of file.
    """
    where = Path(path)
    if not where.exists():
        raise NotFoundError("no such file or folder", file=where)
    opened = open_shards(where)
    modules: dict[str, dict[str, StoredTensor]] = {}
    for name, tensor in opened.tensors.items():
        module, _, part = name.rpartition(".")
        if part not in _PARTS or not module:
            raise MalformedError(
                "is no part of a calibration", file=where, tensor=name, hint=f"<module>.{' or <module>.'.join(_PARTS)}"
            )
        if not tensor.dtype.is_float:
            raise MalformedError(f"is {tensor.dtype.label}, no floating-point type", file=where, tensor=name)
        modules.setdefault(module, {})[part] = tensor
    for module, parts in modules.items():
        if ("activations" in parts) == ("gram" in parts) or ("activations" in parts and "mean" in parts):
            raise MalformedError(
                f"'{show(module)}' has {' and '.join(parts)}; it has activations, or a gram and perhaps a mean",
                file=where,
            )
    if not modules:
        raise MalformedError("holds no inputs", file=where)
    files = tuple(shard.file for shard in opened.shards)
    return Calibration(where, files, modules, "".join(fingerprint(file) for file in files))


def raw_inputs(stored: StoredTensor, *, judging: bool | None = None) -> Iterator[Array]:
    """Blocks of rows: all of them, or only every `JUDGING`-th (`judging`), or only the others."""
    import numpy

    step = max(1, _READ // max(stored.shape[1], 1) // JUDGING) * JUDGING
    for start in range(0, stored.shape[0], step):
        rows = stored.read(start, min(start + step, stored.shape[0]))
        last = numpy.arange(start, start + len(rows)) % JUDGING == JUDGING - 1
        chosen = rows if judging is None else rows[last == judging]
        if len(chosen):
            yield chosen
