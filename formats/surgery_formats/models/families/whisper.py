# SPDX-License-Identifier: Apache-2.0
"""Whisper: the decoder's embedding is the head, named ``proj_out``."""

from surgery_formats.models.families.family import Family

__all__ = ["FAMILY"]

FAMILY = Family(names=("whisper",), embedding="model.decoder.embed_tokens", head="proj_out", tied=True)
