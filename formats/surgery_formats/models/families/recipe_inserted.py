# SPDX-License-Identifier: Apache-2.0
"""Records of the networks that adapters insert."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from surgery_formats.models.families.recipe_parts import Activation, Norm, Projection

__all__ = ["Bottleneck", "BottleneckForm", "Coupling"]


@dataclass(frozen=True, slots=True)
class BottleneckForm:
    """How a bottleneck computes; see `Bottleneck` for what the letters mean.

    Attributes:
        activation: Of the inner values.
        parallel: Whether it reads ``x``, and ``h`` is added to its result, instead of reading ``h``.
        sums_before: Whether it reads ``N(h + x)`` instead of ``h``.
        residual: What is added to its result unless it is parallel: ``body`` ``h``, ``sum`` ``h + x``, ``read`` what it reads.
        norm_before: Whether it has a layer norm of what it reads.
        norm_after: Whether it has a layer norm of its result.
        residual_before_norm: Whether the residual is added before that norm.
        gated: Whether its result is multiplied by the mean over all positions of a sigmoid of what it reads.
        finishes: Whether the branch's own sum and norm follow.
    """

    activation: Activation
    parallel: bool = False
    sums_before: bool = False
    residual: Literal["body", "sum", "read"] = "body"
    norm_before: bool = False
    norm_after: bool = False
    residual_before_norm: bool = False
    gated: bool = False
    finishes: bool = True


@dataclass(frozen=True, slots=True)
class Bottleneck:
    """A small network that an adapter inserts behind the body of a branch (arXiv:1902.00751, 2005.00247, 2110.04366).

    ``x`` is the branch's input, ``h`` the body's result or that of the bottleneck before this one, and ``N`` the norm of the
    branch's sum, the identity where it has none. The network is ``up(act(down(.)))``.

    Attributes:
        module: What the names of its tensors begin with; they are stored ``(inputs, outputs)``.
        width: ``D``.
        rank: Inner values; 0 if an optional input decides.
        form: How it computes.
    """

    module: str
    width: int
    rank: int
    form: BottleneckForm

    @property
    def down(self) -> Projection:
        """``D`` to `rank`."""
        return _inner(f"{self.module}.down", self.width, self.rank)

    @property
    def up(self) -> Projection:
        """`rank` to ``D``, the adapter's scale folded in."""
        return _inner(f"{self.module}.up", self.rank, self.width)

    @property
    def gate(self) -> Projection | None:
        """``D`` to one value."""
        return _inner(f"{self.module}.gate", self.width, 1) if self.form.gated else None

    @property
    def before(self) -> Norm | None:
        """Norm of what it reads."""
        return _inner_norm(f"{self.module}.before") if self.form.norm_before else None

    @property
    def after(self) -> Norm | None:
        """Norm of its result."""
        return _inner_norm(f"{self.module}.after") if self.form.norm_after else None


@dataclass(frozen=True, slots=True)
class Coupling:
    """An invertible network behind the embeddings (NICE, arXiv:1410.8516; MAD-X, arXiv:2005.00052).

    Of the halves ``x1`` and ``x2`` it makes ``y1 = x1 + F(x2)`` and ``y2 = x2 + G(y1)``; F and G are ``up(act(down(.)))``.

    Attributes:
        module: What the names of its tensors begin with.
        width: ``D``; the first half has ``D // 2`` values.
        ranks: Inner values of F and G; 0 if an optional input decides.
        activation: Of the inner values.
    """

    module: str
    width: int
    ranks: tuple[int, int]
    activation: Activation

    @property
    def first(self) -> tuple[Projection, Projection]:
        """Down and up of F."""
        return self._pair("F", self.width - self.width // 2, self.width // 2, self.ranks[0])

    @property
    def second(self) -> tuple[Projection, Projection]:
        """Down and up of G."""
        return self._pair("G", self.width // 2, self.width - self.width // 2, self.ranks[1])

    def _pair(self, name: str, inputs: int, outputs: int, rank: int) -> tuple[Projection, Projection]:
        at = f"{self.module}.{name}"
        return _inner(f"{at}.down", inputs, rank), _inner(f"{at}.up", rank, outputs)


def _inner(module: str, inputs: int, outputs: int) -> Projection:
    return Projection(f"{module}.weight", inputs, outputs, f"{module}.bias", transposed=True)


def _inner_norm(module: str) -> Norm:
    return Norm("layer", f"{module}.weight", 1e-5, f"{module}.bias")
