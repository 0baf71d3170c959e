# SPDX-License-Identifier: Apache-2.0
"""An extraction in shares: workers with a common file system make parts of its pass over both checkpoints.

A worker gets an `ExtractRequest`, plans again, and writes what it measured and factorised, one file for each unit of its share, so that a
rerun of a killed worker goes on behind the last one. What needs all matrices at once is the driver's: ranks of a budget, LoRA or
DoRA, inputs, the form of every change, the proof.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from surgery._version import __version__
from surgery.engine.devices import devices_of, on_gpus
from surgery.engine.execute import Run
from surgery.engine.inputs import as_checkpoint
from surgery.engine.sharing import one_of_shares
from surgery.extraction.extraction_plan import CheckpointPair
from surgery.extraction.pairing import Pair
from surgery.extraction.pass_options import PassOptions, pass_options
from surgery.extraction.stream.lanes import Lanes, default_lanes
from surgery.extraction.stream.scan import ScanResult, scan, warming
from surgery.extraction.stream.scan_plan import HELD, ScanPlan, ScanUnit
from surgery.extraction.stream.scratch import ScratchFile
from surgery.extraction.stream.unit_file import read_unit, unit_name, write_unit
from surgery.rank import Rank
from surgery_formats.errors import FitError, ProofError
from surgery_formats.files.bounded_json import MANIFEST_LIMIT, read_object
from surgery_formats.files.output.folder import OutputFolder
from surgery_formats.files.output.manifest import MANIFEST
from surgery_formats.files.raw import File
from surgery_formats.models.component import Component
from surgery_formats.models.identity import fingerprint
from surgery_formats.text import without_local_paths

__all__ = ["ExtractRequest", "ExtractWork"]


@dataclass(frozen=True, slots=True)
class ExtractRequest:
    """All that decides the factors of an extraction, and what is measured with them, as plain values that can be sent.

    Every attribute is as `surgery.extract_lora` takes it; what is not here is decided by the driver.

    Attributes:
        base: Reference of BASE.
        tuned: Reference of TUNED.
        rank: How ranks are found.
        alpha: Of the factors.
        rslora: Of the factors.
        embeddings: ``lora`` or ``full``.
        matrices: ``lora`` or ``full``.
        dtype: Of the factors.
        to: Format of the adapter.
        factors: Codes of the factors.
        table: Whether there will be a table of ranks.
        evaluated: Whether the driver evaluates the adapter on a text.
        on_gpus: Whether workers compute on GPUs: on all of them, or on none.
    """

    base: str
    tuned: str
    rank: int | Rank = 16
    alpha: float | None = None
    rslora: bool = False
    embeddings: str = "lora"
    matrices: str = "lora"
    dtype: str = "auto"
    to: str = "peft"
    factors: str | None = None
    table: bool = False
    evaluated: bool = False
    on_gpus: bool = False

    def work(self) -> ExtractWork:
        """The work that is shared out; opens both checkpoints.

        Raises:
            FitError, InputError: see `surgery.extract_lora`.
        """
        options = pass_options(
            self.rank,
            alpha=self.alpha,
            rslora=self.rslora,
            embeddings=self.embeddings,
            matrices=self.matrices,
            dtype=self.dtype,
            to=self.to,
            factors=self.factors,
            table=self.table,
            evaluated=self.evaluated,
        )
        pair = CheckpointPair(as_checkpoint(self.base), as_checkpoint(self.tuned, "tuned"))
        return ExtractWork.of(pair, options, on_gpus=self.on_gpus)


@dataclass(frozen=True)
class ExtractWork:
    """The pass of an extraction, as work that is done in shares.

    Attributes:
        checkpoints: BASE and TUNED.
        plan: The pass over them.
        on_gpus: Whether workers compute on GPUs.
    """

    checkpoints: CheckpointPair
    plan: ScanPlan
    on_gpus: bool

    @classmethod
    def of(cls, checkpoints: CheckpointPair, options: PassOptions, *, on_gpus: bool) -> ExtractWork:
        """Plan it.

        Raises:
            FitError: the checkpoints do not fit together.
        """
        return cls(checkpoints, options.planned(checkpoints.old, checkpoints.new, on_gpus=on_gpus), on_gpus)

    @cached_property
    def id(self) -> str:
        """Digest of both checkpoints, of what is done to them, and of the version."""
        layout, spec_of = self.plan.layout, self.plan.spec_of
        facts = [
            __version__,
            "extract-lora",
            self.on_gpus,
            [repr(self.plan.goal.rank), self.plan.goal.table, sorted(layout.whole)],
            [[fingerprint(file) for file in files] for files in map(_files, self._components)],
            [without_local_paths(component.config) for component in self._components],  # what codes stand for
            [[p.pair.name, p.path, p.form, p.pair.base.kind, p.pair.tuned.kind] for p in layout.parameters],
            [[target.path, target.shape, repr(spec_of(target))] for target in layout.targets],
            [unit.names for unit in self.plan.units],
        ]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    @property
    def inputs(self) -> Sequence[File]:
        """The weight files of both."""
        return [file for component in self._components for file in _files(component)]

    @property
    def roots(self) -> Sequence[Path]:
        """Both checkpoints."""
        return [self.checkpoints.base.path, self.checkpoints.tuned.path]

    @property
    def nbytes(self) -> int:
        """Bytes of TUNED to read: factors are few beside them."""
        return self.plan.nbytes

    @property
    def pieces(self) -> int:
        """The number of units."""
        return len(self.plan.units)

    @property
    def makes_files(self) -> bool:
        """Never: the driver makes an adapter of them."""
        return False

    @property
    def piece_memory(self) -> int:
        """Bytes that a lane takes: the largest difference that it holds, what is left of it, and blocks of both sides."""
        held = (delta.numel for target in self.plan.layout.factorised for delta in target.deltas)
        return (64 << 20) + 8 * min(max(held, default=0), HELD["cuda" if self.on_gpus else "cpu"])

    def write_share(self, index: int, count: int, staged: OutputFolder, run: Run) -> Mapping[str, Any]:
        """Measure and factorise share `index` of `count` into `staged`, one file for each unit.

        Raises:
            FitError: there is no such share, the device is another than was planned for, or a value is NaN or Inf.
            ResourceError: disk or device are full.
        """
        devices = devices_of(run.device)
        if on_gpus(devices) is not self.on_gpus:
            raise FitError(f"planned for {'GPUs' if self.on_gpus else 'the CPU'}, and run on {devices[0]}")
        units = {
            number: unit
            for number, unit in one_of_shares(self.plan.shares(count), index).items()
            if unit_name(number) not in staged.finished
        }
        numbers = {unit.names: number for number, unit in units.items()}
        pairs = self._pairs

        def done(unit: ScanUnit, result: ScanResult) -> None:
            write_unit(unit, result, pairs, staged, unit_name(numbers[unit.names]))

        part = self.plan.of(units)
        scratch, lanes = ScratchFile(staged.staged), Lanes(devices, self._lanes(devices, run))
        try:
            lanes.warm(warming(part))
            scan(part, scratch, lanes, run.progress, done)
        finally:
            lanes.close()
            scratch.close()
        return {}

    def _lanes(self, devices: Sequence[str], run: Run) -> int:
        """As many as were asked for, or are best, and fit the limit of memory."""
        lanes = run.workers or default_lanes(devices)
        return lanes if run.memory_limit is None else max(1, min(lanes, run.memory_limit // self.piece_memory))

    def result(self, folders: Sequence[Path]) -> ScanResult:
        """What all shares have measured and factorised together; factors are read when they are needed.

        Raises:
            ProofError: a share is not what its worker wrote.
        """
        result = ScanResult({}, {}, time.monotonic())
        pairs = self._pairs
        for folder, share in zip(folders, self.plan.shares(len(folders)), strict=True):
            files = read_object(folder / MANIFEST, MANIFEST_LIMIT)["files"]
            for number, unit in share.items():
                if (record := files.get(unit_name(number))) is None:
                    raise ProofError(
                        f"lacks {unit_name(number)}", file=folder, hint="remove it, and run the share again"
                    )
                read_unit(unit, folder / unit_name(number), record, pairs, result)
        return result

    @property
    def _components(self) -> tuple[Component, Component]:
        return self.checkpoints.old, self.checkpoints.new

    @property
    def _pairs(self) -> Mapping[str, Pair]:
        return {parameter.pair.name: parameter.pair for parameter in self.plan.layout.parameters}


def _files(component: Component) -> list[File]:
    return [shard.file for shard in component.shards]
