# SPDX-License-Identifier: Apache-2.0
"""Adapters of `matrix_rows`, converted to every format: what comes of each pair, and the proof that it is that."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any, Literal

import numpy as np
from safetensors.numpy import load_file

import surgery
from surgery_formats.adapters.registry import formats, read_adapter
from surgery_formats.binding.parts import in_its_part
from surgery_formats.binding.sizes import sized
from surgery_formats.canonical.adapter import Adapter
from surgery_formats.errors import FitError, SurgeryError
from tests.support.adapter_files import Arrays
from tests.support.matrix_rows import Column, Source

__all__ = ["RANK", "Outcome", "Pair", "outcome", "outcomes"]

RANK = 4  # of LoRAs that stand for other kinds

Word = Literal["exact", "folded", "approximated", "impossible"]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What comes of a conversion.

    Attributes:
        word: The worst of what became of its updates, or that it is impossible.
        error: The certified error of what is approximated.
        why: Why it is impossible.
        as_lora: Whether LoRAs stand for other kinds.
        by_part: Whether each part of a pipeline is written by itself.
    """

    word: Word
    error: float = 0.0
    why: str = ""
    as_lora: bool = False
    by_part: bool = False


@dataclass(frozen=True, slots=True)
class Pair:
    """A conversion and what came of it."""

    source: Source
    column: Column
    outcome: Outcome


def outcomes(source: Source, folder: Path) -> Iterator[Pair]:
    """Convert an adapter to every format, and prove what is written.

    Raises:
        AssertionError: what was written is not what was meant.
    """
    folder.mkdir(parents=True, exist_ok=True)
    effect = _Effect(source, folder)
    for number, column in enumerate(source.columns):
        yield Pair(source, column, _outcome(source, column, effect, folder / str(number), RANK))


def outcome(source: Source, column: Column, folder: Path, rank: int | None = RANK) -> Outcome:
    """Convert an adapter to one format, to LoRAs only if a rank is given.

    Raises:
        AssertionError: what was written is not what was meant.
    """
    folder.mkdir()
    return _outcome(source, column, _Effect(source, folder), folder / "to", rank)


def _outcome(source: Source, column: Column, effect: _Effect, folder: Path, rank: int | None) -> Outcome:
    parts = sorted({site.component for site in source.adapter.updates})
    ways: list[dict[str, Any]] = [{"": {}}]
    if len(parts) > 1 and rank:
        ways.append({part: {"component": part} for part in parts})
    options: list[dict[str, Any]] = [{}]
    if rank and any(update.low_rank() is None for chain in source.adapter.updates.values() for update in chain):
        options += [{"as_lora": True}, {"as_lora": True, "rank": rank}]
    refused: list[FitError] = []
    for option, way in product(options, ways):
        folder.mkdir()
        try:
            results = [_converted(source, column, folder / f"to{part}", **option, **more) for part, more in way.items()]
        except FitError as error:
            refused.append(error)
            shutil.rmtree(folder)
            continue
        error = max(result.max_approximation for result in results)
        effect.check(list(map(_read_back, results)), column.format, error)
        shutil.rmtree(folder)
        found = {entry.outcome for result in results for entry in result.entries}
        worst = next(word for word in WORST if word in found)
        return Outcome(worst, error, as_lora=bool(option), by_part=len(way) > 1)
    return Outcome("impossible", why=_reason(source, column, refused[0]))


WORST: tuple[Word, ...] = ("approximated", "folded", "exact")
SUFFIXES = {"gguf": ".gguf", "loralib": ".pt", "onnx-adapter": ".onnx_adapter"}


def _converted(source: Source, column: Column, where: Path, **options: Any) -> surgery.ConvertResult:
    suffix = SUFFIXES.get(column.format, ".safetensors") if formats()[column.format].single_file else ""
    return surgery.convert(
        source.adapter,
        column.format,
        output=f"{where}{suffix}",
        base=source.base,
        dialect=column.dialect or None,
        **options,
    )


def _read_back(result: surgery.ConvertResult) -> Adapter:
    """What was written, with the alpha that a reader is told to give."""
    assert result.output is not None
    told = [found for warning in result.warnings if (found := re.search(r"read with alpha (\S+)", warning))]
    return read_adapter(result.output, float(told[0][1]) if told else None)


