# SPDX-License-Identifier: Apache-2.0
"""Only PEFT's package knows the fields of adapter_config.json."""

from __future__ import annotations

import ast

from surgery_formats.adapters.peft.kinds import switches
from surgery_formats.adapters.peft.read_config import COMMON
from tests.support.kit import ROOT

# Words of other things too: arguments of verbs, settings of models, fields of other files; and `modules_to_save`, the form of a change in
# the report of an extraction, which plans PEFT's forms.
GENERAL = {"alpha", "bias", "r", "rank_pattern", "revision", "modules_to_save", "num_layers", "num_attention_heads"}
# Words of rarer kinds, too: of options, of the configuration of quantised bases, of names of files and tensors, and in equations.
GENERAL |= {"block_size", "depth", "eps", "exclude_modules", "group_size", "u", "variant"}


def test_no_field_of_pefts_configuration_is_read_elsewhere():
    fields = set(COMMON).union(
        *(known.harmless | known.understood | set(known.refused) for known in switches().values())
    )
    assert {"peft_type", "task_type", "use_rslora", "fan_in_fan_out", "lora_alpha"} <= fields
    for room in ("surgery", "formats", "cli"):
        for path in (ROOT / room).rglob("*.py"):
            # Formats with words of their own that are PEFT's too, and consumers, which are programs that read PEFT's file.
            if path.parent.name in (
                "peft",
                "kinds",
                "dialects",
                "mlx",
                "adapterhub",
                "litgpt",
                "nemo",
                "torchtune",
                "consumers",
            ):
                continue
            constants = (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant))
            used = {node.value for node in constants if isinstance(node.value, str)} & (fields - GENERAL)
            assert not used, path
