# SPDX-License-Identifier: Apache-2.0
"""GPT-Neo: GPT-2's names with ordinary linear layers."""

from surgery_formats.models.families.family import Family

__all__ = ["FAMILY"]

FAMILY = Family(names=("gpt_neo",), embedding="transformer.wte", head="lm_head", tied=True)
