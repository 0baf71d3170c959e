# SPDX-License-Identifier: Apache-2.0
"""Fit factors to the inputs that the modules of a model get, given in a calibration file.

The safetensors file has, for each module (its path in the model, or its weight's name without ``.weight``), either

- ``<module>.activations``, ``(n, in)``: raw inputs, one per row, or
- ``<module>.gram``, ``(in, in)``: their second moment ``E x x^T``, and, if it is known, ``<module>.mean``, ``(in,)``:
  ``E x``.

`in` is the module's number of inputs; for a convolution, channels times kernel size, unfolded. Modules that are not in
the file get plain factors. Half-whitened factors (`surgery_formats.linalg.whitening`) are compared with plain ones by
the error of the outputs on these inputs, and the better ones are used; one raw input in four is kept for this
comparison. Where the mean is known and the module has a bias, the bias compensates the mean error if that helps.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial

from surgery.engine.calibration_file import JUDGING, Calibration, raw_inputs
from surgery.extraction.factorise import TargetFactors, row_lengths
from surgery.extraction.findings import CalibrationFacts
from surgery.extraction.storage_plan import DenseTensor, StoragePlan
from surgery.extraction.stream.lanes import in_threads
from surgery.extraction.stream.scratch import ScratchSlot, Workspace
from surgery.extraction.targets import LowRankTarget, TunedParameter
from surgery_formats.arrays import Array, cast, dtype_of, energy, to_cpu, to_device
from surgery_formats.dtypes import DType
from surgery_formats.errors import FitError
from surgery_formats.linalg.whitening import Moment, moment_of_gram, moment_of_inputs, output_energy, weighted_factors
from surgery_formats.tensors.tensor import StoredTensor
from surgery_formats.text import closest

__all__ = ["CalibrationChanges", "calibrate", "check_modules", "unused_modules"]

_FEW = 8  # raw inputs below this number are too few to keep some back


@dataclass(frozen=True, slots=True)
class CalibrationChanges:
    """What changes in an extraction because of the given inputs.

    Attributes:
        facts: By target path.
        factored: Factors that replace the plain ones, by target path.
        shifts: Additions to biases, ``(1, out)``, by path of the bias.
    """

    facts: Mapping[str, CalibrationFacts]
    factored: Mapping[str, TargetFactors]
    shifts: Mapping[str, ScratchSlot]

    def into(self, storage: StoragePlan, parameters: Iterable[TunedParameter]) -> None:
        """Add the shifted biases to the stored tensors."""
        by_path = {parameter.path: parameter for parameter in parameters}
        for path, slot in self.shifts.items():
            parameter = by_path[path]
            storage.dense_tensors = [dense for dense in storage.dense_tensors if dense.path != path]
            storage.dense_tensors.append(
                DenseTensor(path, parameter.pair.tuned, "bias", parameter.pair.name, shift=partial(_row, slot))
            )
            storage.dropped.pop(parameter.pair.name, None)


def inputs_of(calibration: Calibration, target: LowRankTarget) -> Mapping[str, StoredTensor] | None:
    """The parts that the file has for a target, or None."""
    return calibration.of(target.path.rpartition(".")[0], target.names[0].rpartition(".")[0])


def unused_modules(calibration: Calibration, targets: Iterable[LowRankTarget]) -> tuple[str, ...]:
    """Modules of the file that belong to none of `targets`."""
    used = {id(parts) for target in targets if (parts := inputs_of(calibration, target)) is not None}
    return tuple(module for module, parts in calibration.modules.items() if id(parts) not in used)


def _row(slot: ScratchSlot) -> Array:
    return slot.read()[0]


def check_modules(
    calibration: Calibration,
    parameters: Iterable[TunedParameter],
    targets: Iterable[LowRankTarget],
    shared: Iterable[str],
) -> None:
    """Check that every module of the file is one of the model, with the right number of inputs.

    `shared` are parameters that share another's tensor, such as a tied head.

    Raises:
        FitError: a module does not fit.
    """
    known = {name for parameter in parameters for name in (parameter.module, parameter.pair.name.rpartition(".")[0])}
    known |= {name.rpartition(".")[0] for name in shared}
    for module, parts in calibration.modules.items():
        if module not in known:
            raise FitError(
                "inputs of a module that the model lacks",
                file=calibration.path,
                tensor=f"{module}.{next(iter(parts))}",
                hint=closest(module, known),
            )
    for target in targets:
        for part, tensor in (inputs_of(calibration, target) or {}).items():
            size = target.deltas[0].logical_shape[1]
            shapes = {
                "activations": (tensor.shape[0] if tensor.shape else 0, size),
                "gram": (size, size),
                "mean": (size,),
            }
            if target.form not in ("linear", "conv"):
                raise FitError(
                    f"inputs of {target.form}, which cannot be weighted", file=calibration.path, tensor=tensor.name
                )
            if tensor.shape != shapes[part]:
                raise FitError(
                    f"{list(tensor.shape)} for a module of {size} inputs", file=calibration.path, tensor=tensor.name
                )


def calibrate(
    calibration: Calibration,
    storage: StoragePlan,
    parameters: Iterable[TunedParameter],
    factored: Mapping[str, TargetFactors],
    ranks: Mapping[str, int],
    workspace: Workspace,
    *,
    biases: bool,
) -> CalibrationChanges:
    """Compute weighted factors of every target whose inputs are known; `factored` and `ranks` are by target path.

    Biases change only if `biases`.

    Raises:
        FitError: an input is NaN, or a matrix is not a second moment.
    """
    bias_parameters = {
        parameter.path: parameter for parameter in parameters if parameter.form == "bias" and parameter.pair.grown == 0
    }
    stored = {dense.path for dense in storage.dense_tensors if dense.via != "bias"}
    free_biases = {path for path in bias_parameters if path not in stored} if biases else set()

    def weighted(target: LowRankTarget) -> _WeightedTarget:
        bias = f"{target.path.rpartition('.')[0]}.bias"
        chosen = bias if bias in free_biases else ""
        plain, rank = factored[target.path], ranks[target.path]
        return _weighted(target, inputs_of(calibration, target) or {}, plain, rank, workspace, chosen)

    known = [target for target in storage.targets if inputs_of(calibration, target)]
    results = in_threads(weighted, known, workspace.lanes)
    ordered = {target.path: result for target, result in zip(known, results, strict=True)}
    return CalibrationChanges(
        {path: result.facts for path, result in ordered.items()},
        {path: result.factored for path, result in ordered.items() if result.factored is not None},
        {result.bias: result.shift for result in ordered.values() if result.shift is not None},
    )


@dataclass(frozen=True, slots=True)
class _WeightedTarget:
    facts: CalibrationFacts
    factored: TargetFactors | None
    bias: str
    shift: ScratchSlot | None


def _moments(parts: Mapping[str, StoredTensor]) -> tuple[Moment, Moment]:
    """The moments that weight the factors and that judge them.

    Every fourth raw input only judges: weighted factors are good on the inputs they were fitted to, whatever they do to
    others.
    """
    if "gram" in parts:
        moment = moment_of_gram(parts["gram"].read(), parts["mean"].read() if "mean" in parts else None)
        return moment, moment
    stored = parts["activations"]
    count = stored.shape[0]
    if count < _FEW:
        moment = moment_of_inputs(raw_inputs(stored), count)
        return moment, moment
    judging = count // JUDGING
    return (
        moment_of_inputs(raw_inputs(stored, judging=False), count - judging),
        moment_of_inputs(raw_inputs(stored, judging=True), judging),
    )


def _weighted(
    target: LowRankTarget,
    parts: Mapping[str, StoredTensor],
    plain: TargetFactors,
    rank: int,
    workspace: Workspace,
    bias: str,
) -> _WeightedTarget:
    try:
        moment, judging_moment = _moments(parts)
    except FitError as error:
        tensor = next(iter(parts.values()))
        raise FitError(error.message, file=tensor.file.path, tensor=tensor.name) from error
    mean = moment.mean if bias else None
    delta = target.deltas[0].whole()
    total = output_energy(delta, judging_moment)
    left, right = plain.factors(0, rank)
    rest = delta - cast(left @ right, dtype_of(delta))
    B, A = (to_cpu(factor) for factor in weighted_factors(to_device(delta, workspace.device), moment, rank))
    weighted_rest = delta - B @ A
    if mean is not None and output_energy(rest, judging_moment, mean) >= output_energy(rest, judging_moment):
        mean = None  # the mean of other inputs is another
    errors = {
        "plain": output_energy(rest, judging_moment, mean),
        "weighted": output_energy(weighted_rest, judging_moment, mean),
    }
    better = errors["weighted"] < errors["plain"]
    weighted_error, plain_error = (
        math.sqrt(errors[kind] / total) if total > 0 else 0.0 for kind in ("weighted", "plain")
    )
    facts = CalibrationFacts(
        "weighted" if better else "plain", weighted_error, plain_error, total, bias if mean is not None else ""
    )
    remaining = weighted_rest if better else rest
    shift = None if mean is None else workspace.scratch.put((cast(remaining, DType.F64) @ mean)[None])
    if not better:
        return _WeightedTarget(facts, None, bias, shift)
    (matrix,) = plain.matrices
    left_energy, least_energy = energy(cast(weighted_rest, DType.F64)), matrix.residual(rank)
    values = row_lengths(B.T, A)
    bound = matrix.bound * math.sqrt(left_energy / least_energy) if least_energy > 0 else 1.0
    slots = workspace.scratch.put(B.T), workspace.scratch.put(A)
    weighted_matrix = replace(
        matrix, left=slots[0], right=slots[1], values=values, rest=left_energy, bound=max(bound, 1.0), fold=1.0
    )
    weighted_matrix = replace(weighted_matrix, left_energy=None)
    return _WeightedTarget(facts, TargetFactors(target, (weighted_matrix,)), bias, shift)
