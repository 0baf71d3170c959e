# SPDX-License-Identifier: Apache-2.0
"""Diffusion networks as diffusers names them."""

from surgery_formats.families.family import Family

__all__ = ["FAMILY"]

FAMILY = Family(names=("UNet2DConditionModel",))
