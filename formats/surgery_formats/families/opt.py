# SPDX-License-Identifier: Apache-2.0
"""OPT: a decoder under ``model.decoder``; old files lack the ``model.`` in front."""

from surgery_formats.families.family import Family

__all__ = ["FAMILY"]

FAMILY = Family(names=("opt",), embedding="model.decoder.embed_tokens", head="lm_head", tied=True)
