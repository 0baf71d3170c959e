# SPDX-License-Identifier: Apache-2.0
"""Updates meet the right weights of a base, in the right orientation, or the merge is refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import surgery
from surgery_formats.adapters.registry import read_adapter
from surgery_formats.binding.bind import bind, other_base
from surgery_formats.errors import FitError
from surgery_formats.models.checkpoint import open_checkpoint
from tests.support.adapter_files import GOLDEN
from tests.support.hand_made import write_adapter, write_model
from tests.support.kit import ROOT
from tests.support.quantised_folders import quantise_folder

BASE = ROOT / "examples" / "base"


@pytest.mark.parametrize("side", ["embedding", "head"])
def test_an_untied_pickle_keeps_head_and_embedding(side: str, tmp_path: Path) -> None:
    shared = torch.randn(16, 8)
    tensors = {"model.embed_tokens.weight": shared, "lm_head.weight": shared}
    base = write_model(
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
    surgery.merge(base, write_adapter(tmp_path / "lora", lora), output=tmp_path / "out")
    merged = load_file(tmp_path / "out" / "model.safetensors")
    changed = {"embedding": "model.embed_tokens.weight", "head": "lm_head.weight"}[side]
    other = ({*tensors} - {changed}).pop()
    torch.testing.assert_close(merged[changed], shared + a.T @ b.T, rtol=0, atol=1e-5)
    assert torch.equal(merged[other], shared)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False


def test_a_weighted_conv1d_replacement_is_not_transposed(tmp_path: Path) -> None:
    name = "transformer.h.0.attn.c_proj.weight"
    base = write_model(tmp_path / "base", {name: torch.randn(8, 8)}, model_type="gpt2")
    saved = torch.randn(8, 8)
    path = write_adapter(tmp_path / "lora", {name: saved}, modules_to_save=["c_proj"])
    surgery.merge(base, (path, 0.5), output=tmp_path / "out")
    before = load_file(base / "model.safetensors")[name]
    merged = load_file(tmp_path / "out" / "model.safetensors")[name]
    torch.testing.assert_close(merged, (before + saved) / 2, rtol=0, atol=1e-6)


def test_a_weighted_longer_vocabulary_is_refused(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", {"model.embed_tokens.weight": torch.randn(10, 4)}, model_type="llama")
    path = write_adapter(
        tmp_path / "lora", {"model.embed_tokens.weight": torch.randn(12, 4)}, modules_to_save=["embed_tokens"]
    )
    with pytest.raises(FitError, match="nothing to blend"):
        surgery.merge(base, (path, 0.5), output=tmp_path / "out")


@pytest.mark.parametrize("rows", [3, 12])
@pytest.mark.parametrize("module", ["model.layers.0.self_attn.q_proj", "model.projector"])
def test_only_a_row_for_each_token_or_label_comes_in_other_numbers(module: str, rows: int, tmp_path: Path) -> None:
    name = f"{module}.weight"
    tensors = {
        "model.embed_tokens.weight": torch.randn(10, 4),
        name: torch.randn(8, 4),
        "score.weight": torch.ones(2, 4),
    }
    base = write_model(tmp_path / "base", tensors, model_type="llama", vocab_size=10)
    with pytest.raises(FitError, match=rf"shape \[{rows}, 4\], but \[8, 4\] in the base"):
        surgery.merge(
            base,
            write_adapter(tmp_path / "a", {name: torch.randn(rows, 4)}, modules_to_save=[module.rpartition(".")[2]]),
            dry_run=True,
        )
    others = {"model.embed_tokens.weight": torch.randn(rows, 4), "score.weight": torch.randn(rows, 4)}
    sound = write_adapter(tmp_path / "b", others, modules_to_save=["embed_tokens", "score"])
    assert surgery.merge(base, sound, dry_run=True).ledger.classes["replaced"] == 2


def test_a_possibly_tied_embedding_of_an_unknown_family_is_refused(tmp_path: Path) -> None:
    name = "decoder.words.weight"
    config = {"model_type": "nobody-knows", "vocab_size": 10}
    base = write_model(tmp_path / "base", {name: torch.randn(10, 4)}, **config)
    stem = name.removesuffix(".weight")
    lora = {f"{stem}.lora_embedding_A": torch.randn(2, 10), f"{stem}.lora_embedding_B": torch.randn(4, 2)}
    with pytest.raises(FitError, match="tied to another"):
        surgery.merge(base, write_adapter(tmp_path / "lora", lora), output=tmp_path / "out")


def test_a_base_with_fewer_layers_is_another_base_and_no_misspelling(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", {"transformer.h.0.ln_1.weight": torch.ones(4)}, model_type="gpt2")
    norms = {f"transformer.h.{layer}.ln_1.weight": torch.zeros(4) for layer in range(3)}
    path = write_adapter(tmp_path / "lora", norms, modules_to_save=["ln_1"])
    with pytest.raises(FitError, match="2 of 3 do not fit") as caught:
        surgery.merge(base, path, output=tmp_path / "out")
    assert caught.value.hint == (
        'is this the base it was trained on? to use the rest, merge, convert or combine without them: `without="PATTERN"`'
    )


def test_a_layer_that_the_base_lacks_is_refused(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", {"transformer.h.0.ln_1.weight": torch.ones(4)}, model_type="gpt2")
    path = write_adapter(tmp_path / "lora", {"transformer.h.7.ln_1.weight": torch.zeros(4)}, modules_to_save=["ln_1"])
    with pytest.raises(FitError, match="has no parameter"):
        surgery.merge(base, path, output=tmp_path / "out")


def test_an_adapter_of_several_models_does_not_fit_one() -> None:
    """Two text encoders have the same names: both would be added to the one."""
    mixed = GOLDEN / "kohya/sd1/mixed/adapter.safetensors"
    with pytest.raises(FitError, match="the adapter changes text_encoder, unet, the base is one model") as caught:
        surgery.merge(GOLDEN / "kohya/sd1/base/unet", mixed, dry_run=True)
    assert str(caught.value.hint).endswith('or merge, convert or combine without them: `without="text_encoder:*"`')
    assert surgery.merge(GOLDEN / "kohya/sd1/base/unet", mixed, dry_run=True, without=["text_encoder:*"]).ledger.classes


def test_a_text_encoder_alone_is_told_by_its_names_and_the_cure_leaves_out_the_rest() -> None:
    mixed, encoder = GOLDEN / "kohya/sd1/mixed/adapter.safetensors", GOLDEN / "kohya/sd1/base/text_encoder"
    with pytest.raises(FitError, match="the base is one model") as caught:
        surgery.merge(encoder, mixed, dry_run=True)
    assert str(caught.value.hint).endswith('without them: `without="unet:*"`')
    assert surgery.merge(encoder, mixed, dry_run=True, without=["unet:*"]).ledger.classes


def test_two_names_of_one_weight_are_refused(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", {"model.layers.0.q_proj.weight": torch.randn(4, 4)}, model_type="llama")
    a, b = torch.randn(2, 4), torch.randn(4, 2)
    lora = {
        f"{stem}.lora_{k}.weight": v.clone()
        for stem in ("layers.0.q_proj", "model.layers.0.q_proj")
        for k, v in (("A", a), ("B", b))
    }
    with pytest.raises(FitError, match="same weight"):
        surgery.merge(base, write_adapter(tmp_path / "lora", lora), output=tmp_path / "out")


def test_another_base_is_told_and_a_quantised_copy_is_none(tmp_path: Path) -> None:
    adapter = read_adapter(ROOT / "examples/lora")  # of examples/base
    assert other_base(adapter, open_checkpoint(BASE)) is None
    for name, coded, told in (("base-nf4", True, False), ("based", True, True), ("base-tuned", False, True)):
        there = tmp_path / name
        if coded:
            quantise_folder(BASE, there, "nf4")
        else:
            shutil.copytree(BASE, there)
        checkpoint = open_checkpoint(there)
        assert checkpoint.is_quantised is coded
        assert (other_base(adapter, checkpoint) is not None) is told
    assert "base given is 'base-tuned'" in " ".join(surgery.report(adapter, base=tmp_path / "base-tuned").warnings)
    assert surgery.report(adapter, base=BASE).warnings == ()


@pytest.mark.parametrize(("repository", "told"), [("org--base", False), ("org--other", True)])
def test_a_base_in_the_hubs_cache_is_called_by_its_repository(tmp_path: Path, repository: str, told: bool) -> None:
    snapshot = tmp_path / f"models--{repository}" / "snapshots" / ("0" * 39 + "1")
    shutil.copytree(BASE, snapshot)
    text = other_base(read_adapter(ROOT / "examples/lora"), open_checkpoint(snapshot))
    assert text == (
        f"was trained on 'examples/base', the base given is '{repository.replace('--', '/')}'" if told else None
    )


def test_a_tensor_that_no_update_uses_is_refused_before_a_plan_is_made(tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.q_proj"
    base = write_model(tmp_path / "base", {f"{name}.weight": torch.randn(8, 8)}, model_type="llama")
    factors = {f"{name}.lora_A.weight": torch.randn(2, 8), f"{name}.lora_B.weight": torch.randn(8, 2)}
    adapter, checkpoint = read_adapter(write_adapter(tmp_path / "lora", factors)), open_checkpoint(base)
    unused = checkpoint.main.tensors[f"{name}.weight"]
    bind([(adapter, 1.0)], checkpoint)
    with pytest.raises(FitError, match="1 of 3 tensors are not used by any update"):
        bind([(replace(adapter, tensors=(*adapter.tensors, unused)), 1.0)], checkpoint)
