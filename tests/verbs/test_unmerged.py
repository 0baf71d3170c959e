# SPDX-License-Identifier: Apache-2.0
"""A base and adapters in one folder: transformers and PEFT load them there, and both come out again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from click.testing import CliRunner
from safetensors.torch import load_file

import surgery
from surgery_cli.group import surgery as command
from tests.support.kit import ROOT

IDS = torch.tensor([[1, 17, 44, 3, 90, 5, 61, 8]])
BASE, LORA, DORA = (ROOT / "examples" / name for name in ("base", "lora", "dora"))


def logits(model: Any) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=IDS, use_cache=False).logits
    return found


def load(folder: Path) -> Any:
    """In float32: PEFT keeps an adapter's type where transformers takes the model's."""
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def attached(adapter: Path) -> torch.Tensor:
    return logits(peft.PeftModel.from_pretrained(load(BASE), adapter))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("apart")
    surgery.resize(LORA, rank=3, output=where / "facts")
    surgery.insert(BASE, [LORA, where / "facts"], unmerged=True, output=where / "out")
    return where / "out"


def test_transformers_loads_the_base_and_the_first_from_the_folder(folder: Path):
    model = load(folder)
    assert torch.allclose(logits(model), attached(LORA), atol=1e-5)
    assert model.active_adapters() == ["default"]
    model.disable_adapters()
    assert torch.equal(logits(model), logits(load(BASE)))


def test_transformers_loads_the_others_by_name(folder: Path):
    model = load(folder)
    model.load_adapter(str(folder / "facts"), adapter_name="facts")
    model.set_adapter("facts")
    assert torch.allclose(logits(model), attached(folder.parent / "facts"), atol=1e-5)


def test_peft_loads_them_and_has_the_same_layout(folder: Path, tmp_path: Path):
    model = peft.PeftModel.from_pretrained(load(BASE), folder)
    assert torch.equal(logits(model), attached(LORA))
    model.load_adapter(str(folder / "facts"), "facts")
    model.set_adapter("facts")
    assert torch.equal(logits(model), attached(folder.parent / "facts"))
    model.save_pretrained(tmp_path / "saved")
    kinds = ("adapter_config.json", "adapter_model.safetensors")
    saved = {path.relative_to(tmp_path / "saved").as_posix() for path in (tmp_path / "saved").rglob("adapter_*")}
    own = {path.relative_to(folder).as_posix() for path in folder.rglob("adapter_*")}
    assert saved == own == {*kinds, *(f"facts/{name}" for name in kinds)}


def test_base_and_adapters_come_out_again(folder: Path, tmp_path: Path):
    surgery.layers(folder, output=tmp_path / "base")
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (tmp_path / "base" / name).read_bytes() == (BASE / name).read_bytes()
    assert not list((tmp_path / "base").rglob("adapter_*"))
    for own, source in ((folder, LORA), (folder / "facts", folder.parent / "facts")):
        assert (own / "adapter_model.safetensors").read_bytes() == (source / "adapter_model.safetensors").read_bytes()
        surgery.convert(own, "peft", output=tmp_path / source.name)
        one, two = (load_file(at / "adapter_model.safetensors") for at in (tmp_path / source.name, source))
        assert all(torch.equal(one[name], two[name]) for name in two)


def test_it_is_a_base_to_every_command(folder: Path, tmp_path: Path):
    surgery.merge(folder, folder / "facts", output=tmp_path / "one")
    surgery.merge(BASE, folder.parent / "facts", output=tmp_path / "two")
    assert (tmp_path / "one" / "model.safetensors").read_bytes() == (
        tmp_path / "two" / "model.safetensors"
    ).read_bytes()
    surgery.verify(folder, against=BASE)


def test_an_adapter_of_another_format_becomes_pefts(tmp_path: Path):
    mlx = surgery.convert(LORA, "mlx", output=tmp_path / "mlx").output
    result = surgery.insert(BASE, mlx, unmerged=True, output=tmp_path / "out")
    model = load(tmp_path / "out")
    assert torch.allclose(logits(model), attached(LORA), atol=1e-5)
    assert result.adapters[0].format == "mlx"
    manifest = json.loads((tmp_path / "out" / "surgery_manifest.json").read_text())
    assert manifest["files"].keys() >= {"adapter_config.json", "adapter_model.safetensors", "model.safetensors"}


def test_what_such_a_folder_cannot_say_is_refused(tmp_path: Path):
    with pytest.raises(surgery.FitError, match=r"a weight of 0\.5 is nowhere"):
        surgery.insert(BASE, (LORA, 0.5), unmerged=True, output=tmp_path / "out")
    with pytest.raises(surgery.FitError, match="two adapters are called"):
        surgery.insert(BASE, [LORA, DORA, DORA], unmerged=True, output=tmp_path / "out")
    surgery.layers(BASE, keep="0", output=tmp_path / "small")
    with pytest.raises(surgery.FitError, match="the base has no parameter"):
        surgery.insert(tmp_path / "small", LORA, unmerged=True, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_dora_needs_peft(tmp_path: Path):
    """transformers 5.23 looks for its magnitudes under another name, and begins them anew."""
    result = surgery.insert(BASE, DORA, unmerged=True, output=tmp_path / "out")
    assert any("loads a DoRA without its magnitudes" in text for text in result.warnings)
    assert torch.equal(logits(peft.PeftModel.from_pretrained(load(BASE), tmp_path / "out")), attached(DORA))
    assert not torch.allclose(logits(load(tmp_path / "out")), attached(DORA), atol=0.1)


def test_the_command_says_how_it_is_loaded(tmp_path: Path):
    words = ["insert", str(BASE), str(LORA), str(DORA), "--unmerged", "-o", str(tmp_path / "out")]
    ran = CliRunner().invoke(command, [*words, "--dry-run"], prog_name="surgery")
    assert ran.exit_code == 0, ran.output
    assert not (tmp_path / "out").exists()
    ran = CliRunner().invoke(command, words, prog_name="surgery")
    assert ran.exit_code == 0, ran.output
    assert 'adapter_name="dora"' in ran.output
    assert "need base and adapter apart" in ran.output
