# SPDX-License-Identifier: Apache-2.0
"""The side files of a merge: the base's, and sets that adapters were trained with in their place.

A tokenizer, a processor and the modules of sentence-transformers are each one set (`surgery_formats.models.sets_beside`):
where an adapter brings one that differs from the base's, the output has the adapter's, whole. Files without a set, such as
a value head, are added.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from surgery.engine.plan import SideFile
from surgery_formats.binding.bind import Binding
from surgery_formats.canonical.adapter import Adapter
from surgery_formats.files.raw import open_file
from surgery_formats.models.identity import fingerprint
from surgery_formats.models.sets_beside import CODE, is_whole_set, same_bytes, sets_beside
from surgery_formats.text import listing, show

__all__ = ["CarriedFiles", "carried_files"]


@dataclass(frozen=True, slots=True)
class CarriedFiles:
    """Side files of an output.

    Attributes:
        files: The files.
        facts: By set: the adapter it was taken from, and a digest of each file; for manifest and summary.
        warnings: Sets that could not be chosen.
    """

    files: list[SideFile]
    facts: Mapping[str, Mapping[str, object]]
    warnings: tuple[str, ...]


def carried_files(binding: Binding, grown: Collection[int]) -> CarriedFiles:
    """The base's side files, with the adapters' sets where these differ.

    Args:
        binding: Of the merge.
        grown: Numbers of adapters that bring a vocabulary of another size: their tokenizer belongs to it.
    """
    base = binding.checkpoint
    files = dict(base.side_files)
    facts: dict[str, Mapping[str, object]] = {}
    warnings: list[str] = []
    whole_model = base.path.is_dir() and not base.is_pipeline
    own = sets_beside(base.path) if whole_model and _any_beside(binding) else {}
    for what, brought in _brought(binding).items():
        differing = {number: names for number, names in brought.items() if _differs(names, own.get(what, {}))}
        differing = {n: names for n, names in differing.items() if whole_model or (n in grown and what == "tokenizer")}
        if not differing:
            continue
        chosen = next((number for number in differing if number in grown), min(differing))
        others = [number for number in differing if number != chosen and _differs(differing[number], differing[chosen])]
        adapter = binding.adapters[chosen][0]
        if others and chosen not in grown:
            named = listing(f"'{binding.adapters[number][0].path.name}'" for number in (chosen, *others))
            warnings.append(f"{named} each bring another {what}: the base's is kept")
            continue
        if what and is_whole_set(what, differing[chosen]):
            for name in own.get(what, {}):
                if not name.endswith(CODE):
                    files.pop(name, None)
        files |= differing[chosen]
        facts[what or "files"] = {
            "adapter": show(adapter.path.resolve().name),
            "files": {name: fingerprint(open_file(path)) for name, path in differing[chosen].items()},
        }
    return CarriedFiles([SideFile(name, source=files[name]) for name in sorted(files)], facts, tuple(warnings))


def _any_beside(binding: Binding) -> bool:
    return any(adapter.side_files for adapter, _ in binding.adapters)


def _brought(binding: Binding) -> dict[str, dict[int, dict[str, Path]]]:
    """Sets of the adapters, by what they are and the adapter's number; "" for files that are in none."""
    brought: dict[str, dict[int, dict[str, Path]]] = {}
    for number, (adapter, _) in enumerate(binding.adapters):
        for what, names in _sets(adapter):
            brought.setdefault(what, {})[number] = names
    return brought


def _sets(adapter: Adapter) -> Iterator[tuple[str, dict[str, Path]]]:
    if not adapter.side_files:
        return
    rest = dict(adapter.files_beside)
    for what, names in sets_beside(adapter.path).items():
        if mine := {name: rest.pop(name) for name in names if name in rest}:
            yield what, mine
    if rest:
        yield "", rest


def _differs(names: Mapping[str, Path], own: Mapping[str, Path]) -> bool:
    """Whether some of these files are not among `own` with the same content."""
    return any(name not in own or not same_bytes(path, own[name]) for name, path in names.items())
