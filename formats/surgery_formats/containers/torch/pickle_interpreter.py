# SPDX-License-Identifier: Apache-2.0
"""An interpreter for the few pickle opcodes that describe tensors. It can call nothing.

A pickle is a program for a stack machine whose opcodes may import and call anything. Loaders that filter what
is imported have been broken again and again, so nothing is imported here: ``pickletools.genops`` (a
disassembler) yields opcodes, and this module rebuilds plain containers from them. A global is only a name, to
be compared with those below; the five that may be "called" are cases in `_Machine.reduce`. Everything else is
refused by name.

Time and memory grow with the number of opcodes, which is bounded, and with nothing else. Shared references
may form cycles or deep graphs, as in any pickle, so a walk of the result must bound its depth, and look into what is shared once.
"""

from __future__ import annotations

import io
import pickletools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from surgery_formats.containers.base import is_size
from surgery_formats.containers.torch.rebuild import (
    DTYPES,
    STORAGES,
    UNTYPED,
    PickledStorage,
    are_sizes,
    rebuild,
)
from surgery_formats.dtypes import DType
from surgery_formats.errors import MalformedError
from surgery_formats.files.raw import File
from surgery_formats.tensors.tensor import StoredTensor
from surgery_formats.text import show

__all__ = ["Locate", "interpret"]

Locate = Callable[[str, int], int]  # (storage key, nbytes) -> absolute offset of that storage; raises MalformedError

_STEP_LIMIT = 8_000_000  # some 200,000 tensors; bounds the time of a hostile file to seconds
_INT_BITS = 128  # torch's magic number has 77

_CALLS = frozenset(
    (
        "collections.OrderedDict",
        "torch.Size",
        "torch._utils._rebuild_tensor_v2",
        "torch._utils._rebuild_tensor_v3",
        "torch._utils._rebuild_parameter",
    )
)
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_INTEGERS = frozenset(("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4"))
_TEXTS = frozenset(
    ("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8")
)
_VALUES = _INTEGERS | _TEXTS | {"FLOAT", "BINFLOAT"}
_TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_PUTS = frozenset(("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"))
_GETS = frozenset(("GET", "BINGET", "LONG_BINGET"))


@dataclass(frozen=True, slots=True)
class _Global:
    """The name of something importable. Never imported."""

    name: str


class _Mark:
    """Separates the items of a container under construction from what is below them on the stack."""


_MARK = _Mark()


