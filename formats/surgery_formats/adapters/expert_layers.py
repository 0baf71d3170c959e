# SPDX-License-Identifier: Apache-2.0
"""An adapter's experts by layer, projection and number: the form between all dialects that files have for them.

Dialects differ in what they stack, fuse, share and call by which name. Each is an index map from and to this form, in
which every expert of every projection has one LoRA of its ``(out, in)`` matrix.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

from surgery_formats.adapters.contents import contents_of
from surgery_formats.adapters.writing import factor_dtype
from surgery_formats.arrays import Array, namespace
from surgery_formats.binding.sizes import component_of
from surgery_formats.canonical.adapter import Adapter, Site
from surgery_formats.dtypes import DType
from surgery_formats.errors import FitError
from surgery_formats.models.checkpoint import Checkpoint
from surgery_formats.models.component import Component
from surgery_formats.models.expert_stacks import ExpertPath, ExpertRole, matrices_of, parse_expert_path, part_rows
from surgery_formats.tensors.views import positions
from surgery_formats.updates import Factor, LoRA, Update

__all__ = ["ExpertLayer", "ExpertStack", "expert_layers", "has_gate", "is_expert"]

_PARTS: tuple[ExpertRole, ExpertRole] = ("gate_proj", "up_proj")


@dataclass(frozen=True)
class ExpertStack:
    """One projection of all experts of a layer; an expert that was not trained is absent.

    Attributes:
        role: The projection.
        shape: ``(out, in)`` of each expert.
        count: Of experts in the layer.
        loras: By number.
        folded: Whether a scale was multiplied into their factors.
    """

    role: ExpertRole
    shape: tuple[int, int]
    count: int
    loras: Mapping[int, LoRA]
    folded: bool = False

    @property
    def rank(self) -> int:
        """The greatest of all experts; 1 if none was trained, of zeros."""
        return max((lora.rank for lora in self.loras.values()), default=1)

    @property
    def scale(self) -> float:
        """The experts' scale, or 1 if they have several."""
        scales = {lora.scale for lora in self.loras.values()}
        return scales.pop() if len(scales) == 1 else 1.0

    def evened(self, rank: int, scale: float) -> str:
        """What one rank and scale of all experts takes, for the ledger; empty if they have it."""
        ranks = {lora.rank for lora in self.loras.values()} - {rank}
        scales = {lora.scale for lora in self.loras.values()} - {scale}
        said = [f"rank {min(ranks)} padded to {rank}"] if ranks else []
        said += [f"scale {min(scales):g} / {scale:g}"] if scales else []
        said += [f"zeros for {self.count - len(self.loras)} experts"] if len(self.loras) < self.count else []
        return ", ".join(said)

    def a(self, rank: int) -> Array:
        """All A, ``(count, rank, in)``, with zeros where there are fewer directions."""
        import numpy

        whole = numpy.zeros((self.count, rank, self.shape[1]))
        for number, lora in self.loras.items():
            whole[number, : lora.rank] = lora.A.load(DType.F64)
        return whole

    def b(self, rank: int, scale: float) -> Array:
        """All B, ``(count, out, rank)``, so that `scale` is every expert's."""
        import numpy

        whole = numpy.zeros((self.count, self.shape[0], rank))
        for number, lora in self.loras.items():
            values = lora.B.load(DType.F64)
            whole[number, :, : lora.rank] = values if lora.scale == scale else values * (lora.scale / scale)
        return whole

    def dtype(self, side: Literal["A", "B"], scale: float) -> DType:
        """The type to store all A or B in, where `scale` is to be every expert's."""
        factors = [lora.A if side == "A" else lora.B for lora in self.loras.values()]
        folded = side == "B" and (self.folded or any(lora.scale != scale for lora in self.loras.values()))
        return factor_dtype(factors, folded=folded) if factors else DType.F32

    def shared(self, side: Literal["A", "B"]) -> bool:
        """Whether all experts have one A, or one B and one scale."""
        loras = list(self.loras.values())
        if len(loras) < self.count or len({lora.scale for lora in loras}) > 1:
            return False
        first, *others = (lora.A if side == "A" else lora.B for lora in loras)
        return all(_same(first, other) for other in others)


