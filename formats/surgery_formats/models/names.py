# SPDX-License-Identifier: Apache-2.0
"""Resolve a parameter's name in an adapter to weights of a checkpoint.

The same module has several names: they differ between versions of transformers, between bare models and models with a
head, between single and fused experts, and kohya writes underscores. Names are resolved against those that the base
has; nothing is guessed from the adapter's name alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from surgery_formats.errors import FitError
from surgery_formats.models.conversions import expert_parts, pieces_of
from surgery_formats.models.eras import Eras, eras_of, is_known
from surgery_formats.models.expert_stacks import matrices_of, parse_expert_path, part_of
from surgery_formats.models.families.family import Family
from surgery_formats.models.layouts.index import LayoutIndex, Rows
from surgery_formats.models.layouts.registry import indexes_of
from surgery_formats.storage.base import Storage
from surgery_formats.storage.parameter import Parameter
from surgery_formats.storage.plain import Plain
from surgery_formats.tensors.views import View, expert, rows, transpose, window
from surgery_formats.text import listing

__all__ = ["Names", "WeightSlice", "extent"]

_MAX_SPELLINGS = 256  # of one path; families have fewer than ten renames


@dataclass(frozen=True, slots=True)
class WeightSlice:
    """One piece of the weight a site names.

    Attributes:
        parameter: The piece; the origin of its view is its position in the whole weight.
        alias: The tied name that the site used, if it is not the stored one.
    """

    parameter: Parameter
    alias: str = ""


def extent(places: Sequence[WeightSlice]) -> tuple[int, int]:
    """``(rows, columns)`` of the whole weight, whose pieces `places` lie one under the other."""
    pieces = [place.parameter for place in places]
    return max(piece.view.row_origin + piece.shape[0] for piece in pieces), pieces[0].shape[1]


@dataclass(frozen=True)
class Names:
    """The names of one component of a checkpoint.

    Attributes:
        parameters: Weights by name.
        aliases: Names that are not stored (or are copies), with the name whose bytes they are.
        family: Spellings and orientation.
        component: Name of the component.
        config: Its config.json: its model type tells what transformers renames and converts.
        prefix: What the base's names begin with and these do not, where they are those of one network in a file of several.
        inner: Names of the network that an adapter without a component means, where the base has several in one file.
    """

    parameters: Mapping[str, Parameter]
    aliases: Mapping[str, str]
    family: Family
    component: str = ""
    config: Mapping[str, Any] = field(default_factory=dict)
    prefix: str = ""
    inner: Names | None = None

    @cached_property
    def _known(self) -> frozenset[str]:
        return frozenset(self.parameters) | frozenset(self.aliases)

    @cached_property
    def eras(self) -> Eras:
        """The names as the model's code has them."""
        return eras_of(self.config, self._known)

    def misses_factors(self, module: str) -> bool:
        """Whether PEFT misses the LoRA of `module`, a path in the model's code.

        It renames the factors that it loads as if they had the names on disk, though it saved them under those of the
        code (PEFT 0.21, ``convert_peft_adapter_state_dict_for_transformers``).
        """
        factor = f"{module}.lora_A.weight"
        return is_known(self.config) and self.eras.renamed(factor) != factor

    def _stored(self, name: str) -> Parameter:
        return self.parameters[self.aliases.get(name, name)]

    @cached_property
    def _prefixes(self) -> tuple[str, ...]:
        """Leading segments (``transformer``, ``model.language_model``) that a bare model's adapter lacks."""
        prefixes: dict[str, None] = {}
        for name in (*self._known, *self.eras.parameters):
            segments = name.split(".")
            for depth in (1, 2):
                if len(segments) > depth + 1 and not segments[depth - 1].isdigit():
                    prefixes.setdefault(".".join(segments[:depth]))
        return tuple(sorted(prefixes, key=lambda prefix: (prefix.count("."), prefix)))

    @cached_property
    def _flat(self) -> dict[str, list[str]]:
        names: dict[str, list[str]] = {}
        for name in sorted(self._known):
            module, _, leaf = name.rpartition(".")
            names.setdefault(f"{module.replace('.', '_')}.{leaf}", []).append(name)
        for name in (other for index in self._layouts for other in index.other_names()):
            module, _, leaf = name.rpartition(".")
            others = names.setdefault(f"{module.replace('.', '_')}.{leaf}", [])
            others += [] if name in others else [name]
        return names

    @cached_property
    def _layouts(self) -> tuple[LayoutIndex, ...]:
        """The names of its family's other layouts."""
        return indexes_of(self._known, self.config)

    @property
    def networks(self) -> tuple[str, ...]:
        """The families of networks with several layouts that its names are of; several where they tell no more."""
        return tuple(index.network.name for index in self._layouts)

    def resolve(self, path: str, *, flat: bool = False) -> tuple[WeightSlice, ...]:
        """Every piece of the weight called `path`; empty if the base has no such weight.

        Raises:
            FitError: the name fits several weights of the base.
        """
        slices = self._flat_places(path) if flat else self._here(path) or self._under_other_prefixes(path)
        return slices or (self.inner.resolve(path, flat=flat) if self.inner else ())

    def _under_other_prefixes(self, path: str) -> tuple[WeightSlice, ...]:
        for spelling in self._spellings(path):
            if slices := self._places(spelling):
                return slices
        return self._of_another_era(path) or self._within_a_stack(path) or self._without_module(path)

    def _here(self, path: str) -> tuple[WeightSlice, ...]:
        return self._places(path) or self._in_another_layout(path)

    def _without_module(self, path: str) -> tuple[WeightSlice, ...]:
        """A weight that an adapter calls ``blocks.0.modulation.weight``, and that is no module's."""
        own = path.removesuffix(".weight")
        return self._here(own) if own != path else ()

    def resolve_here(self, path: str) -> tuple[WeightSlice, ...]:
        """As `resolve`, of a path whose leading segments are the base's."""
        for spelling in _renamings(path, self.family):
            if slices := self._here(spelling):
                return slices
        return self._of_another_era(path) or self._within_a_stack(path) or self._without_module(path)

    def _of_another_era(self, path: str) -> tuple[WeightSlice, ...]:
        """The weight that an older release, or a file of one, calls `path`, in a base of a newer one."""
        eras = self.eras
        renamed = eras.renamed(path)
        if renamed != path and (slices := self._places(eras.renamings.get(renamed, renamed))):
            return slices
        if (converted := eras.converted(renamed)) is None:
            return ()
        conversion, number, expert_number, targets = converted
        wholes = [self._places(target) for target in targets]
        if not all(wholes):
            return ()
        if expert_number < 0:
            return _below_each_other(wholes) if [step for step, _ in conversion.steps] == ["Chunk"] else ()
        pieces = [place.parameter for place in wholes[0]]
        return tuple(
            WeightSlice(part) for part in expert_parts(pieces, expert_number, number, len(conversion.patterns))
        )

    def _within_a_stack(self, path: str) -> tuple[WeightSlice, ...]:
        """A projection of all experts, or of one, by a program's name, inside the stacks of the model's code."""
        named = parse_expert_path(path)
        if named is None or path == named.stack:
            return ()
        family, found = self.family, list[WeightSlice]()
        whole = [place.parameter for place in self.resolve(named.stack)]
        for number, matrix in enumerate(matrices_of(whole, transposed=family.experts_transposed)):
            if named.number in (None, number):
                origin = extent(found)[0] if found else 0
                parts = part_of(matrix, named.role, interleaved=family.gate_up_interleaved, origin=origin)
                found += map(WeightSlice, parts)
        return tuple(found)

    def _flat_places(self, path: str) -> tuple[WeightSlice, ...]:
        tried = [path, *(f"{prefix}_{path}" for prefix in self._prefixes if "." not in prefix)]
        tried += [path.removeprefix(f"{prefix}_") for prefix in ("text_model",) if path.startswith(f"{prefix}_")]
        for candidate in tried:
            names = self._flat.get(candidate, [])
            places = {name: slices for name in names if (slices := self._here(name))}
            if len({self._weights(slices) for slices in places.values()}) > 1:
                raise FitError(f"'{candidate}' fits {listing(names)}", tensor=path)
            if places:
                return next(iter(places.values()))
        return ()

    def _weights(self, slices: Sequence[WeightSlice]) -> tuple[tuple[str, View], ...]:
        """What tells one weight from another, whatever it is called."""
        pieces = [piece.parameter for piece in slices]
        return tuple((self.aliases.get(piece.name, piece.name), piece.view) for piece in pieces)

    def _in_another_layout(self, name: str) -> tuple[WeightSlice, ...]:
        """The weight that another layout of the family calls `name`: parts of a fused one, or several as one.

        Raises:
            FitError: the base may be of several families, which mean different weights.
        """
        found: dict[tuple[tuple[str, View], ...], tuple[str, tuple[WeightSlice, ...]]] = {}
        for index in self._layouts:
            if slices := self._of_rows(index.rows(name)):
                found.setdefault(self._weights(slices), (index.network.name, slices))
        if len(found) > 1:
            families = listing([family for family, _ in found.values()])
            raise FitError(
                f"'{name}' means different weights in {families}",
                tensor=name,
                hint="give the base as a folder with its config.json",
            )
        return next((slices for _, slices in found.values()), ())

    def called_by(self, name: str, program: str) -> tuple[str, ...]:
        """What a program (``diffusers``, ``OMI``) calls a weight of the base, or its pieces from top to bottom.

        Halves that the program holds the other way round are two pieces of one name. A name that no family knows is the
        same there; nothing where families tell different names.
        """
        found: dict[tuple[str, ...], None] = {}
        for index in self._layouts:
            if pieces := index.pieces_of(name):
                original = program == "OMI" and index.network.denoises  # OMI's text encoders have transformers' names
                found.setdefault(tuple(map(index.in_omi, pieces)) if original else pieces)
        return next(iter(found)) if len(found) == 1 else () if found else (name,)

    def in_release(self, name: str) -> str:
        """What its makers call a weight of the base, or the one that it is a part of.

        A name that no family knows, or of which they tell different things, is the same there.
        """
        found = {told for index in self._layouts if (told := index.in_release(name))}
        return next(iter(found)) if len(found) == 1 else name

    def _of_rows(self, wanted: Sequence[Rows]) -> tuple[WeightSlice, ...]:
        """Rows of stored weights below each other; nothing if a height cannot be divided so."""
        pieces: list[WeightSlice] = []
        origin = 0
        for part in wanted:
            (place,) = self._stored_slice(part.name)
            view = place.parameter.view
            view = transpose(view) if part.transposed else view
            height = view.shape[0]
            if height * part.start % part.parts or height * part.stop % part.parts:
                return ()
            view = rows(view, height * part.start // part.parts, height * part.stop // part.parts)
            pieces.append(replace(place, parameter=replace(place.parameter, view=window(view, row_origin=origin))))
            origin += view.shape[0]
        return tuple(pieces)

    def _stored_slice(self, name: str) -> tuple[WeightSlice, ...]:
        source = self.aliases.get(name, name)
        return (WeightSlice(self.parameters[source], f"{self.prefix}{name}" if source != name else ""),)

    def _spellings(self, path: str) -> Iterator[str]:
        """`path` itself, then renamed, then with a prefix removed or added."""
        renamed = list(_renamings(path, self.family))
        yield from renamed
        shorter = [name.partition(".")[2] for name in renamed if name.count(".") > 1]
        yield from shorter
        longer = [f"{prefix}.{name}" for prefix in self._prefixes for name in renamed]
        places = {name: slices for name in longer if (slices := self._places(name))}
        hits = list(places)
        if len({self._weights(slices) for slices in places.values()}) > 1:
            raise FitError(f"'{path}' fits {listing(hits)}", tensor=path, hint="the base has several models in it")
        yield from hits[:1]

    def _places(self, name: str) -> tuple[WeightSlice, ...]:
        if (era := self.eras.parameters.get(name)) is not None and (
            pieces := pieces_of(name, era, self._stored, self.config)
        ):
            alias = next((stored for stored in era.stored.values() if stored in self.aliases), "")
            return tuple(WeightSlice(piece, alias) for piece in pieces)
        if name in self._known:
            return self._stored_slice(name)
        module, _, leaf = name.rpartition(".")
        if (
            leaf in ("weight", "bias") and (fused := f"{module}.in_proj_{leaf}") in self.parameters
        ):  # torch's MultiheadAttention
            return (WeightSlice(self.parameters[fused]),)
        return self._split_here(name) or self._fused_here(name)

    def _split_here(self, name: str) -> tuple[WeightSlice, ...]:
        """The parts of a stack of experts (``experts.gate_up_proj``) that the base stores in another way."""
        for fused in self.family.fused:
            if not name.endswith(f".{fused.whole}"):
                continue
            base = name.removesuffix(fused.whole)
            pieces: list[WeightSlice] = []
            row = number = 0
            while parts := [
                parameter for part in fused.parts if (parameter := self._piece(f"{base}{part.format(e=number)}"))
            ]:
                if len(parts) != len(fused.parts):
                    raise FitError(
                        f"the base has only {len(parts)} of {len(fused.parts)} parts of expert {number} of '{name}'"
                    )
                for parameter in parts:
                    view = window(parameter.view, row_origin=row)
                    pieces.append(WeightSlice(replace(parameter, view=view)))
                    row += parameter.shape[0]
                number += 1
            if pieces:
                return tuple(pieces)
        return ()

    def _piece(self, name: str) -> Parameter | None:
        """The parameter of one expert's part: a tensor of its own, or a slice of a 3-D tensor."""
        if name in self.parameters:
            return self.parameters[name]
        slices = self._fused_here(name)
        return slices[0].parameter if slices else None

    def _fused_here(self, name: str) -> tuple[WeightSlice, ...]:
        """One expert's part (``experts.3.w1.weight``) of a 3-D tensor in which the base stores all experts."""
        for fused in (*self.family.fused, *self.family.numbered):
            for position, part in enumerate(fused.parts):
                number = _expert_number(name, part)
                if number is None:
                    continue
                stored = f"{name.removesuffix(part.format(e=number))}{fused.whole}"
                stack = self.parameters.get(stored)
                if stack is None or len(stack.sizes) != 3 or number >= stack.sizes[0]:
                    continue
                count, *shape = stack.sizes
                view = expert(number, count, (shape[0], shape[1]))
                if self.family.experts_transposed:
                    if stack.storage.elements is None:
                        continue
                    view = transpose(view)
                height = view.shape[0] // len(fused.parts)
                view = rows(view, position * height, (position + 1) * height)
                return (WeightSlice(replace(stack, storage=_stacked(stack.storage), view=view)),)
        return ()


def _below_each_other(wholes: Sequence[tuple[WeightSlice, ...]]) -> tuple[WeightSlice, ...]:
    """Weights as the parts of one, in order."""
    placed: list[WeightSlice] = []
    row = 0
    for places in wholes:
        for place in places:
            view = window(place.parameter.view, row_origin=row)
            placed.append(replace(place, parameter=replace(place.parameter, view=view)))
        row += extent(places)[0]
    return tuple(placed)


def _stacked(storage: Storage) -> Storage:
    """The storage read as stacked experts, with one row of its matrix per row of an expert, whatever its name."""
    return storage if storage.elements is None else Plain.of(storage.elements, stacked=True)


def _expert_number(name: str, part: str) -> int | None:
    head, _, tail = part.partition("{e}")
    before, separator, after = name.rpartition(f".{head}")
    digits, _, rest = after.partition(".")
    return (
        int(digits) if separator and digits.isdecimal() and len(digits) < 6 and f".{rest}" == tail and before else None
    )


def _renamings(path: str, family: Family) -> Iterator[str]:
    """`path` and its spellings under the family's renames, fewest renames first."""
    queue, seen = [path], {path}
    while queue and len(seen) < _MAX_SPELLINGS:
        name = queue.pop(0)
        yield name
        for rename in family.renames:
            for source, target in ((rename.new, rename.old), (rename.old, rename.new)):
                changed = f".{name}.".replace(f".{source}.", f".{target}.")[1:-1]
                if changed not in seen and f".{source}." in f".{name}.":
                    seen.add(changed)
                    queue.append(changed)
