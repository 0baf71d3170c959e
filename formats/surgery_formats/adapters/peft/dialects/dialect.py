# SPDX-License-Identifier: Apache-2.0
"""A dialect: one way in which folders like PEFT's hold the LoRAs of experts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from surgery_formats.adapters.expert_layers import ExpertLayer
from surgery_formats.adapters.peft.file import PeftFile
from surgery_formats.adapters.peft.read_config import PeftConfig
from surgery_formats.tensors.tensor import Tensor

__all__ = ["ExpertDialect"]


class ExpertDialect(Protocol):
    """One dialect. Adding one is a file with such an object, and its place in `dialects.BUILT_IN`.

    Attributes:
        name: As users name it.
        title: What writes and reads it, with versions, and the shapes.
        limits: What it cannot hold as it is, and what is done then.
        source: Where that was read.
        uniform: Whether its readers know one rank and one alpha for all modules of a file.
    """

    @property
    def name(self) -> str: ...
    @property
    def title(self) -> str: ...
    @property
    def limits(self) -> str: ...
    @property
    def source(self) -> str: ...
    @property
    def uniform(self) -> bool: ...

    def recognise(self, config: PeftConfig, tensors: Sequence[Tensor]) -> bool:
        """Whether a folder's experts are in this dialect, by its configuration and the names and shapes of its tensors."""

    def put(self, file: PeftFile, layer: ExpertLayer) -> str:
        """Add a layer's experts to `file`, and return what that took, for the ledger: empty if nothing was multiplied.

        Raises:
            FitError: the dialect cannot hold them.
        """

    def named(self, module: str) -> str:
        """Its name for a module that holds no experts."""

    def fields(self, file: PeftFile) -> Mapping[str, Any]:
        """Fields of the configuration that tell a reader which dialect it is."""
