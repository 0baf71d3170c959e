# SPDX-License-Identifier: Apache-2.0
"""Changes that no form of an adapter holds."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from surgery.extraction.storage_plan import StoragePlan
from surgery.extraction.stream.tally import PairMeasure
from surgery_formats.errors import FitError
from surgery_formats.text import show

__all__ = ["check_losses"]


def check_losses(storage: StoragePlan, measures: Mapping[str, PairMeasure], tuned: Path, *, allow_loss: bool) -> None:
    """Refuse changes that no form holds, unless the user allowed their loss.

    Raises:
        FitError: there are such changes.
    """
    if not storage.dropped or allow_loss:
        return
    total = math.fsum(measure.energy for measure in measures.values())
    share = math.fsum(measures[name].energy for name in storage.dropped) / total if total else 0.0
    reasons = "; ".join(f"'{show(name)}' ({why})" for name, why in list(storage.dropped.items())[:3])
    more = f"; and {len(storage.dropped) - 3} more" if len(storage.dropped) > 3 else ""
    raise FitError(
        f"{len(storage.dropped)} changed tensors, {share:.2%} of the change, would be lost: {reasons}{more}",
        file=tuned,
        tensor=next(iter(storage.dropped)),
        hint="`allow_loss=True` leaves them out",
    )
