# SPDX-License-Identifier: Apache-2.0
"""A merge is what the adapter does while attached, rounded once: every option of PEFT's LoRA family, every architecture, on real files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import surgery
from tests.oracles import measure, models
from tests.oracles.cases import CASES, Built, Case, build
from tests.oracles.disk import read_tensors


def merged(built: Built, out: Path) -> surgery.MergeResult:
    return surgery.merge(built.base, built.adapters, output=out)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_merge_equals_the_attached_adapter(case: Case, tmp_path: Path) -> None:
    built = build(case, tmp_path)
    result = merged(built, tmp_path / "out")

    actual, base = read_tensors(tmp_path / "out"), read_tensors(built.base)
    assert set(actual) == set(built.expected)
    for name, reference in built.reference64.items():
        value = actual[name]
        assert value.dtype == built.expected[name].dtype, name
        assert value.shape == reference.shape, name
        if name not in built.changed:
            assert torch.equal(value, built.expected[name]), f"{name} should not have changed"
        elif value.dtype == torch.float32:
            assert measure.relative_error(value, reference) <= 1e-6, name
        elif value.is_floating_point():
            assert measure.ulp_error(value, reference, base.get(name)) <= 0.51, name
    if built.peft_rounds_once:
        assert built.peft is not None
        for name in built.changed:
            assert measure.bit_differences(actual[name], built.peft[name], built.reference64[name]) == 0, name
    config_file = tmp_path / "out" / "config.json"
    config = json.loads(config_file.read_text()) if config_file.exists() else {}
    assert {key: config.get(key) for key in built.config} == dict(built.config)
    assert result.ledger.as_json()["tensors"].keys() == actual.keys()


REPRESENTATIVE = {case.arch: case for case in reversed(CASES.values()) if case.dtype == "float32"}


@pytest.mark.parametrize("arch", REPRESENTATIVE)
def test_transformers_loads_the_output_and_computes_the_same(arch: str, tmp_path: Path) -> None:
    built = build(REPRESENTATIVE[arch], tmp_path)
    if built.attached is None:
        pytest.skip("no peer can attach this adapter")
    merged(built, tmp_path / "out")
    logits = models.run(arch, models.load(arch, tmp_path / "out"))
    torch.testing.assert_close(logits.double(), built.attached, rtol=0, atol=2e-4)
