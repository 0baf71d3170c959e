# SPDX-License-Identifier: Apache-2.0
"""An ONNX file that is open: its tensors where they lie, and the graph without their values."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery_formats.arrays import Array
from surgery_formats.containers.onnx.elements import ELEMENT_NAMES, STRING, raw_form
from surgery_formats.containers.onnx.external import ExternalFiles, is_inside
from surgery_formats.containers.onnx.parse import parsed_model
from surgery_formats.containers.onnx.tensor_proto import FoundTensor
from surgery_formats.containers.onnx.walk import walk
from surgery_formats.containers.onnx.wire import Pieces
from surgery_formats.dtypes import DType
from surgery_formats.errors import MalformedError
from surgery_formats.files.raw import File, open_file
from surgery_formats.tensors.tensor import StoredTensor
from surgery_formats.text import nbytes, show

if TYPE_CHECKING:
    import onnx

__all__ = ["OnnxGraph", "TypedTensors", "external_locations", "open_graph"]

_SKELETON = 1 << 29  # bytes of a graph without its weights
_DECODED = 1 << 28  # bytes of values that are read one by one


@dataclass(frozen=True, eq=False, repr=False)
class OnnxGraph:
    """A graph in a file, only read.

    Names of tensors that are not the main graph's are told in `surgery_formats.containers.onnx.walk`.

    Attributes:
        path: The file.
        file: The same, open.
        tensors: Every tensor whose values lie in a file as they are in memory, in the graph's or in another, in the
            order of the graph. Of types that safetensors lacks they are bytes, see `StoredTensor.packed_as`.
        shapes: The shape of every tensor as the graph has it, also of those that are bytes here.
        small: Every other tensor of numbers: written one by one, they are decoded when they are asked for.
        holders: ``initializer``, ``Constant``, ``attribute`` or ``SparseTensor``, by name of the tensor.
        strings: Names of tensors of text.
        external: The other files, open, in order of their first use.
    """

    path: Path
    file: File
    tensors: Mapping[str, StoredTensor]
    shapes: Mapping[str, tuple[int, ...]]
    small: TypedTensors
    holders: Mapping[str, str]
    strings: tuple[str, ...]
    external: tuple[File, ...]
    skeleton: Pieces

    def __repr__(self) -> str:
        return f"<OnnxGraph {str(self.path)!r}: {len(self.holders)} tensors>"

    @cached_property
    def proto(self) -> onnx.ModelProto:
        """The model; tensors of more than `tensor_proto.KEPT` bytes have no values, whether they are in `tensors` or in `small`.

        Raises:
            MalformedError: it cannot be parsed, or is too large without its weights.
        """
        if self.skeleton.nbytes > _SKELETON:
            text = f"the graph without its weights has {nbytes(self.skeleton.nbytes)}, at most {nbytes(_SKELETON)} are read"
            raise MalformedError(text, file=self.path)
        return parsed_model(self.skeleton.join(self.file), self.path)

    @property
    def files(self) -> tuple[File, ...]:
        """The graph's, and the other files."""
        return self.file, *self.external

    def check_unchanged(self) -> None:
        """Raise ProofError if one of the files changed since it was opened."""
        for file in self.files:
            file.check_unchanged()


