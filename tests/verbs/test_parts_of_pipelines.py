# SPDX-License-Identifier: Apache-2.0
"""Adapters of one network of a pipeline that do not name it: PEFT's folders, merged, summed and reported as they are."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from surgery import combine, convert, diff, merge, report, verify
from surgery.engine.undo.record import unmerge_facts
from surgery_formats.errors import FitError, ProofError
from surgery_formats.models.checkpoint import open_checkpoint
from tests.support.adapter_files import GOLDEN, Arrays, assert_close, draw, peft_deltas, write_peft

UNET = [f"down_blocks.0.attentions.0.transformer_blocks.0.attn1.{x}" for x in ("to_q", "to_v")]
CLIP = [f"text_model.encoder.layers.0.self_attn.{x}_proj" for x in "qv"]


def _pipeline(path: Path, **encoders: int) -> Path:
    networks = {"unet": (UNET, 8), **{name: (CLIP, width) for name, width in encoders.items()}}
    for number, (name, (modules, width)) in enumerate(networks.items()):
        (path / name).mkdir(parents=True)
        kind = {"_class_name": "UNet2DConditionModel"} if name == "unet" else {"model_type": "clip_text_model"}
        (path / name / "config.json").write_text(json.dumps(kind))
        stem = "diffusion_pytorch_model" if name == "unet" else "model"
        tensors = {f"{module}.weight": draw(number, width, width) for module in modules}
        save_file(tensors, path / name / f"{stem}.safetensors")
    index = {"_class_name": "StableDiffusionPipeline", **{name: ["library", "Class"] for name in networks}}
    (path / "model_index.json").write_text(json.dumps(index))
    return path


def _adapter(path: Path, modules: list[str], width: int = 8) -> Path:
    tensors: Arrays = {}
    for number, module in enumerate(modules):
        tensors[f"base_model.model.{module}.lora_A.weight"] = draw(number, 4, width)
        tensors[f"base_model.model.{module}.lora_B.weight"] = draw(number + 9, width, 4)
    targets = sorted({module.rpartition(".")[2] for module in modules})
    return write_peft(path, tensors, r=4, lora_alpha=7, target_modules=targets)


def _changes(base: Path, merged: Path) -> Arrays:
    found: Arrays = {}
    for file in base.rglob("*.safetensors"):
        before, after = load_file(file), load_file(merged / file.relative_to(base))
        found |= {name.removesuffix(".weight"): after[name] - before[name] for name in before}
    return found


def test_two_folders_are_merged_each_into_its_network(tmp_path: Path) -> None:
    base = _pipeline(tmp_path / "sd", text_encoder=8)
    unet, text = _adapter(tmp_path / "u", UNET), _adapter(tmp_path / "t", CLIP)
    merge(base, [unet, text], output=tmp_path / "out")
    wanted = {
        name.removeprefix("base_model.model."): one for some in (unet, text) for name, one in peft_deltas(some).items()
    }
    assert len(wanted) == 4
    assert_close(_changes(base, tmp_path / "out"), wanted)
    assert report(unet, base=base).adapters[0].warnings == ()


def test_two_folders_become_one_file(tmp_path: Path) -> None:
    base = _pipeline(tmp_path / "sd", text_encoder=8)
    pair = [_adapter(tmp_path / "u", UNET), _adapter(tmp_path / "t", CLIP)]
    combine(pair, to="kohya", base=base, output=tmp_path / "one.safetensors")
    assert {key.split("_")[1] for key in load_file(tmp_path / "one.safetensors")} == {"unet", "te"}
    merge(base, tmp_path / "one.safetensors", output=tmp_path / "out")
    merge(base, pair, output=tmp_path / "apart")
    assert_close(_changes(base, tmp_path / "out"), _changes(base, tmp_path / "apart"))


def test_a_merged_pipeline_is_verified(tmp_path: Path) -> None:
    base = _pipeline(tmp_path / "sd", text_encoder=8)
    merge(base, _adapter(tmp_path / "u", UNET), output=tmp_path / "out")
    verify(tmp_path / "out")
    verify(tmp_path / "out", against=base)
    file = tmp_path / "out" / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({name: np.zeros_like(one) for name, one in load_file(file).items()}, file)
    with pytest.raises(ProofError, match="have changed since"):
        verify(tmp_path / "out")


def test_the_sizes_tell_two_text_encoders_apart_and_nothing_tells_equal_ones(tmp_path: Path) -> None:
    base = _pipeline(tmp_path / "xl", text_encoder=8, text_encoder_2=12)
    merge(base, _adapter(tmp_path / "t2", CLIP, 12), output=tmp_path / "out")
    first, second = (f"{name}/model.safetensors" for name in ("text_encoder", "text_encoder_2"))
    assert (base / first).read_bytes() == (tmp_path / "out" / first).read_bytes()
    assert (base / second).read_bytes() != (tmp_path / "out" / second).read_bytes()
    twin = _pipeline(tmp_path / "twin", text_encoder=8, text_encoder_2=8)
    text = _adapter(tmp_path / "t", CLIP)
    with pytest.raises(FitError, match="fits text_encoder, text_encoder_2") as caught:
        merge(twin, text, output=tmp_path / "no")
    assert "component" in caught.value.hint
    convert(text, "kohya", base=twin, component="text_encoder_2", output=tmp_path / "te2.safetensors")
    merge(twin, tmp_path / "te2.safetensors", output=tmp_path / "second")
    assert (twin / first).read_bytes() == (tmp_path / "second" / first).read_bytes()
    assert (twin / second).read_bytes() != (tmp_path / "second" / second).read_bytes()


def test_an_adapter_of_no_part_is_refused(tmp_path: Path) -> None:
    base = _pipeline(tmp_path / "sd", text_encoder=8)
    with pytest.raises(FitError, match="it fits none; there are text_encoder, unet"):
        merge(base, _adapter(tmp_path / "a", ["model.layers.0.mlp.up_proj"]), output=tmp_path / "no")


def test_what_the_base_lacks_is_left_out_of_a_conversion_too(tmp_path: Path) -> None:
    folder = GOLDEN / "kohya/sd1"
    mixed, unet = folder / "mixed/adapter.safetensors", folder / "base/unet"
    with pytest.raises(FitError, match="the base is one model") as caught:
        convert(mixed, "diffusers", base=unet, output=tmp_path / "x.safetensors")
    assert '`without="text_encoder:*"`' in str(caught.value.hint)
    found = convert(mixed, "diffusers", base=unet, without=["text_encoder:*"], output=tmp_path / "x.safetensors")
    out = {entry.site.partition(":")[0] for entry in found.entries if entry.outcome == "dropped"}
    assert out == {"text_encoder"}
    assert diff(mixed, tmp_path / "x.safetensors", base=folder / "base").modules
    merge(unet, tmp_path / "x.safetensors", output=tmp_path / "a")
    merge(unet, mixed, without=["text_encoder:*"], output=tmp_path / "b")
    assert diff(tmp_path / "a", tmp_path / "b", tolerance=1e-6).equal
    with pytest.raises(FitError, match="no module matches 'vae:\\*'"):
        convert(mixed, "diffusers", base=unet, without=["vae:*"], dry_run=True)


def test_what_two_networks_call_the_same_is_accounted_for_twice(tmp_path: Path) -> None:
    base = _pipeline(tmp_path / "xl", text_encoder=8, text_encoder_2=12)
    weight = f"{CLIP[0]}.weight"
    adapters = []
    for width in (8, 12):
        path = _adapter(tmp_path / f"of {width}", CLIP[1:], width)
        tensors = {
            **load_file(path / "adapter_model.safetensors"),
            f"base_model.model.{weight}": draw(5, width, width),
        }
        adapters.append(write_peft(path, tensors, r=4, target_modules=["v_proj"], modules_to_save=["q_proj"]))
    ledger = merge(base, adapters, output=tmp_path / "out").ledger.as_json()
    assert ledger["classes"]["superseded"] == 2
    assert set(ledger["without_output"]) == {f"text_encoder:{weight}", f"text_encoder_2:{weight}"}


def test_a_merge_that_is_taken_back_is_known_by_all_of_its_networks(tmp_path: Path) -> None:
    """Two of them have a file of one name; a run that was killed goes on only where both are the same."""
    merged = _pipeline(tmp_path / "xl", text_encoder=8, text_encoder_2=12)
    known = unmerge_facts((), open_checkpoint(merged))["merged"]
    assert set(known) == {str(path.relative_to(merged)) for path in merged.rglob("*.safetensors")}
    assert len(set(known.values())) == 3