def _reason(source: Source, column: Column, error: FitError) -> str:
    """What the writer says of what it drops, or the error where it says nothing."""
    target = formats()[column.format]
    adapter = source.adapter
    if source.base is not None:
        adapter = sized(in_its_part(adapter, source.base), source.base)
    try:
        entries = target.render(adapter, source.base).entries
    except SurgeryError:
        return error.message
    dropped = [entry.detail for entry in entries if entry.outcome == "dropped"]
    if not dropped:
        return error.message
    some = "some parts: " if len(dropped) < len(entries) else ""
    return some + "; ".join(sorted(dict.fromkeys(detail.partition(": ")[2] or detail for detail in dropped)))


class _Effect:
    """What an adapter does to its base; where there is nothing to merge, the numbers that it has."""

    def __init__(self, source: Source, folder: Path) -> None:
        self.source, self.folder = source, folder
        self.weights: Arrays | None = None
        if source.base is not None:
            try:
                self.weights = self._merged([source.adapter])
            except FitError:
                self.weights = None
        self.numbers = None if self.weights is not None else _numbers(source.adapter)

    def _merged(self, adapters: list[Any]) -> Arrays:
        assert self.source.base is not None
        out = self.folder / "merged"
        surgery.merge(self.source.base, adapters, output=out)
        found = {
            f"{file.parent.relative_to(out)}/{name}": value
            for file in sorted(out.rglob("*.safetensors"))
            for name, value in load_file(file).items()
        }
        shutil.rmtree(out)
        return found

    def check(self, written: list[Adapter], format: str, error: float) -> None:
        """`written` does the same, up to what a float of the base can tell, or within the certified error."""
        assert {one.format for one in written} == {format}, [(one.format, one.path) for one in written]
        if self.weights is None:
            assert np.array_equal(np.sort(np.concatenate([_numbers(one) for one in written])), self.numbers)
            return
        assert self.source.base is not None
        before, got = _stored(self.source.base.path), self._merged(written)
        assert got.keys() == self.weights.keys(), sorted(got.keys() ^ self.weights.keys())[:5]
        groups: dict[str, list[str]] = {}
        for name in self.weights:  # the error of a stack of experts is that of the stack
            groups.setdefault(_STACKED.sub(r"\1", name) if error else name, []).append(name)
        for name, members in groups.items():
            wanted = np.concatenate([self.weights[one].reshape(-1) for one in members])
            change = wanted - np.concatenate([_grown(before[one], self.weights[one]).reshape(-1) for one in members])
            missed = np.concatenate([got[one].astype(np.float64).reshape(-1) for one in members]) - wanted
            rounding = float(np.finfo(wanted.dtype).eps) * abs(wanted).max()
            if error:
                limit = 1.0001 * error * np.linalg.norm(change) + rounding * wanted.size**0.5
                assert np.linalg.norm(missed) <= limit, f"{name}: {np.linalg.norm(missed) / np.linalg.norm(change):.3g}"
            else:
                assert abs(missed).max() <= 1e-6 * abs(change).max() + rounding, name


def _grown(values: np.ndarray, like: np.ndarray) -> np.ndarray:
    """In float64, with zeros where a weight has new inputs."""
    grown = np.zeros(like.shape)
    grown[tuple(slice(size) for size in values.shape)] = values
    return grown


_STACKED = re.compile(r"(experts\.)\d+\..*")


def _numbers(adapter: Adapter) -> np.ndarray:
    """All numbers of its tensors that do something, in order of size."""
    idle = {entry.tensor.name for entry in adapter.ignored}
    told = [tensor.read().astype(np.float64).reshape(-1) for tensor in adapter.tensors if tensor.name not in idle]
    return np.sort(np.concatenate(told))


@cache
def _stored(root: Path) -> Arrays:
    files = [root] if root.is_file() else sorted(root.rglob("*.safetensors"))
    top = root.parent if root.is_file() else root
    return {
        f"{file.parent.relative_to(top)}/{name}": value for file in files for name, value in load_file(file).items()
    }
