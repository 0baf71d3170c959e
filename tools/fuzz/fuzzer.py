# SPDX-License-Identifier: Apache-2.0
"""Executions by their numbers."""

from __future__ import annotations

import os
import random
import shutil
import traceback
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from itertools import accumulate
from pathlib import Path
from tempfile import mkdtemp

from surgery_formats.errors import SurgeryError

from .limits import Limited
from .mutations import mutated
from .quick_bytes import quickly_damaged, tokens_of
from .target import Case, Seed, Target
from .words import Words

__all__ = ["Fault", "Fuzzer"]


@dataclass(frozen=True)
class Fault:
    """What an execution did that it must not.

    Attributes:
        number: Of the execution.
        target: What was executed.
        seed: Name of what was damaged.
        what: The last line of its traceback, and where it was raised: equal for equal faults.
        shown: The whole traceback.
    """

    number: int
    target: str
    seed: str
    what: str
    shown: str


class Fuzzer:
    """Executions by their numbers.

    Attributes:
        targets: What is executed.
        words: What all seeds hold.
        outcomes: How often executions ended in which way, by target.
    """

    def __init__(self, targets: Sequence[Target], seed: int) -> None:
        self.targets = list(targets)
        for name in dict.fromkeys(name for target in self.targets for name in target.needs):
            import_module(name)  # which may do what an execution must not
        self.outcomes: Counter[tuple[str, str]] = Counter()
        self._seed = seed
        self._limits = Limited()
        self._seeds = {target.name: list(target.seeds()) for target in self.targets}
        self._shares = list(accumulate(target.share for target in self.targets))
        self.words = Words.of(
            dict.fromkeys(raw for some in self._seeds.values() for s in some for raw in s.files.values())
        )
        self._tokens = {target.name: tokens_of(self._seeds[target.name]) for target in self.targets if target.quick}
        self._folder = Path()
        self._last: Path | None = None

    @contextmanager
    def working(self, folder: Path | None = None) -> Iterator[None]:
        """With a folder for the files of executions, by default one in memory."""
        memory = Path("/dev/shm")
        place = memory if os.access(memory, os.W_OK) else None
        self._folder = folder or Path(mkdtemp(prefix="surgery-fuzz-", dir=place))
        self._folder.mkdir(parents=True, exist_ok=True)
        self._last = None
        try:
            yield
        finally:
            if folder is None:
                shutil.rmtree(self._folder)

    def damaged(self, number: int) -> tuple[random.Random, Target, Seed, dict[str, bytes]]:
        """The files of an execution."""
        draw = random.Random((self._seed << 48) + number)
        (target,) = draw.choices(self.targets, cum_weights=self._shares)
        seed = draw.choice(self._seeds[target.name])
        if target.quick:
            ((name, raw),) = seed.files.items()
            return draw, target, seed, {name: quickly_damaged(draw, raw, self._tokens[target.name])}
        return draw, target, seed, mutated(draw, dict(seed.files), self.words)

    def run(self, number: int) -> Fault | None:
        """One execution."""
        draw, target, seed, files = self.damaged(number)
        return self.execute(number, target, seed, files, draw)

    def execute(
        self, number: int, target: Target, seed: Seed, files: Mapping[str, bytes], draw: random.Random
    ) -> Fault | None:
        """An execution of a target on these files."""
        path = self._written(number, seed, files) if target.on_disk else self._folder / "none"
        case = Case(path, next(iter(files.values())), draw)
        fault = None
        try:
            with self._limits:
                outcome = target.execute(case)
        except SurgeryError as error:
            outcome = type(error).__name__
            if (
                type(error) is SurgeryError
                or not error.message.strip()
                or not str(error).replace("\n", "").isprintable()
            ):
                fault = _fault(number, target, seed, error)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # a panic of Rust, and those of the limits, are no Exception
            fault = _fault(number, target, seed, error)
        self.outcomes[target.name, "FAULT" if fault else outcome] += 1
        return fault

    def _written(self, number: int, seed: Seed, files: Mapping[str, bytes]) -> Path:
        """The files of an execution on disk, in the place of the last one's."""
        if self._last is not None:
            shutil.rmtree(self._last)
        self._last = folder = self._folder / f"{number}"
        folder.mkdir()
        for name, raw in files.items():
            if "/" in name:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
            with open(folder / name, "wb", buffering=0) as file:
                file.write(raw)
        return folder / next(iter(files)) if seed.alone else folder


def _fault(number: int, target: Target, seed: Seed, error: BaseException) -> Fault:
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "surgery" in frame.filename.rpartition("/")[0]] or list(frames)
    where = f"{Path(ours[-1].filename).name}:{ours[-1].name}"
    what = f"{type(error).__name__} in {where}: {str(error)[:80]}"
    return Fault(number, target.name, seed.name, what, "".join(traceback.format_exception(error)))
