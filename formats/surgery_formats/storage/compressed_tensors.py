# SPDX-License-Identifier: Apache-2.0
"""Weights as compressed-tensors saves them (llm-compressor, vLLM): integers of 1 to 8 bits, FP8, MXFP8, NVFP4, MXFP4, MXFP6.

The tensors say what they are: packed integers have a scale for the tensor, every row, or every group of a row, and their
zero points, if any, packed along the rows; FP8 is as in `surgery_formats.storage.fp8`; of NVFP4 the scales are divided
by the scale of the tensor. The configuration is asked for the bits of integers in whole bytes and for the size of uneven
blocks only, so that its patterns of module names are never run. What the package no longer reads (sparse masks,
marlin-24) is not claimed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from surgery_formats.dtypes import DType
from surgery_formats.errors import FitError, MalformedError
from surgery_formats.storage import packing
from surgery_formats.storage.base import Storage
from surgery_formats.storage.code_rows import CodeRows
from surgery_formats.storage.fp8 import FP8_TYPES, companions, fp8_weight, scale_blocks
from surgery_formats.storage.quantised import quantisation_of
from surgery_formats.storage.scale_choice import absmax, power_of_two, spread
from surgery_formats.storage.scaled_grid import Integers
from surgery_formats.storage.scaled_weight import ScaledWeight
from surgery_formats.storage.scales import Blocks, Scales, Zeros
from surgery_formats.storage.small_floats import E2M1, E2M3, SmallFloat
from surgery_formats.tensors.tensor import StoredTensor
from surgery_formats.text import listing

__all__ = ["COMPRESSED_TENSORS", "CompressedTensorsStorage"]

_METHOD = "compressed-tensors"
_UNREAD = ("sparse-bitmask", "sparse-24-bitmask", "marlin-24")
_PACKED, _WHOLE = ".weight_packed", ".weight"
_LARGEST_SIZE = 1 << 40


@dataclass(frozen=True)
class _Told:
    """What a configuration says of its weights, over all of its groups.

    Attributes:
        bits: Of integers.
        blocks: Rows and columns of blocks.
        asymmetric: Every group has zero points.
    """

    bits: tuple[int, ...]
    blocks: tuple[tuple[int, int], ...]
    asymmetric: bool

    @property
    def block(self) -> tuple[int, int] | None:
        """The one size of blocks."""
        return self.blocks[0] if len(self.blocks) == 1 else None


@dataclass(frozen=True)
class CompressedTensorsStorage:
    """The storage; see the module."""

    name: str = _METHOD
    title: str = "X.weight_packed, or X.weight in integers or FP8, with X.weight_scale (compressed-tensors)"

    def claim(self, tensors: Mapping[str, StoredTensor], config: Mapping[str, Any]) -> Iterator[Storage]:
        """See `StorageKind.claim`."""
        told = quantisation_of(config)
        if str(told.get("quant_method", _METHOD)).lower() != _METHOD or _is_unread(told):
            return
        ours = "quant_method" in told
        said = _said(told)
        for name, tensor in tensors.items():
            packed = name.endswith(_PACKED)
            if not packed and not (ours and name.endswith(_WHOLE)):
                continue
            module = name.removesuffix(_PACKED if packed else _WHOLE)
            scale = tensors.get(f"{module}.weight_scale")
            read = _reader(tensor, packed)
            if scale is None or read is None or not tensor.numel:
                continue
            if told.get("transform_config"):
                raise FitError(
                    "weights are stored rotated (transform_config), which is not supported",
                    file=tensor.path,
                    tensor=name,
                    hint="take the model as it was before quantisation",
                )
            weight = read(_Module(module, tensor, scale, tensors, said))
            if said.asymmetric and weight.zeros is None:
                raise MalformedError(
                    "no zero points, which its configuration says it has", file=tensor.path, tensor=name
                )
            yield replace(weight, others=companions(f"{module}.weight", tensors))


COMPRESSED_TENSORS = CompressedTensorsStorage()


@dataclass(frozen=True)
class _Module:
    """A layer's codes and scales, and where to find the rest."""

    name: str
    codes: StoredTensor
    scale: StoredTensor
    tensors: Mapping[str, StoredTensor]
    told: _Told

    def part(self, name: str) -> StoredTensor | None:
        return self.tensors.get(f"{self.name}.weight_{name}")


