# SPDX-License-Identifier: Apache-2.0
"""Updates: what a small trained part does to one weight of a base. One small file per kind, each with its one equation.

Adding a kind is adding a file with a frozen dataclass that satisfies `base.Update`.
"""

from surgery_formats.updates.base import Apply, Factor, Linear, Update, Weight
from surgery_formats.updates.blend import blend
from surgery_formats.updates.dora import DoRA
from surgery_formats.updates.lora import LoRA
from surgery_formats.updates.offset import Offset
from surgery_formats.updates.replacement import Replacement
from surgery_formats.updates.stacked import Stacked
from surgery_formats.updates.token_rows import TokenRows

__all__ = [
    "Apply",
    "DoRA",
    "Factor",
    "Linear",
    "LoRA",
    "Offset",
    "Replacement",
    "Stacked",
    "TokenRows",
    "Update",
    "Weight",
    "blend",
]
