# SPDX-License-Identifier: Apache-2.0
"""Which module of a network each tensor of a graph belongs to, as far as names tell.

Exporters keep some names of a model and lose others: a transposed weight is ``onnx::MatMul_733`` or ``val_90``. The nodes that
read it are still called after its module, in their name (``/model/layers.0/self_attn/q_proj/MatMul``) or, by torch.export, in
``pkg.torch.onnx.name_scopes``. What the weight is by value is another question, which only the base answers.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx

__all__ = ["ModuleName", "module_names", "module_of"]

_SCOPES = ("pkg.torch.onnx.name_scopes", "pkg.onnxscript.name_scopes")
_LONGEST = 4096  # characters of a list of scopes
_KEEPING = frozenset(
    ("Identity", "Cast", "Transpose", "DequantizeLinear", "Reshape", "Unsqueeze", "Squeeze", "Concat", "Slice")
)
_HOPS = 4
_READERS = 64  # of a value that are compared
_Reader = tuple["onnx.NodeProto", int]
_CAST = re.compile(r"(?<=.)\.(f32|f16|bf16)$")  # of our own graphs: the type before the Cast that gives the weight
_LEAVES = {
    "MatMul": {0: "weight", 1: "weight"},
    "FusedMatMul": {0: "weight", 1: "weight"},
    "Gemm": {0: "weight", 1: "weight", 2: "bias"},
    "Conv": {1: "weight", 2: "bias"},
    "ConvTranspose": {1: "weight", 2: "bias"},
    "Add": {0: "bias", 1: "bias"},
    "Gather": {0: "weight"},
    "MatMulNBits": {1: "weight", 2: "scales", 3: "zero_points", 4: "g_idx", 5: "bias"},
    "MatMulInteger": {1: "weight", 3: "zero_point"},
    "DynamicQuantizeMatMul": {1: "weight", 2: "scale", 3: "zero_point", 4: "bias"},
    "DequantizeLinear": {0: "weight", 1: "scale", 2: "zero_point"},
    "LayerNormalization": {1: "weight", 2: "bias"},
    "SimplifiedLayerNormalization": {1: "weight"},
    "RMSNormalization": {1: "weight"},
}
"""What an input of an operator is to a module, by position."""


@dataclass(frozen=True, slots=True)
class ModuleName:
    """Where a tensor belongs.

    Attributes:
        name: Its module with dots, and what it is in it.
        unplaced: Whether neither its own name nor the node that reads it tells.
    """

    name: str
    unplaced: bool = False


def module_names(graph: onnx.GraphProto, names: Iterable[str]) -> dict[str, ModuleName]:
    """Where the tensors called `names` belong, each under a name of its own."""
    readers = _readers(graph)
    taken: set[str] = set()
    found: dict[str, ModuleName] = {}
    for name in names:
        telling = "" if _tells(name) else _by_node(name, readers)
        one = _CAST.sub("", telling or name)
        number = 1
        while one in taken:
            number += 1
            one = f"{_CAST.sub('', telling or name)}.{number}"
        taken.add(one)
        found[name] = ModuleName(one, not telling and not _tells(name))
    return found


def _tells(name: str) -> bool:
    """Whether the name of a tensor is that of a parameter: a path, and not a number of the exporter's."""
    return "." in name and not name.startswith(("onnx::", "/")) and not re.search(r"Constant(_\d+)?_output", name)


def _readers(graph: onnx.GraphProto) -> Mapping[str, list[_Reader]]:
    """The nodes that read each value, and at which input; those of a body among them."""
    readers: dict[str, list[_Reader]] = {}
    for node in _nodes(graph):
        for position, value in enumerate(node.input):
            if len(own := readers.setdefault(value, [])) < _READERS:
                own.append((node, position))
    return readers


def _nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _nodes(attribute.g)


def _by_node(name: str, readers: Mapping[str, list[_Reader]]) -> str:
    """Module and leaf by the nodes that read a tensor, through nodes that only bring it into another form.

    Empty if they are of different modules, as those that read one table of angles are, or tell none.
    """
    leaf: str | None = None
    own = readers.get(name, [])
    for _ in range(_HOPS):
        if not own or own[0][0].op_type not in _KEEPING or not own[0][0].output:
            break
        leaf = leaf or _LEAVES.get(own[0][0].op_type, {}).get(own[0][1])
        own = readers.get(own[0][0].output[0], [])
    if not own:
        return ""
    node, position = own[0]
    modules = {module_of(node) for node, _ in own}
    module = modules.pop()
    if modules or not module:
        return ""
    return f"{module}.{leaf or _LEAVES.get(node.op_type, {}).get(position) or f'{node.op_type}_{position}'}"


def module_of(node: onnx.NodeProto) -> str:
    """The module that a node was made in, or empty."""
    for entry in node.metadata_props:
        if entry.key in _SCOPES and len(entry.value) <= _LONGEST:
            return _innermost(entry.value)
    if "/" not in node.name:
        return ""
    return ".".join(part for part in node.name.split("/")[:-1] if part)


def _innermost(text: str) -> str:
    """The module of a list of scopes, the last of which is the operation: torch writes whole paths, onnxscript single names."""
    try:
        scopes = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return ""
    if not isinstance(scopes, list) or not all(isinstance(scope, str) for scope in scopes):
        return ""
    named = [scope for scope in scopes if scope]
    whole = len(named) > 1 and named[1].startswith(f"{named[0]}.")
    if whole:
        return next((scope for scope in reversed(named) if "." in scope), "")
    return ".".join(named)
