# SPDX-License-Identifier: Apache-2.0
"""How the factors of a LoRA begin: at random, or along what the base, its rounding or its inputs are made of.

``pissa``: arXiv:2404.02948. ``olora``: arXiv:2406.01775. ``loftq``: arXiv:2310.08659, of codes that are there already.
``eva``: arXiv:2410.07170, with equal ranks. ``orthogonal``: B A = 0 with neither zero (PEFT 0.21, ``orthogonal_init``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

import numpy

from surgery.engine.calibration_file import Calibration, raw_inputs
from surgery.insertion.draws import Draws
from surgery.insertion.modules import LinearModule
from surgery_formats.arrays import Array
from surgery_formats.errors import FitError
from surgery_formats.linalg.svd import truncated_svd
from surgery_formats.linalg.whitening import moment_of_gram, moment_of_inputs
from surgery_formats.text import listing
from surgery_formats.updates import Part
from surgery_formats.updates.spectrum import part_of

__all__ = ["INITS", "TAKEN", "FactorPair", "Init", "PairOfFactors", "Start"]

Init = Literal["default", "pissa", "olora", "orthogonal", "eva", "loftq", "text"]
INITS: tuple[Init, ...] = get_args(Init)
TAKEN: Mapping[str, Part] = {"pissa": "principal", "olora": "first columns"}
"""The part of the base that an init gives to the factors, and that is taken away from it."""
PairOfFactors = tuple[Array, Array]
"""B ``(out, rank)`` and A ``(rank, in)``."""


@dataclass(frozen=True)
class Start:
    """How all factors of an adapter begin.

    Attributes:
        init: The way.
        rank: Of every module.
        scale: On ``B A``.
        draws: Random numbers.
        calibration: Of ``eva``.
        release: Of ``loftq``: the unquantised weights of the modules, by path.
        errors: Of ``loftq``, filled in as factors are made: ``||W - W_q||`` and ``||W - (W_q + s B A)||``, both relative to
            ``||W||``, by path.
    """

    init: Init
    rank: int
    scale: float
    draws: Draws
    calibration: Calibration | None = None
    release: Mapping[str, LinearModule] = field(default_factory=dict)
    errors: dict[str, tuple[float, float]] = field(default_factory=dict)

    def check(self, modules: tuple[LinearModule, ...]) -> None:
        """Refuse modules that cannot begin so, before anything is computed.

        Raises:
            FitError: a rank that does not fit, or inputs that are missing.
        """
        narrow = [module.path for module in modules if self.rank > min(module.shape)]
        if narrow and self.init in ("pissa", "olora", "loftq", "eva"):
            raise FitError(f"rank {self.rank} is more than a side of {listing(narrow)}", hint="give a lower rank")
        if self.init == "orthogonal" and self.rank % 2:
            raise FitError(f"an orthogonal start halves the rank, and {self.rank} is odd", hint="give an even rank")
        if self.calibration is not None:
            lacking = [module.path for module in modules if not self._inputs(module)]
            if lacking:
                raise FitError(
                    f"no inputs of {listing(lacking)}",
                    file=self.calibration.path,
                    hint="choose fewer targets, or add them",
                )

    def _inputs(self, module: LinearModule) -> Mapping[str, object] | None:
        assert self.calibration is not None
        return self.calibration.of(module.path, *(name.rpartition(".")[0] for name in module.names))

    def pair(self, module: LinearModule) -> PairOfFactors:
        """B and A of a module, float64 or float32."""
        makers: Mapping[str, Callable[[LinearModule], PairOfFactors]] = {
            "pissa": self._principal,
            "olora": self._first_columns,
            "orthogonal": self._orthogonal,
            "eva": self._along_inputs,
            "loftq": self._against_rounding,
        }
        return makers[self.init](module)

    def _principal(self, module: LinearModule) -> PairOfFactors:
        """The part along the largest singular values, half of each in either factor."""
        left, right = part_of(module.weight(), "principal", self.rank)
        upright = module.shape[0] <= module.shape[1]  # then the vectors of `left` are orthonormal
        sizes = numpy.linalg.norm(right, axis=1) if upright else numpy.linalg.norm(left, axis=0)
        order = numpy.argsort(-sizes, kind="stable")
        share = numpy.sqrt(numpy.maximum(sizes, numpy.finfo(float).tiny))
        B, A = (left * share, right / share[:, None]) if upright else (left / share, right * share[:, None])
        return B[:, order] / math.sqrt(self.scale), A[order] / math.sqrt(self.scale)

    def _first_columns(self, module: LinearModule) -> PairOfFactors:
        return part_of(module.weight(), "first columns", self.rank)

    def _orthogonal(self, module: LinearModule) -> PairOfFactors:
        half, (rows, cols) = self.rank // 2, module.shape
        Q, _ = numpy.linalg.qr(self.draws.normal(f"{module.path}.Q", (self.rank, self.rank)))
        A = (self.draws.normal(f"{module.path}.A", (cols, half)) @ Q[0::2]).T / 10.0
        B = self.draws.normal(f"{module.path}.B", (rows, half)) @ Q[1::2] / 10.0
        return B, A

    def _along_inputs(self, module: LinearModule) -> PairOfFactors:
        """A along the directions in which the module's inputs have most of their energy; B is zero."""
        assert self.calibration is not None
        parts = self.calibration.of(module.path, *(name.rpartition(".")[0] for name in module.names)) or {}
        stored = parts.get("activations")
        if stored is not None:
            moment = moment_of_inputs(raw_inputs(stored), stored.shape[0])
        else:
            moment = moment_of_gram(parts["gram"].read())
        found = moment.basis.shape[1]
        if found < self.rank or moment.basis.shape[0] != module.shape[1]:
            what = f"{found} directions" if found < self.rank else f"{moment.basis.shape[0]} numbers"
            raise FitError(
                f"the inputs of '{module.path}' have {what}: too few for rank {self.rank} of {module.shape[1]} inputs",
                file=self.calibration.path,
            )
        return numpy.zeros((module.shape[0], self.rank)), moment.basis[:, ::-1][:, : self.rank].T

    def _against_rounding(self, module: LinearModule) -> PairOfFactors:
        """The best factors of what rounding to codes took from the weight."""
        released = self.release[module.path].weight()
        lost = released - module.weight()
        found = truncated_svd(lost, rank=self.rank)
        size = float(numpy.linalg.norm(released)) or 1.0
        self.errors[module.path] = found.total / size, found.residual / size
        B, A = found.factors()
        return B / math.sqrt(self.scale), A / math.sqrt(self.scale)


class FactorPair:
    """The factors of one module, made when the first of them is asked for."""

    def __init__(self, start: Start, module: LinearModule) -> None:
        self._start, self._module = start, module
        self._made: PairOfFactors | None = None

    def B(self) -> Array:
        """``(out, rank)``."""
        return self._both()[0]

    def A(self) -> Array:
        """``(rank, in)``."""
        return self._both()[1]

    def _both(self) -> PairOfFactors:
        if self._made is None:
            B, A = self._start.pair(self._module)
            self._made = numpy.asarray(B, numpy.float32), numpy.asarray(A, numpy.float32)
        return self._made