class TypedTensors(Mapping[str, Array]):
    """Tensors whose values are written one by one, such as halves as integers; each is decoded when it is asked for."""

    def __init__(self, file: File, found: Mapping[str, FoundTensor]) -> None:
        self._file, self._found = file, found

    def __getitem__(self, name: str) -> Array:
        """The values.

        Raises:
            MalformedError: they are not as many as the shape says.
        """
        import onnx
        from google.protobuf.message import DecodeError

        found = self._found[name]
        begin, end = found.message
        if end - begin > _DECODED:
            text = f"{nbytes(end - begin)} of values written one by one"
            raise MalformedError(text, file=self._file.path, tensor=name, hint="save the graph with raw data")
        try:
            proto = onnx.TensorProto.FromString(bytes(self._file.read(begin, end - begin)))
            values: Any = onnx.numpy_helper.to_array(proto)
        except (DecodeError, TypeError, ValueError, OverflowError, MemoryError, KeyError) as error:
            raise MalformedError(
                f"its values cannot be read: {show(error)}", file=self._file.path, tensor=name
            ) from error
        return values

    def raw(self, name: str) -> bytes:
        """The values as raw data has them, those of less than a byte packed.

        Raises:
            MalformedError: see `__getitem__`.
        """
        import onnx

        data: bytes = onnx.numpy_helper.from_array(self[name]).raw_data
        return data

    def __iter__(self) -> Iterator[str]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape, without reading values."""
        return self._found[name].shape

    def is_weight(self, name: str, elements: int) -> bool:
        """Whether it is an array of more than so many numbers of a type that weights have."""
        found = self._found[name]
        form = raw_form(found.elements, found.shape)
        numbers = form is not None and (form[0].is_float_or_fp8 or bool(form[3]) or form[0] in (DType.I8, DType.U8))
        return numbers and math.prod(found.shape) > elements

    def label(self, name: str) -> str:
        """The type."""
        return ELEMENT_NAMES[self._found[name].elements]


def open_graph(path: str | os.PathLike[str]) -> OnnxGraph:
    """Open an ONNX file. Its fields and those of no weight are read; every tensor is known to lie inside its file.

    Raises:
        NotFoundError: no such file, or a file of weights is missing.
        MalformedError: not an ONNX model; a tensor of an unknown type, or whose bytes are not what its shape takes.
    """
    file = open_file(path)
    found = walk(file)
    external = ExternalFiles(file.path)
    stored: dict[str, StoredTensor] = {}
    typed: dict[str, FoundTensor] = {}
    strings = []
    for tensor in found.tensors:
        if tensor.elements == STRING:
            strings.append(tensor.key)
        elif (one := _stored(file, tensor, external)) is not None:
            stored[tensor.key] = one
        else:
            typed[tensor.key] = tensor
    return OnnxGraph(
        file.path,
        file,
        stored,
        {tensor.key: tensor.shape for tensor in found.tensors},
        TypedTensors(file, typed),
        {tensor.key: tensor.holder for tensor in found.tensors},
        tuple(strings),
        tuple(dict.fromkeys(external.files.values())),
        found.skeleton,
    )


def external_locations(path: str | os.PathLike[str]) -> tuple[str, ...]:
    """The other files that a graph has its weights in, as it names them, whether they are there or not.

    Raises:
        NotFoundError, MalformedError: see `open_graph`.
    """
    found = (tensor.external for tensor in walk(open_file(path)).tensors)
    names = dict.fromkeys(entries.get("location", "") for entries in found if entries is not None)
    return tuple(name for name in names if is_inside(name))


def _stored(file: File, tensor: FoundTensor, external: ExternalFiles) -> StoredTensor | None:
    """The tensor where it lies; None if its values are written one by one."""
    form = raw_form(tensor.elements, tensor.shape)
    if form is None:
        raise MalformedError(f"element type {tensor.elements} is not known", file=file.path, tensor=tensor.key)
    dtype, shape, size, packed_as = form
    if tensor.external is not None:
        other, offset = external.place(tensor.key, tensor.external, size)
        return StoredTensor(tensor.key, dtype, shape, other, offset, size, packed_as=packed_as)
    if tensor.raw is None:
        if size:
            return None
        return StoredTensor(tensor.key, dtype, shape, file, tensor.message[1], 0, packed_as=packed_as)
    begin, end = tensor.raw
    if end - begin != size:
        text = f"{end - begin} bytes for {ELEMENT_NAMES[tensor.elements]} {list(tensor.shape)}, which takes {size}"
        raise MalformedError(text, file=file.path, tensor=tensor.key)
    return StoredTensor(tensor.key, dtype, shape, file, begin, size, packed_as=packed_as)
