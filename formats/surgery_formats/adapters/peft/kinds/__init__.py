# SPDX-License-Identifier: Apache-2.0
"""Kinds of PEFT adapters: one file each, with its keys, the fields of its configuration, its reader and its writer."""

from __future__ import annotations

from collections.abc import Mapping

from surgery_formats.adapters.peft.kinds.adalora import ADALORA
from surgery_formats.adapters.peft.kinds.beft import BEFT
from surgery_formats.adapters.peft.kinds.boft import BOFT
from surgery_formats.adapters.peft.kinds.c3a import C3A
from surgery_formats.adapters.peft.kinds.deft import DEFT
from surgery_formats.adapters.peft.kinds.delora import DELORA
from surgery_formats.adapters.peft.kinds.fourierft import FOURIERFT
from surgery_formats.adapters.peft.kinds.frod import FROD
from surgery_formats.adapters.peft.kinds.glora import GLORA
from surgery_formats.adapters.peft.kinds.gralora import GRALORA
from surgery_formats.adapters.peft.kinds.hira import HIRA
from surgery_formats.adapters.peft.kinds.hra import HRA
from surgery_formats.adapters.peft.kinds.ia3 import IA3
from surgery_formats.adapters.peft.kinds.kind import PeftKind
from surgery_formats.adapters.peft.kinds.ln_tuning import LN_TUNING
from surgery_formats.adapters.peft.kinds.loha import LOHA
from surgery_formats.adapters.peft.kinds.lokr import LOKR
from surgery_formats.adapters.peft.kinds.lora import LORA, TRAINABLE_TOKENS
from surgery_formats.adapters.peft.kinds.miss import BONE, MISS
from surgery_formats.adapters.peft.kinds.oft import OFT
from surgery_formats.adapters.peft.kinds.osf import OSF
from surgery_formats.adapters.peft.kinds.peanut import PEANUT
from surgery_formats.adapters.peft.kinds.pvera import PVERA
from surgery_formats.adapters.peft.kinds.randlora import RANDLORA
from surgery_formats.adapters.peft.kinds.road import ROAD
from surgery_formats.adapters.peft.kinds.shira import SHIRA
from surgery_formats.adapters.peft.kinds.supertuning import SUPERTUNING
from surgery_formats.adapters.peft.kinds.tinylora import TINYLORA
from surgery_formats.adapters.peft.kinds.unilora import UNILORA
from surgery_formats.adapters.peft.kinds.unmerged import ADAMSS, LILY, PSOFT
from surgery_formats.adapters.peft.kinds.vblora import VBLORA
from surgery_formats.adapters.peft.kinds.vera import VERA
from surgery_formats.adapters.peft.kinds.waveft import WAVEFT
from surgery_formats.adapters.peft.prompt import PROMPTS
from surgery_formats.adapters.peft.read_config import Switches
from surgery_formats.plugins import with_plugins

__all__ = ["BUILT_IN", "ENTRY_POINTS", "kinds", "switches"]

BUILT_IN: tuple[PeftKind, ...] = (
    LORA,
    TRAINABLE_TOKENS,
    IA3,
    LOHA,
    LOKR,
    OFT,
    VERA,
    LN_TUNING,
    DEFT,
    GLORA,
    OSF,
    PEANUT,
    UNILORA,
    ADAMSS,
    LILY,
    PSOFT,
    FROD,
    TINYLORA,
    SUPERTUNING,
    WAVEFT,
    ADALORA,
    BEFT,
    BOFT,
    C3A,
    DELORA,
    FOURIERFT,
    GRALORA,
    HIRA,
    HRA,
    PVERA,
    RANDLORA,
    ROAD,
    SHIRA,
    VBLORA,
    MISS,
    BONE,
)
ENTRY_POINTS = "surgery.peft_kinds"  # a plugin's entry point is an object like those above


def kinds() -> dict[str, PeftKind]:
    """Every kind by its ``peft_type``: the built-in ones, then plugins'.

    Raises:
        SurgeryError: a plugin cannot be imported, or takes a name that is taken.
    """
    return with_plugins(ENTRY_POINTS, BUILT_IN, "PEFT kind")


def switches() -> Mapping[str, Switches]:
    """Fields of the configuration of every kind that is read, soft prompts included."""
    return {name: kind.switches for name, kind in kinds().items()} | PROMPTS
