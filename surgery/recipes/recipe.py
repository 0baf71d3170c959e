# SPDX-License-Identifier: Apache-2.0
"""A recipe: a chain of verbs as data, with their arguments and the names of results."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

from surgery_formats.errors import SurgeryError, UsageError
from surgery_formats.text import show

__all__ = ["OUTPUTS", "RANKED", "VERBS", "Input", "Operand", "Recipe", "Step"]

VERBS = (
    *("combine", "resize", "convert", "extract-lora", "insert", "merge", "unmerge", "layers", "export-onnx", "verify"),
    *("fold", "prompt-bake", "prompt-combine", "prompt-convert", "prompt-transfer"),
)
"""What a step may do."""
OUTPUTS = ("adapter_output", "residual", "merge_rest")
"""Options that are outputs beside that of the step."""
RANKED = ("rank", "energy", "max_error", "budget", "rank_pattern")
"""Options that make one choice of ranks together."""


@dataclass(frozen=True, slots=True)
class Input:
    """A named input.

    Attributes:
        reference: A path, or a name on the hub; empty for one of a manifest.
        files: Digest of what lay there when the recipe was written into a manifest; empty in a recipe of one's own.
        made: Digest of what a program had made of it in memory; such an input cannot be opened again.
        line: Where it stands.
    """

    reference: str
    files: str = ""
    made: str = ""
    line: int = 0


@dataclass(frozen=True, slots=True)
class Operand:
    """A model or an adapter that a step works on, by name: an input, a result, or a model reference as the command takes it."""

    text: str
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Step:
    """One verb.

    Attributes:
        number: From 1.
        line: Where it begins.
        verb: As the command calls it.
        arguments: By parameter: plain values.
        operands: By parameter: what it names; whether as a list.
        name: Of its result, or empty.
        output: Where it is written, or empty.
        written: Whether it was written to an output when the manifest was made: later steps read rounded values then.
    """

    number: int
    line: int
    verb: str
    arguments: Mapping[str, Any]
    operands: Mapping[str, tuple[Operand, ...]]
    name: str = ""
    output: str = ""
    written: bool = False

    @property
    def title(self) -> str:
        """For messages."""
        where = f", line {self.line}" if self.line else ""
        return f"step {self.number} ({show(self.verb, 40)}){where}"

    @property
    def function(self) -> Callable[..., Any]:
        """The verb."""
        name = self.verb.replace("-", "_")
        function: Callable[..., Any] = getattr(import_module(f"surgery.verbs.{name}"), name)
        return function

    @property
    def parameters(self) -> Mapping[str, inspect.Parameter]:
        """Those of the verb, by name."""
        return _parameters(self.function)

    @property
    def chooses_ranks(self) -> bool:
        """Whether its ``rank`` is a choice of ranks, which all of `RANKED` make together."""
        parameter = self.parameters.get("rank")
        return parameter is not None and "Rank" in str(parameter.annotation)

    @contextmanager
    def located(self) -> Iterator[None]:
        """Errors inside say which step they are of."""
        try:
            yield
        except SurgeryError as error:
            if not error.message.startswith(self.title):
                error.message = f"{self.title}: {error.message}"
                error.args = (error.message,)
            raise

    def fail(self, what: str, hint: str | None = None) -> UsageError:
        """An error that says where."""
        return UsageError(f"{self.title}: {what}", hint=hint)


@cache
def _parameters(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(function).parameters


@dataclass(frozen=True, slots=True)
class Recipe:
    """A chain of steps.

    Attributes:
        path: The file.
        inputs: By name.
        steps: In order.
        recorded: The manifest that it was read from; None for a recipe of one's own.
    """

    path: Path
    inputs: Mapping[str, Input]
    steps: tuple[Step, ...]
    recorded: Mapping[str, Any] | None = field(default=None, repr=False)
