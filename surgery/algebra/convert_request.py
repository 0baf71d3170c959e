# SPDX-License-Identifier: Apache-2.0
"""A conversion in shares: the SVDs of changes that LoRAs are made of, where these have to be formed in full.

All else of a conversion copies factors. A worker lists the same SVDs as the driver, and works out those of its share, one file for each.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy
import xxhash

from surgery._version import __version__
from surgery.algebra.change_svd import ChangeSVD, ListedSVDs, Solve, SVDTask
from surgery.algebra.lora_form import lora_form
from surgery.engine.chosen_part import chosen_part
from surgery.engine.execute import Run, default_workers
from surgery.engine.inputs import as_adapter, as_checkpoint
from surgery.engine.shares.piece_file import Payload, PieceFile, open_piece, other_bytes, write_piece
from surgery.engine.sharing import one_of_shares, shared_out
from surgery.progress import Progress
from surgery.rank import Rank
from surgery_formats.adapters.registry import format_named
from surgery_formats.arrays import Array
from surgery_formats.canonical.adapter import Adapter
from surgery_formats.errors import ProofError
from surgery_formats.files.bounded_json import MANIFEST_LIMIT, read_object
from surgery_formats.files.output.folder import OutputFolder
from surgery_formats.files.output.manifest import MANIFEST
from surgery_formats.files.raw import File
from surgery_formats.models.checkpoint import Checkpoint
from surgery_formats.models.component import Component
from surgery_formats.models.identity import fingerprint
from surgery_formats.tensors.tensor import as_bytes
from surgery_formats.text import without_local_paths
from surgery_formats.threads import one_thread

__all__ = ["ConvertRequest", "ConvertWork"]

_COPIES = 32  # bytes for each element of a change: in float64, what it was made of, and what the SVD leaves


@dataclass(frozen=True, slots=True)
class ConvertRequest:
    """All that decides which SVDs a conversion to LoRAs needs, as plain values that can be sent.

    Attributes:
        adapter: Reference of the adapter.
        base: Reference of the base, if there is one.
        rank: As `surgery.convert` takes it.
        component: As `surgery.convert` takes it.
        without: As `surgery.convert` takes it.
    """

    adapter: str
    base: str | None = None
    rank: int | Rank | None = None
    component: str | None = None
    without: tuple[str, ...] = ()

    def work(self) -> ConvertWork:
        """The SVDs; opens adapter and base.

        Raises:
            FitError, InputError: see `surgery.convert`.
        """
        base = None if self.base is None else as_checkpoint(self.base)
        source = chosen_part(as_adapter(self.adapter), base, self.component, self.without)
        return ConvertWork.of(source.adapter, base, None if self.rank is None else Rank.of(self.rank))


@dataclass(frozen=True)
class ConvertWork:
    """The SVDs of a conversion, as work that is done in shares.

    Attributes:
        adapter: What is converted.
        base: The base, if there is one.
        rank: How ranks are found; None loses nothing.
        tasks: The SVDs.
    """

    adapter: Adapter
    base: Checkpoint | None
    rank: Rank | None
    tasks: tuple[SVDTask, ...]

    @classmethod
    def of(cls, adapter: Adapter, base: Checkpoint | None, rank: Rank | None) -> ConvertWork:
        """List them; no change is formed.

        Raises:
            FitError: see `surgery.algebra.lora_form.lora_form`.
        """
        listed = ListedSVDs()
        lora_form(adapter, base, format_named("peft"), rank, svds=listed)
        return cls(adapter, base, rank, tuple(sorted(listed.tasks, key=lambda task: task.name)))

    @cached_property
    def id(self) -> str:
        """Digest of both inputs, of what is asked for, and of the version."""
        prints = [sorted(fingerprint(file) for file in files) for files in (self.adapter.files, self._base_files)]
        sites = [[str(site), [update.kind for update in chain]] for site, chain in self.adapter.updates.items()]
        # scales and switches of a kind stand in configurations
        configs = [self.adapter.config, *(part.config for part in self._parts.values())]
        facts = [
            __version__,
            "convert",
            repr(self.rank),
            [without_local_paths(config) for config in configs],
            prints,
            sites,
            [(task.name, task.shape) for task in self.tasks],
        ]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    @property
    def inputs(self) -> Sequence[File]:
        """The files of the adapter and of the base."""
        return [*self.adapter.files, *self._base_files]

    @property
    def roots(self) -> Sequence[Path]:
        """The adapter and the base."""
        return [self.adapter.path, *([] if self.base is None else [self.base.path])]

    @property
    def nbytes(self) -> int:
        """Bytes of the changes, which are formed in float64."""
        return sum(8 * math.prod(task.shape) for task in self.tasks)

    @property
    def pieces(self) -> int:
        """The number of SVDs."""
        return len(self.tasks)

    @property
    def makes_files(self) -> bool:
        """Never: the driver makes an adapter of them."""
        return False

    @property
    def piece_memory(self) -> int:
        """Of the largest change."""
        return max((_COPIES * math.prod(task.shape) for task in self.tasks), default=0)

    def write_share(self, index: int, count: int, staged: OutputFolder, run: Run) -> Mapping[str, Any]:
        """Work out the SVDs of share `index` of `count`; see `surgery.engine.shares.work.Work`.

        Raises:
            FitError: there is no such share.
        """
        mine = one_of_shares(self._shares(count), index)
        numbers = [number for number in sorted(mine) if _name(number) not in staged.finished]
        workers = run.workers or default_workers()
        if run.memory_limit is not None:
            workers = max(1, min(workers, run.memory_limit // max(self.piece_memory, 1)))

        def work_out(number: int) -> None:
            svd = self.tasks[number].solve()
            arrays = [numpy.ascontiguousarray(array, numpy.float64) for array in (svd.B, svd.A, svd.values)]
            head = {
                "arrays": [[*array.shape, xxhash.xxh3_128_hexdigest(as_bytes(array))] for array in arrays],
                "norms": [float(svd.lost), float(svd.norm)],
            }
            loads = [Payload(array.nbytes, lambda array=array: as_bytes(array)) for array in arrays]  # type: ignore[misc]
            write_piece(staged, _name(number), head, loads)

        with one_thread(), ThreadPoolExecutor(workers, "surgery-svd") as pool:
            for done, _ in enumerate(pool.map(work_out, numbers), 1):
                if run.progress is not None:
                    run.progress(Progress(done, len(numbers), "factorising"))
        return {}

    def solved(self, folders: Sequence[Path]) -> SolvedSVDs:
        """What all shares have worked out together.

        Raises:
            ProofError: a share is not what its worker wrote.
        """
        pieces: dict[str, PieceFile] = {}
        for folder, share in zip(folders, self._shares(len(folders)), strict=True):
            files = read_object(folder / MANIFEST, MANIFEST_LIMIT)["files"]
            for number in share:
                if (record := files.get(_name(number))) is None:
                    raise ProofError(f"lacks {_name(number)}", file=folder, hint="remove it, and run the share again")
                pieces[self.tasks[number].name] = open_piece(folder / _name(number), record)
        return SolvedSVDs(pieces)

    def _shares(self, count: int) -> list[list[int]]:
        return shared_out([math.prod(task.shape) for task in self.tasks], count)

    @property
    def _base_files(self) -> Sequence[File]:
        return [shard.file for part in self._parts.values() for shard in part.shards]

    @property
    def _parts(self) -> Mapping[str, Component]:
        return {} if self.base is None else self.base.components


@dataclass(frozen=True, slots=True)
class SolvedSVDs:
    """Takes SVDs from shares; see `surgery.algebra.change_svd.SVDs`."""

    pieces: Mapping[str, PieceFile]

    def of(self, name: str, shape: tuple[int, int], solve: Solve) -> ChangeSVD:
        """The SVD of a weight, in memory of the caller's own.

        Raises:
            ProofError: it is not what the worker wrote.
        """
        if (piece := self.pieces.get(name)) is None:
            raise ProofError("no share has worked it out", tensor=name)
        at = 0
        arrays: list[Array] = []
        for *sizes, known in piece.head["arrays"]:
            array = numpy.empty(sizes)
            piece.read_into(as_bytes(array), at)
            if xxhash.xxh3_128_hexdigest(as_bytes(array)) != known:
                raise other_bytes(piece.file.path)
            arrays.append(array)
            at += array.nbytes
        lost, norm = piece.head["norms"]
        B, A, values = arrays
        return ChangeSVD(B, A, values, lost, norm)


def _name(number: int) -> str:
    return f"svd-{number:06}"
