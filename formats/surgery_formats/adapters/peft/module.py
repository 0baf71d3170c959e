# SPDX-License-Identifier: Apache-2.0
"""One module of a PEFT folder: the tensors that the file has for it, and what they mean."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from surgery_formats.adapters.peft.read_config import PeftConfig
from surgery_formats.canonical.adapter import Ignored, Site
from surgery_formats.errors import MalformedError
from surgery_formats.tensors.tensor import StoredTensor
from surgery_formats.updates import Update

__all__ = ["Module", "ModuleUpdates", "malformed"]


@dataclass(frozen=True, slots=True)
class Module:
    """One module's tensors.

    Attributes:
        path: Of the module, without PEFT's wrappers.
        wrapped: Its path as in the file's keys, with them.
        parts: Stored tensors by their name after the module.
        shared: Tensors of the whole adapter.
        config: Its configuration.
        wrappers: How many entries each module of the file has, by `path`: wrappers nest.
    """

    path: str
    wrapped: str
    parts: Mapping[str, StoredTensor]
    shared: Mapping[str, StoredTensor]
    config: PeftConfig
    wrappers: Mapping[str, int]

    def site(self, kernel: tuple[int, ...] = ()) -> Site:
        """Its weight; a convolution where the file has a kernel."""
        return Site(f"{self.path}.weight", module_kind="convolution" if kernel else "", kernel=kernel)

    def part(self, name: str) -> StoredTensor:
        """The tensor `name`.

        Raises:
            MalformedError: it is missing.
        """
        if name not in self.parts:
            first = next(iter(self.parts.values()))
            raise MalformedError(f"'{name}' is missing beside it", file=first.file.path, tensor=first.name)
        return self.parts[name]

    def matrix(self, name: str) -> StoredTensor:
        """The tensor `name`, which must be a matrix."""
        tensor = self.part(name)
        if len(tensor.shape) != 2 or not tensor.numel:
            raise malformed(tensor, "not a matrix")
        return tensor

    def vector(self, name: str) -> StoredTensor:
        """The tensor `name`, which must be a vector."""
        tensor = self.part(name)
        if len(tensor.shape) != 1 or not tensor.numel:
            raise malformed(tensor, "not a vector")
        return tensor


@dataclass(frozen=True, slots=True)
class ModuleUpdates:
    """What a module's tensors mean.

    Attributes:
        updates: By site, in order.
        optional: Sites that the base need not have.
        ignored: Tensors that do nothing, and are meant to do nothing.
    """

    updates: Mapping[Site, tuple[Update, ...]]
    optional: frozenset[Site] = frozenset()
    ignored: tuple[Ignored, ...] = ()


def malformed(tensor: StoredTensor, why: str) -> MalformedError:
    """A tensor of a shape that means nothing."""
    return MalformedError(f"shape {list(tensor.shape)}: {why}", file=tensor.file.path, tensor=tensor.name)
