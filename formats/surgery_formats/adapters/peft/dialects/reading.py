# SPDX-License-Identifier: Apache-2.0
"""Read the experts that a module holds, in whichever dialect they are."""

from __future__ import annotations

from surgery_formats.adapters.peft.dialects.leaves import read_leaves
from surgery_formats.adapters.peft.dialects.stacks import read_stacks, read_vllm
from surgery_formats.adapters.peft.module import Module, ModuleUpdates

__all__ = ["experts_of"]


def experts_of(module: Module) -> ModuleUpdates | None:
    """The experts that a module holds; None if it is a module as any other, as experts one by one are.

    Raises:
        FitError: factors that do not belong together, or bytes that have two readings.
        MalformedError: factors of another rank than the configuration's.
    """
    return read_leaves(module) or read_vllm(module) or read_stacks(module)
