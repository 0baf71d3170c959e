# SPDX-License-Identifier: Apache-2.0
"""How the weights of an exported graph are written, and which."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from surgery.engine.calibration_file import Calibration
from surgery_formats.dtypes import DType
from surgery_formats.errors import FitError
from surgery_formats.models.component import Component
from surgery_formats.models.families.parameters import projections
from surgery_formats.models.families.recipe import LanguageHead, Model, Projection
from surgery_formats.storage.block_format import BITS, FLOAT8, BlockFormat
from surgery_formats.text import closest

__all__ = ["WeightCoding", "WeightUses", "uses_of"]


@dataclass(frozen=True, slots=True)
class WeightUses:
    """The weights of a model that can be codes, by name in the recipe.

    Attributes:
        linear: Linear maps, but those of heads; of a stack of experts the first stands for all.
        head: The projection onto the vocabulary, or empty.
        table: The token table; the head's name where they are tied.
        every: All linear maps of a tensor of their own.
    """

    linear: Mapping[str, Projection]
    head: str
    table: str
    every: Mapping[str, Projection]

    @property
    def tied(self) -> bool:
        """Whether head and token table are one weight."""
        return self.head == self.table


def uses_of(model: Model) -> WeightUses:
    """What each matrix of a recipe is used for."""
    head = model.head.projection.weight if isinstance(model.head, LanguageHead) else ""
    of_head = {each.weight for each in projections(model.head)}
    if isinstance(model.head, LanguageHead) and model.head.before is not None:
        of_head.discard(model.head.before.weight)
    every = {each.weight: each for each in projections(model) if each.stack is None}
    firsts = {each.weight: each for each in projections(model) if each.stack is not None and each.stack[0] == 0}
    linear = {name: each for name, each in {**every, **firsts}.items() if name not in of_head}
    return WeightUses(linear, head, model.embedding.tokens, every)


@dataclass(frozen=True, slots=True)
class WeightCoding:
    """How weights are written.

    Attributes:
        bits: Of the layers' weights; with a `budget` the fewest.
        floats: Whether these are numbers of 8 bits instead of integers, which have a scale for each output.
        block: Inputs that share a scale.
        symmetric: Whether the zero point is the middle code.
        scales: ``minmax`` or ``search``.
        rounding: ``feedback`` or ``nearest``.
        calibration: Inputs to make up for errors along.
        embeddings: One of ``auto``, ``keep``, ``int8``, ``int4``: of the token table.
        head: The same of the projection onto the vocabulary.
        budget: Most bytes of all weights; None for no bound.
        matmul: Whether linear maps are written ``(in, out)`` instead, in the type of the graph.
        chosen: Bits of weights within the budget, by name in the recipe; 0 keeps them.
        stacked: Whether codes of a layer's experts lie one after the other, for an operator that computes all of them.
    """

    bits: int
    block: int = 32
    symmetric: bool = True
    scales: str = "minmax"
    rounding: str = "feedback"
    calibration: Calibration | None = None
    embeddings: str = "auto"
    head: str = "auto"
    budget: int | None = None
    matmul: bool = False
    chosen: Mapping[str, int] = field(default_factory=dict)
    stacked: bool = False
    floats: bool = False

    def form(self, kind: str, io: DType) -> BlockFormat:
        """How a weight is stored in a graph of a type: integers' scales have 16 bits, which a graph of 32 converts at load."""
        if kind == FLOAT8:
            return BlockFormat(8, 0, scale_type=DType.F32, floats=True)
        scale_type = io if io in (DType.F16, DType.BF16) else DType.F16
        return BlockFormat(BITS[kind], self.block, self.symmetric, self.scales == "search", scale_type)

    def kind_of(self, name: str) -> str:
        """The type of a linear map that nothing else is said of; empty keeps it."""
        bits = self.chosen.get(name, self.bits)
        return FLOAT8 if self.floats else f"int{bits}" if bits else ""

    def head_kind(self, uses: WeightUses) -> str:
        """The type of the projection onto the vocabulary; empty keeps it."""
        return self.kind_of(uses.head) if self.head == "auto" else self.head if self.head in BITS else ""

    def table_kind(self, uses: WeightUses) -> str:
        """The type of the token table; empty keeps it. By default it is the tied head's own, or kept."""
        if self.embeddings != "auto":
            return self.embeddings if self.embeddings in BITS else ""
        return self.head_kind(uses) if uses.tied else ""

    @property
    def facts(self) -> dict[str, Any]:
        """For the manifest."""
        if self.matmul:
            return {"linear": "matmul"}
        named: tuple[str, ...] = ("bits", "block", "symmetric", "scales", "rounding", "embeddings", "head", "budget")
        named = ("floats", "embeddings", "head") if self.floats else named
        facts = {name: getattr(self, name) for name in named if getattr(self, name) is not None}
        return facts | ({"calibration": self.calibration.id} if self.calibration is not None else {})

    def check(self, component: Component) -> None:
        """Check that the calibration is of this model.

        Raises:
            FitError: a module that it lacks, or other numbers of inputs.
        """
        if self.calibration is None:
            return
        modules = {name.removesuffix(".weight") for name in component.parameters if name.endswith(".weight")}
        if unknown := sorted(set(self.calibration.modules) - modules):
            raise FitError(
                "inputs of a module that the model lacks",
                file=self.calibration.path,
                tensor=unknown[0],
                hint=closest(unknown[0], modules),
            )
