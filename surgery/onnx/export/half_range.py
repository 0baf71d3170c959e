# SPDX-License-Identifier: Apache-2.0
"""What is converted when a graph is loaded, and whether it fits the type; values on the way are measured if asked for.

A graph reads weights as they are stored and casts those of another type. In float16 a number beyond 65,504 becomes infinite.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from surgery.engine.execute import default_workers
from surgery.onnx.run.text_rows import rows_of_text
from surgery_formats.errors import FitError
from surgery_formats.files.raw import File
from surgery_formats.text import count, listing, nbytes, show

if TYPE_CHECKING:
    import numpy
    import onnx

    from surgery.engine.plan import Plan
    from surgery.reference.stored import Stored
    from surgery_formats.models.component import Component

__all__ = [
    "Converted",
    "converted_weights",
    "issues_of_types",
    "load_cost",
    "measured_values",
    "reach_of_values",
    "too_large",
]

LARGEST_HALF = 65504.0
_HALF, _BRAIN, _FLOAT, _DOUBLE = 10, 16, 1, 11  # of TensorProto.DataType
_BITS = {_HALF: ("u2", 0x7C00), _BRAIN: ("u2", 0x7F80), _FLOAT: ("u4", 0x7F800000), _DOUBLE: ("u8", 0x7FF0 << 48)}
"""The bits of a number of each type, and those of Inf, without their sign."""
_BEYOND = {_BRAIN: 0x4780, _FLOAT: 0x477FF000}
"""Bits of the first number that becomes infinite in float16."""
_BLOCK = 1 << 22  # bytes
_WORTH_TELLING = 100 << 20  # bytes that are converted at each load


class Converted(NamedTuple):
    """A weight that a graph casts.

    Attributes:
        name: Its name in the graph.
        file: The file that holds it.
        start: Its first byte there.
        nbytes: How many it has.
        source: Stored type, as ``TensorProto.DataType``.
        target: The graph's.
    """

    name: str
    file: File
    start: int
    nbytes: int
    source: int
    target: int


def issues_of_types(
    graphs: Sequence[onnx.ModelProto], dtype: str, held: Mapping[str, File], seen: Stored | None, *, read: bool = False
) -> list[str]:
    """What a user is told of the types of an export: what does not fit, and what loading costs.

    Args:
        graphs: The graphs, by whose nodes weights are converted.
        dtype: Their type.
        held: The files of weights, by their names in a graph.
        seen: Values that were measured.
        read: Look at every weight, whether it is converted or not.
    """
    every = (one for graph in graphs for one in converted_weights(graph, held))
    converted = list({(one.file, one.start): one for one in every}.values())
    stored = (one for graph in graphs for one in stored_weights(graph, held)) if read else ()
    issues = too_large([*stored, *(one for one in converted if read or one.target == _HALF)])
    if seen is not None and seen.beyond:
        issues.append(f"values are not finite, first those of {show(seen.beyond, 160)}: the weights are damaged")
    elif seen is not None and dtype == "fp16" and seen.largest > LARGEST_HALF:
        issues.append(
            f"values reach {seen.largest:,.0f} ({show(seen.where, 160)}), where fp16 ends at 65,504: what is beyond "
            "becomes infinite, and logits mostly NaN; --dtype bf16 or fp32 holds them"
        )
    if seen is None and dtype == "fp16" and any(one.source == _BRAIN for one in converted):
        issues.append(
            "what bf16 holds may not fit fp16, which ends at 65,504: --range-text words measures what the graph stores, and so "
            "does surgery verify"
        )
    if cost := load_cost(converted):
        issues.append(cost)
    return issues


def reach_of_values(seen: Stored, dtype: str) -> str:
    """How large measured values get, and whether the graph's type holds them."""
    if seen.beyond:
        return f"not finite, first those of {show(seen.beyond, 160)}"
    return f"{seen.largest:,.1f} at most ({show(seen.where, 160)}); fp16 ends at 65,504" + (
        "" if dtype == "fp16" else f", {dtype} far beyond"
    )


def converted_weights(graph: onnx.ModelProto, held: Mapping[str, File]) -> Iterator[Converted]:
    """Weights in files that a graph casts to another type."""
    stored = {tensor.name: tensor for tensor in graph.graph.initializer if tensor.external_data}
    for node in graph.graph.node:
        if node.op_type != "Cast" or node.input[0] not in stored:
            continue
        tensor = stored[node.input[0]]
        entry = {field.key: field.value for field in tensor.external_data}
        target = next(field.i for field in node.attribute if field.name == "to")
        yield Converted(
            node.output[0].removesuffix("/Cast"),
            held[entry["location"]],
            int(entry["offset"]),
            int(entry["length"]),
            tensor.data_type,
            target,
        )


