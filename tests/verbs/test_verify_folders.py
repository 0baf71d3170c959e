# SPDX-License-Identifier: Apache-2.0
"""``surgery verify`` of a folder of weights: every byte of it has a hash, and computed ones are computed once more."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

import surgery
from surgery_formats.errors import FitError, MalformedError, ProofError, UsageError
from surgery_formats.models.checkpoint import open_checkpoint

EXAMPLES = Path(__file__).parents[2] / "examples"


def _flip(path: Path, place: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[place] ^= 0x41
    path.write_bytes(raw)


def test_changed_tensors_and_stray_files_of_a_merged_folder_are_caught(tmp_path: Path) -> None:
    merged = tmp_path / "merged"
    surgery.merge("examples/base", "examples/lora", output=merged)
    found = surgery.verify(merged, against="examples/base")
    assert (found.kind, found.notes, found.difference) == ("folder", (), None)
    assert surgery.verify(merged).notes == ()  # every byte has a hash
    raw = (merged / "model.safetensors").read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:start])
    for tensor, against in (("model.layers.2.mlp.up_proj.weight", None), ("model.norm.weight", "examples/base")):
        place = start + header[tensor]["data_offsets"][0]
        _flip(merged / "model.safetensors", place)
        with pytest.raises(ProofError, match=r"changed|base's") as caught:
            surgery.verify(merged, against=against)
        assert caught.value.tensor == tensor
        _flip(merged / "model.safetensors", place)
    (merged / "stray.txt").write_text("x")
    with pytest.raises(ProofError, match=r"stray\.txt"):
        surgery.verify(merged)


class TestWholeFiles:
    """Every byte of a folder of weights is known, the copied ones too."""

    @pytest.fixture
    def merged(self, tmp_path: Path) -> Path:
        surgery.merge(EXAMPLES / "base", EXAMPLES / "lora", output=tmp_path / "merged", verify_copies=True)
        return tmp_path / "merged"

    def test_a_flipped_byte_of_a_copied_tensor_is_seen_and_the_base_tells_which_it_is(self, merged: Path) -> None:
        tensor = open_checkpoint(merged).main.tensors["model.norm.weight"]
        with tensor.file.path.open("r+b") as file:
            file.seek(tensor.offset)
            file.write(b"\x77")
        with pytest.raises(ProofError, match="changed since it was written") as caught:
            surgery.verify(merged)
        assert caught.value.file == str(merged / "model.safetensors")
        with pytest.raises(ProofError, match="differs from the base's") as caught:
            surgery.verify(merged, against=EXAMPLES / "base")
        assert caught.value.tensor == "model.norm.weight"

    def test_a_flipped_byte_of_a_computed_tensor_names_it(self, merged: Path) -> None:
        tensor = open_checkpoint(merged).main.tensors["model.layers.0.self_attn.q_proj.weight"]
        with tensor.file.path.open("r+b") as file:
            file.seek(tensor.offset + 2)
            file.write(b"\x77")
        with pytest.raises(ProofError, match="changed since it was written") as caught:
            surgery.verify(merged)
        assert caught.value.tensor == tensor.name

    def test_the_digest_is_that_of_every_file_and_a_signature_may_lie_beside_them(self, merged: Path) -> None:
        (merged / "model.sig").write_text("{}")
        files = {path.name: hashlib.sha256(path.read_bytes()).digest() for path in merged.iterdir()}
        del files["model.sig"]
        found = surgery.verify(merged)
        assert found.digest == hashlib.sha256(b"".join(files[name] for name in sorted(files))).hexdigest()
        assert found.as_json()["digest"] == {"sha256": found.digest}

    def test_a_digest_that_is_not_the_files_is_refused(self, merged: Path) -> None:
        manifest = json.loads((merged / "surgery_manifest.json").read_bytes())
        manifest["digest"]["sha256"] = "0" * 64
        (merged / "surgery_manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(MalformedError, match="digest is not that of its files"):
            surgery.verify(merged)

    def test_computed_weights_are_computed_once_more(self, merged: Path) -> None:
        base, lora = EXAMPLES / "base", EXAMPLES / "lora"

        def checks(**options: Any) -> dict[str, str]:
            found = surgery.verify(merged, against=base, adapters=lora, **options)
            return {check.name: check.detail for check in found.checks}

        assert checks()["recomputed weights"].startswith("8 of 42, drawn anew")
        assert checks(recompute=3)["recomputed weights"].startswith("3 of 42")
        assert checks(recompute="all")["recomputed weights"] == "42, as base and adapters make them"
        with pytest.raises(ProofError, match="not what base and adapters make"):
            surgery.verify(merged, against=base, adapters=(lora, 0.9))
        with pytest.raises(UsageError, match="what was merged is not named"):
            surgery.verify(merged, against=base, recompute=1)
        for wrong in (0, "some", True):
            with pytest.raises(UsageError, match="is no number of weights"):
                surgery.verify(merged, against=base, adapters=lora, recompute=wrong)

    def test_what_base_and_adapters_do_not_tell_is_not_computed(self, tmp_path: Path) -> None:
        surgery.layers(EXAMPLES / "base", drop="1", output=tmp_path / "out")
        with pytest.raises(FitError, match="not written by a merge alone"):
            surgery.verify(tmp_path / "out", against=EXAMPLES / "base", adapters=EXAMPLES / "lora")

    def test_a_copy_of_a_graphs_weights_has_a_hash(self, tmp_path: Path) -> None:
        surgery.export_onnx(EXAMPLES / "base", output=tmp_path / "out")
        (weights,) = (tmp_path / "out").glob("*.safetensors")
        with weights.open("r+b") as file:
            file.seek(weights.stat().st_size - 3)
            file.write(b"\x77")
        with pytest.raises(ProofError, match="changed since it was written"):
            surgery.verify(tmp_path / "out")
