# SPDX-License-Identifier: Apache-2.0
"""Strings of a header survive, and hashes among them are those that sd-scripts works out of the new file."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save, save_file

from surgery import combine, convert, resize
from tests.support.adapter_files import GOLDEN, draw

BASE = GOLDEN / "kohya/sd1/base"
LORA = GOLDEN / "kohya/sd1/lora/adapter.safetensors"
NOTES = {
    "ss_tag_frequency": '{"10_dog": {"a \\"quoted\\" tag": 3, "wörter\\n": 1}}',
    "ss_output_name": "dog",
    "modelspec.title": "Dog",
    "modelspec.trigger_phrase": "sks dog",
    "modelspec.usage_hint": "use 'sks dog'",
    "sshs_model_hash": "f" * 64,
    "sshs_legacy_hash": "f" * 8,
    "modelspec.hash_sha256": "0x" + "f" * 64,
    "note": "mine",
}


def _notes(file: Path) -> dict[str, str]:
    with safe_open(file, "np") as opened:
        return opened.metadata()


def _as_sd_scripts(file: Path) -> dict[str, str]:
    """By the definition: the file is saved again by safetensors, with the strings ``ss_`` alone, and hashed as a whole."""
    notes = {key: value for key, value in _notes(file).items() if key.startswith("ss_")}
    whole = save(load_file(file), notes)
    data = whole[8 + int.from_bytes(whole[:8], "little") :]
    one_by_one = hashlib.sha256()
    with safe_open(file, "np") as opened:
        for name in opened.offset_keys():
            one_by_one.update(opened.get_tensor(name).tobytes())
    return {
        "sshs_model_hash": hashlib.sha256(data).hexdigest(),
        "sshs_legacy_hash": hashlib.sha256(whole[0x100000:0x110000]).hexdigest()[:8],
        "modelspec.hash_sha256": f"0x{one_by_one.hexdigest()}",
    }


def _file(path: Path, notes: dict[str, str], width: int = 64) -> Path:
    """Large enough for the old hash, which begins at 1 MB."""
    tensors = {}
    for number in range(3):
        stem = f"diffusion_model.blocks.{number}.self_attn.q"
        tensors[f"{stem}.lora_A.weight"] = draw(number, 8, width)
        tensors[f"{stem}.lora_B.weight"] = draw(number + 9, width, 8)
        tensors[f"{stem}.alpha"] = np.array(4.0, np.float32)
    save_file(tensors, path, notes)
    return path


@pytest.mark.parametrize("width", [64, 6000, 9000])
@pytest.mark.parametrize("left_out", ["", "ss_", "modelspec.hash_sha256"])
def test_hashes_are_those_of_the_new_file(width: int, left_out: str, tmp_path: Path) -> None:
    notes = {key: value for key, value in NOTES.items() if not left_out or not key.startswith(left_out)}
    source, half = _file(tmp_path / "a.safetensors", notes, width), tmp_path / "half.safetensors"
    combine({source: 0.5}, output=half)
    resize(source, rank=3, output=tmp_path / "small.safetensors")
    convert(source, "kohya", output=tmp_path / "kohya.safetensors")
    convert(source, "bare", output=tmp_path / "bare.safetensors")
    for name in ("half", "small", "kohya", "bare"):
        written = _notes(tmp_path / f"{name}.safetensors")
        wanted = {key: value for key, value in _as_sd_scripts(tmp_path / f"{name}.safetensors").items() if key in notes}
        assert {key: written[key] for key in wanted} == wanted, name
        assert {key: value for key, value in written.items() if key not in wanted} == {
            key: value for key, value in notes.items() if key not in wanted
        }


def test_a_file_without_hashes_gets_none(tmp_path: Path) -> None:
    source = _file(tmp_path / "a.safetensors", {"ss_output_name": "dog"})
    convert(source, "kohya", output=tmp_path / "k.safetensors")
    assert _notes(tmp_path / "k.safetensors").keys() == {"ss_output_name"}


def test_what_sd_scripts_wrote_has_the_same_hash_again(tmp_path: Path) -> None:
    before = _notes(LORA)
    assert before["sshs_model_hash"] == _as_sd_scripts(LORA)["sshs_model_hash"]
    convert(LORA, "kohya", output=tmp_path / "k.safetensors", base=BASE)
    assert load_file(tmp_path / "k.safetensors").keys() == load_file(LORA).keys()
    assert _notes(tmp_path / "k.safetensors") == before


@pytest.mark.parametrize("target", ["kohya", "diffusers"])
def test_strings_survive_every_way_of_a_file(target: str, tmp_path: Path) -> None:
    before, out = _notes(LORA), tmp_path / "x.safetensors"
    convert(LORA, target, output=out, base=BASE)
    written = _notes(out)
    assert {key: written[key] for key in before if not key.startswith("sshs_")} == {
        key: value for key, value in before.items() if not key.startswith("sshs_")
    }
    assert {key: written[key] for key in written if key.startswith("sshs_")} == {
        key: value for key, value in _as_sd_scripts(out).items() if key.startswith("sshs_")
    }


@pytest.mark.parametrize("target", ["peft", "compact"])
def test_folders_carry_strings_without_hashes(target: str, tmp_path: Path) -> None:
    result = convert(_file(tmp_path / "a.safetensors", NOTES), target, output=tmp_path / "out")
    (file,) = (tmp_path / "out").glob("*.safetensors")
    kept = {key: value for key, value in NOTES.items() if "hash" not in key}
    assert _notes(file).items() >= kept.items()
    assert not any("hash" in key for key in _notes(file))
    assert not any("no place" in warning for warning in result.warnings)


def test_strings_without_a_place_are_listed(tmp_path: Path) -> None:
    source = _file(tmp_path / "a.safetensors", NOTES)
    result = convert(source, "onnx-adapter", output=tmp_path / "x.onnx_adapter")
    (told,) = [warning for warning in result.warnings if "no place" in warning]
    assert told == (
        "6 strings of its header have no place in these files: modelspec.title, modelspec.trigger_phrase, modelspec.usage_hint, "
        "note, ss_output_name, ss_tag_frequency"
    )