@dataclass(frozen=True)
class ExpertLayer:
    """The experts of one layer, and what an adapter does to them.

    Attributes:
        module: Path of the module that holds them in the model's code.
        component: The component that has it.
        stacks: By projection: of gate and up together, or of either alone, and down.
        updates: What the adapter has of them, by site.
    """

    module: str
    component: Component
    stacks: Mapping[ExpertRole, ExpertStack]
    updates: tuple[tuple[Site, Update], ...] = field(default=(), compare=False)

    @cached_property
    def interleaved(self) -> bool:
        """Whether rows of gate and up alternate where the model's code has them in one stack."""
        return self.component.family.gate_up_interleaved

    @cached_property
    def transposed(self) -> bool:
        """Whether the model's code has each expert as ``(in, out)``."""
        return self.component.family.experts_transposed

    def split(self) -> dict[ExpertRole, ExpertStack]:
        """Gate and up apart: both have A, each its rows of B."""
        whole = self.stacks.get("gate_up_proj")
        if whole is None:
            return dict(self.stacks)
        height, width = whole.shape
        parts = {role: part_rows(role, height, interleaved=self.interleaved) for role in _PARTS}
        apart: dict[ExpertRole, ExpertStack] = {
            role: replace(
                whole,
                role=role,
                shape=(len(taken), width),
                loras={number: _rows(lora, taken) for number, lora in whole.loras.items()},
            )
            for role, taken in parts.items()
        }
        return {**apart, **{role: stack for role, stack in self.stacks.items() if role == "down_proj"}}

    def fused(self) -> dict[ExpertRole, ExpertStack]:
        """Gate and up in one stack: with the A of both if that is one, else with the directions of both."""
        gate, up = (self.stacks.get(role) for role in _PARTS)
        known = gate or up
        if known is None:
            return dict(self.stacks)
        height = 2 * known.shape[0]
        places = {role: part_rows(role, height, interleaved=self.interleaved) for role in _PARTS}
        sides = [(stack, places[role]) for role, stack in zip(_PARTS, (gate, up), strict=True) if stack is not None]
        numbers = sorted({number for stack, _ in sides for number in stack.loras})
        loras = {
            number: _together([(stack.loras[number], at) for stack, at in sides if number in stack.loras], height)
            for number in numbers
        }
        scales = {lora.scale for stack, _ in sides for lora in stack.loras.values()}
        whole = ExpertStack("gate_up_proj", (height, known.shape[1]), known.count, loras, folded=len(scales) > 1)
        both: dict[ExpertRole, ExpertStack] = {"gate_up_proj": whole}
        return both | {role: stack for role, stack in self.stacks.items() if role == "down_proj"}

    @cached_property
    def stem(self) -> str:
        """The path on the disk of what holds the module of the experts."""
        named = parse_expert_path(f"{self.single(next(iter(self.split())), 0)}.weight")
        return named.stem if named else self.module.removesuffix(".experts")

    def empty(self, role: ExpertRole) -> ExpertStack:
        """A projection of which no expert was trained."""
        place = _place(ExpertPath(self.module.removesuffix(".experts"), role), self.component)
        if place is None:
            raise FitError(f"the base does not tell the shape of '{self.module}.{role}'")
        return ExpertStack(role, place[1], place[2], {})

    def single(self, role: ExpertRole, number: int) -> str:
        """The path on the disk of one expert's projection, as the base or its family has it; without ``.weight``."""
        place = self.component.names.resolve(f"{self.module}.{number}.{role}.weight")
        stored = [piece.parameter for piece in place]
        if (
            len(stored) == 1
            and stored[0].is_whole
            and (named := parse_expert_path(stored[0].name))
            and named.number is not None
        ):
            return stored[0].name.removesuffix(".weight")
        return f"{self.module}.{number}.{role}"


def is_expert(site: Site) -> bool:
    """Whether a site's path names experts."""
    return parse_expert_path(site.path) is not None


