# SPDX-License-Identifier: Apache-2.0
"""LoRA files of Flux in the layouts of others, and weights that an adapter gives more columns."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from surgery import combine, convert, inspect, merge, unmerge, verify
from surgery_formats.adapters.registry import format_named, read_adapter
from surgery_formats.errors import FitError, MalformedError
from surgery_formats.testing.format import save
from tests.support.adapter_files import GOLDEN, Arrays, assert_expected, draw, merged

FOLDER = GOLDEN / "flux"
FILES = json.loads((FOLDER / "expected.json").read_text())["files"]
LAYOUTS = ("bfl", "diffusers")
CONTROL = FOLDER / "control/adapter.safetensors"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", FILES)
def test_it_does_what_diffusers_does(name: str, layout: str, tmp_path: Path) -> None:
    base, file = FOLDER / f"base-{layout}.safetensors", FOLDER / name / "adapter.safetensors"
    adapter = read_adapter(file)
    assert (adapter.format, adapter.unconsumed()) == ("bare", ())
    assert_expected(base, merged(base, file, tmp_path / "out"), FOLDER / name / f"expected-{layout}.safetensors")


@pytest.mark.parametrize("name", FILES)
def test_it_is_written_again_as_it_was(name: str, tmp_path: Path) -> None:
    file = FOLDER / name / "adapter.safetensors"
    adapter = read_adapter(file)
    target = format_named("bare")
    before, written = load_file(file), load_file(save(target.render(adapter, None), target, tmp_path))
    assert before.keys() == written.keys()
    assert all(np.array_equal(written[key], value) for key, value in before.items())


def test_a_file_says_who_wrote_it_and_of_what() -> None:
    reports = {name: inspect(FOLDER / name / "adapter.safetensors") for name in FILES}
    tools = {name: str(report.tool) for name, report in reports.items()}
    assert tools["control"].startswith("Black Forest Labs")
    assert tools["xlabs"].startswith("XLabs")
    assert {report.family for report in reports.values()} == {"Flux or HunyuanVideo"}
    assert {name: report.scale_sources for name, report in reports.items()} == {
        "control": {"rank": 23},
        "xlabs": {"rank": 6},
        "fal": {"rank": 14},
    }


def test_pefts_prefix_before_other_names_is_pefts_without_its_configuration(tmp_path: Path) -> None:
    stem = "base_model.model.transformer_blocks.0.attn1.to_q"
    save_file({f"{stem}.lora_{side}.weight": draw(1, 4, 4) for side in "AB"}, tmp_path / "adapter.safetensors")
    with pytest.raises(FitError, match="which has their scale"):
        read_adapter(tmp_path / "adapter.safetensors")


@pytest.mark.parametrize("with_base", [False, True])
def test_comfyui_is_told_of_the_growth(with_base: bool, tmp_path: Path) -> None:
    base, out = FOLDER / "base-bfl.safetensors", tmp_path / "comfy.safetensors"
    result = convert(CONTROL, "comfyui", output=out, base=base if with_base else None)
    assert {entry.outcome for entry in result.entries} == {"exact"}
    written = load_file(out)
    sizes = {key: value.tolist() for key, value in written.items() if key.endswith("reshape_weight")}
    assert sizes == {"diffusion_model.img_in.reshape_weight": [16, 8]}
    assert written["diffusion_model.img_in.reshape_weight"].dtype == np.int64
    assert sum(key.endswith("_norm.set_weight") for key in written) == 6
    assert_expected(base, merged(base, out, tmp_path / "out"), FOLDER / "control/expected-bfl.safetensors")
    again = format_named("comfyui")
    adapter = read_adapter(out)
    assert load_file(save(again.render(adapter, None), again, tmp_path / "again")).keys() == written.keys()


def _input(folder: Path, columns: int, more: Arrays | None = None, prefix: str = "") -> Path:
    """Factors of the input alone, and of one block, which tells the family."""
    tensors = {"img_in.lora_A.weight": draw(1, 2, columns), "img_in.lora_B.weight": draw(2, 16, 2)}
    tensors |= {"double_blocks.0.img_attn.proj.lora_A.weight": draw(3, 2, 16)}
    tensors |= {"double_blocks.0.img_attn.proj.lora_B.weight": draw(4, 16, 2), **(more or {})}
    folder.mkdir(exist_ok=True)
    save_file({f"{prefix}{key}": value for key, value in tensors.items()}, folder / "lora.safetensors")
    return folder / "lora.safetensors"


def test_an_ordinary_lora_beside_one_that_grows_a_weight(tmp_path: Path) -> None:
    base = FOLDER / "base-bfl.safetensors"
    wide, plain = _input(tmp_path / "wide", 8), _input(tmp_path / "plain", 4)
    old = load_file(base)["img_in.weight"]
    want = np.pad(old, ((0, 0), (0, 4))) + draw(2, 16, 2) @ draw(1, 2, 8)
    want[:, :4] += draw(2, 16, 2) @ draw(1, 2, 4)
    for order in ([wide, plain], [plain, wide]):
        out = tmp_path / f"out-{order[0].parent.name}"
        merge(base, order, output=out)
        assert np.allclose(load_file(out / "base-bfl.safetensors")["img_in.weight"], want, atol=1e-5)
        verify(out, against=base)


def test_a_weight_that_grew_is_taken_back_only_with_what_was_kept(tmp_path: Path) -> None:
    base, wide = FOLDER / "base-bfl.safetensors", _input(tmp_path / "wide", 8)
    merge(base, wide, output=tmp_path / "kept", reversible=True)
    unmerge(tmp_path / "kept", wide, output=tmp_path / "back")
    assert (tmp_path / "back/base-bfl.safetensors").read_bytes() == base.read_bytes()
    merge(base, wide, output=tmp_path / "lost")
    with pytest.raises(FitError, match="grew"):
        unmerge(tmp_path / "lost", wide, output=tmp_path / "no")


def test_diffusers_is_told_how_many_channels_there_are(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    save_file(load_file(FOLDER / "base-diffusers.safetensors"), base / "diffusion_pytorch_model.safetensors")
    config = {"_class_name": "FluxTransformer2DModel", "in_channels": 4, "out_channels": None}
    (base / "config.json").write_text(json.dumps(config))
    merge(base, CONTROL, output=tmp_path / "out")
    written = json.loads((tmp_path / "out/config.json").read_text())
    assert (written["in_channels"], written["out_channels"]) == (8, 4)


@pytest.mark.parametrize(
    ("columns", "more", "fault"),
    [
        (3, {}, "made for a weight of"),
        (8, {"img_in.reshape_weight": np.array([16, 9])}, "for factors of one of"),
        (8, {"img_in.reshape_weight": np.array([16.0, 8.0])}, "a shape in a tensor of"),
        (8, {"img_in.reshape_weight": np.array([-16, 8])}, "a shape of"),
        (8, {"txt_in.reshape_weight": np.array([16, 8])}, "nothing uses 'reshape_weight'"),
    ],
)
def test_what_cannot_grow_is_refused(columns: int, more: Arrays, fault: str, tmp_path: Path) -> None:
    file = _input(tmp_path / "lora", columns, more, "diffusion_model.")
    with pytest.raises((FitError, MalformedError), match=fault):
        merge(FOLDER / "base-bfl.safetensors", file, output=tmp_path / "out")


def test_only_an_input_grows_unless_the_file_says_so(tmp_path: Path) -> None:
    factors = {"lora_A.weight": draw(1, 2, 24), "lora_B.weight": draw(2, 16, 2)}
    stem = "diffusion_model.double_blocks.0.img_attn.proj"
    save_file({f"{stem}.{leaf}": value for leaf, value in factors.items()}, tmp_path / "lora.safetensors")
    base = FOLDER / "base-bfl.safetensors"
    with pytest.raises(FitError, match="made for a weight of"):
        merge(base, tmp_path / "lora.safetensors", output=tmp_path / "out")
    stated = {f"{stem}.reshape_weight": np.array([16, 24])}
    save_file({**{f"{stem}.{k}": v for k, v in factors.items()}, **stated}, tmp_path / "lora.safetensors")
    got = merged(base, tmp_path / "lora.safetensors", tmp_path / "out")["double_blocks.0.img_attn.proj.weight"]
    want = np.pad(load_file(base)["double_blocks.0.img_attn.proj.weight"], ((0, 0), (0, 8)))
    assert np.allclose(got, want + draw(2, 16, 2) @ draw(1, 2, 24), atol=1e-5)


def test_a_half_of_whole_norms_needs_the_base(tmp_path: Path) -> None:
    with pytest.raises(FitError, match="depends on the base"):
        combine({CONTROL: 0.5}, output=tmp_path / "half.safetensors")
    half = tmp_path / "half"
    merge(FOLDER / "base-bfl.safetensors", {CONTROL: 0.5}, output=half)
    got = load_file(half / "base-bfl.safetensors")
    assert_expected(FOLDER / "base-bfl.safetensors", got, FOLDER / "control/expected-bfl.safetensors", share=0.5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_control_lora_becomes_one_of_diffusers(layout: str, tmp_path: Path) -> None:
    """With the norms, and biases that diffusers loads only if the header speaks of them."""
    base, out = FOLDER / f"base-{layout}.safetensors", tmp_path / "d.safetensors"
    result = convert(CONTROL, "diffusers", output=out, base=base)
    assert {entry.outcome for entry in result.entries} == {"exact"}
    with safe_open(out, "np") as opened:
        assert json.loads(opened.metadata()["lora_adapter_metadata"])["transformer.lora_bias"] is True
    adapter = read_adapter(out)
    assert (adapter.format, adapter.unconsumed()) == ("diffusers", ())
    for other in LAYOUTS:
        place = FOLDER / f"base-{other}.safetensors"
        got = merged(place, out, tmp_path / other)
        assert_expected(place, got, FOLDER / f"control/expected-{other}.safetensors")
    target = format_named("diffusers")
    before, written = load_file(out), load_file(save(target.render(adapter, None), target, tmp_path / "again"))
    assert before.keys() == written.keys()
    assert all(np.array_equal(written[key], value) for key, value in before.items())


def test_biases_beside_factors_follow_the_scale_that_the_header_states(tmp_path: Path) -> None:
    tensors = {key: value for key, value in load_file(CONTROL).items() if "img_mlp.0." in key}
    alpha = {"double_blocks.0.img_mlp.0.alpha": np.array(6, np.float32)}  # at rank 4: the bias is scaled by 1.5 as well
    save_file({**tensors, **alpha}, tmp_path / "lora.safetensors")
    base = FOLDER / "base-bfl.safetensors"
    wanted = merged(base, tmp_path / "lora.safetensors", tmp_path / "wanted")
    bias = "double_blocks.0.img_mlp.0.bias"
    step = 1.5 * tensors["double_blocks.0.img_mlp.0.lora_B.bias"]
    assert np.allclose(wanted[bias] - load_file(base)[bias], step, atol=1e-6)
    for target in ("diffusers", "comfyui", "bare"):
        source = tmp_path / ("comfyui" if target == "bare" else "lora")
        convert(source.with_suffix(".safetensors"), target, output=tmp_path / f"{target}.safetensors", base=base)
        got = merged(base, tmp_path / f"{target}.safetensors", tmp_path / f"out-{target}")
        assert all(np.allclose(got[key], value, atol=1e-6) for key, value in wanted.items())


def test_no_other_whole_weight_goes_to_diffusers(tmp_path: Path) -> None:
    stem = "diffusion_model.img_in"
    save_file({f"{stem}.set_weight": draw(1, 16, 4), f"{stem}.diff_b": draw(2, 16)}, tmp_path / "lora.safetensors")
    with pytest.raises(FitError, match=r"no replacement.*loads no offset|loads no offset.*no replacement"):
        convert(tmp_path / "lora.safetensors", "diffusers", output=tmp_path / "d", base=FOLDER / "base-bfl.safetensors")
