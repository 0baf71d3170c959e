# SPDX-License-Identifier: Apache-2.0
"""What is fuzzed: a target has seeds, and something that is done with each damaged one."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Case", "DisagreementError", "Seed", "Target"]


class DisagreementError(AssertionError):
    """We read something else than the program whose format it is, or let something through."""


@dataclass(frozen=True)
class Seed:
    """A file or a folder.

    Attributes:
        name: Where it is from.
        files: Contents by name; one file that is its own adapter or model stands alone.
        alone: Whether a reader is given the first file, and not the folder around it.
    """

    name: str
    files: Mapping[str, bytes]
    alone: bool = True


@dataclass(frozen=True)
class Case:
    """A damaged seed.

    Attributes:
        path: The file, or the folder around it.
        raw: The first file's bytes.
        draw: For what the execution chooses.
    """

    path: Path
    raw: bytes
    draw: random.Random


@dataclass(frozen=True)
class Target:
    """Something that reads.

    Attributes:
        name: ``area:what``.
        execute: Reads a case and says in a word or two how it ended. A `SurgeryError` is a good end, too.
        seeds: What is damaged.
        on_disk: Whether it needs the files; otherwise `Case.path` does not exist.
        share: How often it is executed, compared with others.
        quick: Whether bytes of small seeds are changed without looking at what they are, for thousands of executions a second.
        needs: Packages of which one is missing where it cannot be executed.
    """

    name: str
    execute: Callable[[Case], str]
    seeds: Callable[[], Sequence[Seed]]
    on_disk: bool = True
    share: float = 1.0
    quick: bool = False
    needs: tuple[str, ...] = ()
