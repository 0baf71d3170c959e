# SPDX-License-Identifier: Apache-2.0
"""Updates: what a small trained part does to one weight of a base. One small file per kind, each with its one equation.

Add a kind as a file with a frozen dataclass that satisfies `update.Update`; `surgery_formats.testing.update` checks it.
"""

from surgery_formats.updates.activations import ACTIVATIONS
from surgery_formats.updates.adalora import AdaLoRA
from surgery_formats.updates.base import Apply, Effect, Factor, Fit, Weight
from surgery_formats.updates.bat import BAT
from surgery_formats.updates.blend import blend, unblend
from surgery_formats.updates.boft import BOFT
from surgery_formats.updates.c3a import C3A
from surgery_formats.updates.changed_base import ChangedBase
from surgery_formats.updates.decomposed import Decomposed
from surgery_formats.updates.deft import DEFT
from surgery_formats.updates.delora import DeLoRA
from surgery_formats.updates.dora import DoRA
from surgery_formats.updates.forms import (
    expanded,
    experts_of,
    in_full,
    low_rank_part,
    plain_form,
    stack_of_loras,
    transposed,
)
from surgery_formats.updates.fourierft import FourierFT
from surgery_formats.updates.frod import FRoD
from surgery_formats.updates.glora import GLoRA, GLoRABias, Support
from surgery_formats.updates.gralora import GraLoRA
from surgery_formats.updates.hira import HiRA
from surgery_formats.updates.hra import HRA
from surgery_formats.updates.ia3 import IA3
from surgery_formats.updates.loha import LoHa
from surgery_formats.updates.lokr import LoKr
from surgery_formats.updates.lora import LoRA
from surgery_formats.updates.miss import MiSS
from surgery_formats.updates.offset import Offset
from surgery_formats.updates.oft import OFT
from surgery_formats.updates.osf import OSF
from surgery_formats.updates.output_dora import DoRABias, OutputDoRA
from surgery_formats.updates.output_rotations import OutputRotation
from surgery_formats.updates.paired_rows import PairedRows, halved, head_rows, paired
from surgery_formats.updates.peanut import PEANuT
from surgery_formats.updates.product_glora import ProductGLoRA
from surgery_formats.updates.pvera import PVeRA
from surgery_formats.updates.randlora import RandLoRA, RandomBases
from surgery_formats.updates.replacement import Held, Replacement
from surgery_formats.updates.road import RoAd
from surgery_formats.updates.sameness import equal_factors, noted_tensors, same_update, settings
from surgery_formats.updates.shira import SHiRA
from surgery_formats.updates.spectrum import Part
from surgery_formats.updates.stacked import Stacked
from surgery_formats.updates.supertuning import SuperTuning
from surgery_formats.updates.tinylora import TinyLoRA
from surgery_formats.updates.token_rows import TokenRows
from surgery_formats.updates.unilora import UniLoRA
from surgery_formats.updates.unmerged import Unmerged
from surgery_formats.updates.update import (
    Directed,
    EitherWay,
    Expanding,
    Holding,
    InFull,
    Invertible,
    Linear,
    Mixing,
    OfBase,
    Refusing,
    Replacing,
    RowSetting,
    Sharing,
    Unsized,
    Update,
    Waiting,
    is_directed,
    is_either_way,
    is_expanding,
    is_holding,
    is_in_full,
    is_invertible,
    is_linear,
    is_mixing,
    is_of_base,
    is_refusing,
    is_replacing,
    is_row_setting,
    is_sharing,
    is_unsized,
    is_waiting,
)
from surgery_formats.updates.vblora import VBLoRA
from surgery_formats.updates.vera import Seed, VeRA
from surgery_formats.updates.waveft import WaveFT
from surgery_formats.updates.wavelets import LOWPASS as WAVELETS

__all__ = [
    "ACTIVATIONS",
    "BAT",
    "BOFT",
    "C3A",
    "DEFT",
    "HRA",
    "IA3",
    "OFT",
    "OSF",
    "WAVELETS",
    "AdaLoRA",
    "Apply",
    "ChangedBase",
    "DeLoRA",
    "Decomposed",
    "Directed",
    "DoRA",
    "DoRABias",
    "Effect",
    "EitherWay",
    "Expanding",
    "FRoD",
    "Factor",
    "Fit",
    "FourierFT",
    "GLoRA",
    "GLoRABias",
    "GraLoRA",
    "Held",
    "HiRA",
    "Holding",
    "InFull",
    "Invertible",
    "Linear",
    "LoHa",
    "LoKr",
    "LoRA",
    "MiSS",
    "Mixing",
    "OfBase",
    "Offset",
    "OutputDoRA",
    "OutputRotation",
    "PEANuT",
    "PVeRA",
    "PairedRows",
    "Part",
    "ProductGLoRA",
    "RandLoRA",
    "RandomBases",
    "Refusing",
    "Replacement",
    "Replacing",
    "RoAd",
    "RowSetting",
    "SHiRA",
    "Seed",
    "Sharing",
    "Stacked",
    "SuperTuning",
    "Support",
    "TinyLoRA",
    "TokenRows",
    "UniLoRA",
    "Unmerged",
    "Unsized",
    "Update",
    "VBLoRA",
    "VeRA",
    "Waiting",
    "WaveFT",
    "Weight",
    "blend",
    "equal_factors",
    "expanded",
    "experts_of",
    "halved",
    "head_rows",
    "in_full",
    "is_directed",
    "is_either_way",
    "is_expanding",
    "is_holding",
    "is_in_full",
    "is_invertible",
    "is_linear",
    "is_mixing",
    "is_of_base",
    "is_refusing",
    "is_replacing",
    "is_row_setting",
    "is_sharing",
    "is_unsized",
    "is_waiting",
    "low_rank_part",
    "noted_tensors",
    "paired",
    "plain_form",
    "same_update",
    "settings",
    "stack_of_loras",
    "transposed",
    "unblend",
]
