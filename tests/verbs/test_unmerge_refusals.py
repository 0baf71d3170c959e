# SPDX-License-Identifier: Apache-2.0
"""Taking a merge back with other adapters, another model or a damaged file: a refusal that says which, or the base itself."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

import surgery
from surgery_formats.errors import FitError, MalformedError, OutputExistsError, ProofError, SurgeryError
from surgery_formats.models.side_files import BASE_ROUNDING
from tests.support.kit import make_base, make_lora


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    return make_base(tmp_path / "base"), make_lora(tmp_path / "lora")


class TestWithTheWrongThings:
    """What was kept belongs to one model, one list of adapters, and their weights."""

    @pytest.fixture
    def merged(self, pair: tuple[Path, Path], tmp_path: Path) -> Path:
        surgery.merge(pair[0], (pair[1], 0.5), output=tmp_path / "out", reversible=True)
        return tmp_path / "out"

    def refused(self, tmp_path: Path, match: str, *words: object, error: type = FitError, **options: object) -> None:
        before = set(os.listdir(tmp_path))
        with pytest.raises(error, match=match):
            surgery.unmerge(*words, output=tmp_path / "back", **options)
        assert set(os.listdir(tmp_path)) == before

    def test_another_weight(self, merged: Path, tmp_path: Path) -> None:
        self.refused(
            tmp_path, rf"was merged with the weight 0\.5, not 1; write {tmp_path}/lora=0\.5", merged, tmp_path / "lora"
        )

    def test_another_adapter(self, merged: Path, tmp_path: Path) -> None:
        other = make_lora(tmp_path / "other", strength=0.4)
        told = (
            r"another adapter was merged: 'lora' with the weight 0\.5 \(content \w{8}\); this one has the content \w{8}"
        )
        self.refused(tmp_path, told, merged, (other, 0.5))

    def test_more_adapters(self, merged: Path, tmp_path: Path) -> None:
        lora = tmp_path / "lora"
        self.refused(tmp_path, "1 adapters were merged, 2 are given", merged, [(lora, 0.5), (lora, 0.5)])

    def test_another_model(self, merged: Path, tmp_path: Path) -> None:
        file, lora = merged / BASE_ROUNDING, (tmp_path / "lora", 0.5)
        self.refused(tmp_path, "is not the model", tmp_path / "base", lora, base_rounding=file)

    def test_a_changed_tensor(self, merged: Path, tmp_path: Path) -> None:
        tensors = load_file(merged / "model.safetensors")
        tensors["model.norm.weight"] += 1  # copied, not computed
        save_file(tensors, merged / "model.safetensors", {"format": "pt"})
        self.refused(tmp_path, "content id", merged, (tmp_path / "lora", 0.5), error=ProofError)

    def test_a_changed_side_file(self, merged: Path, tmp_path: Path) -> None:
        (merged / "tokenizer.json").write_text("{ }")
        self.refused(tmp_path, "not as the merge left it", merged, (tmp_path / "lora", 0.5), error=MalformedError)

    def test_no_such_file(self, merged: Path, tmp_path: Path) -> None:
        lora, absent = (tmp_path / "lora", 0.5), tmp_path / "absent"
        self.refused(tmp_path, "No such file", merged, lora, error=SurgeryError, base_rounding=absent)
        file = merged / "model.safetensors"
        self.refused(tmp_path, "not a file of what", merged, lora, error=MalformedError, base_rounding=file)

    def test_an_output_that_is_there(self, merged: Path, tmp_path: Path) -> None:
        (tmp_path / "back").mkdir()
        (tmp_path / "back" / "file").touch()
        self.refused(tmp_path, "already exists", merged, (tmp_path / "lora", 0.5), error=OutputExistsError)

    def test_damaged_bytes_give_the_base_or_an_error(self, merged: Path, tmp_path: Path) -> None:
        """Any byte may be wrong: what comes out is the base, or a fault of this program's own."""
        good = (merged / BASE_ROUNDING).read_bytes()
        rng, refused = np.random.default_rng(0), 0
        base = (tmp_path / "base" / "model.safetensors").read_bytes()
        for number in range(150):
            data = bytearray(good)
            for _ in range(int(rng.integers(1, 4))):
                at = int(rng.integers(len(data) if number % 2 else 3000))
                data[at] = int(rng.integers(256))
            data = data[: int(rng.integers(len(data)))] if number % 7 == 0 else data
            (tmp_path / "bad").write_bytes(data)
            try:
                surgery.unmerge(
                    merged, (tmp_path / "lora", 0.5), output=tmp_path / "back", base_rounding=tmp_path / "bad"
                )
            except SurgeryError:
                refused += 1
                assert not (tmp_path / "back").exists()
                continue
            assert (tmp_path / "back" / "model.safetensors").read_bytes() == base
            shutil.rmtree(tmp_path / "back")
        assert refused > 100
