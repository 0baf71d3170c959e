# SPDX-License-Identifier: Apache-2.0
"""MLX's quantisation to small floats: X.weight as U32 words and X.scales as bytes, of the modes mxfp4, mxfp8 and nvfp4.

A value is a number E2M1 (E4M3 in mxfp8) times the scale of its group: a power of two for 32 of a row, or in nvfp4 a
number E4M3 for 16. There is no scale of the whole tensor.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple

from surgery_formats.dtypes import DType
from surgery_formats.errors import MalformedError
from surgery_formats.storage.code_rows import CodeRows
from surgery_formats.storage.mlx_affine import layer_settings
from surgery_formats.storage.module_tensors import check_types
from surgery_formats.storage.quantised import quantisation_of
from surgery_formats.storage.scale_choice import absmax
from surgery_formats.storage.scaled_weight import ScaledWeight
from surgery_formats.storage.scales import Blocks, Scales
from surgery_formats.storage.small_floats import E2M1, E4M3, E8M0, SmallFloat
from surgery_formats.tensors.tensor import StoredTensor

__all__ = ["MLX_FLOATS"]


class _Mode(NamedTuple):
    label: str
    numbers: SmallFloat
    packed: Literal["bytes", "stream"]
    size: int
    scales: SmallFloat


_MODES = {
    "mxfp4": _Mode("MXFP4", E2M1, "stream", 32, E8M0),
    "mxfp8": _Mode("MXFP8", E4M3, "bytes", 32, E8M0),
    "nvfp4": _Mode("NVFP4", E2M1, "stream", 16, E4M3),
}


class _MlxFloats:
    """See the module."""

    name = "mlx-floats"
    title = "X.weight (U32) and X.scales (U8): MLX's modes mxfp4, mxfp8 and nvfp4"

    def claim(self, tensors: Mapping[str, StoredTensor], config: Mapping[str, Any]) -> Iterator[ScaledWeight]:
        """See `StorageKind.claim`."""
        named = quantisation_of(config)
        if "quant_method" in named:
            return
        for name, scales in tensors.items():
            if not name.endswith(".scales"):
                continue
            stem = name.removesuffix(".scales")
            words = tensors.get(f"{stem}.weight")
            if words is None or words.dtype is not DType.U32:
                continue
            mode = _MODES.get(layer_settings(named, stem)[2])
            if mode is not None:
                yield _weight(words, scales, mode)


MLX_FLOATS = _MlxFloats()


def _weight(words: StoredTensor, scales: StoredTensor, mode: _Mode) -> ScaledWeight:
    check_types(words, (DType.U32,), (2, 3))
    check_types(scales, (DType.U8,), (2, 3))
    columns = words.shape[-1] * 32 // mode.numbers.bits
    if scales.shape != (*words.shape[:-1], columns // mode.size) or columns % mode.size:
        raise MalformedError(
            f"scales {list(scales.shape)} for words {list(words.shape)}: not one for every {mode.size} of a row",
            file=scales.path,
            tensor=scales.name,
        )
    sizes = (*words.shape[:-1], columns)
    shape = words.numel // words.shape[-1], columns
    rows = CodeRows(words, shape, mode.numbers.bits, mode.packed)
    own = Scales(scales, Blocks(shape, (1, mode.size), words.shape[-2]), stored_as=mode.scales)
    choose = absmax(mode.numbers.largest)
    return ScaledWeight(words.name, mode.label, sizes, shape, rows, mode.numbers, own, choose=choose)
