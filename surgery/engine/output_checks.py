# SPDX-License-Identifier: Apache-2.0
"""Checks of an output before it appears.

Does anything differ from the base, and is the update still there after rounding?
"""

from __future__ import annotations

from collections.abc import Sequence

from surgery.engine.ledger import Ledger
from surgery.engine.plan import Compute, PlannedTensor
from surgery_formats.binding.tied_edits import same_values
from surgery_formats.errors import NothingChangedError
from surgery_formats.linalg.survival import Survival
from surgery_formats.models.checkpoint import Checkpoint
from surgery_formats.text import listing, show

__all__ = ["LEAST_CORRELATION", "LEAST_SURVIVAL", "LOW_SURVIVAL", "check_output"]

LEAST_SURVIVAL = 0.5
"""Below this share of the update in their codes, requantised weights are refused: docs/quantised.md has the measurement."""
LEAST_CORRELATION = 0.1
"""Of what was stored with what was meant; below, the codes moved, but elsewhere: the rest is noise of ten times its norm."""

LOW_SURVIVAL = 0.9
"""Below this share of the update surviving its storage type, a merge warns."""

_WORST = 3


def _differs(tensor: PlannedTensor, checkpoint: Checkpoint) -> bool:
    """Whether an added tensor is trained, or a replaced one holds other values than the base's."""
    if tensor.outcome == "added":
        files = {shard.file for component in checkpoint.components.values() for shard in component.shards}
        return all(source.file not in files for source in tensor.step.sources)
    base = checkpoint.components[tensor.component].parameters.get(tensor.weight)
    if tensor.outcome != "replaced" or not isinstance(tensor.step, Compute):
        return False
    return base is None or not same_values(base.storage, tensor.step.source)


def check_output(
    ledger: Ledger, checkpoint: Checkpoint, weights: Sequence[float], *, accept_loss: bool = False
) -> list[str]:
    """Refuse an output equal to the base, or nearly so; warn of updates lost to rounding.

    Raises:
        NothingChangedError: no stored value differs from the base's, or codes hold too little of the update and
            `accept_loss` does not allow it.
    """
    moved = any(measurement.changed for measurement in ledger.measured.values())
    if not moved and not any(_differs(tensor, checkpoint) for tensor in ledger.plan.weights):
        if all(weight == 0 for weight in weights):
            raise NothingChangedError("every adapter has the weight 0", hint="weights are written ADAPTER=0.7")
        if ledger.measured and not any(measurement.update for measurement in ledger.measured.values()):
            raise NothingChangedError(
                "no weight of the base would change: the adapter looks untrained, its update of every weight is zero",
                hint="a LoRA begins with B = 0; train it, or name the checkpoint that the training saved",
            )
        raise NothingChangedError(
            "no weight of the base would change", hint="the update is smaller than the stored type can hold"
        )
    warnings = []
    if ledger.requantised:
        warnings += _check_codes(ledger, accept_loss=accept_loss)
    elif ledger.survival < LOW_SURVIVAL:
        warnings.append(
            f"only {ledger.survival:.0%} of the update survives in the stored type; --dtype fp32 keeps it all, "
            "or serve the adapter unmerged"
        )
    if unmoved := ledger.unmoved():
        warnings.append(f"{len(unmoved)} updated tensors did not change: {listing(unmoved)}")
    return warnings


def _check_codes(ledger: Ledger, *, accept_loss: bool) -> list[str]:
    """Refuse codes that do not hold the update; warn if they hold only a part of it."""
    kept = Survival.total(measured.kept for _, measured, _ in ledger.requantised)
    found = f"{kept.survival:.0%} of the update is in the codes, and what was stored correlates {kept.correlation:.2f} with it"
    if kept.survival < LEAST_SURVIVAL or kept.correlation < LEAST_CORRELATION:
        worst = sorted(ledger.requantised, key=lambda each: (each[1].survival, each[0].weight_label))[:_WORST]
        named = ", ".join(f"{show(tensor.weight_label)} ({measured.survival:.0%})" for tensor, measured, _ in worst)
        if not accept_loss:
            raise NothingChangedError(
                f"only {found}: that is no merge. Least is kept in {named}",
                hint='`quantized="dequantize"` keeps all of it; `accept_loss=True` writes this',
            )
    return [f"only {found}"] if kept.survival < LOW_SURVIVAL else []
