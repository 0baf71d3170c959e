# SPDX-License-Identifier: Apache-2.0
"""MXFP4: numbers E2M1, a power of two (E8M0) for every 32 of a row. The first of two numbers is in the low half of a byte.

gpt-oss saves its experts as ``X_blocks (experts, out, in / 32, 16)`` and ``X_scales (experts, out, in / 32)``, of a
parameter X ``(experts, in, out)``. Quark, ModelOpt and DeepSeek V4 save ``X.weight (out, in / 2)`` and a tensor of
exponents ``(out, in / 32)`` beside it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from surgery_formats.dtypes import DType
from surgery_formats.errors import MalformedError
from surgery_formats.storage.base import Storage
from surgery_formats.storage.code_rows import CodeRows
from surgery_formats.storage.fp8 import companions
from surgery_formats.storage.nvfp4 import fp4_sizes
from surgery_formats.storage.quantised import quantisation_of
from surgery_formats.storage.scale_choice import absmax
from surgery_formats.storage.scaled_weight import ScaledWeight
from surgery_formats.storage.scales import Blocks, Scales
from surgery_formats.storage.small_floats import E2M1
from surgery_formats.tensors.tensor import StoredTensor

__all__ = ["MXFP4", "Mxfp4Storage"]

_GROUP = 32
_CODES = (DType.U8, DType.I8, DType.F4)
_EXPONENTS = (DType.U8, DType.F8_E8M0)
_SCALES = ("weight_scale", "weight_scale_inv", "scale")  # of X.weight: Quark and ModelOpt, transformers, DeepSeek V4
_EXPERTS = ("gate_up_proj", "down_proj")


@dataclass(frozen=True)
class Mxfp4Storage:
    """The storage; see the module."""

    name: str = "mxfp4"
    title: str = "X_blocks and X_scales of gpt-oss, or X.weight in FP4 with exponents for 32 (MXFP4)"

    def claim(self, tensors: Mapping[str, StoredTensor], config: Mapping[str, Any]) -> Iterator[Storage]:
        """See `StorageKind.claim`."""
        method = str(quantisation_of(config).get("quant_method", "")).lower()
        if method == "compressed-tensors":
            return
        for name, codes in tensors.items():
            if name.endswith("_blocks"):
                weight = name.removesuffix("_blocks")
                scale = tensors.get(f"{weight}_scales")
                if codes.dtype is DType.U8 and scale is not None and scale.dtype is DType.U8:
                    yield _experts(weight, codes, scale)
                elif codes.dtype.is_float_or_fp8 and weight.endswith(_EXPERTS):
                    raise MalformedError(
                        f"is called the blocks of MXFP4 and holds numbers in {codes.dtype.label}: transformers saves "
                        "experts so that it dequantised on loading, and reads them nowhere",
                        file=codes.path,
                        tensor=name,
                        hint="take the model as it was released, or call the tensor by its name without _blocks",
                    )
            elif name.endswith(".weight") and codes.dtype in _CODES:
                module = name.removesuffix("weight")
                beside = [tensors[module + last] for last in _SCALES if module + last in tensors]
                if len(beside) == 1 and _fits(codes, beside[0]) and f"{module}comfy_quant" not in tensors:
                    yield _linear(codes, beside[0], companions(name, tensors))


MXFP4 = Mxfp4Storage()


def _experts(name: str, codes: StoredTensor, scale: StoredTensor) -> ScaledWeight:
    """Of gpt-oss; the stored matrices are the transposes of those of the model's code."""
    if len(codes.shape) != 4 or codes.shape[:3] != scale.shape or codes.shape[3] != _GROUP // 2:
        raise MalformedError(
            f"blocks {list(codes.shape)} and scales {list(scale.shape)}: not (experts, out, in / 32, 16) and one for each",
            file=codes.path,
            tensor=codes.name,
        )
    experts, out, groups, _ = codes.shape
    shape = experts * out, groups * _GROUP
    scales = Scales(scale, Blocks(shape, (1, _GROUP), out))
    rows = CodeRows(codes, shape, E2M1.bits, "stream")
    sizes = experts, groups * _GROUP, out
    return ScaledWeight(name, "MXFP4", sizes, shape, rows, E2M1, scales, choose=absmax(E2M1.largest), transposed=True)


def _fits(codes: StoredTensor, scale: StoredTensor) -> bool:
    sizes = fp4_sizes(codes)
    if len(sizes) not in (2, 3) or sizes[-1] % _GROUP or not codes.numel:
        return False
    return scale.dtype in _EXPONENTS and scale.shape == (*sizes[:-1], sizes[-1] // _GROUP)


def _linear(codes: StoredTensor, scale: StoredTensor, others: tuple[StoredTensor, ...]) -> ScaledWeight:
    sizes = fp4_sizes(codes)
    shape = (sizes[0] * sizes[1], sizes[2]) if len(sizes) == 3 else (sizes[0], sizes[1])
    scales = Scales(scale, Blocks(shape, (1, _GROUP), sizes[-2]))
    rows = CodeRows(codes, shape, E2M1.bits, "stream")
    return ScaledWeight(
        codes.name, "MXFP4", sizes, shape, rows, E2M1, scales, choose=absmax(E2M1.largest), others=others
    )
