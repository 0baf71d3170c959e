# SPDX-License-Identifier: Apache-2.0
"""Factors that PEFT saves under the class's names, and renames as it loads them as if they had names on disk."""

from __future__ import annotations

import copy
from pathlib import Path

import peft
import torch

import surgery
from tests.oracles.peft_oracle import randomise
from tests.support.attached import quiet
from tests.support.tiny_models import inputs, output, tiny


def test_experts_that_peft_would_miss_are_merged_into_the_base(tmp_path: Path) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    with quiet():
        model = tiny("mistral_large4")
        model.save_pretrained(base)
        given = inputs(model)
        stacks = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
        lora = peft.LoraConfig(r=2, target_modules=["o_proj"], target_parameters=stacks)
        wrapped = peft.get_peft_model(copy.deepcopy(model), lora).eval()
        randomise(wrapped, torch.Generator().manual_seed(1))
        wrapped.save_pretrained(adapter)
        trained = output(wrapped, given)
        loaded = output(peft.PeftModel.from_pretrained(copy.deepcopy(model), str(adapter)).eval(), given)
    effect = (trained - output(model, given)).norm()
    assert (loaded - trained).norm() > 0.1 * effect  # what PEFT saved, it does not load

    rest, fixed = tmp_path / "rest", tmp_path / "fixed"
    (judged,) = surgery.check(base, adapter, consumer="peft", fix=fixed, merge_rest=rest).consumers
    assert judged.outcome == "ignored"
    with quiet():
        other = type(model).from_pretrained(rest).eval()
        mended = output(peft.PeftModel.from_pretrained(other, str(fixed)).eval(), given)
    assert (mended - trained).norm() < 1e-5 * effect
