# SPDX-License-Identifier: Apache-2.0
"""Branches of LoRAs folded into the weights beside them: ``W + A B`` in the place of ``W``, and no nodes of theirs left."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from surgery.onnx.edit.nodes import names_in
from surgery.onnx.edit.readers import readers_of
from surgery.onnx.edit.uses import attribute, graphs_in
from surgery.onnx.fold.branches import BranchFactors, LoraBranch, find_branches
from surgery.onnx.fold.constants import Constants
from surgery_formats.containers.onnx import OnnxGraph
from surgery_formats.errors import FitError, NothingChangedError
from surgery_formats.text import show

if TYPE_CHECKING:
    import onnx

__all__ = ["FoldedWeight", "Folding", "fold_branches"]

Array = npt.NDArray[Any]
_BLOCK = 1 << 18  # elements of a sum at a time
_NUMBERS = (1, 10, 11, 16)  # TensorProto.FLOAT, FLOAT16, DOUBLE, BFLOAT16


@dataclass(frozen=True, eq=False)
class FoldedWeight:
    """A tensor of the graph and what is added to it.

    Attributes:
        tensor: Its name.
        node: The node that reads it.
        factors: ``(factors, turned)``: their product is added, transposed if `turned`, in the tensor's shape.
    """

    tensor: str
    node: str
    factors: tuple[tuple[BranchFactors, bool], ...] = ()

    @property
    def rank(self) -> int:
        """Greatest rank of what is added."""
        return sum(factors.rank for factors, _ in self.factors)

    def added_to(self, values: Array) -> Array:
        """The tensor with what is added, rounded once to its type.

        Raises:
            FitError: a value does not fit the type.
        """
        wide = np.promote_types(values.dtype, np.float32)
        products = [self._product(factors, turned).reshape(values.shape) for factors, turned in self.factors]
        stored, fits, finite = np.empty_like(values), True, True
        step = max(1, _BLOCK // max(1, values[:1].size))
        for start in range(0, len(values), step):
            rows = slice(start, start + step)
            before = values[rows].astype(wide)
            finite &= bool(np.isfinite(before).all())
            for product in products:
                before += product[rows]
            stored[rows] = before.astype(values.dtype)
            fits &= bool(np.isfinite(stored[rows].astype(wide)).all())
        if finite and not fits:
            raise FitError("the sum does not fit the type of the weight", tensor=self.tensor)
        return stored

    @staticmethod
    def _product(factors: BranchFactors, turned: bool) -> Array:
        left, right = factors.read()
        product: Array = left @ right
        return product.T if turned else product


@dataclass
class Folding:
    """What was folded so far.

    Attributes:
        weights: By tensor, in the order in which they were found.
        copies: Tensors that are new, as others read the old ones, too; they have their values.
        removed: Number of nodes that are gone.
    """

    weights: dict[str, FoldedWeight] = field(default_factory=dict)
    copies: dict[str, FoldedWeight] = field(default_factory=dict)
    removed: int = 0


def fold_branches(graph: OnnxGraph, model: onnx.ModelProto, given: Mapping[str, Array]) -> Folding:
    """Take every branch out of `model` and return what is to be added to which of its tensors.

    Args:
        graph: The file, which has the values.
        model: Its model, which is changed.
        given: Values of inputs (an adapter's factors, strengths), in place of their defaults.

    Raises:
        NothingChangedError: there is no branch.
        FitError: a branch beside a weight that is stored as codes, or parts of a LoRA that are none of a plain branch.
    """
    done = Folding()
    before = sum(len(inner.node) for inner in graphs_in(model.graph))
    while branches := list(find_branches(model, constants := Constants(graph, model, given))):
        if _as_initializers(model, {_stored(branch, constants)[0] for branch in branches}):
            continue  # and look again
        reads = _reads(model)
        taken: dict[int, LoraBranch] = {}
        for branch in branches:
            if id(branch.node) not in taken:  # a second one beside the same node is looked at again
                taken[id(branch.node)] = branch
                _fold(model, branch, constants, reads, done)
        _bypass(list(taken.values()))
        _sweep(model, [branch.side for branch in taken.values()], given)
    if not done.weights and not done.copies:
        raise NothingChangedError(
            "no branch of a LoRA is in the graph", file=graph.path, hint="merge an adapter into it instead"
        )
    _check_nothing_left(model, graph)
    done.removed = before - sum(len(inner.node) for inner in graphs_in(model.graph))
    return done


def _as_initializers(model: onnx.ModelProto, names: Collection[str]) -> bool:
    """Turn the Constant nodes of these names into initializers; returns whether there were any."""
    made = 0
    for number in range(len(model.graph.node) - 1, -1, -1):
        node = model.graph.node[number]
        if node.op_type == "Constant" and node.output[0] in names:
            tensor = model.graph.initializer.add()
            tensor.CopyFrom(attribute(node, "value", None))
            tensor.name = node.output[0]
            del model.graph.node[number]
            made += 1
    return made > 0


def _reads(model: onnx.ModelProto) -> Counter[str]:
    """How often each value is read."""
    reads: Counter[str] = Counter()
    for inner in graphs_in(model.graph):
        reads.update(value for node in inner.node for value in node.input)
        reads.update(out.name for out in inner.output)
    return reads


def _fold(model: onnx.ModelProto, branch: LoraBranch, constants: Constants, reads: Counter[str], done: Folding) -> None:
    """Note what a branch adds to its weight; a weight that others read, too, is copied for its node."""
    name, turned = _stored(branch, constants)
    product = branch.kind == "product"
    if reads[name] > 1 or reads[branch.weight] > 1:
        copy = _copied(model, branch, name, constants)
        part = (branch.factors, branch.by_output and product)
        tensor = next(one for one in model.graph.initializer if one.name == copy)
        _add_to_copy(tensor, FoldedWeight(copy, "", (part,)))
        done.copies[copy] = FoldedWeight(copy, _called(branch.node), (part,))
        return
    part = (branch.factors, (branch.by_output != turned) and product)
    known = done.copies.get(name) or done.weights.get(name) or FoldedWeight(name, _called(branch.node))
    whole = FoldedWeight(name, known.node, (*known.factors, part))
    if name in done.copies:
        tensor = next(one for one in model.graph.initializer if one.name == name)
        _add_to_copy(tensor, FoldedWeight(name, "", (part,)))
        done.copies[name] = whole
    else:
        done.weights[name] = whole


def _called(node: onnx.NodeProto) -> str:
    return node.name or node.output[0]


def _stored(branch: LoraBranch, constants: Constants) -> tuple[str, bool]:
    """The initializer behind the weight's operand, and whether it lies transposed there.

    Raises:
        FitError: it is made of codes or of several tensors.
    """
    if branch.node.op_type in ("MatMulNBits", "MatMulInteger"):
        raise _of_codes(branch, f"codes of a {branch.node.op_type}")
    name, turned = branch.weight, False
    while constants.initializer(name) is None:
        node = constants.producer(name)
        if node is not None and node.op_type == "Constant" and attribute(node, "value", None) is not None:
            break
        if node is not None and node.op_type in ("Identity", "Cast"):
            name = node.input[0]
        elif node is not None and node.op_type == "Transpose" and list(attribute(node, "perm", [1, 0])) == [1, 0]:
            name, turned = node.input[0], not turned
        else:
            raise _of_codes(branch, f"made by a {show(node.op_type, 40)}" if node is not None else "an input")
    stored = constants.initializer(name)
    if stored is not None and stored.data_type not in _NUMBERS:
        raise _of_codes(branch, "codes")
    return name, turned


def _of_codes(branch: LoraBranch, what: str) -> FitError:
    return FitError(
        f"the weight '{show(branch.weight)}' is {what}, into which nothing can be folded",
        hint="leave the branch where it is, or fold it before the graph is quantised",
    )


def _copied(model: onnx.ModelProto, branch: LoraBranch, name: str, constants: Constants) -> str:
    """A tensor of its own for a node whose weight others read, too, as the node reads it."""
    import onnx

    taken, new = names_in(model.graph), f"{name} of {_called(branch.node)}"
    while new in taken:
        new += "_"
    model.graph.initializer.append(onnx.numpy_helper.from_array(constants.value(branch.weight), new))
    position = 0 if branch.kind == "table" else 1
    branch.node.input[position] = new
    return new


def _add_to_copy(tensor: onnx.TensorProto, weight: FoldedWeight) -> None:
    import onnx

    values = onnx.numpy_helper.to_array(tensor)
    tensor.CopyFrom(onnx.numpy_helper.from_array(weight.added_to(values), tensor.name))


def _bypass(branches: Sequence[LoraBranch]) -> None:
    """Remove the sums: what made the first operand makes the result."""
    for graph in {id(branch.graph): branch.graph for branch in branches}.values():
        ours = {branch.base: branch for branch in branches if branch.graph is graph}
        adds = {branch.add.output[0] for branch in ours.values()}
        for number in range(len(graph.node) - 1, -1, -1):
            node = graph.node[number]
            if node.output[0] in adds and node.op_type == "Add":
                del graph.node[number]
            elif any(value in ours for value in node.output):
                node.output[:] = [ours[value].add.output[0] if value in ours else value for value in node.output]


def _sweep(model: onnx.ModelProto, values: Iterable[str], given: Collection[str]) -> None:
    """Remove what made `values` and nothing else, back to initializers and to inputs that were given."""
    main, reads = model.graph, _reads(model)
    made = {value: (inner, node) for inner in graphs_in(main) for node in inner.node for value in node.output}
    stored = {one.name for one in main.initializer} | set(given)
    pending, gone, nodes = list(values), set[str](), set[int]()
    while pending:
        value = pending.pop()
        if reads[value] or value in gone:
            continue
        if value in made:
            _, node = made[value]
            if id(node) in nodes or any(reads[other] for other in node.output):
                continue
            nodes.add(id(node))
            gone |= set(node.output)
            for one in node.input:
                reads[one] -= 1
                pending.append(one)
        elif value in stored:
            gone.add(value)
    for inner in graphs_in(main):
        for number in range(len(inner.node) - 1, -1, -1):
            if set(inner.node[number].output) <= gone and any(inner.node[number].output):
                del inner.node[number]
        for part in (inner.value_info, inner.initializer, inner.input):
            for number in range(len(part) - 1, -1, -1):
                if part[number].name in gone:
                    del part[number]


def _check_nothing_left(model: onnx.ModelProto, graph: OnnxGraph) -> None:
    """Refuse a result that still has parts of LoRAs.

    Raises:
        FitError: a tensor or an input is called like a factor and is still read.
    """
    read = readers_of(model.graph)
    for part in (model.graph.initializer, model.graph.input):
        for one in part:
            if one.name in read and any(word in one.name for word in (".lora_A", ".lora_B", "lora_magnitude")):
                raise FitError(
                    "is part of a branch that is no plain sum with a weight, and cannot be folded",
                    file=graph.path,
                    tensor=one.name,
                    hint="only LoRA beside a weight of numbers is folded: no DoRA, no LoRA with a bias",
                )
