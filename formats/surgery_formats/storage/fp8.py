# SPDX-License-Identifier: Apache-2.0
"""Weights in floats of 8 bits: with a scale for the tensor, every row, or every block of rows and columns, or without.

Values are code times scale, also where the scale is called ``weight_scale_inv``. What is read was written by:
transformers (``fp8`` and ``fbgemm_fp8``; DeepSeek V3 and V4, Qwen3, MiniMax, Ministral 3), ModelOpt's FP8, Quark, and
ComfyUI (``fp8_scaled``, and models that were cast to fp8 as they are). The tensors of compressed-tensors are the same;
`surgery_formats.storage.compressed_tensors` finds them by its configuration.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from surgery_formats.dtypes import DType
from surgery_formats.errors import MalformedError
from surgery_formats.storage.base import Storage
from surgery_formats.storage.code_rows import CodeRows
from surgery_formats.storage.quantised import MARKER, quantisation_of
from surgery_formats.storage.scale_choice import absmax
from surgery_formats.storage.scaled_weight import ScaledWeight
from surgery_formats.storage.scales import Blocks, Scales
from surgery_formats.storage.small_floats import E4M3, E4M3_FNUZ, E5M2, E5M2_FNUZ, SmallFloat
from surgery_formats.tensors.tensor import StoredTensor, matrix_of
from surgery_formats.text import show

__all__ = ["FP8", "FP8_TYPES", "Fp8Storage", "companions", "fp8_weight", "scale_blocks"]

FP8_TYPES: dict[DType, SmallFloat] = {
    DType.F8_E4M3: E4M3,
    DType.F8_E5M2: E5M2,
    DType.F8_E4M3_FNUZ: E4M3_FNUZ,
    DType.F8_E5M2_FNUZ: E5M2_FNUZ,
}

_BESIDE_WEIGHT = ("scale_weight", "qscale_weight", "scale")  # of X.weight: ComfyUI, Mistral, DeepSeek V4
_BEHIND_NAME = ("_scale", "_scale_inv")  # of any name
_INPUT_SCALES = (
    *("input_scale", "activation_scale", "scale_input", "qscale_act", "input_scale_ub", "output_scale"),
    *("input_zero_point", "output_zero_point", "input_global_scale", "output_global_scale"),
    *("comfy_quant", "k_scale", "v_scale", "q_scale"),
)
_CACHE_SCALES = {"k_proj": ("k_scale", "k_zero_point"), "v_proj": ("v_scale", "v_zero_point"), "q_proj": ("q_scale",)}
_WITH_SCALES = ("fp8", "fbgemm_fp8", "modelopt")
_DEFAULT_BLOCK = 128
_WEIGHTS = ("weight", "bias", "gate_up_proj", "down_proj")
_ALONE = re.compile(  # parameters of diffusion networks that are in no layer; a cast to fp8 takes all of a file
    r"modulation|scale_shift_table\w*|\w*_scale_shift_table|in_proj_(weight|bias)|text_projection|positional_embedding"
    r"|lin|\w+_pad_token|padding_tokens|register_tokens|pos_embed|pos_frequencies|positional_encoding"
)


@dataclass(frozen=True)
class Fp8Storage:
    """The storage; see the module."""

    name: str = "fp8"
    title: str = "X in FP8, with or without X_scale, X_scale_inv, .scale_weight (DeepSeek, ModelOpt, ComfyUI ...)"

    def claim(self, tensors: Mapping[str, StoredTensor], config: Mapping[str, Any]) -> Iterator[Storage]:
        """See `StorageKind.claim`."""
        told = quantisation_of(config)
        method = str(told.get("quant_method", "")).lower()
        if method == "compressed-tensors":
            return
        found = [t for t in tensors.values() if t.dtype in FP8_TYPES and t.numel and _is_weight(t.name, tensors)]
        markers = [name for name in tensors if name.rpartition(".")[2] == MARKER] if found else []
        block = _told_block(told)
        for tensor in found:
            weight = fp8_weight(tensor, tensors, block, method)
            if weight.scales is None and method in _WITH_SCALES and tensor.name.endswith(".weight"):
                raise MalformedError(
                    f"no scale, though the model's quant_method is {show(method)}", file=tensor.path, tensor=tensor.name
                )
            mine = [name for name in markers if tensor.name.startswith(name.removesuffix(MARKER))]
            markers = [name for name in markers if name not in mine]
            yield replace(weight, others=(*weight.others, *(tensors[name] for name in mine))) if mine else weight


FP8 = Fp8Storage()


def fp8_weight(
    tensor: StoredTensor,
    tensors: Mapping[str, StoredTensor],
    block: tuple[int, int] | None = None,
    method: str = "",
) -> ScaledWeight:
    """The weight of a tensor of fp8.

    Args:
        tensor: The codes.
        tensors: All of the network, by name.
        block: Rows and columns of a block, where the configuration says it.
        method: The configuration's ``quant_method``.

    Raises:
        MalformedError: its scales are not what a weight of its shape has.
    """
    numbers = FP8_TYPES[tensor.dtype]
    kind = "FP8" if numbers is E4M3 else f"FP8 {numbers.label}"
    scale = _scale_of(tensor, tensors)
    stacked = len(tensor.shape) == 3 and (not tensor.name.endswith(".weight") or _has_grids(tensor, scale))
    shape = (tensor.shape[0] * tensor.shape[1], tensor.shape[2]) if stacked else matrix_of(tensor.shape)
    rows = CodeRows(tensor, shape, numbers.bits)
    weight = ScaledWeight(
        tensor.name, kind, tensor.shape, shape, rows, numbers, others=companions(tensor.name, tensors)
    )
    if scale is None:
        return weight
    blocks = scale_blocks(tensor, shape, shape[0] // tensor.shape[0] if stacked else shape[0], scale, block, method)
    scales = Scales(scale, blocks)
    if blocks.size != shape:
        height, width = blocks.size
        kind = f"MX{kind}" if scales.are_exponents and blocks.size == (1, 32) else kind
        kind += " rows" if (height, width) == (1, shape[1]) else "" if kind.startswith("MX") else f" {height}x{width}"
    return replace(weight, kind=kind, scales=scales, choose=absmax(numbers.largest))


def companions(name: str, tensors: Mapping[str, StoredTensor]) -> tuple[StoredTensor, ...]:
    """What stands beside a quantised weight for its layer's inputs, outputs and cache: it goes where the scales go."""
    module = name.removesuffix(".weight")
    if module == name:
        named = [f"{name}_{each}" for each in ("input_scale", "activation_scale")]
    else:
        parent, _, last = module.rpartition(".")
        named = [f"{module}.{each}" for each in _INPUT_SCALES]
        named += [f"{parent}.{each}" for each in _CACHE_SCALES.get(last, ())]
    return tuple(tensors[each] for each in named if each in tensors)


