# SPDX-License-Identifier: Apache-2.0
"""LoRAs of rows of a weight that a file holds as one: they wait for each other, and become one LoRA of it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from surgery_formats.adapters.grammar.naming import SiteNames
from surgery_formats.adapters.rows import Span, joined
from surgery_formats.adapters.writing import places_of, whole_place
from surgery_formats.canonical.adapter import Site
from surgery_formats.models.families.denoisers import COMPONENTS
from surgery_formats.updates import LoRA

__all__ = ["WaitingParts"]

_THREADS = 4


@dataclass(frozen=True, slots=True)
class _WholeWeight:
    """A weight that is written when all its parts are known.

    Attributes:
        prefix: How keys of its component begin.
        height: Rows that it has.
        parts: LoRAs, and which of their rows lie at which of its own.
    """

    prefix: str
    height: int
    parts: list[tuple[LoRA, Sequence[tuple[Span, int]]]]


@dataclass(frozen=True)
class WaitingParts:
    """The LoRAs of one adapter that wait for the other parts of their weights.

    Attributes:
        names: Of its sites in the file.
    """

    names: SiteNames
    _wholes: dict[str, _WholeWeight] = field(default_factory=dict)

    def take(self, site: Site, lora: LoRA, prefix: str) -> str:
        """Keep a LoRA of a part; the stem of the weight that it is a part of, or empty if it is of none.

        Raises:
            FitError: a weight that the base does not have.
        """
        base = self.names.base
        if base is None or self.names.dialect.names_of or site.kernel or site.component not in (*COMPONENTS, ""):
            return ""
        places = places_of(site, base, lora.tensors)
        parameters = [place.parameter for place in places]
        if any(len(p.sizes) != 2 or p.view.transposed or p.shape[1] != p.sizes[1] for p in parameters):
            return ""
        whole = self.names.whole_at(site, places)
        if whole is None or not whole.name.endswith(".weight"):
            return ""
        if whole_place(places) is not None and whole.is_filled:
            return ""
        stem = self.names.stem(prefix, whole.name.removesuffix(".weight"))
        self._wholes.setdefault(stem, _WholeWeight(prefix, whole.height, [])).parts.append((lora, whole.rows))
        return stem

    def joined(self) -> list[tuple[str, str, LoRA]]:
        """``(stem, prefix, LoRA)`` of every weight whose parts were taken.

        Whether all parts have one A decides its rank, and takes a look at all of their numbers: the weights share the cores.
        """
        with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1), "surgery-join") as pool:
            loras = pool.map(lambda item: joined(item[0], item[1].parts, item[1].height), self._wholes.items())
            return [(stem, whole.prefix, lora) for (stem, whole), lora in zip(self._wholes.items(), loras, strict=True)]