def _reader(codes: StoredTensor, packed: bool) -> Callable[[_Module], ScaledWeight] | None:
    if packed:
        return {DType.I32: _packed_integers, DType.U8: _packed_floats}.get(codes.dtype)
    if codes.dtype is DType.I8:
        return _integers
    return _floats if codes.dtype in FP8_TYPES else None


def _packed_integers(module: _Module) -> ScaledWeight:
    codes, sizes = module.codes, _logical_sizes(module)
    words = codes.shape[-1] if codes.shape else 0
    fitting = [bits for bits in range(1, 9) if packing.words_of(sizes[-1], bits) == words]
    bits = _only([each for each in module.told.bits if each in fitting] or fitting, module)
    shape, stack = _matrix(sizes)
    blocks = scale_blocks(codes, shape, stack, module.scale, None)
    weight = _weight(module, Integers(bits, 1 << (bits - 1)), sizes, CodeRows(codes, shape, bits, "stream"), blocks)
    order = module.part("g_idx")
    if order is not None and (order.dtype is not DType.I32 or order.shape != sizes[-1:]):
        raise MalformedError(
            f"{order.dtype.label} {list(order.shape)} instead of a group for each of {sizes[-1]} columns",
            file=order.path,
            tensor=order.name,
        )
    shape_tensor = module.part("shape")
    assert shape_tensor is not None
    return replace(weight, order=order, shape_in=shape_tensor)


def _integers(module: _Module) -> ScaledWeight:
    bits = _only([each for each in module.told.bits if each <= 8] or [8], module)
    sizes = module.codes.shape
    if len(sizes) not in (2, 3):
        raise _wrong(module, "not a matrix")
    shape, stack = _matrix(sizes)
    blocks = scale_blocks(module.codes, shape, stack, module.scale, module.told.block)
    return _weight(module, Integers(bits), sizes, CodeRows(module.codes, shape, bits), blocks)


def _weight(module: _Module, numbers: Integers, sizes: tuple[int, ...], rows: CodeRows, blocks: Blocks) -> ScaledWeight:
    zero = module.part("zero_point")
    zeros = None
    if zero is not None:
        packed = rows.packed == "stream" and zero.dtype is DType.I32
        if packed and blocks.stack != rows.shape[0] and blocks.per_expert % packing.unit(numbers.bits):
            raise _wrong(module, "zero points of several experts in a word")
        zeros = Zeros(zero, blocks, numbers.bits if packed else 0)
    low, high = -numbers.largest - 1, numbers.largest
    choose = absmax((high - low) / 2) if zeros is None else spread(low, high)
    scales = Scales(module.scale, blocks)
    name = f"{module.name}.weight"
    return ScaledWeight(name, numbers.label, sizes, rows.shape, rows, numbers, scales, zeros, choose=choose)


def _packed_floats(module: _Module) -> ScaledWeight:
    codes, scale, overall = module.codes, module.scale, module.part("global_scale")
    if len(codes.shape) not in (2, 3) or len(scale.shape) != len(codes.shape) or not scale.numel:
        raise _wrong(module, f"{list(codes.shape)} with scales {list(scale.shape)}")
    numbers: SmallFloat = E2M1
    group, kind = (16, "NVFP4") if overall is not None else (32, "MXFP4")
    columns = scale.shape[-1] * group
    if overall is None and codes.shape[-1] * 8 == columns * E2M3.bits:
        numbers, kind = E2M3, "MXFP6"
    if codes.shape[-1] * 8 != columns * numbers.bits or scale.shape[:-1] != codes.shape[:-1]:
        raise _wrong(module, f"{list(codes.shape)} with scales {list(scale.shape)}: not one for every {group}")
    sizes = (*codes.shape[:-1], columns)
    shape, stack = _matrix(sizes)
    scales = Scales(scale, Blocks(shape, (1, group), stack), overall, divides=True)
    if scales.are_exponents == (overall is not None):
        raise _wrong(module, f"scales of type {scale.dtype.label} in {kind}")
    choose = absmax(numbers.largest) if overall is not None else power_of_two(numbers)
    rows = CodeRows(codes, shape, numbers.bits, "stream")
    return ScaledWeight(f"{module.name}.weight", kind, sizes, shape, rows, numbers, scales, choose=choose)