def scale_blocks(
    tensor: StoredTensor,
    shape: tuple[int, int],
    stack: int,
    scale: StoredTensor,
    block: tuple[int, int] | None,
    method: str = "",
) -> Blocks:
    """The blocks that a tensor of scales stands for.

    Args:
        tensor: The codes, for messages.
        shape: ``(rows, columns)`` of the weight's matrix.
        stack: Rows of an expert.
        scale: The scales; only their shape is looked at.
        block: See `fp8_weight`.
        method: See `fp8_weight`.

    Raises:
        MalformedError: no blocks have as many scales.
    """
    rows, columns = shape
    experts, sizes = rows // stack, scale.shape
    if scale.numel == 1:
        return Blocks(shape, shape, rows)
    by_row = sizes[0] == rows if experts == 1 else sizes[:2] == (experts, stack)
    if scale.numel == rows and by_row and not (_is_fbgemm(tensor, method) and sizes[1:] == (columns, 1)):
        return Blocks(shape, (1, columns), stack)
    if scale.numel == experts and sizes[0] == experts:
        return Blocks(shape, (stack, columns), stack)
    if experts > 1 and sizes == (experts, columns, 1):  # fbgemm's down_proj
        return Blocks(shape, (stack, 1), stack)
    grid = sizes[1:] if experts > 1 and len(sizes) == 3 and sizes[0] == experts else sizes if experts == 1 else ()
    if len(grid) == 2 and min(grid) > 0:
        told = block or (None, None)
        size = _side(stack, grid[0], told[0]), _side(columns, grid[1], told[1])
        if all(size):
            return Blocks(shape, size, stack)
    raise MalformedError(
        f"scales {list(sizes)} for codes {list(tensor.shape)}: neither one, nor one a row, nor one a block",
        file=scale.path,
        tensor=scale.name,
    )


