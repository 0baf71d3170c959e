# SPDX-License-Identifier: Apache-2.0
"""Several streams of hidden states (Gemma 3n): how they begin and end, what a layer makes of them, and its own embeddings.

Shapes as in `surgery_formats.models.families.recipe`.
"""

from __future__ import annotations

from dataclasses import dataclass

from surgery_formats.models.families.recipe_parts import (
    Activation,
    Norm,
    Projection,
    Shapes,
    norm_shapes,
    projection_shapes,
)

__all__ = ["AltUp", "AltUpLayer", "Laurel", "LayerEmbeddings", "LayerInput"]


@dataclass(frozen=True, slots=True)
class AltUp:
    """Alternating updates (arXiv:2301.13310): a layer computes one of several streams and corrects its prediction of all.

    The first stream is the embedding; each other is a map of it, scaled to its root mean square. Behind the layers each
    other is mapped and scaled to that of the first, and the mean of all goes on.

    Attributes:
        active: Which stream the layers compute.
        begins: The maps in front of the layers, one for every stream but the first.
        ends: The maps behind them.
    """

    active: int
    begins: tuple[Projection, ...]
    ends: tuple[Projection, ...]

    @property
    def streams(self) -> int:
        """Number of streams."""
        return 1 + len(self.begins)

    def shapes(self) -> Shapes:
        """Its tensors."""
        return projection_shapes(*self.begins, *self.ends)


@dataclass(frozen=True, slots=True)
class Laurel:
    """A learned residual of low rank (arXiv:2411.07501): ``x + norm(second(first(x)))``."""

    first: Projection
    second: Projection
    norm: Norm


@dataclass(frozen=True, slots=True)
class LayerInput:
    """What a layer adds for its own embedding ``e``: ``norm(projection(act(gate(x)) * e))``."""

    gate: Projection
    activation: Activation
    projection: Projection
    norm: Norm


@dataclass(frozen=True, slots=True)
class AltUpLayer:
    """What a layer does with the streams ``h`` around its attention and MLP.

    With ``m(x) = tanh(router(norm(x) / D))``, stream ``i`` is predicted as ``p[i] = h[i] + sum_j predict(m(h[active]))[i, j] h[j]``.
    Attention and MLP make ``y`` of ``p[active]``: ``z = (p[active] + attention + laurel) / sqrt(2)``, ``y = z + mlp(z)``. The
    streams are then ``p[i] + (1 + correct(m(y))[i]) (y - p[active])``, and `input` is added to all but the first.

    Attributes:
        norm: Norm in front of the router.
        router: ``D`` to one number per stream.
        predict: Those to the square of their number, row by row.
        correct: Those to as many.
        gains: Tensor ``(D,)`` of factors on what `input` reads, the corrected active stream; or empty.
        laurel: Beside attention, of the same input.
        input: What is added for the layer's own embedding.
    """

    norm: Norm
    router: Projection
    predict: Projection
    correct: Projection
    gains: str
    laurel: Laurel
    input: LayerInput

    def shapes(self, hidden: int) -> Shapes:
        """Its tensors, in a model of `hidden` values."""
        laurel, own = self.laurel, self.input
        shapes = projection_shapes(
            self.router, self.predict, self.correct, laurel.first, laurel.second, own.gate, own.projection
        )
        shapes |= norm_shapes(hidden, self.norm, laurel.norm, own.norm)
        return shapes | ({self.gains: (hidden,)} if self.gains else {})


@dataclass(frozen=True, slots=True)
class LayerEmbeddings:
    """An embedding of every token for every layer: ``(scale row + norm(projection(x) / sqrt(D))) / sqrt(2)``.

    Attributes:
        table: Tensor ``(rows, layers * width)``.
        rows: Its rows; ids beyond them have the first.
        width: Values per layer.
        scale: Factor on a row, rounded to the table's type.
        projection: The embedding ``x`` to all layers' values.
        norm: Norm of each layer's values.
    """

    table: str
    rows: int
    width: int
    scale: float
    projection: Projection
    norm: Norm

    def shapes(self) -> Shapes:
        """Its tensors."""
        table: Shapes = {self.table: (self.rows, self.projection.outputs)}
        return table | projection_shapes(self.projection) | norm_shapes(self.width, self.norm)