def expert_layers(adapter: Adapter, base: Checkpoint) -> tuple[tuple[ExpertLayer, ...], Mapping[Site, str]]:
    """The layers whose experts an adapter changes, and why some of its experts are in none of them.

    Raises:
        FitError: the base has no such component.
    """
    found: dict[str, ExpertLayer] = {}
    left: dict[Site, str] = {}
    gates: dict[tuple[str, str], bool] = {}
    for site, chain in adapter.updates.items():
        named = parse_expert_path(site.path)
        if named is None:
            continue
        component = component_of(site, base)
        home = (site.component, named.stem)
        if home not in gates:
            gates[home] = has_gate(named, component)
        if not gates[home]:
            left[site] = "how experts without a gate are held in it is not known"
            continue
        known = _place(named, component)
        loras = [_loras(site, update, named, component) for update in chain]
        if known is None or not all(loras):
            left[site] = "the base does not tell its experts" if known is None else f"stacks have no {chain[0].kind}"
            continue
        module, shape, count = known
        for update, changed in zip(chain, loras, strict=True):
            layer = found.get(module, ExpertLayer(module, component, {}))
            stack = layer.stacks.get(named.role, ExpertStack(named.role, shape, count, {}))
            if stack.loras.keys() & changed.keys() or any(number >= count for number in changed):
                left[site] = "a second one on one expert" if stack.loras.keys() & changed.keys() else "too many experts"
                continue
            stack = replace(stack, loras={**stack.loras, **changed})
            found[module] = replace(
                layer, stacks={**layer.stacks, named.role: stack}, updates=(*layer.updates, (site, update))
            )
    return tuple(found[module] for module in sorted(found)), left


def has_gate(named: ExpertPath, component: Component) -> bool:
    """Whether experts that the base has, as far as it can be told, are gate, up and down; Nemotron H's are up and down."""
    names = component.names
    if names.resolve(replace(named, role="gate_up_proj").stack):
        return True
    return not any(names.resolve(f"{named.stem}.experts.{role}") for role in ("up_proj", "down_proj"))


def _place(named: ExpertPath, component: Component) -> tuple[str, tuple[int, int], int] | None:
    """``(module in the model's code, (out, in) of the projection, experts)`` of a path, if the base has them."""
    names = component.names
    whole = [place.parameter for place in names.resolve(named.stack)]
    matrices = matrices_of(whole, transposed=component.family.experts_transposed) if whole else ()
    if not matrices:
        return None
    live = names.eras.live(whole[0].name)
    home = parse_expert_path(live)
    module = f"{home.stem if home else named.stem}.experts"
    height, width = sum(piece.shape[0] for piece in matrices[0]), matrices[0][0].shape[1]
    taken = part_rows(named.role, height, interleaved=component.family.gate_up_interleaved)
    return module, (len(taken), width), len(matrices)


def _loras(site: Site, update: Update, named: ExpertPath, component: Component) -> dict[int, LoRA]:
    """Every expert's LoRA of its ``(out, in)`` matrix; none where the update has another form."""
    held = contents_of(update)
    if held.stack is not None:
        stack = held.stack
        turned = site.path == named.stack and component.family.experts_transposed and not stack.if_transposed
        return {number: lora.transpose() if turned else lora for number, lora in enumerate(stack.experts)}
    if held.lora is not None and held.dora is None:
        turned = named.number is None and component.family.experts_transposed
        return {named.number or 0: held.lora.transpose() if turned else held.lora}
    return {}


def _rows(lora: LoRA, taken: range) -> LoRA:
    """The LoRA of some rows of its weight: the same A, a part of B."""
    whole = lora.B
    part = Factor(whole.tensors, (len(taken), lora.rank), lambda *stored: positions(whole.show(stored), 0, taken))
    return replace(lora, B=part)


def _together(parts: Sequence[tuple[LoRA, range]], height: int) -> LoRA:
    """One LoRA of `height` rows of which `parts` have theirs."""
    first = parts[0][0]
    shared = len(parts) == 1 or _same(first.A, parts[1][0].A)
    ranks = [first.rank] if shared else [lora.rank for lora, _ in parts]
    starts = [0] * len(parts) if shared else [0, ranks[0]]
    scale = first.scale if len({lora.scale for lora, _ in parts}) == 1 else 1.0

    def b(*sides: Array) -> Array:
        import numpy

        whole = numpy.zeros((height, sum(ranks)), dtype=numpy.float64)
        for values, (lora, at), start in zip(sides, parts, starts, strict=True):
            times = 1.0 if lora.scale == scale else lora.scale / scale
            whole[at.start : at.stop : at.step, start : start + lora.rank] = values * times
        return whole

    def a(*sides: Array) -> Array:
        return namespace(sides[0]).concat(sides, axis=0)

    up = Factor.computed([lora.B for lora, _ in parts], (height, sum(ranks)), b)
    down = first.A if shared else Factor.computed([lora.A for lora, _ in parts], (sum(ranks), first.shape[1]), a)
    return LoRA(down, up, scale)


def _same(one: Factor, other: Factor) -> bool:
    """Whether two factors have the same values."""
    if one is other or one.shape != other.shape:
        return one is other
    return bool((one.load(DType.F64) == other.load(DType.F64)).all())
