# SPDX-License-Identifier: Apache-2.0
"""The options of an extraction that its pass over both checkpoints depends on, understood."""

from __future__ import annotations

from dataclasses import dataclass

from surgery.engine.conversion import coded_as
from surgery.engine.inputs import check_alpha
from surgery.extraction.extraction_plan import stored_factor_specs
from surgery.extraction.ranks import RankGoal, rank_goal
from surgery.extraction.stream.scan_plan import ScanPlan, layout_of, plan_scan
from surgery.extraction.targets import LowRankTarget
from surgery.rank import Rank
from surgery_formats.adapters.format import Coded, Format, Scaling
from surgery_formats.adapters.registry import format_to_write
from surgery_formats.dtypes import DType
from surgery_formats.errors import FitError
from surgery_formats.linalg.coding import Coding
from surgery_formats.models.component import Component

__all__ = ["PassOptions", "one_of", "pass_options"]


@dataclass(frozen=True, slots=True)
class PassOptions:
    """What decides factors and measurements.

    Attributes:
        goal: How ranks are found.
        scaling: Alpha and rsLoRA.
        adapter_format: What is written.
        coding: Codes of the factors, if they are stored as codes.
        dtype: Type of the factors, as it was asked for.
        full: Whether embedding and head are stored whole.
        whole: Whether all matrices are.
        by_rank: Whether adapters of several ranks are made of the factors, so that all directions are kept.
    """

    goal: RankGoal
    scaling: Scaling
    adapter_format: Format
    coding: Coding | None
    dtype: str
    full: bool
    whole: bool
    by_rank: bool = False

    def stored(self, tuned: Component) -> DType:
        """Type of the factors; of codes, what these are made of."""
        return DType.F32 if self.coding else _dtype(self.dtype, tuned)

    def planned(self, old: Component, new: Component, *, on_gpus: bool) -> ScanPlan:
        """The pass.

        Raises:
            FitError: the checkpoints do not fit together, or a pattern of a rank matches nothing.
        """
        layout = layout_of(old, new, full=self.full, matrices=self.whole)
        self.goal.check_patterns(layout.targets)
        specs = _decided_later if self.by_rank else stored_factor_specs(self.goal, self.scaling, self.stored(new))
        return plan_scan(layout, self.goal, specs, on_gpus=on_gpus)


def pass_options(
    rank: int | Rank,
    *,
    alpha: float | None,
    rslora: bool,
    embeddings: str,
    matrices: str,
    dtype: str,
    to: str,
    factors: str | None,
    table: bool,
    evaluated: bool = False,
) -> PassOptions:
    """Understand them; all are as `surgery.extract_lora` takes them, but for `evaluated`: whether there is a text.

    Raises:
        UsageError: an argument of a wrong type.
        FitError: no such choice, or options that contradict each other.
    """
    goal = rank_goal(Rank.of(rank), table=table)
    whole = one_of(matrices, ("lora", "full"), "matrices") == "full"
    full = one_of(embeddings, ("lora", "full"), "embeddings") == "full"
    check_alpha(alpha)
    scaling = Scaling(None if alpha is None else float(alpha), rslora, goal.rank.number)
    adapter_format = coded_as(format_to_write("compact" if factors is not None and to == "peft" else to), factors)
    coding = _coding(adapter_format, dtype)
    return PassOptions(goal, scaling, adapter_format, coding, dtype, full or whole, whole, table and evaluated)


def _decided_later(target: LowRankTarget) -> None:
    """The stored form of no target's factors: they are kept as they were computed."""


def one_of(value: str, known: tuple[str, ...], what: str) -> str:
    """`value`, if it is a choice.

    Raises:
        FitError: it is none.
    """
    if value not in known:
        raise FitError(f"'{value}' is no choice of {what}", hint=f"there are {', '.join(known)}")
    return value


def _coding(adapter_format: Format, dtype: str) -> Coding | None:
    """The codes that factors are stored as, if they are."""
    if not isinstance(adapter_format, Coded):
        return None
    if dtype != "auto":
        raise FitError(
            f"{adapter_format.name} stores factors as codes, not as {dtype}", hint="`factors=` chooses the codes"
        )
    return adapter_format.coding


def _dtype(text: str, tuned: Component) -> DType:
    if text != "auto":
        return DType.parse(one_of(text, ("fp32", "fp16", "bf16"), "dtype"))
    largest = max((t for t in tuned.tensors.values() if t.dtype.is_float), key=lambda t: t.numel, default=None)
    return DType.F32 if largest is None or largest.dtype.bits > 16 else largest.dtype
