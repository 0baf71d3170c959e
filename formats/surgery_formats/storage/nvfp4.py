# SPDX-License-Identifier: Apache-2.0
"""NVFP4 as ModelOpt saves it: numbers E2M1, a scale E4M3 for every 16 of a row, and one scale of the tensor.

A number is multiplied by the product of both scales, which is rounded to float32 first. The first of two numbers is in
the low half of a byte. Experts of Llama 4 lie ``(experts, in, out)``, their numbers packed along the inputs.

compressed-tensors divides by the scale of the tensor (`surgery_formats.storage.compressed_tensors`). ComfyUI lays
scales out in tiles of 128 x 4 and has the first number in the high half: its weights are not read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from surgery_formats.dtypes import DType
from surgery_formats.errors import MalformedError
from surgery_formats.storage.base import Storage
from surgery_formats.storage.code_rows import CodeRows
from surgery_formats.storage.fp8 import companions
from surgery_formats.storage.scale_choice import absmax
from surgery_formats.storage.scaled_weight import ScaledWeight
from surgery_formats.storage.scales import Blocks, Scales
from surgery_formats.storage.small_floats import E2M1
from surgery_formats.tensors.tensor import StoredTensor

__all__ = ["NVFP4", "Nvfp4Storage", "fp4_sizes"]

_GROUP = 16
_OVERALL = "weight_scale_2"


@dataclass(frozen=True)
class Nvfp4Storage:
    """The storage; see the module."""

    name: str = "nvfp4"
    title: str = "X.weight in FP4 with X.weight_scale and X.weight_scale_2 (ModelOpt's NVFP4)"

    def claim(self, tensors: Mapping[str, StoredTensor], config: Mapping[str, Any]) -> Iterator[Storage]:
        """See `StorageKind.claim`."""
        for name, overall in tensors.items():
            if not name.endswith(_OVERALL):
                continue
            stem = name.removesuffix(_OVERALL)  # `X.` of the weight X.weight, or `X_` of the weight X
            weight = stem[:-1] if stem.endswith("_") else f"{stem}weight"
            codes, scale = tensors.get(weight), tensors.get(f"{stem}weight_scale")
            foreign = f"{stem}comfy_quant" in tensors or f"{stem}pre_quant_scale" in tensors
            if codes is None or scale is None or codes.dtype not in (DType.U8, DType.F4) or foreign:
                continue
            yield _weight(codes, scale, overall, companions(weight, tensors))


NVFP4 = Nvfp4Storage()


def _weight(
    codes: StoredTensor, scale: StoredTensor, overall: StoredTensor, others: tuple[StoredTensor, ...]
) -> ScaledWeight:
    sizes, packed = fp4_sizes(codes), _along(codes, scale)
    if packed is None or scale.dtype is not DType.F8_E4M3:
        raise MalformedError(
            f"scales {scale.dtype.label} {list(scale.shape)} for codes {list(codes.shape)}: not one E4M3 for every "
            f"{_GROUP} of a row",
            file=scale.path,
            tensor=scale.name,
        )
    if packed == "pairs":
        sizes = codes.shape[0], codes.shape[1] * 2, codes.shape[2]
    shape = (sizes[0] * sizes[1], sizes[2]) if len(sizes) == 3 else (sizes[0], sizes[1])
    size = (_GROUP, 1) if packed == "pairs" else (1, _GROUP)
    rows = CodeRows(codes, shape, E2M1.bits, packed)
    scales = Scales(scale, Blocks(shape, size, sizes[-2]), overall)
    return ScaledWeight(
        codes.name, "NVFP4", sizes, shape, rows, E2M1, scales, choose=absmax(E2M1.largest), others=others
    )


def fp4_sizes(codes: StoredTensor) -> tuple[int, ...]:
    """Sizes of a weight whose numbers of four bits lie two a byte along rows; F4 counts numbers, not bytes."""
    if codes.dtype is DType.F4 or not codes.shape:
        return codes.shape
    return (*codes.shape[:-1], codes.shape[-1] * 2)


def _along(codes: StoredTensor, scale: StoredTensor) -> Literal["stream", "pairs"] | None:
    """Whether numbers are packed, and share scales, along rows or along columns of experts; None if neither."""
    sizes = fp4_sizes(codes)
    if len(sizes) in (2, 3) and sizes[-1] % _GROUP == 0 and scale.shape == (*sizes[:-1], sizes[-1] // _GROUP):
        return "stream"
    if codes.dtype is DType.U8 and len(codes.shape) == 3 and codes.shape[1] * 2 % _GROUP == 0:
        experts, half, columns = codes.shape
        return "pairs" if scale.shape == (experts, half * 2 // _GROUP, columns) else None
    return None
