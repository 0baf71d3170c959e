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
from surgery_formats.models.checkpoint import Checkpoint
from surgery_formats.text import listing

__all__ = ["LOW_SURVIVAL", "check_output"]

LOW_SURVIVAL = 0.9
"""Below this share of the update surviving its storage type, a merge warns."""


def _differs(tensor: PlannedTensor, checkpoint: Checkpoint) -> bool:
    """Whether an added tensor is trained, or a replaced one holds other values than the base's."""
    if tensor.outcome == "added":
        files = {shard.file for component in checkpoint.components.values() for shard in component.shards}
        return all(source.file not in files for source in tensor.step.sources)
    base = checkpoint.components[tensor.component].parameters.get(tensor.weight)
    if tensor.outcome != "replaced" or not isinstance(tensor.step, Compute):
        return False
    return base is None or not same_values(base.storage, tensor.step.source)


def check_output(ledger: Ledger, checkpoint: Checkpoint, weights: Sequence[float]) -> list[str]:
    """Refuse an output equal to the base; warn of updates lost to rounding.

    Raises:
        NothingChangedError: no stored value differs from the base's.
    """
    moved = any(measurement.changed for measurement in ledger.measured.values())
    if not moved and not any(_differs(tensor, checkpoint) for tensor in ledger.plan.weights):
        if all(weight == 0 for weight in weights):
            raise NothingChangedError("every adapter has the weight 0", hint="weights are written ADAPTER=0.7")
        raise NothingChangedError(
            "no weight of the base would change",
            hint="the adapter is all zeros, or its update is smaller than the stored type can hold",
        )
    warnings = []
    if ledger.survival < LOW_SURVIVAL:
        warnings.append(
            f"only {ledger.survival:.0%} of the update survives in the stored type; --dtype fp32 keeps it all, "
            "or serve the adapter unmerged"
        )
    if unmoved := ledger.unmoved():
        warnings.append(f"{len(unmoved)} updated tensors did not change: {listing(unmoved)}")
    return warnings
