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
from tests.support.adapter_files import GOLDEN, Arrays, draw, merged

FOLDER, FLUX = GOLDEN / "onetrainer", GOLDEN / "flux"
OMI, LEGACY = FOLDER / "omi.safetensors", FOLDER / "legacy.safetensors"
FORMATS = {OMI: "omi", LEGACY: "kohya"}
BUNDLED = {"bundle_emb.token.clip_l", "bundle_emb.token.t5", "bundle_emb.token.t5_out"}


def _error(base: Path, got: Arrays, expected: Path) -> float:
    """The greatest error of a weight, of its greatest change; what did not change must not."""
    before, wanted = load_file(base), load_file(expected)
    assert all(np.array_equal(got[name], value) for name, value in before.items() if name not in wanted)
    steps = {name: abs(value.astype(np.float64) - before[name]).max() for name, value in wanted.items()}
    return max(abs(got[name].astype(np.float64) - value).max() / steps[name] for name, value in wanted.items())


@pytest.mark.parametrize("layout", ["bfl", "diffusers"])
@pytest.mark.parametrize("file", FORMATS, ids=lambda file: file.stem)
def test_its_names_are_read_against_both_layouts(file: Path, layout: str, tmp_path: Path) -> None:
    adapter = read_adapter(file)
    assert (adapter.format, adapter.unconsumed()) == (FORMATS[file], ())
    assert adapter.provenance.scales["alpha"] == 30
    base, out = FLUX / f"base-{layout}.safetensors", tmp_path / "out"
    merge(base, file, output=out, without="*bundle_emb*")
    got = load_file(out / base.name)
    assert _error(base, got, FOLDER / f"expected-{layout}.safetensors") <= 1e-6


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
        assert _error(place, got, FOLDER / f"expected-{other}.safetensors") <= 1e-6


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
    assert _error(base, got, FLUX / source / f"expected-{layout}.safetensors") <= 1e-6


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
    assert _error(base, got, place / "expected.safetensors") <= 1e-6
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
