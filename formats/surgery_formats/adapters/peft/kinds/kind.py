# SPDX-License-Identifier: Apache-2.0
"""One kind of PEFT adapter: its tensors, its configuration, its known issues, its reader and its writer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from surgery_formats.adapters.peft.file import PeftFile
from surgery_formats.adapters.peft.module import Module, ModuleUpdates, malformed
from surgery_formats.adapters.peft.read_config import PeftConfig, Switches
from surgery_formats.canonical.adapter import Site
from surgery_formats.tensors.tensor import StoredTensor
from surgery_formats.updates import Update

__all__ = ["Module", "ModuleUpdates", "PeftKind", "malformed"]


def _no_issues(config: Mapping[str, Any], tensors: Sequence[StoredTensor]) -> Iterable[str]:
    return ()


def _no_lack(config: PeftConfig) -> str:
    return ""


@dataclass(frozen=True, slots=True)
class PeftKind:
    """One ``peft_type``. Adding one is a file with such an object, and a line in `kinds.BUILT_IN` or an entry point.

    Attributes:
        name: The ``peft_type``.
        factors: Names of its tensors after the module's path; with ``.weight`` where the file has it.
        read: From a module's tensors to updates.
        writes: Kinds of updates (`Update.kind`) that its files hold. A folder is written as the kind that holds most of
            an adapter.
        write: Adds updates to a file under construction and sets the fields of its configuration. It gets all updates
            of the adapter and passes those it cannot hold to `PeftFile.hold_other`.
        switches: Fields of its configuration.
        shared: Names of tensors that belong to the whole adapter; one that ends with a dot stands for several, of which
            each has a name of its own behind the dot.
        issues: Facts worth a warning, from configuration and headers.
        lacks: What its files lack, going by their configuration, so that they cannot be read; empty if nothing.
        unused: Names after a module's path of tensors that only training used, and why they do nothing.
        ranks: Factors whose axis of this number is as long as ``r``, or ``rank_pattern``, says. A kind that checks it
            in its reader has none.
    """

    name: str
    factors: frozenset[str]
    read: Callable[[Module], ModuleUpdates]
    writes: frozenset[str]
    write: Callable[[PeftFile, Sequence[tuple[Site, Update]]], None]
    switches: Switches = field(default_factory=Switches)
    shared: frozenset[str] = frozenset()
    issues: Callable[[Mapping[str, Any], Sequence[StoredTensor]], Iterable[str]] = _no_issues
    unused: Mapping[str, str] = field(default_factory=dict)
    lacks: Callable[[PeftConfig], str] = _no_lack
    ranks: Mapping[str, int] = field(default_factory=dict)
