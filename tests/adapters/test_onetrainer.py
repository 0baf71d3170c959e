# SPDX-License-Identifier: Apache-2.0
"""Files of OneTrainer: legacy and OMI names, embeddings in a bundle, OFT of inputs and of kernels; and OMI written."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from surgery import combine, convert, inspect, merge
from surgery_formats.adapters.registry import format_named, read_adapter
from surgery_formats.errors import FitError, MalformedError
from surgery_formats.testing.format import save
from tests.support.adapter_files import GOLDEN, Arrays, assert_expected, draw, merged, write_base

FOLDER, FLUX = GOLDEN / "onetrainer", GOLDEN / "flux"
OMI, LEGACY = FOLDER / "omi.safetensors", FOLDER / "legacy.safetensors"
FORMATS = {OMI: "omi", LEGACY: "kohya"}
BUNDLED = {"bundle_emb.token.clip_l", "bundle_emb.token.t5", "bundle_emb.token.t5_out"}


@pytest.mark.parametrize("layout", ["bfl", "diffusers"])
@pytest.mark.parametrize("file", FORMATS, ids=lambda file: file.stem)
def test_its_names_are_read_against_both_layouts(file: Path, layout: str, tmp_path: Path) -> None:
    adapter = read_adapter(file)
    assert (adapter.format, adapter.unconsumed()) == (FORMATS[file], ())
    assert adapter.provenance.scales["alpha"] == 30
    base, out = FLUX / f"base-{layout}.safetensors", tmp_path / "out"
    merge(base, file, output=out, without="*bundle_emb*")
    got = load_file(out / base.name)
    assert_expected(base, got, FOLDER / f"expected-{layout}.safetensors")


@pytest.mark.parametrize("file", FORMATS, ids=lambda file: file.stem)
def test_a_bundled_embedding_is_shown_and_in_no_weight(file: Path, tmp_path: Path) -> None:
    report = inspect(file)
    assert {kind: report.kinds[kind] for kind in ("token embedding", "output embedding")} == {
        "token embedding": 2,
        "output embedding": 1,
    }
    with pytest.raises(FitError, match=r"rows for a new token.*without=") as error:
        merge(FLUX / "base-bfl.safetensors", file, output=tmp_path / "out")
    assert "bundle_emb.token" in str(error.value)
    with pytest.raises(FitError, match="rows for a new token"):
        convert(file, "diffusers", output=tmp_path / "d.safetensors", base=FLUX / "base-diffusers.safetensors")


@pytest.mark.parametrize("file", FORMATS, ids=lambda file: file.stem)
def test_it_is_written_again_as_it_was(file: Path, tmp_path: Path) -> None:
    adapter = read_adapter(file)
    target = format_named(adapter.format)
    before, written = load_file(file), load_file(save(target.render(adapter, None), target, tmp_path))
    assert written.keys() == before.keys()
    assert all(np.array_equal(written[key], value) for key, value in before.items())


@pytest.mark.parametrize("layout", ["bfl", "diffusers"])
@pytest.mark.parametrize("target", ["omi", "diffusers"])
def test_every_layout_of_a_base_gives_the_same_file(target: str, layout: str, tmp_path: Path) -> None:
    """From kohya's names of either layout: what is fused there is cut, and a modulation's halves are exchanged."""
    base = FLUX / f"base-{layout}.safetensors"
    flat = {key: value for key, value in load_file(LEGACY).items() if not key.startswith("bundle_emb")}
    save_file(flat, tmp_path / "flat.safetensors")
    result = convert(tmp_path / "flat.safetensors", target, output=tmp_path / "x.safetensors", base=base)
    assert {entry.outcome for entry in result.entries} == {"exact"}
    written = load_file(tmp_path / "x.safetensors")
    if target == "omi":
        wanted = {key: value for key, value in load_file(OMI).items() if key not in BUNDLED}
        assert written.keys() == wanted.keys()
        assert all(np.array_equal(written[key], value) for key, value in wanted.items())
    assert read_adapter(tmp_path / "x.safetensors").format == target
    for other in ("bfl", "diffusers"):
        place = FLUX / f"base-{other}.safetensors"
        got = merged(place, tmp_path / "x.safetensors", tmp_path / other)
        assert_expected(place, got, FOLDER / f"expected-{other}.safetensors")


@pytest.mark.parametrize("layout", ["bfl", "diffusers"])
@pytest.mark.parametrize("target", ["omi", "diffusers"])
@pytest.mark.parametrize("source", ["xlabs", "fal"])
def test_factors_of_fused_weights_are_cut_to_parts(source: str, target: str, layout: str, tmp_path: Path) -> None:
    file, base = FLUX / source / "adapter.safetensors", FLUX / f"base-{layout}.safetensors"
    out = tmp_path / "x.safetensors"
    result = convert(file, target, output=out, base=base)
    assert {entry.outcome for entry in result.entries} == {"exact"}
    assert any(".0.attn.to_k." in key or ".qkv.1." in key for key in load_file(out))
    got = merged(base, out, tmp_path / "out")
    assert_expected(base, got, FLUX / source / f"expected-{layout}.safetensors")


def test_omi_needs_a_base_for_names_of_others(tmp_path: Path) -> None:
    flat = {key: value for key, value in load_file(LEGACY).items() if not key.startswith("bundle_emb")}
    save_file(flat, tmp_path / "flat.safetensors")
    with pytest.raises(FitError, match="only the base can tell its dots"):
        convert(tmp_path / "flat.safetensors", "omi", output=tmp_path / "x.safetensors")
    with pytest.raises(FitError, match="is known from the base"):
        convert(FLUX / "xlabs/adapter.safetensors", "omi", output=tmp_path / "x.safetensors")


@pytest.mark.parametrize("name", ["own", "shared", "scaled"])
def test_its_rotations_are_those_of_its_modules(name: str, tmp_path: Path) -> None:
    place = FOLDER / f"oft-{name}"
    base, file = place / "base.safetensors", place / "adapter.safetensors"
    adapter = read_adapter(file)
    assert (adapter.format, adapter.unconsumed()) == ("kohya", ())
    got = merged(base, file, tmp_path / "out")
    # its series is in float32, ours in float64
    assert_expected(base, got, place / "expected.safetensors")
    target = format_named("kohya")
    before, written = load_file(file), load_file(save(target.render(adapter, None), target, tmp_path))
    assert before.keys() == written.keys()
    assert all(np.array_equal(written[key], value) for key, value in before.items())


@pytest.mark.parametrize(
    ("tensors", "fault"),
    [
        ({"lora_unet_a_b.oft_R.weight": draw(1, 2, 4)}, "no strictly upper triangles"),
        ({"lora_unet_a_b.oft_R.scaled_oft": np.array(True)}, "without its 'oft_R.weight'"),
        ({"lora_unet_a_b.oft_R.weight": draw(1, 2, 6), "bundle_emb.token.unet": draw(1, 2, 8)}, "prefixes"),
        ({"lora_unet_a_b.oft_R.weight": draw(1, 2, 6), "bundle_emb.token.t5": draw(1, 2, 2, 8)}, "not rows of an embedding"),
    ],
)  # fmt: skip
def test_a_malformed_file_is_refused(tensors: Arrays, fault: str, tmp_path: Path) -> None:
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises((MalformedError, FitError), match=fault):
        read_adapter(tmp_path / "x.safetensors")


@pytest.mark.parametrize("file", FORMATS, ids=lambda file: file.stem)
def test_a_bundled_embedding_becomes_a_textual_inversion(file: Path, tmp_path: Path) -> None:
    combine([file], only="bundle_emb*weight", output=tmp_path / "emb.safetensors")
    assert load_file(tmp_path / "emb.safetensors").keys() == BUNDLED - {"bundle_emb.token.t5_out"}
    convert(tmp_path / "emb.safetensors", "embedding", output=tmp_path / "token.safetensors")
    written, stored = load_file(tmp_path / "token.safetensors"), load_file(file)
    assert written.keys() == {"clip_l", "t5xxl"}
    assert np.array_equal(written["clip_l"], stored["bundle_emb.token.clip_l"])
    assert np.array_equal(written["t5xxl"], stored["bundle_emb.token.t5"])
    assert read_adapter(tmp_path / "token.safetensors").config["token"] == "token"


def test_sdxl_in_omis_names_is_what_it_was(tmp_path: Path) -> None:
    """Names of the original UNet; text encoders by their number."""
    place = GOLDEN / "kohya/sdxl"
    file = place / "sgm-names/adapter.safetensors"
    result = convert(file, "omi", output=tmp_path / "x.safetensors", base=place / "base")
    assert {entry.outcome for entry in result.entries} == {"exact"}
    keys = load_file(tmp_path / "x.safetensors").keys()
    beginnings = {".".join(key.split(".")[:2]) for key in keys}
    assert {"unet.input_blocks", "unet.middle_block", "unet.output_blocks", "unet.label_emb"} <= beginnings
    assert {"clip_l.text_model", "clip_g.text_model"} <= beginnings
    assert read_adapter(tmp_path / "x.safetensors").format == "omi"
    for source in (file, tmp_path / "x.safetensors"):
        merge(place / "base", source, output=tmp_path / source.stem)
    for part in ("unet", "text_encoder", "text_encoder_2"):
        one, two = (load_file(next((tmp_path / stem / part).glob("*.safetensors"))) for stem in ("adapter", "x"))
        assert all(np.array_equal(one[key], value) for key, value in two.items())


def test_the_last_block_of_sd3_has_its_halves_exchanged(tmp_path: Path) -> None:
    """Its text stream ends there, with a scale and a shift in place of six numbers (OMI's ``filter_is_last``)."""
    linear = {
        f"transformer_blocks.{n}.attn.{name}.weight": (8, 8)
        for n in range(2)
        for name in ("to_q", "to_k", "to_v", "to_out.0")
    }
    linear |= {f"transformer_blocks.0.attn.{name}.weight": (8, 8) for name in ("add_q_proj", "to_add_out")}
    linear |= {f"transformer_blocks.{n}.norm1_context.linear.weight": (rows, 8) for n, rows in ((0, 48), (1, 16))}
    linear |= {"context_embedder.weight": (8, 8), "norm_out.linear.weight": (16, 8), "proj_out.weight": (4, 8)}
    base = tmp_path / "base"
    write_base(base, linear, {"_class_name": "SD3Transformer2DModel"}, "diffusion_pytorch_model.safetensors")
    ups = {n: draw(5 + n, rows, 2) for n, rows in ((0, 48), (1, 16))}
    stems = {n: f"lora_transformer_transformer_blocks_{n}_norm1_context_linear" for n in ups}
    tensors = {f"{stem}.lora_down.weight": draw(9, 2, 8) for stem in stems.values()}
    tensors |= {f"{stems[n]}.lora_up.weight": up for n, up in ups.items()}
    save_file(tensors, tmp_path / "legacy.safetensors")
    convert(tmp_path / "legacy.safetensors", "omi", output=tmp_path / "x.safetensors", base=base)
    written = load_file(tmp_path / "x.safetensors")
    first, last = (
        written[f"transformer.joint_blocks.{n}.context_block.adaLN_modulation.1.lora_up.weight"] for n in (0, 1)
    )
    assert np.array_equal(first, ups[0])
    assert np.array_equal(last, np.concatenate([ups[1][8:], ups[1][:8]]))
    one, two = (merged(base, tmp_path / f"{name}.safetensors", tmp_path / name) for name in ("legacy", "x"))
    assert all(np.allclose(one[key], value, atol=1e-6) for key, value in two.items())
    changed = {
        key
        for key, value in load_file(base / "diffusion_pytorch_model.safetensors").items()
        if not np.array_equal(one[key], value)
    }
    assert changed == {f"transformer_blocks.{n}.norm1_context.linear.weight" for n in (0, 1)}


def test_rows_with_lengths_go_along_and_lengths_of_columns_do_not(tmp_path: Path) -> None:
    """A DoRA of a fused projection is one of each part if its lengths belong to rows; those of columns run through all parts."""
    stem, base = "lora_unet_double_blocks_0_img_attn_qkv", FLUX / "base-bfl.safetensors"
    factors = {f"{stem}.lora_down.weight": draw(1, 2, 16), f"{stem}.lora_up.weight": draw(2, 48, 2)}
    for name, lengths in (("rows", abs(draw(3, 48, 1)) + 1), ("columns", abs(draw(3, 1, 16)) + 1)):
        save_file({**factors, f"{stem}.dora_scale": lengths}, tmp_path / f"{name}.safetensors")
    convert(tmp_path / "rows.safetensors", "omi", output=tmp_path / "x.safetensors", base=base)
    assert sum(key.endswith(".dora_scale") for key in load_file(tmp_path / "x.safetensors")) == 3
    one, two = (merged(base, tmp_path / f"{name}.safetensors", tmp_path / name) for name in ("rows", "x"))
    assert all(np.allclose(one[key], value, atol=1e-6) for key, value in two.items())
    with pytest.raises(FitError, match="in parts that it cannot be cut to"):
        convert(tmp_path / "columns.safetensors", "omi", output=tmp_path / "y.safetensors", base=base)
