# SPDX-License-Identifier: Apache-2.0
"""What a file of an adapter tells of its making: the program, the family of its base, and where scales stand."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

__all__ = ["Provenance", "ScaleSource"]

ScaleSource = Literal["alpha", "adapter metadata", "training metadata", "rank", "none"]
"""Where the scale of an update was read.

``alpha``
    A tensor beside its factors.
``adapter metadata``
    ``lora_adapter_metadata`` in the header of the file, with its patterns (diffusers).
``training metadata``
    ``ss_network_alpha`` in the header (sd-scripts).
``rank``
    Nowhere: alpha is taken for the rank, so that the scale is 1.
``none``
    Nowhere, and the kind has none: factors stored whole.
"""


@dataclass(frozen=True, slots=True)
class Provenance:
    """Facts of a file, none of which changes what the adapter does.

    Attributes:
        tool: The program that wrote it, with what tells so: ``OneTrainer (ot_config)``; empty where nothing does.
        family: The family of the base by the names of its modules; empty where they tell none.
        scales: How many updates have their scale from where.
        base: What the header says the base is, and its field: ``sdxl_base_v1-0 (ss_base_model_version)``; empty without one.
    """

    tool: str = ""
    family: str = ""
    scales: Mapping[ScaleSource, int] = field(default_factory=dict)
    base: str = ""
