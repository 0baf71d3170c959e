# SPDX-License-Identifier: Apache-2.0
"""What every adapter format must do: checks for a test suite, each of which raises AssertionError.

@pytest.mark.parametrize("check", FORMAT_CHECKS, ids=lambda check: check.__name__)
def test_the_format_conforms(check, tmp_path):
    check(FormatCase(MINE, write_mine), tmp_path)
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import ClassVar

import numpy

from surgery_formats.adapters.format import Format, OnlyRead, Rendering
from surgery_formats.arrays import Array, cast
from surgery_formats.binding.sizes import sized
from surgery_formats.canonical.adapter import Adapter, Site
from surgery_formats.models.checkpoint import Checkpoint
from surgery_formats.tensors.tensor import Tensor, as_bytes
from surgery_formats.testing.foreign import foreign_paths
from surgery_formats.testing.memory import adapter_of, in_memory
from surgery_formats.testing.promise import promised
from surgery_formats.testing.update import UpdateCase, accounts_for_its_tensors, answers_every_question
from surgery_formats.updates import Apply, Effect, Factor, Fit, Update, Weight, is_unsized
from surgery_formats.updates.weights import HeldWeight

__all__ = ["FORMAT_CHECKS", "FormatCase", "assert_same_effect", "save"]


@dataclass(frozen=True, slots=True)
class FormatCase:
    """A format under test.

    Attributes:
        format: The object.
        write: Writes an adapter into a folder with the format's original program, or at least without `format`, and
            returns the path that `format` reads.
        base: The model it is for, for a format that needs one to write.
        tolerance: Greatest error of what it writes, relative to the greatest value of a weight.
    """

    format: Format
    write: Callable[[Path], Path]
    base: Checkpoint | None = None
    tolerance: float = 1e-6

    def read(self, folder: Path) -> Adapter:
        """The adapter, as its format reads it, with the sizes that the base knows."""
        adapter = self.format.read(self.write(folder))
        return adapter if self.base is None else sized(adapter, self.base)

    def written(self, adapter: Adapter, folder: Path) -> Adapter:
        """`adapter` written by the format, and read again."""
        written = self.format.read(save(self.format.render(adapter, self.base), self.format, folder))
        return written if self.base is None else sized(written, self.base)


def detects_its_own(case: FormatCase, folder: Path) -> None:
    """`detect` knows what the program wrote, and what `render` gives; in a folder, `file_stems` match its weights."""
    path = case.write(folder)
    assert case.format.detect(path)
    rendering = case.format.render(case.read(folder), case.base)
    if isinstance(case.format, OnlyRead):
        assert not rendering.tensors
    else:
        assert case.format.detect(save(rendering, case.format, folder))
    name = rendering.tensor_file
    stems = (name.partition(".")[0], name.rpartition(".")[0])
    assert case.format.single_file or any(fnmatchcase(stem, own) for own in case.format.file_stems for stem in stems)


def is_silent_about_foreign_files(case: FormatCase, folder: Path) -> None:
    """`detect` is False, and raises nothing, for what is missing, empty, garbage or no file at all."""
    for path in foreign_paths(folder, ("file", "adapter.safetensors", "folder")):
        assert case.format.detect(path) is False, path
    for name in ("adapter_config.json", "adapter.safetensors", "config.json"):
        for path in foreign_paths(folder, (name,)):
            if os.path.lexists(path):
                assert case.format.detect(path.parent) in (True, False), path


def accounts_for_every_tensor(case: FormatCase, folder: Path) -> None:
    """Every tensor is used by an update, is the prompt, or is ignored for a reason; updates answer for themselves."""
    adapter = case.read(folder)
    assert adapter.format == case.format.name
    assert adapter.tensors
    assert not adapter.unconsumed()
    assert all(entry.reason for entry in adapter.ignored)
    assert adapter.updates or adapter.prompt
    for chain in adapter.updates.values():
        assert chain
        for update in chain:
            fit = Fit(_shape((update,)), 1, _shape((update,)))
            answers_every_question(UpdateCase(update, fit))
            accounts_for_its_tensors(UpdateCase(update, fit))


def writes_what_it_reads(case: FormatCase, folder: Path) -> None:
    """Read, written and read again, an adapter is the same in the canonical form."""
    adapter = case.read(folder)
    if _is_only_read(case, adapter):
        return
    written = case.written(adapter, folder)
    assert_same_effect(adapter, written, case.tolerance)
    assert written.optional == adapter.optional
    assert written.keeps_ties == adapter.keeps_ties
    assert (written.task, written.stored_transposed) == (adapter.task, adapter.stored_transposed)


def writes_an_adapter_without_a_file(case: FormatCase, folder: Path) -> None:
    """An adapter built in memory is written like one that was read: names and formats of the source do not matter."""
    adapter = case.read(folder)
    if _is_only_read(case, adapter):
        return
    detached = replace(in_memory(adapter), optional=adapter.optional, new_modules=adapter.new_modules)
    assert_same_effect(adapter, case.written(detached, folder), case.tolerance)


def names_what_it_drops(case: FormatCase, folder: Path) -> None:
    """Every update is held or named as dropped with a reason, one of an unknown kind too."""
    adapter = case.read(folder)
    site = next(iter(adapter.updates), None)
    if site is None:
        return
    like = next(iter(adapter.updates[site]))
    strange = _Strange(next(iter(like.factors().values())), like.shape)
    odd = adapter_of({**adapter.updates, site: (*adapter.updates[site], strange)}, adapter)
    for source in (odd, replace(odd, format=adapter.format, config=adapter.config, kind=adapter.kind)):
        rendering = case.format.render(source, case.base)
        dropped = [entry for entry in rendering.entries if entry.outcome == "dropped"]
        assert str(site) in {entry.site for entry in dropped}
        assert all(entry.detail for entry in dropped)
        held = sum(len(chain) for chain in rendering.held.values())
        assert held + len(dropped) == sum(len(chain) for chain in source.updates.values())
        assert strange not in rendering.held.get(site, ())


def renders_the_same_twice(case: FormatCase, folder: Path) -> None:
    """Names, types, shapes, configuration and ledger depend on the adapter alone."""
    adapter = case.read(folder)
    first, second = (case.format.render(adapter, case.base) for _ in range(2))
    assert [(t.name, t.dtype, t.shape) for t in first.tensors] == [(t.name, t.dtype, t.shape) for t in second.tensors]
    assert (first.small_files, first.metadata, first.entries) == (second.small_files, second.metadata, second.entries)


FORMAT_CHECKS: tuple[Callable[[FormatCase, Path], None], ...] = promised(
    "format",
    lambda case: case.format.name,
    (
        detects_its_own,
        is_silent_about_foreign_files,
        accounts_for_every_tensor,
        writes_what_it_reads,
        writes_an_adapter_without_a_file,
        names_what_it_drops,
        renders_the_same_twice,
    ),
)


def _is_only_read(case: FormatCase, adapter: Adapter) -> bool:
    """Whether the format is not written; it says why then, and nothing of `adapter` is in its rendering."""
    if not isinstance(case.format, OnlyRead):
        return False
    rendering = case.format.render(adapter, case.base)
    assert case.format.only_read
    assert not [*rendering.tensors, *rendering.held, *rendering.small_files]
    return True


def save(rendering: Rendering, format: Format, folder: Path) -> Path:
    """Write a rendering into a new place in `folder`, without the care that `surgery.convert` takes."""
    count = sum(1 for _ in folder.glob("saved*"))
    suffix = Path(rendering.tensor_file).suffix
    target = folder / (f"saved{count}{suffix}" if format.single_file else f"saved{count}")
    file = target if format.single_file else target / rendering.tensor_file
    file.parent.mkdir(exist_ok=True)
    packed = rendering.packing([(t.name, t.dtype, t.shape) for t in rendering.tensors], rendering.metadata)
    tensors = {tensor.name: tensor for tensor in rendering.tensors}
    data = (
        (name, as_bytes(numpy.ascontiguousarray(cast(tensors[name].load(), tensors[name].dtype))))
        for name in packed.ranges
    )
    with open(file, "wb") as stream:
        for offset, piece in packed.pieces(data):
            stream.seek(offset)
            stream.write(piece)
    for name, content in rendering.small_files.items():
        (target / name).write_bytes(content)
    return target


def assert_same_effect(adapter: Adapter, other: Adapter, tolerance: float = 1e-6) -> None:
    """Two adapters change the same parameters, each in the same way: tried on a weight of random numbers."""
    mine, theirs = _placed(adapter), _placed(other)
    assert mine.keys() == theirs.keys()
    assert (adapter.prompt is None) == (other.prompt is None)
    for site, chain in mine.items():
        weight = _weight(_shape((*chain, *theirs[site])))
        result, expected = _applied(theirs[site], weight), _applied(chain, weight)
        error = float(abs(result - expected).max()) / float(abs(expected).max())
        assert error <= tolerance, f"{site}: {error:.1e}"


def _placed(adapter: Adapter) -> Mapping[Site, tuple[Update, ...]]:
    """Updates by site, the one part of a pipeline left out that the files of a format may not name."""
    parts = {site.component for site in adapter.updates}
    if len(parts) > 1:
        return adapter.updates
    return {replace(site, component=""): chain for site, chain in adapter.updates.items()}


def _shape(chain: tuple[Update, ...]) -> tuple[int, int]:
    """Sizes of a weight that all of `chain` fit."""
    rows, cols = (max(update.shape[axis] for update in chain) for axis in (0, 1))
    return rows or 12, cols or 12


def _weight(shape: tuple[int, int]) -> Array:
    return numpy.random.default_rng(0).standard_normal(shape)


def _applied(chain: tuple[Update, ...], weight: Array) -> Array:
    """`weight` after a chain of updates."""
    for update in chain:
        fit = Fit((weight.shape[0], weight.shape[1]), 1, (weight.shape[0], weight.shape[1]))
        fitted = update.fitted(fit) if is_unsized(update) else update
        result = weight.copy()
        for first, part in fitted.parts():
            rows = range(part.shape[0]) if part.effect != "sets" else range(len(weight))
            block = slice(first, first + len(rows))
            apply = part.prepare(HeldWeight(weight[block]))
            result[block] = apply(weight[block].copy(), rows, range(weight.shape[1]))
        weight = result
    return weight


@dataclass(frozen=True, slots=True)
class _Strange:
    """An update of a kind that no format has: ``W' = 2 W``, with a tensor that it does not need."""

    kind: ClassVar[str] = "strange"
    needs_weight: ClassVar[bool] = False
    effect: ClassVar[Effect] = "maps"
    rank: ClassVar[None] = None
    alpha: ClassVar[None] = None
    scale: ClassVar[None] = None
    untrained: ClassVar[tuple[()]] = ()

    value: Factor
    shape: tuple[int, int]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.value.tensors

    def factors(self) -> dict[str, Factor]:
        return {"value": self.value}

    def low_rank(self) -> None:
        return None

    def parts(self) -> tuple[tuple[int, Update], ...]:
        return ((0, self),)

    def prepare(self, weight: Weight) -> Apply:
        return lambda block, rows, cols: 2 * block
