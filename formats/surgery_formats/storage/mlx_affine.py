# SPDX-License-Identifier: Apache-2.0
"""MLX's affine quantisation: X.weight as U32 words, X.scales and X.biases, 2, 3, 4, 5, 6 or 8 bits.

The "metal" quantisation of transformers has the same words, calls the biases X.qbiases, and chooses other numbers.

Words hold the codes of a row as a stream of bits. A value is ``scale * code + bias``: scales may be negative, and the
bias is the value of the group that lies farthest from 0, so that 0 is kept as it is. Shapes alone do not tell bits from
the size of a group; config.json's `quantization` does, for all layers and under a layer's name for that one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from surgery_formats.dtypes import DType
from surgery_formats.errors import MalformedError
from surgery_formats.storage.fitting import Fit, fit_metal, fit_mlx
from surgery_formats.storage.grouped_columns import GroupedColumns
from surgery_formats.storage.module_tensors import FLOATS, check_types
from surgery_formats.storage.quantised import quantisation_of
from surgery_formats.tensors.tensor import StoredTensor
from surgery_formats.text import show

__all__ = ["MLX_AFFINE", "layer_settings"]

_BITS = (2, 3, 4, 5, 6, 8)


class _MlxAffine:
    """See the module."""

    name = "mlx"
    title = "X.weight (U32), X.scales, X.biases: MLX's affine quantisation, 2 to 8 bits in words along the inputs"

    def claim(self, tensors: Mapping[str, StoredTensor], config: Mapping[str, Any]) -> Iterator[GroupedColumns]:
        """See `StorageKind.claim`."""
        named = quantisation_of(config)
        method = named.get("quant_method")
        if method not in (None, "metal") or not isinstance(named.get("bits"), int):
            return
        ending, fitting = (".biases", fit_mlx) if method is None else (".qbiases", fit_metal)
        for name, scales in tensors.items():
            if not name.endswith((".scales", ending)):
                continue
            stem = name.removesuffix(".scales").removesuffix(ending)
            words = tensors.get(f"{stem}.weight")
            if words is None or words.dtype is not DType.U32:
                continue
            bits, size, mode = layer_settings(named, stem)
            if mode != "affine":
                continue
            partner = f"{stem}{ending}" if name.endswith(".scales") else f"{stem}.scales"
            if partner not in tensors:
                raise MalformedError(f"there is no '{show(partner)}' beside it", file=scales.path, tensor=name)
            if name.endswith(".scales"):
                yield _weight(stem, words, scales, tensors[partner], bits, size, fitting)


MLX_AFFINE = _MlxAffine()


def layer_settings(named: Mapping[str, Any], stem: str) -> tuple[Any, Any, str]:
    """Bits, size of a group and mode of a layer, as far as they are named."""
    own = named.get(stem)
    holders = (own, named) if isinstance(own, Mapping) else (named,)
    bits, size = (next((each[key] for each in holders if key in each), None) for key in ("bits", "group_size"))
    return bits, 64 if size is None else size, str(next((each["mode"] for each in holders if "mode" in each), "affine"))


def _weight(
    stem: str, words: StoredTensor, scales: StoredTensor, biases: StoredTensor, bits: Any, size: Any, fitting: Fit
) -> GroupedColumns:
    axes = (2, 3)
    check_types(words, (DType.U32,), axes)
    for tensor in (scales, biases):
        check_types(tensor, FLOATS, axes)
    columns = scales.shape[-1] * size if isinstance(size, int) and 0 < size <= 1 << 20 else 0
    same = scales.shape == biases.shape and scales.shape[:-1] == words.shape[:-1]
    if bits not in _BITS or not columns or not same or words.shape[-1] * 32 != columns * bits:
        raise MalformedError(
            f"{list(words.shape)} with scales {list(scales.shape)} and biases {list(biases.shape)} "
            f"are not {show(str(bits), 10)} bits in groups of {show(str(size), 10)}",
            file=words.path,
            tensor=words.name,
        )
    sizes = (*words.shape[:-1], columns)
    return GroupedColumns(f"{stem}.weight", f"MLX{bits}", sizes, words, scales, biases, (0, 1, 2), bits, size, fitting)
