# SPDX-License-Identifier: Apache-2.0
"""What a merge of each kind must be, in float64, and how far from that ours and PEFT's are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import peft
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

from tests.oracles.measure import ulp

__all__ = ["Errors", "check", "load"]

_F32 = 8 * 2.0**-24
"""What float32 may lose on the way, of the largest value of a weight: where float64 is that near to a tie, either neighbour is right."""

_SCALE = 2.0
"""``lora_alpha / r`` of `kinds.KINDS`."""


class Errors(NamedTuple):
    """How far a merge is from float64, as shares of what changed: the lengths of both as vectors."""

    ours: float
    peft: float


def load(base: Path, dtype: torch.dtype = torch.bfloat16) -> Any:
    """The model, by transformers."""
    transformers.logging.set_verbosity_error()
    return transformers.AutoModelForCausalLM.from_pretrained(base, dtype=dtype)


def check(kind: str, base: Path, adapter: Path, ours: Path, theirs: Path) -> Errors:
    """Assert that every weight of `ours` is the float64 result, rounded once; what did not change, bit for bit.

    Args:
        kind: Its name in `kinds.KINDS`.
        base: A model.
        adapter: An adapter for it.
        ours: The merge of the two, which is checked.
        theirs: PEFT's merge of the two, or of a model with more layers that begins with these: only measured.
    """
    before, actual, beside = map(_tensors, (base, ours, theirs))
    wanted = _exact(kind, before, base, adapter)
    change = our_error = peft_error = 0.0
    for name, value in actual.items():
        exact, old = wanted[name], before[name].double()
        if torch.equal(exact, old):
            assert torch.equal(value, before[name]), name
            continue
        error = (value.double() - exact).abs()
        step = ulp(torch.maximum(exact.abs(), old.abs()), value.dtype)
        wrong = (error > 0.51 * step) & (error > 0.5 * step + _F32 * exact.abs().max())
        assert not wrong.any(), (
            f"{name}: {int(wrong.sum())} of {wrong.numel()}, by {float((error / step).max()):.2f} ulp"
        )
        change += float((exact - old).square().sum())
        our_error += float(error.square().sum())
        peft_error += float((beside[name].double() - exact).square().sum())
    assert change
    return Errors((our_error / change) ** 0.5, (peft_error / change) ** 0.5)


def _exact(kind: str, before: Mapping[str, Tensor], base: Path, adapter: Path) -> Mapping[str, Tensor]:
    """By this module's equation where PEFT's own has float32 in it, or refuses float64; else by PEFT in float64."""
    if kind not in _EQUATIONS:
        model = peft.PeftModel.from_pretrained(load(base, torch.float64), adapter)
        merged: dict[str, Tensor] = model.merge_and_unload().state_dict()
        return merged
    stored = load_file(adapter / "adapter_model.safetensors")
    mark, equation = _EQUATIONS[kind]
    found = {name: value.double() for name, value in before.items()}
    for key in stored:
        module, marked, _ = key.removeprefix("base_model.model.").rpartition(f".{mark}")
        if marked:
            name = f"{module}.weight"
            found[name] = equation(found[name], module, stored)
    return found


def _lora(weight: Tensor, module: str, stored: Mapping[str, Tensor]) -> Tensor:
    """``W + s B A``."""
    A, B = (stored[f"base_model.model.{module}.lora_{part}.weight"].double() for part in "AB")
    return weight + _SCALE * B @ A


def _pissa(weight: Tensor, module: str, stored: Mapping[str, Tensor]) -> Tensor:
    """``W - W_r + s B A``, with the part along the r largest singular values."""
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    rank = len(stored[f"base_model.model.{module}.lora_A.weight"])
    return _lora(weight - (left[:, :rank] * values[:rank]) @ right[:rank], module, stored)


def _olora(weight: Tensor, module: str, stored: Mapping[str, Tensor]) -> Tensor:
    """``W - s Q_r R_r + s B A``."""
    Q, R = torch.linalg.qr(weight)
    rank = len(stored[f"base_model.model.{module}.lora_A.weight"])
    return _lora(weight - _SCALE * Q[:, :rank] @ R[:rank], module, stored)


def _osf(weight: Tensor, module: str, stored: Mapping[str, Tensor]) -> Tensor:
    """``W - W_low + U_low diag(S_low) V_low``, by a singular value decomposition of W."""
    U, S, V = (stored[f"base_model.model.{module}.osf_svd_params.{part}_low"].double() for part in "USV")
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    kept = len(values) - len(S)
    return (left[:, :kept] * values[:kept]) @ right[:kept] + (U * S) @ V


def _frod(weight: Tensor, module: str, stored: Mapping[str, Tensor]) -> Tensor:
    """``U (S + diag(l)) V^T``, with the directions U of ``W V^-T``."""
    category = "_".join(module.split(".")[-2:])
    V = stored[f"base_model.frod_V.{category}"].double()
    between = torch.diag(stored[f"base_model.model.{module}.frod_lambda_l"].double())
    values = stored[f"base_model.model.{module}.frod_lambda_s_values"].double()
    between.index_put_(tuple(stored[f"base_model.frod_s_indices.{category}"].long()), values, accumulate=True)
    scaled = torch.linalg.solve(V, weight.T).T
    return scaled / scaled.norm(dim=0) @ between @ V.T


_EQUATIONS: Mapping[str, tuple[str, Callable[[Tensor, str, Mapping[str, Tensor]], Tensor]]] = {
    "OSF": ("osf_svd_params.S_low", _osf),
    "FRoD": ("frod_lambda_l", _frod),
    "PiSSA": ("lora_A.weight", _pissa),
    "OLoRA": ("lora_A.weight", _olora),
    "MiCA": ("lora_A.weight", _lora),
}


def _tensors(folder: Path) -> dict[str, Tensor]:
    return {name: value for path in sorted(folder.glob("*.safetensors")) for name, value in load_file(path).items()}
