# SPDX-License-Identifier: Apache-2.0
"""The weights that an export computes: merged, dequantised, coded or turned; none where graphs refer to the base's alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

from surgery.onnx.export.adapters import AdapterRoles
from surgery.onnx.graph.target import io_type
from surgery_formats.errors import NothingChangedError
from surgery_formats.models.checkpoint import Checkpoint

if TYPE_CHECKING:
    from surgery.engine.ledger import Ledger
    from surgery.onnx.export.merged import MergedWeights
    from surgery.onnx.export.weight_coding import WeightCoding
    from surgery_formats.binding.bind import Binding

__all__ = ["check_written", "weights_to_write"]


def weights_to_write(
    checkpoint: Checkpoint,
    roles: AdapterRoles,
    task: str,
    *,
    full: bool,
    coding: WeightCoding | None,
    io: tuple[str, str],
) -> tuple[Binding | None, MergedWeights | None]:
    """The adapters to merge, bound, and the merged weights: also those that a graph needs in elements, not in codes.

    Imports only what is needed: adapters would cost a plain export as much as all the rest.

    Args:
        checkpoint: The base.
        roles: The adapters.
        task: What the graph is for; empty for what the model was saved for.
        full: Whether all weights are written, not only those that change.
        coding: How they are written; None for as they are stored.
        io: Target and type of the graph, as they are asked for.

    Returns:
        The binding and the weights; None for both where a graph refers to nothing but the base's files.

    Raises:
        FitError: an adapter of another base, or one that does not fit; see `coded_weights` and `merged_weights`.
    """
    checkpoint.main.check_read()
    coded = checkpoint.is_quantised or any(shard.container == "gguf" for shard in checkpoint.main.shards)
    if not roles.adapters and not coded and coding is None:
        return None, None
    from surgery.engine.input_checks import check_base_id
    from surgery.onnx.export.merged import merged_weights
    from surgery_formats.binding.bind import bind

    check_base_id(checkpoint, roles.adapters)
    if not (pairs := roles.merged) and not coded and coding is None:
        return None, None
    binding = bind(pairs, checkpoint, new_biases=True)
    if coding is not None:
        from surgery.onnx.export.coded_plan import coded_weights

        return binding, coded_weights(binding, coding, task, io_type(*io, checkpoint.main.dtype))
    return binding, merged_weights(binding, "full" if full else "delta", task)


def check_written(ledger: Ledger, binding: Binding, *, headed: bool) -> list[str]:
    """Check that adapters changed something; warnings of what rounding took.

    Args:
        ledger: Of the weights that were written.
        binding: What they are written from; without adapters nothing but dequantised or coded.
        headed: Whether a head may have come along with a module, which may be the base's own.

    Raises:
        NothingChangedError: no stored value differs from the base's.
    """
    from surgery.engine.output_checks import check_output

    if not binding.adapters:
        return []
    try:
        return check_output(ledger, binding.checkpoint, [weight for _, weight in binding.adapters])
    except NothingChangedError:
        if headed:
            return []
        raise
