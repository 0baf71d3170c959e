# SPDX-License-Identifier: Apache-2.0
"""An adapter that PEFT writes today merges right whatever the model type, and whatever names the base has on disk."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.attached import attach, outcome, quiet
from tests.support.type_sweep import REFUSED, lora, sweep

SOME = (
    *("aria_text", "deepseek_v3", "gpt2", "gpt_neox", "gpt_oss", "granitemoe", "hrm_text", "inkling2_text", "jetmoe"),
    *("big_bird", "llama", "llava", "mixtral", "mllama", "nemotron_h", "qianfan_ocr", "qwen3_5_moe", "qwen3_vl_moe"),
    *("deberta-v2", "luke", "qwen2_5_vl", "t5", "vit", "whisper"),
)
"""Types that stand for the ways in which names on disk differ from those of the modules."""

_SMALLEST = 325
"""Types that merge right, at the least, of those of which a tiny model can be made with the installed transformers."""


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with quiet():
        yield


@pytest.mark.parametrize("model_type", SOME)
def test_merged_is_attached(model_type: str, tmp_path: Path) -> None:
    made = outcome(attach(model_type, tmp_path, lora))
    assert made.found
    assert not made.wrong
    assert not made.refused


@pytest.mark.slow
def test_merged_is_attached_for_every_type(tmp_path: Path) -> None:
    found = sweep(tmp_path, lambda name: print(name, flush=True))
    assert not {name: one.wrong for name, one in found.outcomes.items() if one.wrong}
    assert {name for name, one in found.outcomes.items() if one.refused} == set(REFUSED)
    assert len(found.right) >= _SMALLEST
