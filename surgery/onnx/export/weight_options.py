# SPDX-License-Identifier: Apache-2.0
"""What an export may do to the type and the orientation of weights, as it is asked for. Imported without numpy."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from surgery.onnx.graph.target import TARGETS
from surgery_formats.errors import FitError, UsageError
from surgery_formats.storage.block_format import BITS, FLOAT8
from surgery_formats.text import show

if TYPE_CHECKING:
    import os

    from surgery.onnx.export.weight_coding import WeightCoding

__all__ = ["OWN", "WITHOUT_ATTENTION", "WeightOptions"]

OWN = ", its own codes"
"""What the ledger says of a weight whose codes were taken as they are."""
WITHOUT_ATTENTION = 22
"""Set of operators for graphs of MatMul: quantize_dynamic takes ONNX's Attention for com.microsoft's (onnxruntime 1.31)."""
_BLOCKS = (32, 64, 128)
_SPOKEN = {"symmetric": "asymmetric rounding"}
_TABLES = ("auto", "keep", "int8", "int4")


@dataclass(frozen=True, slots=True)
class WeightOptions:
    """The options of `surgery.export_onnx` of the same names."""

    weights_type: str = "stored"
    block: int = 32
    symmetric: bool = True
    scales: str = "minmax"
    rounding: str | None = None
    calibration: str | os.PathLike[str] | None = None
    embeddings: str = "auto"
    head: str = "auto"
    budget: int | None = None
    linear: str = "auto"
    experts: str = "auto"

    def coding(self, target: str) -> WeightCoding | None:
        """How weights are written for a target; None if they stay as they are stored.

        Raises:
            FitError: a value that there is not.
            UsageError: options that contradict each other.
        """
        if self == WeightOptions():
            return None
        self._check()
        # It knows calibrations, which a plain export does not need.
        from surgery.onnx.export.weight_coding import WeightCoding

        if self.linear == "matmul":
            return WeightCoding(0, matmul=True)
        if self.weights_type == FLOAT8:
            return WeightCoding(8, rounding="nearest", embeddings=self.embeddings, head=self.head, floats=True)
        from surgery.engine.calibration_file import open_calibration

        opened = None if self.calibration is None else open_calibration(self.calibration)
        bits, rounding = BITS.get(self.weights_type, 4), self.rounding or ("nearest" if opened is None else "feedback")
        if self.weights_type == "stored" and self.linear != "matmul":
            return None
        fused = target in TARGETS and TARGETS[target].experts == "codes" and self.experts != "apart"
        return WeightCoding(
            bits,
            self.block,
            self.symmetric,
            self.scales,
            rounding,
            opened,
            self.embeddings,
            self.head,
            self.budget,
            stacked=fused and self.weights_type == "int4",
        )

    def _check(self) -> None:
        for name, value, known in (
            ("weights_type", self.weights_type, ("stored", *BITS, FLOAT8, "mixed")),
            ("scales", self.scales, ("minmax", "search")),
            ("rounding", self.rounding or "feedback", ("feedback", "nearest")),
            ("embeddings", self.embeddings, _TABLES),
            ("head", self.head, _TABLES),
            ("linear", self.linear, ("auto", "matmul")),
            ("experts", self.experts, ("auto", "fused", "apart")),
        ):
            if value not in known:
                raise FitError(f"{name} is one of {', '.join(known)}, not '{show(value)}'")
        if self.block not in _BLOCKS:
            raise FitError(f"block is 32, 64 or 128, not {self.block}")
        default = WeightOptions()
        given = [field.name for field in fields(self) if getattr(self, field.name) != getattr(default, field.name)]
        about = [name for name in given if name not in ("weights_type", "linear", "experts")]
        if self.weights_type == "stored" and about:
            raise UsageError(
                f"{_SPOKEN.get(about[0], about[0])} is about weights that become codes, and these stay as they are stored",
                hint='for codes `weights_type="int4"`',
            )
        if self.linear == "matmul" and self.weights_type != "stored":
            raise UsageError(
                "codes have a product of their own, and MatMul none", hint="leave `linear=` or `weights_type=` away"
            )
        whole = [name for name in about if name not in ("embeddings", "head", "budget")]
        if self.weights_type == FLOAT8 and whole and whole != ["rounding"]:
            raise UsageError(
                f"{_SPOKEN.get(whole[0], whole[0])} is about integers: fp8 has a scale for each output, and rounds to nearest",
                hint='for integers `weights_type="int8"`',
            )
        if self.weights_type == FLOAT8 and self.rounding == "feedback":
            raise UsageError("fp8 rounds to nearest", hint='`rounding="nearest"`, or `weights_type="int8"`')
        if self.weights_type != "stored" and (self.budget is None) == (self.weights_type == "mixed"):
            raise UsageError(
                "mixed types have a budget, and nothing else has one",
                hint='`weights_type="mixed"` with `budget=`, or neither',
            )
        unheard = self.rounding == "nearest" and self.budget is None and self.scales == "minmax"
        if self.calibration is not None and unheard:
            raise UsageError(
                "rounding to nearest looks at no inputs", hint='leave `calibration=` away, or `rounding="nearest"`'
            )
