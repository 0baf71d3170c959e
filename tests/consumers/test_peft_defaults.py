# SPDX-License-Identifier: Apache-2.0
"""Targets that PEFT chooses by itself: our copy beside the installed PEFT."""

from __future__ import annotations

from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as OF_LORA

from surgery.consumers.peft_defaults import DEFAULT_TARGETS, WITH_DEFAULTS


def test_the_copy_is_that_of_the_installed_peft() -> None:
    assert {name: targets if isinstance(targets, str) else tuple(targets) for name, targets in OF_LORA.items()} == dict(
        DEFAULT_TARGETS
    )
    alike = {
        kind.value
        for kind, tuner in PEFT_TYPE_TO_TUNER_MAPPING.items()
        if getattr(tuner, "target_module_mapping", None) == OF_LORA
    }
    assert alike == WITH_DEFAULTS
