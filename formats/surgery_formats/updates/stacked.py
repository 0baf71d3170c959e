# SPDX-License-Identifier: Apache-2.0
"""One update per expert of a 3-D parameter ``(E, rows, cols)`` (PEFT's ``target_parameters``, MLX's ``SwitchLinear``)."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

from surgery_formats.tensors.tensor import Tensor
from surgery_formats.updates.base import Apply, Effect, Factor, Weight
from surgery_formats.updates.lora import LoRA
from surgery_formats.updates.update import Update

__all__ = ["Stacked"]


@dataclass(frozen=True, slots=True)
class Stacked:
    """Updates of equal kind, one under the other in the flattened weight ``(E * rows, cols)``.

    Binding takes it apart (`parts`), so that each expert meets the bytes that hold it, fused or not.

    Attributes:
        experts: In order.
        if_transposed: The same factors for a family that stores experts as ``(E, in, out)``: PEFT exchanges A and B
            there, and only the base decides. Empty where the format is unambiguous.
    """

    experts: tuple[LoRA, ...]
    if_transposed: tuple[LoRA, ...] = ()

    @property
    def kind(self) -> str:
        """The experts' kind."""
        return self.experts[0].kind

    @property
    def shape(self) -> tuple[int, int]:
        """``(E * rows, cols)``."""
        return sum(expert.shape[0] for expert in self.experts), self.experts[0].shape[1]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All experts' tensors; experts usually share theirs."""
        return tuple(dict.fromkeys(tensor for expert in self.experts for tensor in expert.tensors))

    @property
    def needs_weight(self) -> bool:
        """As the experts."""
        return self.experts[0].needs_weight

    @property
    def untrained(self) -> tuple[Tensor, ...]:
        """Those of all experts."""
        return tuple(dict.fromkeys(tensor for expert in self.experts for tensor in expert.untrained))

    @property
    def effect(self) -> Effect:
        """As the experts."""
        return self.experts[0].effect

    @property
    def rank(self) -> int:
        """Of the first expert; formats give all experts one."""
        return self.experts[0].rank

    @property
    def alpha(self) -> float | None:
        """Of the first expert."""
        return self.experts[0].alpha

    @property
    def scale(self) -> float:
        """Of the first expert."""
        return self.experts[0].scale

    def factors(self) -> dict[str, Factor]:
        """Every expert's, as ``A[0]``, ``B[0]``, ``A[1]`` ..."""
        return {f"{name}[{e}]": f for e, expert in enumerate(self.experts) for name, f in expert.factors().items()}

    def low_rank(self) -> None:
        """None: each expert has its own."""

    def scaled(self, weight: float) -> Stacked:
        """Every expert scaled; they are LoRAs."""
        return Stacked(
            tuple(expert.scaled(weight) for expert in self.experts),
            tuple(expert.scaled(weight) for expert in self.if_transposed),
        )

    def transposed(self) -> Stacked | None:
        """The experts `if_transposed`; None if there are none."""
        return Stacked(self.if_transposed) if self.if_transposed else None

    def parts(self) -> tuple[tuple[int, Update], ...]:
        """Each expert with its first row."""
        starts = accumulate((expert.shape[0] for expert in self.experts[:-1]), initial=0)
        return tuple(zip(starts, self.experts, strict=True))

    def prepare(self, weight: Weight) -> Apply:
        """Never used: binding applies the parts.

        Raises:
            TypeError: always.
        """
        raise TypeError("a stacked update is applied by its parts")
