# SPDX-License-Identifier: Apache-2.0
"""Weights of torchao as transformers saves them: ``X._weight_qdata`` and others, and their class in the file's metadata.

Read from torchao 0.18 (``torchao.prototype.safetensors``). ``Int8Tensor``, ``IntxUnpackedToInt8Tensor`` and
``Float8Tensor`` are read as ``(code - zero_point) * scale`` in float32, ``Int4Tensor`` as `torchao_int4` says. What is
laid out for the kernels of one device is refused by name, as is a weight whose layer multiplies its input first. An
``NF4Tensor`` is never saved.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from surgery_formats.dtypes import DType
from surgery_formats.errors import FitError, MalformedError
from surgery_formats.files.bounded_json import parse_object
from surgery_formats.files.raw import File
from surgery_formats.storage.base import Storage
from surgery_formats.storage.code_rows import CodeRows
from surgery_formats.storage.quantised import METADATA_NAMES
from surgery_formats.storage.scale_choice import Choose, absmax
from surgery_formats.storage.scaled_grid import Integers
from surgery_formats.storage.scaled_weight import ScaledWeight
from surgery_formats.storage.scales import Blocks, Scales, Zeros
from surgery_formats.storage.small_floats import E4M3, E5M2
from surgery_formats.storage.torchao_int4 import Int4Weight
from surgery_formats.tensors.tensor import StoredTensor
from surgery_formats.text import show

if TYPE_CHECKING:
    import numpy

__all__ = ["TORCHAO"]

_CODES = "_qdata"
_HEADER_LIMIT = 100_000_000
_FLOATS = {DType.F8_E4M3: E4M3, DType.F8_E5M2: E5M2}
_LAID_OUT = {
    "Int4TilePackedTo4dTensor": "in tiles for the tensor cores of a GPU",
    "Int4PlainInt32Tensor": "for the kernels of an XPU or NPU",
    "Int4PreshuffledTensor": "shuffled for the kernels of one GPU",
    "MXTensor": "with scales swizzled for a GPU",
    "NVFP4Tensor": "with scales swizzled for a GPU",
}


class _TorchAO:
    name = "torchao"
    title = "torchao as transformers saves it: Int4Tensor, Int8Tensor, IntxUnpackedToInt8Tensor, Float8Tensor"

    def claim(self, tensors: Mapping[str, StoredTensor], config: Mapping[str, Any]) -> Iterator[Storage]:
        """See `StorageKind`."""
        files: dict[File, dict[str, str]] = {}
        for name, tensor in tensors.items():
            module, _, last = name.rpartition(".")
            if last.startswith("_") and last.endswith(_CODES) and len(last) > len(_CODES) + 1:
                if tensor.file not in files:
                    files[tensor.file] = _metadata(tensor.file)
                parameter = last[1:].removesuffix(_CODES)
                yield _weight(f"{module}.{parameter}", f"{module}._{parameter}_", tensors, files[tensor.file])


TORCHAO = _TorchAO()


def _metadata(file: File) -> dict[str, str]:
    """The strings of a safetensors file beside its tensors; of another file, none."""
    length = int.from_bytes(file.read(0, min(8, file.size)), "little")
    if not 0 < length <= min(_HEADER_LIMIT, file.size - 8):
        return {}
    metadata = parse_object(file.read(8, length), file=file.path).get("__metadata__")
    return metadata if isinstance(metadata, dict) else {}


def _weight(
    name: str, stem: str, tensors: Mapping[str, StoredTensor], metadata: Mapping[str, str]
) -> ScaledWeight | Int4Weight:
    codes = tensors[stem + "qdata"]

    def fail(what: str) -> NoReturn:
        raise MalformedError(what, file=codes.path, tensor=codes.name)

    kind, fields, parts = _described(name, codes, metadata, fail)
    for part in ("scale", *parts):
        if stem + part not in tensors:
            fail(f"there is no '{show(stem + part)}' beside it")
    blocks = _blocks(codes, fields.get("block_size"), fail, 2 if kind == "Int4Tensor" else 1)
    if kind == "Int4Tensor":
        return _int4(name, codes, blocks, tensors[stem + "scale"], tensors.get(stem + "zero_point"), fail)
    scales = Scales(tensors[stem + "scale"], blocks)
    zeros = Zeros(tensors[stem + "zero_point"], blocks) if "zero_point" in parts else None
    others = tuple(tensors[stem + each] for each in parts if each not in ("qdata", "scale", "zero_point"))
    if kind == "Float8Tensor" and codes.dtype in _FLOATS and zeros is None:
        numbers = _FLOATS[codes.dtype]
        choose = absmax(numbers.largest)
        label = "FP8" if numbers is E4M3 else f"FP8 {numbers.label}"
        rows = CodeRows(codes, blocks.shape, numbers.bits)
        return ScaledWeight(
            name, label, codes.shape, blocks.shape, rows, numbers, scales=scales, choose=choose, others=others
        )
    if kind not in ("Int8Tensor", "IntxUnpackedToInt8Tensor") or codes.dtype is not DType.I8:
        fail(f"is {codes.dtype.label}, and torchao's {show(kind)} by the file's metadata")
    bits = _bits(fields) if kind != "Int8Tensor" else 7 if fields.get("reduce_range") is True else 8
    if bits is None:
        fail(f"its target_dtype is {show(fields.get('target_dtype'), 60)}")
    rows, integers = CodeRows(codes, blocks.shape, bits), Integers(bits)
    return ScaledWeight(
        name,
        f"INT{bits}",
        codes.shape,
        blocks.shape,
        rows,
        integers,
        scales=scales,
        zeros=zeros,
        choose=_symmetric(bits),
        others=others,
    )


class _Description(NamedTuple):
    """What a file's metadata says of a weight: its class, the class's fields, and its tensors beside the codes."""

    kind: object
    fields: dict[str, Any]
    parts: list[str]


def _described(
    name: str, codes: StoredTensor, metadata: Mapping[str, str], fail: Callable[[str], NoReturn]
) -> _Description:
    """What the metadata says of the weight `name`; refuses what is not undone here."""
    if name not in metadata or METADATA_NAMES not in metadata:
        fail(f"the file's metadata does not say what '{show(name)}' is, as torchao needs it")
    told = parse_object(metadata[name].encode(), file=codes.path)
    kind, fields, parts = told.get("_type"), told.get("_data"), told.get("_tensor_data_names")
    if kind in _LAID_OUT:
        raise FitError(
            f"is torchao's {kind}, {_LAID_OUT[kind]}, which is not undone here",
            file=codes.path,
            tensor=codes.name,
            hint="take the model as it was before quantisation",
        )
    if not isinstance(fields, dict) or not isinstance(parts, list) or not all(isinstance(each, str) for each in parts):
        fail(f"the file's metadata of '{show(name)}' is not what torchao writes")
    if "act_pre_scale" in parts:
        raise FitError(
            "its layer multiplies the input before the weight (act_pre_scale), which is not supported",
            file=codes.path,
            tensor=codes.name,
        )
    return _Description(kind, fields, parts)


def _int4(
    name: str,
    codes: StoredTensor,
    blocks: Blocks,
    scale: StoredTensor,
    zero: StoredTensor | None,
    fail: Callable[[str], NoReturn],
) -> Int4Weight:
    rows, columns = blocks.shape
    if codes.dtype not in (DType.I8, DType.U8) or len(codes.shape) != 2 or zero is None or blocks.size[0] != 1:
        fail(f"is {codes.dtype.label} {list(codes.shape)} in blocks of {blocks.size[0]} rows, not torchao's Int4Tensor")
    for tensor in (scale, zero):
        if tensor.dtype not in (DType.F32, DType.BF16, DType.F16) or tensor.shape != (columns // blocks.size[1], rows):
            what = f"is {tensor.dtype.label} {list(tensor.shape)}, where there are {columns // blocks.size[1]} groups"
            raise MalformedError(f"{what} of {rows} rows", file=tensor.path, tensor=tensor.name)
    return Int4Weight(name, blocks.shape, blocks.size[1], codes, scale, zero)


def _blocks(codes: StoredTensor, size: object, fail: Callable[[str], NoReturn], per_byte: int) -> Blocks:
    """The blocks of a weight of two axes, or of a stack of such; -1 is a whole axis."""
    shape = (*codes.shape[:-1], per_byte * codes.shape[-1]) if codes.shape else ()
    if len(shape) not in (2, 3) or 0 in shape:
        fail(f"is {list(shape)}, neither a matrix nor a stack of matrices")
    if not isinstance(size, list) or len(size) != len(shape) or not all(type(each) is int for each in size):
        fail(f"a block_size of '{show(size)}' for {list(shape)}")
    sides = [whole if side == -1 else side for side, whole in zip(size, shape, strict=True)]
    if any(side < 1 or whole % side for side, whole in zip(sides, shape, strict=True)):
        fail(f"a block_size of {size} for {list(shape)}")
    rows, columns = math.prod(shape[:-1]), shape[-1]
    if len(shape) == 3 and sides[0] != 1:
        if sides[:2] != list(shape[:2]):
            fail(f"blocks of {size} across matrices of {list(shape)}")
        return Blocks((rows, columns), (rows, sides[2]), rows)
    return Blocks((rows, columns), (sides[-2], sides[-1]), shape[-2])


def _bits(fields: Mapping[str, Any]) -> int | None:
    """Of ``target_dtype``, such as ``{"_type": "torch.dtype", "_data": "int4"}``."""
    told = fields.get("target_dtype")
    named = told.get("_data") if isinstance(told, dict) else None
    found = [bits for bits in range(1, 9) if named == f"int{bits}"]
    return found[0] if found else None


def _symmetric(bits: int) -> Choose:
    """Scales that spread the codes over both signs, as torchao does by default."""

    def choose(low: numpy.ndarray, high: numpy.ndarray) -> tuple[numpy.ndarray, numpy.ndarray]:
        import numpy as np

        greatest = np.maximum(np.maximum(-low, high), 0)
        scales = np.maximum(greatest / np.float32(((1 << bits) - 1) / 2), np.finfo(np.float32).eps)
        return scales, np.zeros_like(scales)

    return choose
