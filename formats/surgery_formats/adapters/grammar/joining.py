# SPDX-License-Identifier: Apache-2.0
"""LoRAs and DoRAs of rows of a weight that a file holds as one: they wait for each other, and become one of it."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from surgery_formats.adapters.grammar.naming import SiteNames
from surgery_formats.adapters.grammar.refusals import Candidate
from surgery_formats.adapters.rows import Span, joined
from surgery_formats.adapters.writing import places_of, whole_place
from surgery_formats.models.families.denoisers import COMPONENTS
from surgery_formats.threads import cores
from surgery_formats.updates import Update, is_directed, low_rank_part

__all__ = ["JoinedWeight", "WaitingParts"]

_THREADS = 4


@dataclass(frozen=True, slots=True)
class JoinedWeight:
    """A weight that is written when all its parts are known.

    Attributes:
        stem: What its keys begin with.
        prefix: How keys of its component begin.
        height: Rows that it has.
        parts: Updates of its rows.
        rows: Which rows of each part lie at which of its own.
    """

    stem: str
    prefix: str
    height: int
    parts: list[Candidate] = field(default_factory=list)
    rows: list[Sequence[tuple[Span, int]]] = field(default_factory=list)


@dataclass(frozen=True)
class WaitingParts:
    """The updates of one adapter that wait for the other parts of their weights.

    Attributes:
        names: Of its sites in the file.
    """

    names: SiteNames
    _wholes: dict[str, JoinedWeight] = field(default_factory=dict)

    def take(self, part: Candidate, prefix: str) -> bool:
        """Keep an update of a part; whether it is one.

        Raises:
            FitError: a weight that the base does not have.
        """
        base, site, update = self.names.base, part.site, part.update
        if low_rank_part(update) is None or (is_directed(update) and not update.per_row) or part.own is not None:
            return False
        if base is None or self.names.dialect.names_of or site.kernel or site.component not in (*COMPONENTS, ""):
            return False
        places = places_of(site, base, update.tensors)
        parameters = [place.parameter for place in places]
        if any(len(p.sizes) != 2 or p.view.transposed or p.shape[1] != p.sizes[1] for p in parameters):
            return False
        whole = self.names.whole_at(site, places)
        if whole is None or not whole.name.endswith(".weight"):
            return False
        if whole_place(places) is not None and whole.is_filled:
            return False
        stem = self.names.stem(prefix, whole.name.removesuffix(".weight"))
        waiting = self._wholes.setdefault(stem, JoinedWeight(stem, prefix, whole.height))
        waiting.parts.append(part)
        waiting.rows.append(whole.rows)
        return True

    def joined(self) -> list[tuple[JoinedWeight, Update | str]]:
        """Every weight whose parts were taken, with the update that they make, or why they make none.

        Whether all parts have one A decides its rank, and takes a look at all of their numbers: the weights share the cores.
        """

        def made(whole: JoinedWeight) -> Update | str:
            updates = [part.update for part in whole.parts]
            return joined(whole.stem.rstrip("."), list(zip(updates, whole.rows, strict=True)), whole.height)

        with ThreadPoolExecutor(min(_THREADS, cores()), "surgery-join") as pool:
            return list(zip(self._wholes.values(), pool.map(made, self._wholes.values()), strict=True))