def _side(length: int, count: int, told: int | None) -> int:
    """The side of the blocks of which `count` make `length`; 0 if there is none.

    As the configuration says, if that fits; else equal parts; else the default of the format's writers.
    """
    if told and -(-length // told) == count:
        return min(told, length)
    if length % count == 0:
        return length // count
    return _DEFAULT_BLOCK if -(-length // _DEFAULT_BLOCK) == count else 0


def _scale_of(tensor: StoredTensor, tensors: Mapping[str, StoredTensor]) -> StoredTensor | None:
    name, module = tensor.name, tensor.name.removesuffix(".weight")
    named = [name + suffix for suffix in _BEHIND_NAME]
    if module != name:
        named += [f"{module}.{last}" for last in _BESIDE_WEIGHT]
        if (second := tensors.get(f"{module}.weight_scale_2")) is not None:
            raise MalformedError("a second scale of a weight in fp8", file=second.path, tensor=second.name)
    found = [tensors[each] for each in named if each in tensors]
    if len(found) > 1:
        raise MalformedError(
            f"two scales: '{show(found[0].name)}' and '{show(found[1].name)}'", file=tensor.path, tensor=name
        )
    return found[0] if found else None


def _is_weight(name: str, tensors: Mapping[str, StoredTensor]) -> bool:
    """Whether a tensor is a weight of this format: it has a scale, or a name that only weights have.

    One whose layer multiplies its input by numbers first (ModelOpt's AWQ) is not, nor is one whose scales ComfyUI laid
    out in tiles.
    """
    module, _, last = name.rpartition(".")
    scale = tensors.get(f"{module}.weight_scale")
    tiled = scale is not None and scale.dtype in (DType.U8, DType.F8_E8M0) and f"{module}.comfy_quant" in tensors
    if tiled or f"{module}.pre_quant_scale" in tensors:
        return False
    if last == "scale":  # the weight of a norm, as Flux calls it, unless it is that of a weight
        return f"{module}.weight" not in tensors
    named = last in _WEIGHTS or _ALONE.fullmatch(last) is not None
    return named or any(name + suffix in tensors for suffix in _BEHIND_NAME)


def _has_grids(tensor: StoredTensor, scale: StoredTensor | None) -> bool:
    """Whether there is a grid of scales for every expert: of a convolution there is not."""
    return (
        scale is not None and len(scale.shape) == 3 and scale.shape[0] == tensor.shape[0] and scale.shape[1:] != (1, 1)
    )


def _is_fbgemm(tensor: StoredTensor, method: str) -> bool:
    """Whether scales of shape ``(experts, n, 1)`` belong to columns even if the matrix is square."""
    return method == "fbgemm_fp8" and len(tensor.shape) == 3 and tensor.name.endswith("down_proj")


def _told_block(told: Mapping[str, Any]) -> tuple[int, int] | None:
    block = told.get("weight_block_size")
    if isinstance(block, list) and len(block) == 2 and all(type(side) is int and side > 0 for side in block):
        return block[0], block[1]
    return None
