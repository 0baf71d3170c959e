# SPDX-License-Identifier: Apache-2.0
"""Faults that were once here: each merged silently, wrongly, before it had a test."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import surgery
from surgery_formats.errors import FitError, NothingChangedError, OutputExistsError
from tests.support.kit import make_base, make_lora


def model(folder: Path, tensors: dict[str, torch.Tensor], *, pickled: bool = False, **config: Any) -> Path:
    folder.mkdir()
    if pickled:
        torch.save(tensors, folder / "pytorch_model.bin")
    else:
        save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def adapter(folder: Path, tensors: dict[str, torch.Tensor], **config: Any) -> Path:
    folder.mkdir()
    save_file(
        {f"base_model.model.{name}": value for name, value in tensors.items()}, folder / "adapter_model.safetensors"
    )
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2} | config))
    return folder


@pytest.mark.parametrize("side", ["embedding", "head"])
def test_a_tied_pickle_keeps_both_sides_when_they_part(side: str, tmp_path: Path) -> None:
    shared = torch.randn(16, 8)
    tensors = {"model.embed_tokens.weight": shared, "lm_head.weight": shared}
    base = model(
        tmp_path / "base",
        tensors,
        pickled=True,
        model_type="llama",
        architectures=["LlamaForCausalLM"],
        tie_word_embeddings=True,
    )
    a, b = torch.randn(2, 16), torch.randn(8, 2)
    if side == "embedding":
        lora = {"model.embed_tokens.lora_embedding_A": a, "model.embed_tokens.lora_embedding_B": b}
    else:
        lora = {"lm_head.lora_A.weight": b.T.contiguous(), "lm_head.lora_B.weight": a.T.contiguous()}
    surgery.merge(base, adapter(tmp_path / "lora", lora), output=tmp_path / "out")
    merged = load_file(tmp_path / "out" / "model.safetensors")
    changed = {"embedding": "model.embed_tokens.weight", "head": "lm_head.weight"}[side]
    other = ({*tensors} - {changed}).pop()
    torch.testing.assert_close(merged[changed], shared + a.T @ b.T, rtol=0, atol=1e-5)
    assert torch.equal(merged[other], shared)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False


def test_a_share_of_a_saved_conv1d_is_not_transposed(tmp_path: Path) -> None:
    name = "transformer.h.0.attn.c_proj.weight"
    base = model(tmp_path / "base", {name: torch.randn(8, 8)}, model_type="gpt2")
    saved = torch.randn(8, 8)
    path = adapter(tmp_path / "lora", {name: saved}, modules_to_save=["c_proj"])
    surgery.merge(base, (path, 0.5), output=tmp_path / "out")
    before = load_file(base / "model.safetensors")[name]
    merged = load_file(tmp_path / "out" / "model.safetensors")[name]
    torch.testing.assert_close(merged, (before + saved) / 2, rtol=0, atol=1e-6)


def test_a_share_of_a_longer_vocabulary_is_refused(tmp_path: Path) -> None:
    base = model(tmp_path / "base", {"model.embed_tokens.weight": torch.randn(10, 4)}, model_type="llama")
    path = adapter(
        tmp_path / "lora", {"model.embed_tokens.weight": torch.randn(12, 4)}, modules_to_save=["embed_tokens"]
    )
    with pytest.raises(FitError, match="nothing to blend"):
        surgery.merge(base, (path, 0.5), output=tmp_path / "out")


def test_an_embedding_of_an_unknown_family_may_be_tied(tmp_path: Path) -> None:
    name = "decoder.words.weight"
    config = {"model_type": "nobody-knows", "vocab_size": 10}
    base = model(tmp_path / "base", {name: torch.randn(10, 4)}, **config)
    stem = name.removesuffix(".weight")
    lora = {f"{stem}.lora_embedding_A": torch.randn(2, 10), f"{stem}.lora_embedding_B": torch.randn(4, 2)}
    with pytest.raises(FitError, match="tied to another"):
        surgery.merge(base, adapter(tmp_path / "lora", lora), output=tmp_path / "out")


def test_the_index_keeps_the_name_loaders_look_for(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    (base / "model.safetensors").unlink()
    halves = {f"model-0000{i}-of-000002.safetensors": dict(list(tensors.items())[i - 1 :: 2]) for i in (1, 2)}
    for name, half in halves.items():
        save_file(half, base / name)
    weight_map = {key: name for name, half in halves.items() for key in half}
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    surgery.merge(base, make_lora(tmp_path / "lora"), output=tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors.index.json").exists()


def test_integers_of_a_pickle_stay_what_they_are(tmp_path: Path) -> None:
    big = (torch.arange(12).reshape(3, 4) + (1 << 40)).T
    tensors = {"model.layers.0.self_attn.q_proj.weight": torch.randn(4, 4), "ids": big}
    base = model(tmp_path / "base", tensors, pickled=True, model_type="llama")
    stem = "model.layers.0.self_attn.q_proj"
    lora = {f"{stem}.lora_A.weight": torch.randn(2, 4), f"{stem}.lora_B.weight": torch.randn(4, 2)}
    surgery.merge(base, adapter(tmp_path / "lora", lora), output=tmp_path / "out")
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")["ids"], big)


def test_a_change_of_type_alone_is_no_merge(tmp_path: Path) -> None:
    base, lora = make_base(tmp_path / "base"), make_lora(tmp_path / "lora", strength=0.0)
    with pytest.raises(NothingChangedError):
        surgery.merge(base, lora, output=tmp_path / "out", dtype="fp32")


def test_a_layer_the_base_lacks_is_no_new_head(tmp_path: Path) -> None:
    base = model(tmp_path / "base", {"transformer.h.0.ln_1.weight": torch.ones(4)}, model_type="gpt2")
    path = adapter(tmp_path / "lora", {"transformer.h.7.ln_1.weight": torch.zeros(4)}, modules_to_save=["ln_1"])
    with pytest.raises(FitError, match="has no parameter"):
        surgery.merge(base, path, output=tmp_path / "out")


def test_one_weight_under_two_names_is_not_added_twice(tmp_path: Path) -> None:
    base = model(tmp_path / "base", {"model.layers.0.q_proj.weight": torch.randn(4, 4)}, model_type="llama")
    a, b = torch.randn(2, 4), torch.randn(4, 2)
    lora = {
        f"{stem}.lora_{k}.weight": v.clone()
        for stem in ("layers.0.q_proj", "model.layers.0.q_proj")
        for k, v in (("A", a), ("B", b))
    }
    with pytest.raises(FitError, match="same weight"):
        surgery.merge(base, adapter(tmp_path / "lora", lora), output=tmp_path / "out")


@pytest.mark.parametrize(
    "wrong", [{"dtype": "int8"}, {"dtype": "banana"}, {"verify": "nope"}, {"workers": -1}, {"shard_size": -5}]
)
def test_options_that_make_no_sense_are_refused(wrong: dict[str, Any], tmp_path: Path) -> None:
    base, lora = make_base(tmp_path / "base"), make_lora(tmp_path / "lora")
    with pytest.raises(FitError):
        surgery.merge(base, lora, output=tmp_path / "out", **wrong)


def test_sub_folders_are_carried(tmp_path: Path) -> None:
    base, lora = make_base(tmp_path / "base"), make_lora(tmp_path / "lora")
    (base / "1_Pooling").mkdir()
    (base / "1_Pooling" / "config.json").write_text("{}")
    surgery.merge(base, lora, output=tmp_path / "out")
    assert (tmp_path / "out" / "1_Pooling" / "config.json").read_text() == "{}"


def test_a_folder_of_somebody_s_work_is_never_replaced(tmp_path: Path) -> None:
    base, lora = make_base(tmp_path / "base"), make_lora(tmp_path / "lora")
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "thesis.tex").write_text("years")
    with pytest.raises(OutputExistsError, match="not written by surgery"):
        surgery.merge(base, lora, output=tmp_path / "work", overwrite=True)
    assert (tmp_path / "work" / "thesis.tex").read_text() == "years"


def test_small_blocks_give_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Real matrices are many blocks; test models are one."""
    base, lora = make_base(tmp_path / "base"), make_lora(tmp_path / "lora")
    surgery.merge(base, lora, output=tmp_path / "one")
    monkeypatch.setattr("surgery.engine.arithmetic.BLOCK_ELEMENTS", 100)
    surgery.merge(base, lora, output=tmp_path / "many")
    one, many = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "many"))
    assert all(torch.equal(one[name], many[name]) for name in one)
