# SPDX-License-Identifier: Apache-2.0
"""One module of a file: its tensors by role, and checks that name the tensor at fault."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from surgery_formats.errors import FitError, MalformedError
from surgery_formats.tensors.tensor import StoredTensor
from surgery_formats.text import show

__all__ = ["ModuleTensors", "fit_error", "malformed"]


@dataclass(frozen=True, slots=True)
class ModuleTensors:
    """The tensors of one module.

    Attributes:
        path: Of the module, without prefix; flat if dots are written as underscores.
        component: Of the pipeline.
        flat: Whether `path` is flat.
        stem: What stands before the leaf in its keys.
        parts: Tensors by role.
        leaves: Spellings by role.
    """

    path: str
    component: str
    flat: bool
    stem: str
    parts: dict[str, StoredTensor] = field(default_factory=dict)
    leaves: dict[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Component and path, which name it in the file."""
        return f"{self.component}:{self.path}"

    def part(self, role: str, beside: str) -> StoredTensor:
        """The tensor of a role without which another makes no sense.

        Raises:
            MalformedError: it is not there.
        """
        if role not in self.parts:
            spelt = _SPELT.get(role, role)
            raise malformed(self.parts[beside], f"without its '{spelt}'")
        return self.parts[role]

    def matrix(self, role: str, beside: str) -> StoredTensor:
        """As `part`, of a tensor with two axes and more.

        Raises:
            MalformedError: it is not there, or has fewer.
        """
        stored = self.part(role, beside)
        if len(stored.shape) < 2:
            raise malformed(stored, f"a factor of shape {list(stored.shape)}")
        return stored


_SPELT: Mapping[str, str] = {"down": "lora_down.weight", "up": "lora_up.weight", "mid": "lora_mid.weight"}


def malformed(tensor: StoredTensor, what: str, hint: str | None = None) -> MalformedError:
    """An error about a tensor that is not what its format says."""
    return MalformedError(what, file=tensor.file.path, tensor=tensor.name, hint=hint)


def fit_error(tensor: StoredTensor, what: str, hint: str | None = None) -> FitError:
    """An error about a tensor that is what it is, and cannot be used."""
    return FitError(show(what, 300), file=tensor.file.path, tensor=tensor.name, hint=hint)
