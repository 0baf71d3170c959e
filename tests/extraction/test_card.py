# SPDX-License-Identifier: Apache-2.0
"""What an extraction says of itself to those who find it: the name of its base, and its card."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

import surgery
from surgery_formats.models.base_name import base_name, hub_name
from surgery_formats.models.checkpoint import open_checkpoint
from tests.support.kit import ROOT

BASE, TUNED = ROOT / "examples" / "base", ROOT / "examples" / "tuned"


@pytest.fixture
def cached(tmp_path: Path) -> Path:
    """The base as the hub's cache has it, with a card."""
    folder = tmp_path / "models--some-org--tiny-model" / "snapshots" / ("0123456789" * 4)
    shutil.copytree(BASE, folder)
    (folder / "README.md").write_text(
        "---\nlicense: mit\nlanguage: en\ntags:\n- code\nbase_model: its/own\n---\n# Base\n"
    )
    return folder


def test_the_card_holds_what_was_measured_and_what_still_holds_of_the_bases(cached: Path, tmp_path: Path) -> None:
    result = surgery.extract_lora(cached, TUNED, rank=4, output=tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    _, metadata, text = card.split("---\n", 2)
    assert metadata.splitlines() == [
        "base_model: some-org/tiny-model",
        "language: en",
        "library_name: peft",
        "license: mit",
        "pipeline_tag: text-generation",
        "tags:",
        "- lora",
        "- code",
        "base_model_relation: adapter",
    ]
    assert "# `tuned` as a LoRA of `some-org/tiny-model`" in text
    assert (
        f"| of the change of the weights, missing (Frobenius norm, over all tensors) | {result.residual:.2%} |" in text
    )
    missing = dict(re.findall(r"^\| `([^`]+)` \| 4 \| .* \| ([\d.]+)% \|$", text, re.M))
    down = [row.residual for row in result.rows if row.name.endswith("down_proj.weight")]
    assert min(down) * 100 - 0.01 <= float(missing["model.layers.*.mlp.down_proj"]) <= max(down) * 100 + 0.01
    assert str(tmp_path) not in card
    surgery.verify(tmp_path / "out")


def test_the_adapter_names_the_base_as_the_hub_does(cached: Path, tmp_path: Path) -> None:
    surgery.extract_lora(cached, TUNED, rank=4, output=tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "some-org/tiny-model"
    surgery.insert(cached, new="lora", output=tmp_path / "fresh")
    config = json.loads((tmp_path / "fresh" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "some-org/tiny-model"


def test_a_folder_that_the_hub_does_not_know_is_called_by_its_own_name(tmp_path: Path) -> None:
    shutil.copytree(BASE, tmp_path / "mine")
    assert base_name(open_checkpoint(tmp_path / "mine")) == "mine"
    config = json.loads((BASE / "config.json").read_text())
    (tmp_path / "mine" / "config.json").write_text(json.dumps(config | {"_name_or_path": "org/mine"}))
    assert base_name(open_checkpoint(tmp_path / "mine")) == "org/mine"
    (tmp_path / "mine" / "config.json").write_text(json.dumps(config | {"_name_or_path": "org/what-it-was-tuned-from"}))
    assert base_name(open_checkpoint(tmp_path / "mine")) == "mine"
    assert hub_name(open_checkpoint(tmp_path / "mine"), ["some/mine"]) == "some/mine"


def test_folders_that_the_hub_has_no_library_for_have_no_card(tmp_path: Path) -> None:
    surgery.extract_lora(BASE, TUNED, rank=4, to="litgpt", allow_loss=True, output=tmp_path / "out")
    assert not (tmp_path / "out" / "README.md").exists()


def test_the_card_of_codes_says_that_its_figures_are_of_the_factors_before(tmp_path: Path) -> None:
    surgery.extract_lora(BASE, TUNED, rank=4, to="compact", allow_loss=True, output=tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "- The figures are of the factors before they became codes." in card
    assert "library_name: model-surgery" in card
