# SPDX-License-Identifier: Apache-2.0
"""Without the file of what rounding lost, a merge taken back is an honest estimate, or a refusal with the reason."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import surgery
from surgery_formats.errors import FitError
from surgery_formats.models.checkpoint import open_checkpoint
from surgery_formats.storage.base import read_values
from tests.oracles.cases import CASES, build
from tests.support.kit import ROOT, make_base, make_lora
from tests.support.quantised_folders import quantise_folder


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    return make_base(tmp_path / "base"), make_lora(tmp_path / "lora")


class TestWithoutTheFile:
    """The best estimate, with how good it is; refused where it would be none."""

    def share_exact(self, base: Path, back: Path) -> dict[str, float]:
        before, after = load_file(base / "model.safetensors"), load_file(back / "model.safetensors")
        return {
            name: float((before[name].view(torch.int16) == after[name].view(torch.int16)).double().mean())
            for name in before
        }

    @pytest.mark.parametrize("strength", [0.01, 0.1, 1.0])
    def test_the_expected_share_of_exact_values_is_the_true_one(self, strength: float, tmp_path: Path) -> None:
        base, lora = make_base(tmp_path / "base"), make_lora(tmp_path / "lora", strength)
        surgery.merge(base, lora, output=tmp_path / "out")
        result = surgery.unmerge(tmp_path / "out", lora, output=tmp_path / "back")
        assert result.evidence is not None
        assert result.evidence.source == "manifest"
        assert result.base_id == ""
        assert "this is an estimate" in result.warnings[0]
        true = self.share_exact(base, tmp_path / "back")
        assert len(result.exact) == 4
        for name, expected in result.exact.items():
            assert true[name] == pytest.approx(expected, abs=0.03), name
        assert result.same_files == {"model.safetensors": False}
        said = str(result)
        assert "so says its manifest" in said
        assert "0 of 1 are the base's byte for byte, by the hashes in the manifest; the rest is near it" in said
        assert all(share == 1 for name, share in true.items() if name not in result.exact)

    def test_of_a_dequantised_base_the_expected_share_is_that_of_its_rounded_values(self, tmp_path: Path) -> None:
        base, lora = quantise_folder(ROOT / "examples" / "base", tmp_path / "base", "nf4"), ROOT / "examples" / "lora"
        surgery.merge(base, lora, output=tmp_path / "out")
        result = surgery.unmerge(tmp_path / "out", lora, output=tmp_path / "back")
        after = load_file(tmp_path / "back" / "model.safetensors")
        for name, parameter in open_checkpoint(base).components[""].parameters.items():
            values = torch.from_numpy(read_values(parameter.storage, 0, parameter.storage.shape[0])).bfloat16()
            true = float((values.reshape(after[name].shape) == after[name]).double().mean())
            assert true == pytest.approx(result.exact.get(name, 1.0), abs=0.02), name
        assert 0.7 < result.exact_share < 0.8  # 0.874 had been said, as if the base had been in bf16
        assert set(result.of_codes.kinds.values()) == {"NF4"}
        assert "the merge dequantised 42 weights of NF4: their codes and scales are lost" in str(result.warnings)
        assert "of codes (42 weights of NF4) as they round to elements" in str(result.summary())

    def test_a_merge_as_trained_does_not_give_the_release_back(self, tmp_path: Path) -> None:
        release, lora = ROOT / "examples" / "base", ROOT / "examples" / "lora"
        surgery.merge(release, lora, output=tmp_path / "out", as_trained="nf4")
        result = surgery.unmerge(tmp_path / "out", lora, dry_run=True)
        assert isinstance(result, surgery.UnmergeResult)
        assert result.of_codes.as_trained
        assert "this is not the release" in result.warnings[0]
        assert "(42 weights of NF4)" in result.warnings[0]

    def test_another_adapter_is_refused_as_such_before_its_kind_is(self, tmp_path: Path) -> None:
        base, lora = ROOT / "examples" / "base", ROOT / "examples" / "lora"
        surgery.merge(base, lora, output=tmp_path / "out")
        with pytest.raises(FitError, match="another adapter was merged"):
            surgery.unmerge(tmp_path / "out", ROOT / "examples" / "dora", output=tmp_path / "back")

    def test_of_codes_nothing_is_said_to_be_exact(self, tmp_path: Path) -> None:
        base, lora = quantise_folder(ROOT / "examples" / "base", tmp_path / "base", "nf4"), ROOT / "examples" / "lora"
        surgery.merge(base, lora, output=tmp_path / "out", quantized="requantize")
        result = surgery.unmerge(tmp_path / "out", lora, output=tmp_path / "back")
        assert not result.exact
        assert len(result.estimated_codes) == 42
        assert result.exact_share < 0.7
        assert "the nearest codes in 42 weights: how many are the base's is not known" in str(result.summary())
        before, after = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "back"))
        codes = [name for name in before if name.endswith("proj.weight")]
        assert not all(torch.equal(before[name], after[name]) for name in codes)  # it had been said of all

    def test_a_merge_with_a_residual_has_no_update_to_take_out(self, tmp_path: Path) -> None:
        base, lora = quantise_folder(ROOT / "examples" / "base", tmp_path / "base", "nf4"), ROOT / "examples" / "lora"
        surgery.merge(base, lora, output=tmp_path / "out", quantized="residual")
        shutil.rmtree(tmp_path / "out" / "adapter")
        with pytest.raises(FitError, match="hold at most a part of the update: the rest is in the LoRA beside it"):
            surgery.unmerge(tmp_path / "out", lora, output=tmp_path / "back")

    def test_an_update_too_small_to_move_a_power_of_two_comes_back_whole_and_the_manifest_shows_it(
        self, tmp_path: Path
    ) -> None:
        base, lora = make_base(tmp_path / "base"), make_lora(tmp_path / "lora", 1.0)
        for folder, name in ((base, "model.safetensors"), (lora, "adapter_model.safetensors")):
            tensors = load_file(folder / name)
            for key, tensor in tensors.items():
                if "q_proj" in key or "v_proj" in key:
                    tensors[key] = tensor.clamp(-1, 1) * (0.001 if "lora" in key else 0.2) + (
                        0 if "lora" in key else 1.5
                    )
            save_file(tensors, folder / name, {"format": "pt"})
        surgery.merge(base, (lora, 1000.0), output=tmp_path / "out")
        result = surgery.unmerge(tmp_path / "out", (lora, 1000.0), output=tmp_path / "back")
        assert result.same_files == {"model.safetensors": True}
        assert "1 of 1 are the base's byte for byte, by the hashes in the manifest\n" in str(result)
        assert result.warnings == ()
        assert (tmp_path / "back" / "model.safetensors").read_bytes() == (base / "model.safetensors").read_bytes()

    def test_without_a_manifest_the_weights_tell(self, pair: tuple[Path, Path], tmp_path: Path) -> None:
        base, lora = pair
        surgery.merge(base, lora, output=tmp_path / "out")
        (tmp_path / "out" / "surgery_manifest.json").unlink()
        result = surgery.unmerge(tmp_path / "out", lora, output=tmp_path / "back")
        assert result.evidence is not None
        assert result.evidence.source == "weights"
        assert result.evidence.share == pytest.approx(1, abs=5 * result.evidence.noise + 1e-3)
        with pytest.raises(FitError, match=r"hold -?0\.\d\d \(\+- 0\.\d\d\) times its update"):
            surgery.unmerge(base, lora, output=tmp_path / "never")
        with pytest.raises(FitError, match=r"hold 1\.99 .* times its update"):
            surgery.unmerge(tmp_path / "out", (lora, 0.5), output=tmp_path / "never")

    def test_the_manifest_names_the_adapters_and_their_weights(self, pair: tuple[Path, Path], tmp_path: Path) -> None:
        surgery.merge(pair[0], (pair[1], 0.5), output=tmp_path / "out")
        with pytest.raises(FitError, match=r"with the weight 0\.5, not 1"):
            surgery.unmerge(tmp_path / "out", pair[1], output=tmp_path / "back")
        with pytest.raises(FitError, match="another adapter was merged"):
            surgery.unmerge(tmp_path / "out", (make_lora(tmp_path / "b", 2.0), 0.5), output=tmp_path / "back")
        surgery.merge(pair[0], pair[1], output=tmp_path / "kept", reversible=True)
        surgery.unmerge(tmp_path / "kept", pair[1], output=tmp_path / "back")
        with pytest.raises(FitError, match="was not written by a merge"):
            surgery.unmerge(tmp_path / "back", pair[1], output=tmp_path / "never")

    @pytest.mark.parametrize(
        ("name", "why"),
        [
            ("llama-dora", "lengths of the rows before are not in the result"),
            ("llama_cls-ia3", "replaced"),
        ],
    )
    def test_what_has_no_inverse_is_refused_with_the_reason(self, name: str, why: str, tmp_path: Path) -> None:
        built = build(CASES[name], tmp_path)
        surgery.merge(built.base, built.adapters, output=tmp_path / "out")
        with pytest.raises(FitError, match=why):
            surgery.unmerge(tmp_path / "out", built.adapters, output=tmp_path / "back")

    @pytest.mark.parametrize("name", ["llama-ia3", "llama-oft", "llama-loha", "llama-lokr", "llama-vera"])
    def test_what_can_be_solved_is(self, name: str, tmp_path: Path) -> None:
        built = build(CASES[name], tmp_path)
        surgery.merge(built.base, built.adapters, output=tmp_path / "out")
        surgery.unmerge(tmp_path / "out", built.adapters, output=tmp_path / "back")
        before, after = open_checkpoint(built.base).main.tensors, open_checkpoint(tmp_path / "back").main.tensors
        for key, tensor in before.items():
            np.testing.assert_allclose(after[key].read(), tensor.read(), rtol=1e-4, atol=1e-5)

    def test_what_was_done_last_is_taken_back_first(self, tmp_path: Path) -> None:
        """A stretch after an addition stretches it too: in another order something else comes back."""
        addition, stretch = (build(CASES[name], tmp_path / name) for name in ("llama-vera", "llama-ia3"))
        base, adapters = addition.base, [*addition.adapters, *stretch.adapters]
        surgery.merge(base, adapters, output=tmp_path / "out")
        surgery.unmerge(tmp_path / "out", adapters, output=tmp_path / "back")
        before, after = open_checkpoint(base).main.tensors, open_checkpoint(tmp_path / "back").main.tensors
        for key, tensor in before.items():
            np.testing.assert_allclose(after[key].read(), tensor.read(), rtol=1e-4, atol=1e-5)

    def test_nothing_tells_of_a_stretch_without_a_manifest(self, tmp_path: Path) -> None:
        built = build(CASES["llama-ia3"], tmp_path)
        surgery.merge(built.base, built.adapters, output=tmp_path / "out")
        (tmp_path / "out" / "surgery_manifest.json").unlink()
        with pytest.raises(FitError, match="nothing in the files tells"):
            surgery.unmerge(tmp_path / "out", built.adapters, output=tmp_path / "back")