class _Machine:
    """Stack, memo and storages of one run."""

    def __init__(self, file: File, locate: Locate) -> None:
        self.file = file
        self.locate = locate
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.steps = 0
        self.storages: dict[str, tuple[str, int, PickledStorage]] = {}

    def fail(self, what: str) -> MalformedError:
        return MalformedError(f"pickle: {what}", file=self.file.path)

    def refuse(self, name: str) -> MalformedError:
        hint = "only tensors and plain values are read; convert the file to safetensors where it was made"
        return MalformedError(
            f"the pickle asks for '{show(name)}', which is not allowed", file=self.file.path, hint=hint
        )

    def spend(self, steps: int) -> None:
        self.steps += steps
        if self.steps > _STEP_LIMIT:
            raise self.fail(f"more than {_STEP_LIMIT} steps")

    def pop(self) -> Any:
        if not self.stack or self.stack[-1] is _MARK:
            raise self.fail("it pops an empty stack")
        return self.stack.pop()

    def top(self, kind: type[Any]) -> Any:
        if not self.stack or self.stack[-1] is _MARK or not isinstance(self.stack[-1], kind):
            raise self.fail(f"items for a {kind.__name__} that is not there")
        return self.stack[-1]

    def to_mark(self) -> list[Any]:
        items: list[Any] = []
        while self.stack:
            item = self.stack.pop()
            if item is _MARK:
                items.reverse()
                return items
            items.append(item)
        raise self.fail("a mark is missing")

    def set_items(self, into: dict[Any, Any], items: list[Any]) -> None:
        if len(items) % 2:
            raise self.fail("a key without a value")
        for key, value in zip(items[::2], items[1::2], strict=True):
            # Hashing a tuple walks it whole, which for tuples of shared tuples takes for ever.
            if not isinstance(key, str | int | float | None):
                raise self.fail(f"a {type(key).__name__} as key of a dict")
            into[key] = value

    def import_name(self, module: Any, name: Any) -> _Global | DType:
        full = f"{module}.{name}" if isinstance(module, str) and isinstance(name, str) else "a name that is not text"
        if full in DTYPES:
            return DTYPES[full]
        if full not in _CALLS and full not in STORAGES and full not in UNTYPED:
            raise self.refuse(full)
        return _Global(full)

    def persistent(self, pid: Any) -> PickledStorage:
        """``('storage', type, key, device, numel[, view])``; numel counts bytes for an untyped storage."""
        if not isinstance(pid, tuple) or len(pid) not in (5, 6) or pid[0] != "storage" or pid[5:] not in ((), (None,)):
            raise self.fail("a persistent id that is not a storage")
        kind, key, numel = pid[1], pid[2], pid[4]
        if not isinstance(kind, _Global) or (kind.name not in STORAGES and kind.name not in UNTYPED):
            raise self.fail("a storage of an unknown type")
        if not isinstance(key, str) or not is_size(numel):
            raise self.fail("a storage without a key or a size")
        known = self.storages.get(key)
        if known is not None:
            if known[:2] != (kind.name, numel):
                raise self.fail(f"storage '{show(key)}' is described in two ways")
            return known[2]
        dtype = STORAGES.get(kind.name)
        nbytes = numel * (dtype.bits // 8 if dtype else 1)
        storage = PickledStorage(key, dtype, self.locate(key, nbytes), nbytes)
        self.storages[key] = (kind.name, numel, storage)
        return storage

    def reduce(self, called: Any, args: Any) -> Any:
        name = called.name if isinstance(called, _Global) else type(called).__name__
        if name not in _CALLS or not isinstance(called, _Global):
            raise self.refuse(f"{name}(...)")
        if not isinstance(args, tuple):
            raise self.fail(f"the arguments of {name} are not a tuple")
        if name == "collections.OrderedDict":
            ordered: dict[Any, Any] = {}
            pairs = args[0] if len(args) == 1 and isinstance(args[0], list) else args  # Python 2 gives a list of pairs
            self.spend(len(pairs))
            for pair in pairs:
                if not isinstance(pair, list | tuple) or len(pair) != 2:
                    raise self.fail("an OrderedDict of something other than pairs")
                self.set_items(ordered, list(pair))
            return ordered
        if name == "torch.Size":
            if len(args) != 1 or not are_sizes(args[0]):
                raise self.fail("a torch.Size of something other than sizes")
            return args[0]
        if name == "torch._utils._rebuild_parameter":
            if len(args) != 3 or not isinstance(args[0], StoredTensor):
                raise self.fail("a parameter without a tensor")
            return args[0]
        tensor = rebuild(args, v3=name.endswith("_v3"), file=self.file)
        if isinstance(tensor, str):
            raise self.fail(tensor)
        return tensor


def _as_torch_decodes(text: str, m: _Machine) -> str:
    """A text of Python 2, whose bytes pickletools gives one character each."""
    try:
        return text if text.isascii() else text.encode("latin-1").decode()
    except UnicodeDecodeError as error:
        raise m.fail("a text that is not UTF-8") from error


def _step(m: _Machine, op: str, arg: Any) -> None:
    """Run one opcode; a refused one raises."""
    stack = m.stack
    if op in _VALUES:
        if isinstance(arg, int) and arg.bit_length() > _INT_BITS:
            raise m.fail("an integer of more than 128 bits")
        stack.append(_as_torch_decodes(arg, m) if op in ("BINSTRING", "SHORT_BINSTRING") else arg)
    elif op in _PUTS:
        m.memo[len(m.memo) if op == "MEMOIZE" else arg] = m.top(object)
    elif op in _GETS:
        if arg not in m.memo:
            raise m.fail("it refers to something that was not stored")
        stack.append(m.memo[arg])
    elif op in _CONSTANTS:
        stack.append(_CONSTANTS[op])
    elif op in _TUPLES:
        stack.append(tuple([m.pop() for _ in range(_TUPLES[op])][::-1]))
    elif op == "MARK":
        stack.append(_MARK)
    elif op == "TUPLE":
        stack.append(tuple(m.to_mark()))
    elif op in ("EMPTY_LIST", "EMPTY_DICT"):
        stack.append([] if op == "EMPTY_LIST" else {})
    elif op == "LIST":
        stack.append(m.to_mark())
    elif op == "DICT":
        into: dict[Any, Any] = {}
        m.set_items(into, m.to_mark())
        stack.append(into)
    elif op in ("APPEND", "APPENDS"):
        added = m.to_mark() if op == "APPENDS" else [m.pop()]
        m.top(list).extend(added)
    elif op in ("SETITEM", "SETITEMS"):
        items = m.to_mark() if op == "SETITEMS" else [m.pop(), m.pop()][::-1]
        m.set_items(m.top(dict), items)
    elif op == "GLOBAL":
        stack.append(m.import_name(*arg.split(" ", 1)))
    elif op == "STACK_GLOBAL":
        name, module = m.pop(), m.pop()
        stack.append(m.import_name(module, name))
    elif op == "REDUCE":
        args, called = m.pop(), m.pop()
        stack.append(m.reduce(called, args))
    elif op == "BINPERSID":
        stack.append(m.persistent(m.pop()))
    elif op == "BUILD":
        # A module's state_dict() is an OrderedDict with the attribute _metadata; attributes of containers are
        # not weights.
        if not isinstance(m.pop(), dict):
            raise m.fail("a state that is not a dict")
        m.top(dict)
    elif op == "POP":
        m.pop()
    elif op == "POP_MARK":
        m.to_mark()
    elif op == "DUP":
        stack.append(m.top(object))
    elif op not in ("PROTO", "FRAME"):
        raise m.refuse(f"{op} of {arg}" if isinstance(arg, str) else op)


def interpret(stream: io.BytesIO, file: File, locate: Locate) -> object:
    r"""Read one pickle from `stream`, leaving it behind the STOP opcode.

    Args:
        stream: The bytes of the pickle.
        file: Where the storages lie; the `StoredTensor`\\ s of the result point into it.
        locate: Gives the absolute offset of a storage, or raises when there is none of that size.

    Returns:
        A tree of dict, list, tuple, str, int, float, bool, None, `DType` and `StoredTensor`; also inert names
        and `PickledStorage`, where the pickle has them outside a tensor.

    Raises:
        MalformedError: not a pickle, or one that asks for anything else; the message names it.
    """
    machine = _Machine(file, locate)
    ops = pickletools.genops(stream)
    while True:
        try:
            opcode, arg, _ = next(ops)
        except (ValueError, IndexError, OverflowError, RecursionError) as error:
            raise machine.fail(f"not a pickle ({show(error)})") from error
        except StopIteration as error:  # genops ends behind STOP only
            raise machine.fail("it has no end") from error
        if opcode.name == "STOP":
            break
        machine.spend(1)
        _step(machine, opcode.name, arg)
    result = machine.pop()
    if machine.stack:
        raise machine.fail("values are left on the stack")
    return result
