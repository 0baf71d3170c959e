# SPDX-License-Identifier: Apache-2.0
"""Bytes as an ONNX model whose every text is one: the parser takes any bytes for texts, and gives some back as bytes."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery_formats.errors import MalformedError

if TYPE_CHECKING:
    import onnx

__all__ = ["parsed_model"]


def parsed_model(data: bytes, path: Path) -> onnx.ModelProto:
    """The model in `data`, the bytes of the file at `path` or a part of them.

    Raises:
        MalformedError: it cannot be parsed, or a name in it is not UTF-8.
    """
    import onnx
    from google.protobuf.message import DecodeError

    try:
        model: onnx.ModelProto = onnx.ModelProto.FromString(data)
    except DecodeError as error:
        raise MalformedError("not an ONNX model: it cannot be parsed", file=path) from error
    if not _is_text(model):
        raise MalformedError("not an ONNX model: a name in it is not UTF-8", file=path)
    return model


def _is_text(message: Any) -> bool:
    texts, messages = _fields(type(message).DESCRIPTOR)
    for name, repeated in texts:
        value = getattr(message, name)
        if not (all(isinstance(one, str) for one in value) if repeated else isinstance(value, str)):
            return False
    return all(_is_text(one) for name, repeated in messages for one in _inner(message, name, repeated))


def _inner(message: Any, name: str, repeated: bool) -> Iterable[Any]:
    if repeated:
        several: Iterable[Any] = getattr(message, name)
        return several
    return (getattr(message, name),) if message.HasField(name) else ()


@cache
def _fields(descriptor: Any) -> tuple[tuple[tuple[str, bool], ...], tuple[tuple[str, bool], ...]]:
    """The fields of a kind of message that are texts, and those that are messages: names, and whether there are several."""
    found: tuple[list[tuple[str, bool]], list[tuple[str, bool]]] = [], []
    for field in descriptor.fields:
        if field.type in (field.TYPE_STRING, field.TYPE_MESSAGE):
            repeated = field.default_value == []  # as every release of protobuf says it
            found[field.type == field.TYPE_MESSAGE].append((field.name, repeated))
    return tuple(found[0]), tuple(found[1])