def _floats(module: _Module) -> ScaledWeight:
    weight = fp8_weight(module.codes, module.tensors, module.told.block, _METHOD)
    assert weight.scales is not None
    zero = module.part("zero_point")
    if zero is None:
        return replace(weight, choose=power_of_two(weight.numbers)) if weight.scales.are_exponents else weight
    largest = weight.numbers.largest
    return replace(weight, zeros=Zeros(zero, weight.scales.blocks), choose=spread(-largest, largest))


def _logical_sizes(module: _Module) -> tuple[int, ...]:
    """What ``weight_shape`` holds."""
    tensor = module.part("shape")
    if tensor is None:
        raise _wrong(module, "no weight_shape, which says how many columns there are")
    whole = tensor.dtype in (DType.I64, DType.I32) and tensor.shape in ((2,), (3,))
    sizes = tuple(int(size) for size in tensor.read()) if whole else ()
    if not sizes or not all(0 < size < _LARGEST_SIZE for size in sizes) or sizes[:-1] != module.codes.shape[:-1]:
        raise MalformedError(
            f"{tensor.dtype.label} {list(sizes or tensor.shape)} for codes {list(module.codes.shape)}",
            file=tensor.path,
            tensor=tensor.name,
        )
    return sizes


def _matrix(sizes: tuple[int, ...]) -> tuple[tuple[int, int], int]:
    """The matrix of a weight, and the rows of an expert."""
    if len(sizes) == 3:
        return (sizes[0] * sizes[1], sizes[2]), sizes[1]
    return (sizes[0], sizes[1]), sizes[0]


def _only(bits: list[int], module: _Module) -> int:
    if len(bits) != 1:
        what = (
            f"codes of {listing(map(str, bits))} bits, which of them cannot be told" if bits else "of no width of codes"
        )
        raise _wrong(module, f"{what}: {module.codes.dtype.label} {list(module.codes.shape)}")
    return bits[0]


def _wrong(module: _Module, what: str) -> MalformedError:
    return MalformedError(what, file=module.codes.path, tensor=module.codes.name)


def _is_unread(told: Mapping[str, Any]) -> bool:
    sparse = told.get("sparsity_config")
    formats = [told.get("format"), sparse.get("format") if isinstance(sparse, Mapping) else None]
    return any(each in _UNREAD for each in formats)


def _said(told: Mapping[str, Any]) -> _Told:
    groups = told.get("config_groups")
    listed = groups.values() if isinstance(groups, Mapping) else ()
    weights = [group.get("weights") for group in listed if isinstance(group, Mapping)]
    schemes = [each for each in weights if isinstance(each, Mapping)]
    bits = {each.get("num_bits") for each in schemes if each.get("type", "int") == "int"}
    blocks = {_block(each.get("block_structure")) for each in schemes} - {None}
    return _Told(
        tuple(sorted(each for each in bits if type(each) is int and 1 <= each <= 8)),
        tuple(sorted(each for each in blocks if each is not None)),
        bool(schemes) and all(each.get("symmetric") is False for each in schemes),
    )


def _block(said: Any) -> tuple[int, int] | None:
    sides = said.split("x") if isinstance(said, str) else said
    if not isinstance(sides, list) or len(sides) != 2:
        return None
    try:
        rows, columns = (int(side) for side in sides)
    except (TypeError, ValueError):
        return None
    return (rows, columns) if min(rows, columns) > 0 else None
