# SPDX-License-Identifier: Apache-2.0
"""The linear modules of a base that a fresh adapter is for, chosen by what they are part of or by name."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fnmatch import fnmatchcase

from surgery.extraction.stream.scan_plan import layout_of
from surgery.extraction.targets import LowRankTarget
from surgery_formats.arrays import Array, namespace
from surgery_formats.dtypes import DType
from surgery_formats.errors import FitError
from surgery_formats.models.component import Component
from surgery_formats.models.names import WeightSlice
from surgery_formats.text import closest, show

__all__ = ["ROLES", "LinearModule", "LinearModules", "chosen_modules", "linear_modules", "model_type"]

ROLES = ("attention", "mlp", "all")


@dataclass(frozen=True, slots=True)
class LinearModule:
    """A linear module.

    Attributes:
        path: Of the module, in the model's code.
        names: What its weight is called on disk; of one that is stored in parts, of these.
        shape: Logical ``(out, in)`` of the weight.
        role: What it is part of, see `Component.role`.
        pieces: Where the base holds the weight.
        has_bias: Whether the base has a bias for it.
        transposed: Whether the weight is stored as ``(in, out)``.
    """

    path: str
    names: tuple[str, ...]
    shape: tuple[int, int]
    role: str
    pieces: tuple[WeightSlice, ...]
    has_bias: bool
    transposed: bool

    def weight(self) -> Array:
        """Its values, float64, ``(out, in)``.

        Raises:
            FitError: NaN or Inf, of which nothing can begin.
        """
        parts = [piece.parameter.get(DType.F64) for piece in sorted(self.pieces, key=_row)]
        values: Array = parts[0] if len(parts) == 1 else namespace(*parts).concat(parts)
        if not math.isfinite(float(values.sum())):
            raise FitError("NaN or Inf", tensor=self.pieces[0].parameter.name)
        return values


def _row(piece: WeightSlice) -> int:
    return piece.parameter.view.row_origin


@dataclass(frozen=True, slots=True)
class LinearModules:
    """All linear modules of a base.

    Attributes:
        linear: In the order of the base.
        paths: Of all its modules that hold or contain parameters, in the model's code.
        experts: Paths of parameters that stack experts.
    """

    linear: tuple[LinearModule, ...]
    paths: frozenset[str]
    experts: tuple[str, ...]


def linear_modules(base: Component) -> LinearModules:
    """The linear modules of `base`; an embedding is none, nor is a convolution.

    Raises:
        FitError: weights are stored in a format that is not read.
    """
    layout = layout_of(base, base, full=False)
    paths = {
        ".".join(parts[:depth])
        for parameter in layout.parameters
        for parts in [parameter.path.split(".")]
        for depth in range(1, len(parts))
    }
    linear = tuple(_module(target, base) for target in layout.targets if target.form == "linear" and _named(target))
    stacks = tuple(target.path for target in layout.targets if target.form == "experts")
    return LinearModules(linear, frozenset(paths), stacks)


def _named(target: LowRankTarget) -> bool:
    return target.path.endswith(".weight")


def _module(target: LowRankTarget, base: Component) -> LinearModule:
    path = target.path.removesuffix(".weight")
    rows, cols = target.deltas[0].logical_shape
    return LinearModule(
        path,
        target.names,
        (rows, cols),
        base.role(target.names[0]),
        base.names.resolve(target.path),
        bool(base.names.resolve(f"{path}.bias")),
        base.family.stores_transposed(target.names[0]),
    )


def chosen_modules(found: LinearModules, targets: str, base: Component) -> tuple[LinearModule, ...]:
    """The modules that `targets` names.

    Args:
        found: All there are.
        targets: ``attention``, ``mlp``, ``all`` (every linear module but the head), or patterns of a shell joined by
            commas, which match from any dot of a path on to its end: ``q_proj,v_proj``, ``layers.[01].*``.
        base: For messages.

    Raises:
        FitError: a pattern matches nothing, or what was named holds stacked experts.
    """
    if targets in ROLES:
        chosen = [module for module in found.linear if _wanted(module.role, targets)]
        if found.experts and targets != "attention":
            raise FitError(
                f"its experts are stacked parameters ('{show(found.experts[0])}' ...), for which no adapter is begun",
                file=base.folder,
                hint="name attention, or modules by a pattern",
            )
        if not chosen:
            raise FitError(f"no linear module of it is known to be of {targets}", file=base.folder, hint=_NAME_THEM)
        return tuple(chosen)
    patterns = [pattern.strip() for pattern in targets.split(",") if pattern.strip()]
    for pattern in patterns or [""]:
        if not any(_matches(pattern, module.path) for module in found.linear):
            names = sorted({part for module in found.linear for part in module.path.split(".") if not part.isdigit()})
            raise FitError(
                f"no linear module matches '{show(pattern)}'",
                file=base.folder,
                hint=closest(pattern, names) or _NAME_THEM,
            )
    return tuple(module for module in found.linear if any(_matches(pattern, module.path) for pattern in patterns))


_NAME_THEM = (
    "the modules are those that `surgery inspect` lists; patterns are those of a shell, 'q_proj' or 'layers.[01].*'"
)


def _wanted(role: str, targets: str) -> bool:
    return role != "head" if targets == "all" else role == targets


def _matches(pattern: str, path: str) -> bool:
    return fnmatchcase(path, pattern) or fnmatchcase(path, f"*.{pattern}")


def model_type(base: Component) -> str:
    """What transformers calls the type, or empty."""
    return str(base.config.get("model_type") or "")
