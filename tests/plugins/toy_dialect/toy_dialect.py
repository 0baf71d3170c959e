# SPDX-License-Identifier: Apache-2.0
"""A dialect: one file of weights whose keys begin with ``toy/``, in the leaves of kohya, an alpha beside each pair."""

from surgery_formats.adapters.grammar.dialect import Dialect
from surgery_formats.adapters.grammar.format import WeightFileFormat
from surgery_formats.adapters.grammar.leaves import LORA_SPELLINGS
from surgery_formats.adapters.grammar.spelling import KeyPrefix

START = KeyPrefix("toy/", "", False)
DOWN, UP = LORA_SPELLINGS["lora_down"]

TOY_FILE = WeightFileFormat(
    Dialect(
        name="toy-file",
        prefixes=(START,),
        own=(START.text,),  # no other format has such keys
        written={"": START.text},
        leaves={"down": DOWN, "up": UP},
    ),
    title="toy file: keys behind toy/",
)
