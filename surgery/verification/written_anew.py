# SPDX-License-Identifier: Apache-2.0
"""Weights that were written anew for a graph, against the base and what is merged into it.

No byte of them is the base's: codes may be as far from its values as was written down, and what is kept as numbers is the same
values, rounded to the type that it is kept in.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import torch

from surgery.engine.ledger import CodeError
from surgery.reference import Reference
from surgery.reference.weights import ReferenceWeights
from surgery.verification.coded_weights import HEAD, CodedWeights
from surgery.verification.recorded import recorded_errors
from surgery.verification.session import GraphFile
from surgery_formats.dtypes import DType
from surgery_formats.errors import ProofError
from surgery_formats.models.families.parameters import parameters

__all__ = ["check_codes", "check_kept"]

_RECORDED = 1e-3
"""Share by which an error of codes may differ from what was written down."""
_UNRECORDED = {4: 0.5, 8: 0.1}
"""The greatest error of codes of which nothing was written down, by their bits: that of no rounding to them."""
_NONE = CodeError(0.0, 0.0, 0.0)
_BLOCK = 1 << 22  # elements compared at a time
_HINT = "`against=` names another base, or the adapters that were merged are not named"


def check_codes(graph: GraphFile, reference: Reference, wanted: ReferenceWeights, folder: Path) -> str:
    """What is said of codes that are near enough to the values that they were made of.

    Args:
        graph: The graph.
        reference: What its files hold, see `surgery.verification.coded_weights.coded_reference`.
        wanted: The values; of a merge in float32, since codes are made of them before they are rounded to another type.
        folder: Where the manifest is that tells how far they were when they were written, if there is one.

    Raises:
        ProofError: a weight is farther from them than was written down.
    """
    weights, recorded = _weights(reference), recorded_errors(folder)
    errors: dict[str, CodeError] = {}
    for name, matrices in _code_errors(weights, wanted):
        found = errors[name] = sum(matrices, _NONE)
        limit, most = recorded.get(name), _UNRECORDED.get(weights.codes_of(name).bits, _UNRECORDED[4])
        off = next((one.relative for one in matrices if not one.relative <= most), None)
        if limit is None and off is not None:
            text = f"its codes are off by {off:.3g} of the base"
            raise ProofError(text, file=graph.path, tensor=name, hint=_HINT)
        if limit is not None and not found.relative <= limit * (1 + _RECORDED) + _RECORDED**2:
            text = f"its codes are off by {found.relative:.3g} of the base, and {limit:.3g} was written down"
            raise ProofError(text, file=graph.path, tensor=name, hint=_HINT)
    total = sum(errors.values(), _NONE)
    worst = max(errors, key=lambda name: errors[name].relative)
    return f"error {total.relative:.3g} of the base, at most {errors[worst].relative:.3g} ({worst})"


def check_kept(graph: GraphFile, reference: Reference, wanted: ReferenceWeights, *, merged: bool) -> int:
    """The number of weights that are kept as numbers, each as `wanted` has it; see `check_codes` for the arguments.

    `merged` says whether `wanted` are a merge's, as it would store them.

    Raises:
        ProofError: a weight has other values; those of a merge may differ by the rounding of both types.
        FitError: the base lacks a weight.
    """
    weights, number = _weights(reference), 0
    for name, shape in parameters(reference.model).items():
        if name.endswith(HEAD) or (dtype := weights.kept_type(name)) is None:
            continue
        found, between = _kept_error(weights, name, shape, wanted, dtype)
        allowed = between + torch.finfo(_torch(dtype)).eps if merged else 0.0
        if not found.relative <= allowed:
            text = f"differs from what base and adapters make, by {found.relative:.3g} of it"
            raise ProofError(text, file=graph.path, tensor=weights.stored(name), hint=_HINT)
        number += 1
    return number


def _weights(reference: Reference) -> CodedWeights:
    assert isinstance(reference.weights, CodedWeights)
    return reference.weights


def _code_errors(weights: CodedWeights, wanted: ReferenceWeights) -> Iterator[tuple[str, list[CodeError]]]:
    """By stored name, of each matrix of a stack by itself."""
    for name, (outputs, inputs) in weights.shapes.items():
        if count := weights.stacks.get(name):
            found = [_code_error(weights, name, wanted, number, number + 1) for number in range(count)]
        else:
            blocks = [(0, None)] if name in weights.turned else _blocks(outputs, inputs)
            found = [sum((_code_error(weights, name, wanted, *block) for block in blocks), _NONE)]
        yield weights.stored(name), found


def _code_error(weights: CodedWeights, name: str, wanted: ReferenceWeights, start: int, stop: int | None) -> CodeError:
    own = weights.load(f"{name} {HEAD}" if weights.parted(name) else name, start, stop)
    return _between(own.double(), wanted.load(name, start, stop).double())


def _kept_error(
    weights: CodedWeights, name: str, shape: tuple[int, ...], wanted: ReferenceWeights, dtype: DType
) -> tuple[CodeError, float]:
    """Of one weight; and the relative step of the type that `wanted` has it in."""
    error, between = _NONE, 0.0
    whole = len(shape) < 2 or shape[0] < 0 or weights.is_across(name)
    for start, stop in [(0, None)] if whole else _blocks(shape[0], math.prod(shape[1:])):
        values = wanted.load(name, start, stop)
        between = torch.finfo(values.dtype).eps
        own, values = weights.load(name, start, stop).double(), values.to(_torch(dtype)).double()
        if own.shape != values.shape:
            return CodeError(0.0, math.inf, math.inf), between
        error += _between(own, values)
    return error, between


def _between(own: torch.Tensor, values: torch.Tensor) -> CodeError:
    difference = own - values
    return CodeError(float(values.square().sum()), float(difference.square().sum()), float(difference.abs().max()))


def _blocks(rows: int, width: int) -> Iterator[tuple[int, int]]:
    step = max(1, _BLOCK // max(width, 1))
    yield from ((start, min(start + step, rows)) for start in range(0, rows, step))


def _torch(dtype: DType) -> torch.dtype:
    found = dtype.torch
    assert isinstance(found, torch.dtype)
    return found
