# SPDX-License-Identifier: Apache-2.0
"""Branches of LoRAs in a graph, whoever made it: ``Add`` of a map by a weight and of the same inputs by two small ones.

They are found by what the nodes do, not by names: slots and gates of ours, what Olive and the genai builder make of an
adapter, and a model of PEFT's traced by torch look alike:

    y = Add(W(x) [+ bias], scale * B(A(x)))
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from surgery.onnx.edit.integers import product_of
from surgery.onnx.edit.readers import Readers, readers_of
from surgery.onnx.edit.uses import Kind, attribute, graphs_in, turns_inputs
from surgery.onnx.fold.constants import Constants

if TYPE_CHECKING:
    import onnx

__all__ = ["BranchFactors", "LoraBranch", "find_branches"]

Array = npt.NDArray[Any]
_PASSING = ("Identity", "Cast", "Dropout")
_DEPTH = 4  # biases behind a map


@dataclass(frozen=True, eq=False)
class BranchFactors:
    """What a branch adds: ``left @ right`` is ``(in, out)``, of a table its rows; of a convolution ``(out, in * k ...)``.

    Attributes:
        rank: Greatest rank of it.
        read: Gives both, float32: those of all branches are as large as an adapter.
    """

    rank: int
    read: Callable[[], tuple[Array, Array]]


@dataclass(frozen=True, eq=False)
class LoraBranch:
    """A sum that adds what a LoRA makes of the inputs of a weight to what the weight makes of them.

    Attributes:
        graph: The graph that it is in.
        add: The node that adds.
        base: The sum's other operand.
        node: The node with the weight.
        kind: What that node does.
        weight: Its operand that is the weight.
        by_output: Whether that operand's rows are outputs.
        side: The sum's operand that comes from the LoRA.
        constants: The tensors of the two small maps.
        factors: What is added to the weight.
    """

    graph: onnx.GraphProto
    add: onnx.NodeProto
    base: str
    node: onnx.NodeProto
    kind: Kind
    weight: str
    by_output: bool
    side: str
    constants: tuple[str, str]
    factors: BranchFactors


@dataclass(frozen=True)
class _Map:
    """A node that maps `x` by a constant."""

    node: onnx.NodeProto
    kind: Kind
    x: str
    weight: str
    by_output: bool
    alpha: float


def find_branches(model: onnx.ModelProto, constants: Constants) -> Iterator[LoraBranch]:
    """The outermost branches, in the order of the nodes; another may lie below one that is folded."""
    readers = readers_of(model.graph)
    for graph in graphs_in(model.graph):
        producers = {value: node for node in graph.node for value in node.output if value}
        for add in graph.node:
            if add.op_type == "Add" and not add.domain:
                for base, side in (tuple(add.input), tuple(add.input)[::-1]):
                    if (branch := _branch(graph, add, base, side, producers, constants, readers)) is not None:
                        yield branch
                        break


def _branch(
    graph: onnx.GraphProto,
    add: onnx.NodeProto,
    base: str,
    side: str,
    producers: dict[str, onnx.NodeProto],
    constants: Constants,
    readers: Readers,
) -> LoraBranch | None:
    main = _main(base, producers, constants)
    if main is None or len(readers.get(base, ())) != 1:
        return None
    small = _small(side, producers, constants)
    if small is None or _before(small[0].x, producers) != _before(main.x, producers):
        return None
    down, up, factors = small
    if down.kind != main.kind or (main.kind == "convolution" and not _same_steps(down.node, main.node)):
        return None
    read = partial(
        _delta,
        down,
        up,
        [(op, constants.reader(name), inner) for op, name, inner in factors],
        (constants.reader(down.weight), constants.reader(up.weight)),
        main.alpha,
    )
    found = _factors(read)
    if found is None:
        return None
    small_weights = (down.weight, up.weight)
    return LoraBranch(graph, add, base, main.node, main.kind, main.weight, main.by_output, side, small_weights, found)


def _mapped(value: str, producers: dict[str, onnx.NodeProto], constants: Constants) -> _Map | None:
    """The node that makes `value` of another by a constant matrix, kernel or table."""
    node = producers.get(value)
    if node is None:
        return None
    op = node.op_type
    if op == "Gather" and node.input[0] in constants and attribute(node, "axis", 0) == 0:
        return _Map(node, "table", node.input[1], node.input[0], False, 1.0)
    if op == "DequantizeLinear" and (rows := producers.get(node.input[0])) is not None and rows.op_type == "Gather":
        return _mapped(node.input[0], producers, constants)
    if op == "MatMulNBits" and node.input[1] in constants:
        return _Map(node, "product", node.input[0], node.input[1], True, 1.0)
    if (integers := product_of(node, producers)) is not None and integers[0].input[1] in constants:
        return _Map(integers[0], "product", integers[1].x, integers[0].input[1], False, 1.0)
    if len(node.input) < 2 or node.input[0] in constants or node.input[1] not in constants:
        return None
    x, weight = node.input[0], node.input[1]
    if op == "Conv" and attribute(node, "group", 1) == 1:
        return _Map(node, "convolution", x, weight, True, 1.0)
    if op == "MatMul" or (op in ("Gemm", "FusedMatMul") and not turns_inputs(node)):
        by_output, alpha = bool(attribute(node, "transB", 0)), float(attribute(node, "alpha", 1.0))
        return _Map(node, "product", x, weight, by_output, alpha)
    return None


def _main(value: str, producers: dict[str, onnx.NodeProto], constants: Constants) -> _Map | None:
    """The map that makes `value`, but for constants that are added to it, such as a bias."""
    for _ in range(_DEPTH):
        if (found := _mapped(value, producers, constants)) is not None:
            return found
        node = producers.get(value)
        if node is None or node.op_type != "Add":
            return None
        constant = [one for one in node.input if one in constants]
        if len(constant) != 1:
            return None
        value = next(one for one in node.input if one not in constants)
    return None


def _small(
    value: str, producers: dict[str, onnx.NodeProto], constants: Constants
) -> tuple[_Map, _Map, list[tuple[str, str, bool]]] | None:
    """The two maps of a branch, the first one first, and the constants in between and behind: ``(operator, name, inner)``."""
    maps: list[_Map] = []
    factors: list[tuple[str, str, bool]] = []
    while len(maps) < 2:
        if (found := _mapped(value, producers, constants)) is not None:
            if len(found.node.input) > 2 and found.kind != "table":
                return None  # no LoRA has a bias, and one of codes is not understood
            maps.append(found)
            value = found.x
            continue
        node = producers.get(value)
        if node is None:
            return None
        if node.op_type in _PASSING:
            value = node.input[0]
        elif node.op_type in ("Mul", "Div") and len(node.input) == 2:
            fixed = [one for one in node.input if one in constants]
            if len(fixed) != 1 or (node.op_type == "Div" and node.input[1] != fixed[0]):
                return None
            factors.append((node.op_type, fixed[0], bool(maps)))
            value = next(one for one in node.input if one != fixed[0])
        else:
            return None
    up, down = maps
    if up.kind == "table" or (down.kind == "convolution") != (up.kind == "convolution"):
        return None
    return down, up, factors


def _factors(read: Callable[[], tuple[Array, Array] | None]) -> BranchFactors | None:
    """The factors of a branch, if it is one: they are looked at once, and read again when they are added."""
    found = read()
    if found is None:
        return None

    def again() -> tuple[Array, Array]:
        factors = read()
        assert factors is not None
        return factors

    return BranchFactors(found[0].shape[1], again)


def _delta(
    down: _Map,
    up: _Map,
    factors: Sequence[tuple[str, Callable[[], Array], bool]],
    readers: tuple[Callable[[], Array], Callable[[], Array]],
    alpha: float,
) -> tuple[Array, Array] | None:
    """The two factors of what is added, divided by the `alpha` of the weight's own node."""
    A, B = (read().astype(np.float32) for read in readers)
    if down.kind == "convolution":
        if A.ndim < 3 or B.ndim != A.ndim or set(B.shape[2:]) - {1}:
            return None
        rank = A.shape[0]
        left, right = B.reshape(B.shape[0], B.shape[1]), A.reshape(rank, int(np.prod(A.shape[1:])))
        if left.shape[1] == rank:
            filled = left.any(axis=0) & right.any(axis=1)  # slots of ours have a kernel of zeros behind theirs
            left, right = left[:, filled], right[filled]
            rank = int(filled.sum())
    else:
        if A.ndim != 2 or B.ndim != 2:
            return None
        left = A.T if down.by_output and down.kind != "table" else A
        right = B.T if up.by_output else B
        rank = left.shape[1]
    if left.shape[1] != right.shape[0] or rank > min(left.shape[0], right.shape[1]):
        return None
    scale: Any = np.float32(down.alpha * up.alpha)
    for op, read, inner in factors:
        factor = read().astype(np.float32)
        factor = np.float32(1) / factor if op == "Div" else factor
        if factor.size == 1:
            scale = scale * factor.reshape(())
        elif inner and factor.size == rank:
            left = left * factor.reshape(-1)
        else:
            return None
    return left * scale / np.float32(alpha), right


def _before(value: str, producers: dict[str, onnx.NodeProto]) -> str:
    """A value before the nodes that pass it on."""
    while (node := producers.get(value)) is not None and node.op_type in _PASSING:
        value = node.input[0]
    return value


def _same_steps(first: onnx.NodeProto, second: onnx.NodeProto) -> bool:
    """Whether two convolutions step over their inputs in the same way."""
    defaults = {"auto_pad": b"NOTSET", "strides": None, "pads": None, "dilations": None}
    return all(_plain(first, name, other) == _plain(second, name, other) for name, other in defaults.items())


def _plain(node: onnx.NodeProto, name: str, default: Any) -> Any:
    value = attribute(node, name, default)
    if isinstance(value, bytes) or value is None:
        return value or None if value != b"NOTSET" else None
    usual = 0 if name == "pads" else 1
    return None if all(one == usual for one in value) else list(value)
