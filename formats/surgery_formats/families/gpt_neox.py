# SPDX-License-Identifier: Apache-2.0
"""GPT-NeoX and Pythia: transformers 5 calls the head ``lm_head``, every checkpoint ``embed_out``."""

from surgery_formats.families.family import Family, Rename

__all__ = ["FAMILY"]

FAMILY = Family(
    names=("gpt_neox",),
    embedding="gpt_neox.embed_in",
    head="embed_out",
    renames=(Rename("lm_head", "embed_out"),),
    derivable=("rotary_emb.inv_freq", "attention.bias", "attention.masked_bias"),
)
