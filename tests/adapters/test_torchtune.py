# SPDX-License-Identifier: Apache-2.0
"""torchtune's own files: what its checkpointer saved merges to what its merge made, and what we write torch loads."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

import surgery
from surgery import convert
from surgery_formats.adapters.peft import PEFT
from surgery_formats.adapters.registry import read_adapter
from surgery_formats.adapters.torchtune import TORCHTUNE
from surgery_formats.errors import FitError, MalformedError, SurgeryError
from tests.support.adapter_files import GOLDEN, assert_expected, draw, merged, write_peft

HERE = GOLDEN / "torchtune"
CASES = ("llama", "llama-dora", "qwen2", "gemma")
Q = "layers.0.attn.q_proj"


def own(name: str, folder: Path) -> Path:
    """The folder of an epoch without its export to PEFT."""
    folder.mkdir(parents=True)
    for file in ("adapter_model.pt", "adapter_config.json"):
        shutil.copy(HERE / name / "epoch" / file, folder / file)
    return folder


def write(folder: Path, tensors: dict[str, np.ndarray], name: str = "adapter_0.pt", **config: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    torch.save({key: torch.from_numpy(value) for key, value in tensors.items()}, folder / name)
    if config:
        (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", **config}))
    return folder


@pytest.mark.parametrize("name", CASES)
def test_merges_to_what_torchtune_makes_of_it(name: str, tmp_path: Path) -> None:
    folder, base = own(name, tmp_path / "epoch_0"), HERE / name / "base"
    assert TORCHTUNE.detect(folder)
    assert TORCHTUNE.detect(folder / "adapter_model.pt")
    assert read_adapter(folder).unconsumed() == ()
    assert_expected(base, merged(base, folder, tmp_path / "out"), HERE / name / "expected.safetensors")


@pytest.mark.parametrize("name", CASES)
def test_to_peft_and_back_it_is_the_same_file(name: str, tmp_path: Path) -> None:
    folder, base = own(name, tmp_path / "epoch_0"), HERE / name / "base"
    there = convert(folder, "peft", output=tmp_path / "peft", base=base)
    back = convert(tmp_path / "peft", "torchtune", output=tmp_path / "back", base=base)
    assert max(there.max_error, back.max_error) <= 1e-6
    assert_expected(base, merged(base, tmp_path / "peft", tmp_path / "out"), HERE / name / "expected.safetensors")
    ours = torch.load(tmp_path / "back/adapter_model.pt", weights_only=True)
    theirs = torch.load(folder / "adapter_model.pt", weights_only=True)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    config = json.loads((tmp_path / "back/adapter_config.json").read_text())
    known = json.loads((folder / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (known["r"], known["lora_alpha"])
    assert set(config["target_modules"]) == set(known["target_modules"])


def test_with_the_models_configuration_beside_it_no_base_is_needed(tmp_path: Path) -> None:
    folder = own("llama", tmp_path / "epoch_0")
    with pytest.raises(FitError, match="only the base tells how many rows a head has"):
        convert(folder, "peft", output=tmp_path / "peft")
    shutil.copy(HERE / "llama/base/config.json", folder)
    convert(folder, "peft", output=tmp_path / "peft")
    ours, theirs = (load_file(f / "adapter_model.safetensors") for f in (tmp_path / "peft", HERE / "llama/epoch"))
    assert all(np.array_equal(ours[key], theirs[key]) for key in theirs)
    with pytest.raises(FitError, match="as the base's family has them"):
        convert(folder, "torchtune", output=tmp_path / "again")


def test_written_again_without_a_base_it_keeps_its_rows(tmp_path: Path) -> None:
    folder = own("llama-dora", tmp_path / "epoch_0")
    convert(folder, "torchtune", output=tmp_path / "again")
    ours, theirs = (torch.load(f / "adapter_model.pt", weights_only=True) for f in (tmp_path / "again", folder))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_an_older_file_needs_an_alpha(tmp_path: Path) -> None:
    tensors = {f"{Q}.lora_a.weight": draw(1, 2, 32), f"{Q}.lora_b.weight": draw(2, 32, 2)}
    file = write(tmp_path / "a", tensors) / "adapter_0.pt"
    with pytest.raises(FitError, match="the scale of its LoRAs is not in its file"):
        read_adapter(file)
    assert next(iter(read_adapter(file, alpha=6.0).updates.values()))[0].scale == 3.0
    write(tmp_path / "a", tensors, r=2, lora_alpha=4)
    assert next(iter(read_adapter(file).updates.values()))[0].scale == 2.0
    assert read_adapter(tmp_path / "a").format == "torchtune"


def test_an_export_to_peft_is_read_as_peft_and_says_what_may_be_wrong(tmp_path: Path) -> None:
    for name in ("llama", "qwen2"):
        adapter = read_adapter(HERE / name / "epoch")
        assert adapter.format == "peft"
        assert any("torchtune" in issue and "Qwen2" in issue for issue in adapter.known_issues())
    result = surgery.merge(HERE / "qwen2/base", HERE / "qwen2/epoch", output=tmp_path / "out")
    assert any("wrong order" in warning for warning in result.warnings)
    report = str(surgery.inspect(HERE / "qwen2/epoch"))
    assert "wrong order" in report
    assert not any("torchtune" in issue for issue in PEFT.read(Path("examples/lora")).known_issues())


@pytest.mark.parametrize(
    ("tensors", "config", "error", "said"),
    [
        ({f"{Q}.lora_a.weight": (2, 32)}, {}, MalformedError, "without its 'lora_b.weight'"),
        ({f"{Q}.magnitude": (32,)}, {}, MalformedError, "without its 'lora_a.weight'"),
        ({f"{Q}.lora_a.weight": (2, 32), f"{Q}.lora_b.weight": (32, 3)}, {}, FitError, "its lora_b"),
        ({f"{Q}.lora_a.weight": (2, 32), f"{Q}.lora_b.weight": (32, 2)}, {"r": 4}, FitError, "has rank 2"),
        (
            {"encoder.x.lora_a.weight": (2, 32), "encoder.x.lora_b.weight": (32, 2)},
            {},
            FitError,
            "no module of a language model",
        ),
        (
            {f"{Q}.lora_a.weight": (2, 32), f"{Q}.lora_b.weight": (32, 2), f"{Q}.magnitude": (3,)},
            {},
            FitError,
            "3 magnitudes for 32 rows",
        ),
    ],
)
def test_what_is_refused(tensors: dict, config: dict, error: type[SurgeryError], said: str, tmp_path: Path) -> None:
    values = {name: draw(number, *sizes) for number, (name, sizes) in enumerate(tensors.items())}
    with pytest.raises(error, match=said):
        TORCHTUNE.read(write(tmp_path / "a", values, **{"lora_alpha": 4, **config}))


def test_other_ranks_and_scales_are_folded_and_other_kinds_dropped(tmp_path: Path) -> None:
    prefix = "base_model.model.model.layers.0"
    tensors = {
        f"{prefix}.self_attn.q_proj.lora_A.weight": draw(1, 2, 32),
        f"{prefix}.self_attn.q_proj.lora_B.weight": draw(2, 32, 2),
        f"{prefix}.mlp.up_proj.lora_A.weight": draw(3, 3, 32),
        f"{prefix}.mlp.up_proj.lora_B.weight": draw(4, 48, 3),
    }
    folder = write_peft(tmp_path / "peft", tensors, r=3, lora_alpha=6, rank_pattern={"q_proj": 2})
    base = HERE / "llama/base"
    result = convert(folder, "torchtune", output=tmp_path / "tune", base=base)
    assert result.max_error <= 1e-6
    mine, theirs = merged(base, tmp_path / "tune", tmp_path / "a"), merged(base, folder, tmp_path / "b")
    assert all(np.allclose(mine[name], theirs[name], rtol=0, atol=1e-5) for name in theirs)
    embedding = {
        "base_model.model.model.embed_tokens.lora_embedding_A": draw(1, 2, 24),
        "base_model.model.model.embed_tokens.lora_embedding_B": draw(2, 32, 2),
    }
    with pytest.raises(FitError, match="torchtune trains no such module"):
        convert(write_peft(tmp_path / "e", embedding, r=2), "torchtune", output=tmp_path / "x", base=base)
    other = shutil.copytree(base, tmp_path / "granite")
    config = json.loads((base / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "model_type": "granite"}))
    with pytest.raises(FitError, match="torchtune has no such model"):
        convert(folder, "torchtune", output=tmp_path / "x", base=other)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 4), st.floats(0.125, 64, width=32), st.integers(0, 2**16), st.sampled_from(["llama", "qwen2"]))
def test_any_lora_survives_the_way_there_and_back(rank: int, alpha: float, seed: int, name: str) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as place:
        folder, base = Path(place), HERE / name / "base"
        prefix = "base_model.model.model.layers.1.self_attn"
        tensors = {}
        for module, out in (("q_proj", 32), ("k_proj", 16), ("v_proj", 16)):
            tensors[f"{prefix}.{module}.lora_A.weight"] = draw(seed, rank, 32)
            tensors[f"{prefix}.{module}.lora_B.weight"] = draw(seed + 1, out, rank)
        write_peft(folder / "peft", tensors, r=rank, lora_alpha=alpha)
        convert(folder / "peft", "torchtune", output=folder / "tune", base=base)
        convert(folder / "tune", "peft", output=folder / "back", base=base)
        back = load_file(folder / "back/adapter_model.safetensors")
        assert back.keys() == tensors.keys()
        assert all(np.array_equal(back[key], tensors[key]) for key in tensors)