def load_cost(converted: list[Converted]) -> str:
    """What converting costs whoever loads the graph, or the empty string where it is little."""
    size = sum(one.nbytes for one in converted)
    if size < _WORTH_TELLING:
        return ""
    names = {_HALF: "fp16", _BRAIN: "bf16", _FLOAT: "fp32"}
    pairs = sorted({(names.get(one.source, "others"), names.get(one.target, "others")) for one in converted})
    what = listing([f"{source} for {target}" for source, target in pairs])
    return (
        f"{nbytes(size)} of {what} are converted at each load, which takes as much more memory of the host and several "
        "times the time; surgery layers with --dtype writes them in that type, to be exported instead"
    )


def stored_weights(graph: onnx.ModelProto, held: Mapping[str, File]) -> Iterator[Converted]:
    """Weights in files as they are."""
    for tensor in graph.graph.initializer:
        entry = {field.key: field.value for field in tensor.external_data}
        if entry and tensor.data_type in _BITS and entry["location"] in held:
            place = held[entry["location"]], int(entry["offset"]), int(entry["length"])
            yield Converted(tensor.name, *place, tensor.data_type, tensor.data_type)


def too_large(weights: Iterable[Converted]) -> list[str]:
    """Warnings of weights that float16 cannot hold, and of those that are no numbers; they are read for it."""
    each = list({(one.file, one.start): one for one in weights if one.source in _BITS and one.nbytes}.values())
    with ThreadPoolExecutor(default_workers(), "surgery-range") as pool:
        greatest = list(pool.map(_greatest_bits, each))
    beyond: list[str] = []
    damaged: list[str] = []
    for one, bits in zip(each, greatest, strict=True):
        if bits >= _BITS[one.source][1]:
            damaged.append(one.name)
        elif one.target == _HALF and bits >= _BEYOND.get(one.source, bits + 1):
            beyond.append(one.name)
    warnings = []
    if damaged:
        warnings.append(f"{_weights(damaged)} NaN or Inf: {listing([show(name) for name in damaged])}")
    if beyond:
        warnings.append(
            f"{_weights(beyond)} numbers beyond 65,504, which become infinite in fp16: "
            f"{listing([show(name) for name in beyond])}; --dtype bf16 or fp32 keeps them"
        )
    return warnings


def _weights(names: list[str]) -> str:
    return "one weight holds" if len(names) == 1 else f"{count(len(names))} weights hold"


def _greatest_bits(one: Converted) -> int:
    """The greatest bits without their sign: they are in the order of the magnitudes, NaN behind Inf."""
    import numpy as np

    kind, greatest = _BITS[one.source][0], 0
    size = np.dtype(kind).itemsize
    sign = 1 << (8 * size - 1)
    buffer = np.empty(min(_BLOCK, one.nbytes), "u1")
    for start in range(0, one.nbytes, _BLOCK):
        part: numpy.ndarray = buffer[: min(_BLOCK, one.nbytes - start)]
        one.file.read_into(memoryview(part), one.start + start)  # type: ignore[arg-type]  # its stubs do not declare the protocol
        bits = part.view(kind)
        largest = int(bits.max())
        greatest = max(greatest, int(bits.view(f"i{size}").max()), largest - sign if largest >= sign else 0)
    return greatest


def measured_values(component: Component, plan: Plan | None, task: str, text: str | Path) -> Stored:
    """How large the values get that a graph stores, on a text, computed in float32.

    Args:
        component: The network.
        plan: What a merge would write of it, or None.
        task: What the graph is for.
        text: File of a text, or ``words``: tokens from all over the vocabulary.

    Raises:
        NotFoundError, MalformedError: no tokenizer, or it cannot be read.
        FitError: an empty text, an encoder-decoder, or a model without a reference.
    """
    import torch

    from surgery.reference import forward, open_reference
    from surgery.reference.stored import watched

    reference = open_reference(component, plan, task=task)
    if reference.model.encoder is not None:
        raise FitError("values of an encoder-decoder are not measured at an export", hint="`surgery verify` does it")
    rows = rows_of_text(component.folder, text, reference.model.vocabulary, reference.model.max_positions)
    with watched() as seen:
        for row in rows:
            forward(reference, torch.tensor([row]))
    return seen
