# SPDX-License-Identifier: Apache-2.0
"""From the bytes of a graph to every tensor in it, and to the graph without their values.

Tensors lie in initializers, in ``Constant`` nodes and other attributes, in the bodies of ``If``, ``Loop`` and ``Scan``,
in functions, and in the graphs of training. All are found, each under a name of its own:

    NAME                           an initializer of the main graph, or what a Constant node of it gives
    NODE/ATTRIBUTE                 another attribute that is a tensor; NODE is called by its first output
    NODE/then_branch/NAME          the same in a body
    DOMAIN.FUNCTION/NAME           the same in a function
    training/N/NAME                the same in a graph of training
    NAME/values, NAME/indices      the halves of a sparse tensor

A field that may stand once is refused if it stands twice: parsers take the last, or merge them, and no file is to mean
two things.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from surgery_formats.containers.onnx.tensor_proto import FoundTensor, find_tensor
from surgery_formats.containers.onnx.wire import BYTES, VARINT, Field, Pieces, WireReader
from surgery_formats.errors import MalformedError
from surgery_formats.files.raw import File

__all__ = ["GraphWalk", "walk"]

_NESTED = 30  # bodies within bodies; parsers of protocol buffers give up at 100 messages, which is 33 bodies
_ATTRIBUTES = 4096  # of a node
_TENSORS, _GRAPHS, _SPARSE = (5, 10), (6, 11), (22, 23)  # fields of an attribute: one, several
_HOLDING = frozenset((*_TENSORS, *_GRAPHS, *_SPARSE))
_SEVERAL = frozenset((10, 11, 23))


@dataclass(slots=True)
class GraphWalk:
    """What was found in a file.

    Attributes:
        tensors: In the order of the file.
        skeleton: The model without the values of its larger tensors.
    """

    tensors: list[FoundTensor] = field(default_factory=list)
    skeleton: Pieces = field(default_factory=Pieces)


def walk(file: File) -> GraphWalk:
    """Find every tensor of the model in `file`.

    Raises:
        MalformedError: the file is no ONNX model.
    """
    return _Walker(WireReader(file)).model()


class _Walker:
    """Goes through messages; each method returns its message without values, or None if nothing was left out."""

    def __init__(self, reader: WireReader) -> None:
        self.reader = reader
        self.found = GraphWalk()
        self._names: set[str] = set()

    def model(self) -> GraphWalk:
        file, there = self.reader.file, set[int]()

        def inner(one: Field) -> Pieces | None:
            first = one.number not in there
            there.add(one.number)
            if one.number in (1, 7):
                if not first:
                    raise MalformedError("a field of the model stands twice", file=file.path)
                if one.number == 1 and one.wire != VARINT:
                    raise self.reader.malformed(one.start)
            if one.number == 7:
                return self.graph(one, "", 0)
            if one.number == 20:
                return self.training(one)
            return self.function(one) if one.number == 25 else None

        changed = self._within(Field(0, BYTES, 0, 0, file.size, 0), inner)
        if not {1, 7} <= there:
            raise MalformedError("not an ONNX model: it has no graph", file=file.path)
        if changed is None:
            self.found.skeleton.keep(0, file.size)
        else:
            self.found.skeleton = changed
        return self.found

    def graph(self, whole: Field, scope: str, depth: int) -> Pieces | None:
        if depth > _NESTED:
            raise MalformedError(f"bodies of nodes are nested more than {_NESTED} deep", file=self.reader.file.path)

        def inner(one: Field) -> Pieces | None:
            if one.number == 1:
                return self.node(one, scope, depth)
            if one.number == 5:
                return self.tensor(one, "initializer", scope)
            return self.sparse(one, scope) if one.number == 15 else None

        return self._within(whole, inner)

    def function(self, whole: Field) -> Pieces | None:
        names = {1: "", 10: "", 13: ""}  # name, domain, overload
        for one in self._fields(whole):
            if one.number in names:
                names[one.number] = self.reader.text(one)
        name = ".".join(part for part in (names[10], names[1], names[13]) if part)

        def inner(one: Field) -> Pieces | None:
            if one.number == 11:  # an attribute with a default
                return self.attribute(one, name, 0, constant=False)
            return self.node(one, f"{name}/", 0) if one.number == 7 else None

        return self._within(whole, inner)

    def training(self, whole: Field) -> Pieces | None:
        def inner(one: Field) -> Pieces | None:
            return self.graph(one, f"training/{one.number}/", 1) if one.number in (1, 2) else None

        return self._within(whole, inner)

    def node(self, whole: Field, scope: str, depth: int) -> Pieces | None:
        output, kind, attributes = None, "", 0
        for one in self._fields(whole):
            if one.number == 2 and output is None:
                output = one
            elif one.number == 4:
                kind = self.reader.text(one)
            attributes += one.number == 5
        if not attributes:
            return None
        if attributes > _ATTRIBUTES:
            raise MalformedError(f"a node has {attributes} attributes", file=self.reader.file.path)
        named = self.reader.text(output) if output is not None else ""
        name = scope + (named or f"byte {whole.begin}")

        def inner(one: Field) -> Pieces | None:
            return self.attribute(one, name, depth, constant=kind == "Constant") if one.number == 5 else None

        return self._within(whole, inner)

    def attribute(self, whole: Field, node: str, depth: int, *, constant: bool) -> Pieces | None:
        name, holds, count = "", False, 0
        for one in self._fields(whole):
            if one.number == 1:
                name = self.reader.text(one)
            holds |= one.number in _HOLDING
        if not holds:
            return None
        alone = node if constant else f"{node}/{name}"

        def inner(one: Field) -> Pieces | None:
            nonlocal count
            if one.number not in _HOLDING:
                return None
            key = f"{alone}/{count}" if one.number in _SEVERAL else alone
            count += one.number in _SEVERAL
            if one.number in _GRAPHS:
                return self.graph(one, f"{key}/", depth + 1)
            if one.number in _SPARSE:
                return self.sparse(one, "", key)
            return self.tensor(one, "Constant" if constant else "attribute", "", key)

        return self._within(whole, inner)

    def sparse(self, whole: Field, scope: str, key: str = "") -> Pieces | None:
        """A sparse tensor; that of an initializer is called as its values are."""
        if not key:
            for one in self._fields(whole):
                named = [part for part in self._fields(one) if part.number == 8] if one.number == 1 else []
                key = scope + self.reader.text(named[-1]) if named else key
        halves = {1: "values", 2: "indices"}

        def inner(one: Field) -> Pieces | None:
            half = halves.get(one.number)
            return None if half is None else self.tensor(one, "SparseTensor", "", f"{key}/{half}")

        return self._within(whole, inner)

    def tensor(self, whole: Field, holder: str, scope: str, key: str = "") -> Pieces | None:
        found, rest = find_tensor(self.reader, whole, holder, scope, key)
        if found.key in self._names:
            raise MalformedError("the name appears twice", file=self.reader.file.path, tensor=found.key)
        self._names.add(found.key)
        self.found.tensors.append(found)
        return rest

    def _fields(self, whole: Field) -> Iterator[Field]:
        if whole.wire != BYTES:
            raise self.reader.malformed(whole.start)
        return self.reader.fields(whole.begin, whole.end)

    def _within(self, whole: Field, inner: Callable[[Field], Pieces | None]) -> Pieces | None:
        """The message without what `inner` left out of its fields."""
        pieces, done = Pieces(), whole.begin
        for one in self._fields(whole):
            if (part := inner(one)) is not None:
                pieces.keep(done, one.start)
                pieces.nest(one, part)
                done = one.end
        if done == whole.begin and not pieces.nbytes:
            return None
        pieces.keep(done, whole.end)
        return pieces
