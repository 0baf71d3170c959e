# SPDX-License-Identifier: Apache-2.0
"""LoRA or DoRA: what was chosen, and what either leaves. Figures only; torch is not needed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

__all__ = ["KINDS", "Kind", "KindFacts"]

Kind = Literal["auto", "lora", "dora"]
KINDS: tuple[Kind, ...] = ("auto", "lora", "dora")


@dataclass(frozen=True, slots=True)
class KindFacts:
    """What the factors are, and what the other kind would have left.

    Attributes:
        kind: ``lora`` or ``dora``.
        why: In words.
        lora: ``||W' - (W + BA)|| / ||W' - W||`` over the modules that could be either.
        equal: At least this is left by a LoRA with as many numbers as the DoRA has; NaN where no DoRA was made.
        dora: What the DoRA leaves of them; NaN where none was made.
        rows: Share of what the LoRA leaves that rescaling rows would take away (the test beforehand); NaN where it was not made.
        rounding: What PEFT's rounding of norms adds to the DoRA's error, relative to the change, in a model of the stored type.
    """

    kind: Literal["lora", "dora"]
    why: str
    lora: float = math.nan
    equal: float = math.nan
    dora: float = math.nan
    rows: float = math.nan
    rounding: float = 0.0

    def as_json(self) -> dict[str, Any]:
        """For ``--json`` and the manifest."""
        figures = {
            "lora": self.lora,
            "lora_of_equal_size_at_least": self.equal,
            "dora": self.dora,
            "row_scale_share": self.rows,
            "dora_rounding_in_peft": self.rounding,
        }
        shown = {name: None if math.isnan(value) else float(f"{value:.6g}") for name, value in figures.items()}
        return {"chosen": self.kind, "why": self.why, **shown}
