# SPDX-License-Identifier: Apache-2.0
"""gpt-oss: experts in 3-D tensors, ``(E, in, out)``, gate and up interleaved."""

from surgery_formats.models.families.family import Family

__all__ = ["FAMILY"]

FAMILY = Family(names=("gpt_oss",), embedding="model.embed_tokens", head="lm_head", experts_transposed=True)
