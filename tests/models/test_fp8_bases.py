# SPDX-License-Identifier: Apache-2.0
"""Single files in fp8: what is merged into them ComfyUI reads as what it read before, and the LoRA."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.bases import KINDS
from tests.support.fp8_bases import FP8_COMBINATIONS, STYLES, WAYS, Fp8Combination, check_fp8

EVERY = 13
SAMPLE = FP8_COMBINATIONS[::EVERY]


@pytest.mark.parametrize("combination", SAMPLE, ids=str)
def test_comfyui_reads_what_is_written(combination: Fp8Combination, tmp_path: Path) -> None:
    check_fp8(combination, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("combination", FP8_COMBINATIONS, ids=str)
def test_comfyui_reads_what_is_written_for_all(combination: Fp8Combination, tmp_path: Path) -> None:
    check_fp8(combination, tmp_path)


def test_the_sample_has_every_network_style_and_way() -> None:
    assert {one.network for one in SAMPLE} == KINDS.keys()
    assert {(one.style, one.way) for one in SAMPLE} == {(style, way) for style in STYLES for way in WAYS}
