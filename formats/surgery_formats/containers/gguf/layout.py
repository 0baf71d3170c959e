# SPDX-License-Identifier: Apache-2.0
"""The header of a GGUF that is to be written: the key-values of its base byte for byte, but for those that would lie."""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from surgery_formats.containers.base import FileLayout, TensorSpec
from surgery_formats.containers.gguf.constants import ALIGNMENT, ALIGNMENT_KEY, MAGIC, NAME_LIMIT
from surgery_formats.containers.gguf.header import Header
from surgery_formats.dtypes import DType
from surgery_formats.errors import FitError
from surgery_formats.tensors.ggml import BY_NAME, GgmlType, ggml_type_of

__all__ = ["key_value", "lay_out", "lay_out_new"]

_VERSION = 3
_DIMS = 4
_UINT32, _FLOAT32, _STRING = 4, 6, 8
_FILE_TYPE = "general.file_type"
_FILE_TYPES = {"F32": 0, "F16": 1, "BF16": 32}  # enum llama_ftype, of files without blocks
_OF_BLOCKS = "quantize.imatrix."  # keys that say how blocks were chosen
_COUNT, _ALL_TENSORS = "split.count", "split.tensors.count"


def lay_out(tensors: Sequence[TensorSpec], base: Header | None, alignment: int) -> FileLayout:
    """The layout of a file of these tensors.

    Args:
        tensors: In order; those of blocks as bytes, under a name or with a shape that `base` has.
        base: The header whose key-values and types are kept.
        alignment: Of the data and of every tensor, at least.

    Raises:
        FitError: GGML has no such type or shape, or a tensor of blocks is none of the base's.
    """
    alignment = max(alignment, base.alignment if base is not None else ALIGNMENT)
    if base is not None and alignment == base.alignment and _same(tensors, base):
        end = max((tensor.offset + tensor.nbytes for tensor in base.tensors), default=base.begin)
        padded = -(-end // alignment) * alignment
        nbytes = base.file.size if end <= base.file.size <= padded else padded
        ranges = {tensor.name: (tensor.offset, tensor.nbytes) for tensor in base.tensors}
        return _padded(bytes(base.file.read(0, base.begin)), ranges, nbytes)
    if len({name for name, _, _ in tensors}) != len(tensors):
        raise FitError("two tensors of one name")
    types = {name: _type(name, dtype, shape, base) for name, dtype, shape in tensors}
    entries = list(_entries(types, {name: len(shape) for name, _, shape in tensors}, base, alignment))
    return _planned(tensors, types, entries, base.version if base is not None else _VERSION, alignment)


def lay_out_new(tensors: Sequence[TensorSpec], entries: Mapping[str, str | int | float]) -> FileLayout:
    """The layout of a file that replaces none: texts, and numbers as uint32 or float32, are its key-values.

    Raises:
        FitError: GGML has no such type or shape.
    """
    types = {name: _type(name, dtype, shape, None) for name, dtype, shape in tensors}
    return _planned(tensors, types, [key_value(*entry) for entry in entries.items()], _VERSION, ALIGNMENT)


def key_value(key: str, value: str | int | float) -> bytes:
    """The bytes of one key-value."""
    if isinstance(value, int):
        return _number(key, value)
    raw = key.encode()
    data = struct.pack("<f", value) if isinstance(value, float) else value.encode(errors="replace")
    typed = struct.pack("<I", _FLOAT32) if isinstance(value, float) else struct.pack("<IQ", _STRING, len(data))
    return struct.pack("<Q", len(raw)) + raw + typed + data


def _planned(
    tensors: Sequence[TensorSpec], types: Mapping[str, GgmlType], entries: Sequence[bytes], version: int, alignment: int
) -> FileLayout:
    infos, places, at = [], {}, 0
    for name, _, shape in tensors:
        sizes = types[name].sizes(shape)
        nbytes = types[name].size(sizes)
        infos.append(_info(name, sizes, types[name], at))
        places[name] = at, nbytes
        at += -(-nbytes // alignment) * alignment
    counts = struct.pack("<IQQ", version, len(tensors), len(entries))
    header = MAGIC + counts + b"".join(entries) + b"".join(infos)
    header += bytes(-len(header) % alignment)
    ranges = {name: (len(header) + offset, nbytes) for name, (offset, nbytes) in places.items()}
    return _padded(header, ranges, len(header) + at)


def _padded(header: bytes, ranges: Mapping[str, tuple[int, int]], nbytes: int) -> FileLayout:
    """The layout, with all that is between the tensors: they are in order."""
    padding, at = [], len(header)
    for offset, size in (*ranges.values(), (nbytes, 0)):
        if offset > at:
            padding.append((at, offset - at))
        at = offset + size
    return FileLayout(header, ranges, nbytes, tuple(padding))


def _same(tensors: Sequence[TensorSpec], base: Header) -> bool:
    return [(tensor.name, tensor.dtype, tensor.shape) for tensor in base.tensors] == list(tensors)


def _type(name: str, dtype: DType, shape: tuple[int, ...], base: Header | None) -> GgmlType:
    if (plain := ggml_type_of(dtype)) is not None:
        return plain
    stored = base.tensors if base is not None and dtype is DType.U8 else ()
    own = [tensor.packed_as for tensor in stored if tensor.name == name and tensor.shape == shape]
    found = own or list({tensor.packed_as for tensor in stored if tensor.shape == shape and tensor.dtype is DType.U8})
    if len(found) != 1:
        raise FitError(f"a GGUF has no type for {dtype.label} {list(shape)}", tensor=name)
    return BY_NAME[found[0]]


def _info(name: str, sizes: tuple[int, ...], type_: GgmlType, offset: int) -> bytes:
    raw = name.encode(errors="surrogatepass")
    if len(raw) > NAME_LIMIT or len(sizes) > _DIMS:
        limit = f"{_DIMS} axes" if len(sizes) > _DIMS else f"{NAME_LIMIT} bytes of a name"
        raise FitError(f"is too much for a GGUF, of at most {limit}", tensor=name)
    dims = struct.pack(f"<I{len(sizes)}Q", len(sizes), *reversed(sizes))
    return struct.pack("<Q", len(raw)) + raw + dims + struct.pack("<IQ", type_.number, offset)


def _entries(
    types: Mapping[str, GgmlType], axes: Mapping[str, int], base: Header | None, alignment: int
) -> Iterable[bytes]:
    """The key-values, each as its bytes."""
    changed: dict[str, int] = {}
    before = base.entries if base is not None else {}
    if alignment != (base.alignment if base is not None else ALIGNMENT):
        changed[ALIGNMENT_KEY] = alignment
    plain = all(type_.dtype is not None for type_ in types.values())
    was_plain = base is not None and all(BY_NAME[tensor.packed_as].dtype is not None for tensor in base.tensors)
    if _FILE_TYPE in before and plain:
        matrices = Counter(type_.name for name, type_ in types.items() if axes[name] > 1)
        usual = next((name for name, _ in matrices.most_common() if name in _FILE_TYPES), None)
        if usual is not None:
            changed[_FILE_TYPE] = _FILE_TYPES[usual]
    if base is not None and (base.value(_COUNT) or 0) > 1 and len(types) != len(base.tensors):
        raise FitError(
            f"{len(types)} tensors in place of {len(base.tensors)}: the splits of a GGUF count those of all files",
            file=base.file.path,
            hint="join the splits first, with llama-gguf-split",
        )
    if _ALL_TENSORS in before and base is not None and len(types) != len(base.tensors):
        changed[_ALL_TENSORS] = len(types)
    for key, entry in before.items():
        if plain and not was_plain and key.startswith(_OF_BLOCKS):
            continue
        assert base is not None
        if key in changed and entry.value != changed[key]:
            yield _number(key, changed[key])
        else:
            yield bytes(base.file.read(entry.offset, entry.nbytes))
    for key in changed.keys() - before.keys():
        yield _number(key, changed[key])


def _number(key: str, value: int) -> bytes:
    raw = key.encode()
    return struct.pack("<Q", len(raw)) + raw + struct.pack("<II", _UINT32, value)
