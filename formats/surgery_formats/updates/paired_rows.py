# SPDX-License-Identifier: Apache-2.0
"""Rows of queries and keys in rotary pairs, as Meta's code and llama.cpp have them: ``W' = W + s P B A``, P reorders rows.

transformers has the halves of a head one after the other, and the pairs ``(i, i + d / 2)`` rotate. Meta's code has each
pair in two neighbouring rows. A file does not say how many heads there are, so that only the base tells P.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from surgery_formats.arrays import Array
from surgery_formats.errors import FitError
from surgery_formats.tensors.tensor import Tensor
from surgery_formats.updates.base import Apply, Effect, Factor, Fit, Weight
from surgery_formats.updates.dora import DoRA
from surgery_formats.updates.lora import LoRA

__all__ = ["PairedRows", "halved", "head_rows", "paired"]

Heads = Literal["queries", "keys"]


@dataclass(frozen=True, slots=True)
class PairedRows:
    """An update of queries or keys whose file has rows in pairs.

    Attributes:
        update: As the file has it.
        of: Which heads its rows are of.
        unpaired: Types of models (``model_type``) for which the program that wrote the file leaves rows as transformers
            has them.
    """

    waits: ClassVar[str] = "its rows lie in rotary pairs, and only the base tells how many rows a head has"

    update: LoRA | DoRA
    of: Heads
    unpaired: tuple[str, ...] = ()

    @property
    def kind(self) -> str:
        """Of the update."""
        return self.update.kind

    @property
    def effect(self) -> Effect:
        """Of the update."""
        return self.update.effect

    @property
    def needs_weight(self) -> bool:
        """Whether the update does."""
        return self.update.needs_weight

    @property
    def shape(self) -> tuple[int, int]:
        """Logical ``(out, in)``."""
        return self.update.shape

    @property
    def rank(self) -> int:
        """Of the update."""
        return self.update.rank

    @property
    def alpha(self) -> float | None:
        """As written in the file."""
        return self.update.alpha

    @property
    def scale(self) -> float:
        """Of the update."""
        return self.update.scale

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The update's."""
        return self.update.tensors

    @property
    def untrained(self) -> tuple[Tensor, ...]:
        """The update's."""
        return self.update.untrained

    def factors(self) -> Mapping[str, Factor]:
        """As the file has them."""
        return self.update.factors()

    def low_rank(self) -> None:
        """None until `fitted`."""

    def parts(self) -> tuple[tuple[int, PairedRows], ...]:
        """Itself."""
        return ((0, self),)

    def fitted(self, fit: Fit) -> LoRA | DoRA:
        """The update with its rows as transformers has them.

        Raises:
            FitError: the base's configuration does not tell how many rows a head has.
        """
        if fit.config.get("model_type") in self.unpaired:
            return self.update
        first = self.update.tensors[0]
        return halved(self.update, head_rows(fit.config, self.of, self.update.shape[0], first))

    def prepare(self, weight: Weight) -> Apply:
        """Never: rows have no order yet.

        Raises:
            FitError: always.
        """
        tensor = self.update.tensors[0]
        raise FitError(self.waits, file=tensor.path, tensor=tensor.name)


def head_rows(config: Mapping[str, Any], of: Heads, rows: int, tensor: Tensor) -> int:
    """Rows of one head, by the configuration of a model.

    Raises:
        FitError: it has no number of heads, or one that does not divide `rows`.
    """
    text = config.get("text_config")
    known = text if isinstance(text, Mapping) else config
    heads = known.get("num_attention_heads", known.get("n_head"))
    if of == "keys":
        heads = known.get("num_key_value_heads", heads)
    if not isinstance(heads, int) or isinstance(heads, bool) or heads < 1:
        raise FitError(
            "its rows lie in rotary pairs, and the base's configuration has no number of heads",
            file=tensor.path,
            tensor=tensor.name,
            hint="give the base as a folder with its config.json",
        )
    if rows % (2 * heads):
        raise FitError(f"{rows} rows are not {heads} heads of pairs of rows", file=tensor.path, tensor=tensor.name)
    return rows // heads


def halved(update: LoRA | DoRA, head: int) -> LoRA | DoRA:
    """An update whose rows lie in pairs, with the halves of each head one after the other."""
    return _reordered(update, (head // 2, 2))


def paired(update: LoRA | DoRA, head: int) -> LoRA | DoRA:
    """An update whose heads have their halves one after the other, with its rows in pairs."""
    return _reordered(update, (2, head // 2))


def _reordered(update: LoRA | DoRA, axes: tuple[int, int]) -> LoRA | DoRA:
    if isinstance(update, DoRA):
        magnitude = _rows(update.magnitude, axes) if update.per_row else update.magnitude
        return replace(update, direction=_lora(update.direction, axes), magnitude=magnitude)
    return _lora(update, axes)


def _lora(lora: LoRA, axes: tuple[int, int]) -> LoRA:
    return replace(lora, B=_rows(lora.B, axes))


def _rows(factor: Factor, axes: tuple[int, int]) -> Factor:
    rest = factor.shape[1:]

    def view(*stored: Array) -> Array:
        values = factor.show(stored).reshape(-1, *axes, *rest)
        return values.swapaxes(1, 2).reshape(factor.shape)

    return Factor(factor.tensors, factor.shape, view, factor.terms)
