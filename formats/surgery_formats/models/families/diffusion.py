# SPDX-License-Identifier: Apache-2.0
"""U-Nets under diffusers' names, and the original release's ("sgm") names of the same modules as kohya flattens them.

LoRA files for SDXL use the original names, flattened; `surgery_formats.models.layouts.unet` has the map.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

from surgery_formats.models.families.family import Family
from surgery_formats.models.layouts.unet import original_names

__all__ = ["FAMILY", "original_flat"]


def original_flat(modules: Collection[str]) -> Iterator[tuple[str, str]]:
    """Yield ``(flattened original name, module)`` for every module of a U-Net, by its path in diffusers."""
    return ((original.replace(".", "_"), module) for original, module in original_names(modules))


FAMILY = Family(names=("UNet2DConditionModel",), other_flat=original_flat)
