# SPDX-License-Identifier: Apache-2.0
"""Files that an interrupted run finished: what was measured of them, and whether they are still good."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from surgery.engine.ledger import Measurement
from surgery_formats.files.output.folder import FileRecord

__all__ = ["remembered", "still_good"]


def remembered(record: Mapping[str, Any]) -> dict[str, Measurement]:
    """The recorded measurements of a finished file's tensors, by label."""
    return {label: Measurement.of_record(fields) for label, fields in record["tensors"].items()}


def still_good(path: Path, record: FileRecord) -> bool:
    """Whether a file that an interrupted run finished still holds the computed tensors it finished with."""
    from surgery_formats.containers.weight_files import open_shard
    from surgery_formats.models.identity import tensor_digest

    if "tensors" not in record.record:
        return False  # a side file: copied again
    try:
        stored = {tensor.name: tensor for tensor in open_shard(path).tensors}
        for label, fields in record.record["tensors"].items():
            tensor = stored[label.rpartition(":")[2]]
            if tensor_digest(tensor) != fields["xxh3"]:
                return False
    except (KeyError, TypeError, ValueError):
        return False
    return True
