# SPDX-License-Identifier: Apache-2.0
"""LyCORIS' files: each algorithm does to a base what LyCORIS' own forward does, and is written again as it was."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from surgery import combine, convert, diff, inspect
from surgery_formats.adapters.kohya import KOHYA
from surgery_formats.adapters.registry import read_adapter
from surgery_formats.errors import FitError, NothingChangedError
from surgery_formats.testing.format import save
from surgery_formats.updates import LoKr, OutputRotation
from tests.support.adapter_files import GOLDEN, assert_close, assert_expected, draw, merged, write_base

FOLDER = GOLDEN / "lycoris"
BASE = FOLDER / "base.safetensors"
FILES = json.loads((FOLDER / "expected.json").read_text())["files"]
KEY = "lora_unet_blocks_0_to_q"


@pytest.mark.parametrize("name", FILES)
def test_it_does_what_lycoris_own_forward_does(name: str, tmp_path: Path) -> None:
    file = FOLDER / name / "adapter.safetensors"
    assert read_adapter(file).unconsumed() == ()
    assert_expected(BASE, merged(BASE, file, tmp_path / "out"), FOLDER / name / "expected.safetensors")


@pytest.mark.parametrize("name", FILES)
def test_it_is_written_again_under_its_own_keys_without_a_base(name: str, tmp_path: Path) -> None:
    """Every key, type, shape and value; a core is multiplied into the factor beside it."""
    file = FOLDER / name / "adapter.safetensors"
    rendering = KOHYA.render(read_adapter(file), None)
    assert all(entry.outcome != "dropped" for entry in rendering.entries)
    before, written = load_file(file), load_file(save(rendering, KOHYA, tmp_path))
    if name == "locon-core":
        before = {key: value for key, value in before.items() if not key.endswith("lora_mid.weight")}
        assert before.keys() == written.keys()
    else:
        assert {key: value.shape for key, value in before.items()} == {k: v.shape for k, v in written.items()}
        assert all(np.array_equal(written[key], value) for key, value in before.items())
    saved = tmp_path / "again.safetensors"
    save_file(written, saved)
    assert_expected(BASE, merged(BASE, saved, tmp_path / "out"), FOLDER / name / "expected.safetensors")


@pytest.mark.parametrize(
    "name", ["locon", "loha", "loha-alpha", "lokr-alpha", "lokr-both", "lokr-whole", "full", "norm"]
)
def test_what_adds_is_scaled_without_a_base(name: str, tmp_path: Path) -> None:
    file, half = FOLDER / name / "adapter.safetensors", tmp_path / "half.safetensors"
    combine({file: 0.5}, output=half)
    assert load_file(half).keys() == load_file(file).keys()
    before, wanted = load_file(BASE), load_file(FOLDER / name / "expected.safetensors")
    got = merged(BASE, half, tmp_path / "out")
    for key, value in wanted.items():
        step = value.astype(np.float64) - before[key]
        assert abs(got[key] - before[key] - 0.5 * step).max() <= 1e-6 * abs(value).max(), key


@pytest.mark.parametrize("name", ["dora-out", "doha", "ia3-in", "glora", "oft", "boft"])
def test_what_depends_on_the_base_is_not_scaled_without_one(name: str, tmp_path: Path) -> None:
    with pytest.raises(FitError, match=r"depends on the base"):
        combine({FOLDER / name / "adapter.safetensors": 0.5}, output=tmp_path / "half.safetensors")


@pytest.mark.parametrize(("name", "rank"), [("loha-core", 4), ("lokr-both", 2)])
def test_products_become_loras_exactly(name: str, rank: int, tmp_path: Path) -> None:
    file = FOLDER / name / "adapter.safetensors"
    convert(file, "peft", output=tmp_path / "peft", base=BASE, as_lora=True)
    wanted = load_file(FOLDER / name / "expected.safetensors")
    got = merged(BASE, tmp_path / "peft", tmp_path / "out")
    assert all(abs(got[key] - value).max() <= 1e-6 for key, value in wanted.items())
    assert max(inspect(tmp_path / "peft").ranks) == rank


_REFORMED = {"glora": None, "oft": None, "loha-alpha": (1,), "lokr-alpha": (1,), "dokr": (1,), "doha": (1,)}


@pytest.mark.parametrize("name", [name for name in FILES if name in _REFORMED])
def test_alphas_are_left_out_or_have_an_axis(name: str, tmp_path: Path) -> None:
    """What says the scale is no factor: whether it is there, and its shape, make no other change."""
    tensors, shape = load_file(FOLDER / name / "adapter.safetensors"), _REFORMED[name]
    alphas = [key for key in tensors if key.endswith(".alpha")]
    for key in alphas:
        alpha = tensors.pop(key)
        if shape is not None:
            tensors[key] = alpha.reshape(shape)
        elif "glora" in name:
            tensors[key.replace("alpha", "b1.weight")] *= alpha / tensors[key.replace("alpha", "a1.weight")].shape[1]
            tensors[key.replace("alpha", "a1.weight")] *= alpha / tensors[key.replace("alpha", "a1.weight")].shape[1]
    assert alphas
    file = tmp_path / "a.safetensors"
    save_file(tensors, file)
    wanted = merged(BASE, file, tmp_path / "out")
    for target in ("kohya", "comfyui"):
        convert(file, target, base=BASE, output=tmp_path / f"{target}.safetensors")
        assert_close(merged(BASE, tmp_path / f"{target}.safetensors", tmp_path / target), wanted)


def test_a_scale_inside_a_decomposed_update_is_compared(tmp_path: Path) -> None:
    """It is no setting of its own, and no factor."""
    file = FOLDER / "doha" / "adapter.safetensors"
    tensors = load_file(file)
    for key in [key for key in tensors if key.endswith(".alpha")]:
        tensors[key] = np.array(1.5 * tensors[key], np.float32)
    save_file(tensors, tmp_path / "stronger.safetensors")
    assert not diff(file, tmp_path / "stronger.safetensors").equal
    assert diff(file, file).equal


def test_a_difference_of_a_bias_needs_no_lora_beside_it(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", {"conv.weight": (6, 4, 3, 3), "conv.bias": (6,)}, {})
    file = tmp_path / "a.safetensors"
    save_file({"unet.conv.diff": draw(1, 6, 4, 3, 3), "unet.conv.diff_b": draw(2, 6)}, file)
    convert(file, "diffusers", base=base, output=tmp_path / "b.safetensors")
    assert load_file(tmp_path / "b.safetensors").keys() == load_file(file).keys()


def test_a_difference_of_a_matrix_becomes_a_lora_of_the_rank_that_is_chosen(tmp_path: Path) -> None:
    """Without a rank it is asked for; a bias beside it stays what it is."""
    base = write_base(tmp_path / "base", {"conv.weight": (6, 4, 3, 3), "conv.bias": (6,)}, {})
    file, change, bias = tmp_path / "a.safetensors", draw(1, 6, 4, 3, 3), draw(2, 6)
    save_file({"lora_unet_conv.diff": change, "lora_unet_conv.diff_b": bias}, file)
    with pytest.raises(FitError, match="a rank that is chosen"):
        convert(file, "diffusers", base=base, output=tmp_path / "b.safetensors", as_lora=True)
    for rank in (2, 6):
        convert(file, "diffusers", base=base, output=tmp_path / f"{rank}.safetensors", as_lora=True, rank=rank)
        before, after = (
            load_file(base / "model.safetensors"),
            merged(base, tmp_path / f"{rank}.safetensors", tmp_path / f"m{rank}"),
        )
        u, s, v = np.linalg.svd(change.reshape(6, -1), full_matrices=False)
        best = ((u[:, :rank] * s[:rank]) @ v[:rank]).reshape(change.shape)
        assert np.allclose(after["conv.weight"] - before["conv.weight"], best, atol=1e-4)
        assert np.allclose(after["conv.bias"] - before["conv.bias"], bias, atol=1e-6)


def test_alpha_counts_for_nothing_where_both_factors_of_a_lokr_are_whole(tmp_path: Path) -> None:
    tensors = {f"{KEY}.lokr_w1": draw(1, 4, 4), f"{KEY}.lokr_w2": draw(2, 8, 4), f"{KEY}.alpha": np.float32(9.9e9)}
    save_file({key: np.asarray(value) for key, value in tensors.items()}, tmp_path / "a.safetensors")
    ((update,),) = read_adapter(tmp_path / "a.safetensors").updates.values()
    assert isinstance(update, LoKr)
    assert (update.scale, update.alpha) == (1.0, None)
    before = load_file(BASE)["blocks.0.to_q.weight"]
    got = merged(BASE, tmp_path / "a.safetensors", tmp_path / "m")["blocks.0.to_q.weight"]
    wanted = before + np.kron(tensors[f"{KEY}.lokr_w1"], tensors[f"{KEY}.lokr_w2"])
    assert np.allclose(got, wanted, atol=1e-5)


def test_a_constraint_of_zero_is_none_for_lycoris_and_final_for_sd_scripts(tmp_path: Path) -> None:
    blocks, zero = draw(3, 8, 4, 4), np.zeros((), np.float32)
    for prefix, limit in (("lora_unet", None), ("oft_unet", 0.0)):
        file = tmp_path / f"{prefix}.safetensors"
        save_file({f"{prefix}_blocks_0_to_q.oft_blocks": blocks, f"{prefix}_blocks_0_to_q.alpha": zero}, file)
        adapter = read_adapter(file)
        ((update,),) = adapter.updates.values()
        assert isinstance(update, OutputRotation)
        assert update.limit == limit
        assert any("alpha 0" in issue for issue in adapter.stated_issues) == (limit is None)
    with pytest.raises(NothingChangedError):  # nothing passes: what sd-scripts merges is the base
        merged(BASE, tmp_path / "oft_unet.safetensors", tmp_path / "m")


def test_the_sd_scripts_rotation_is_its_own_forward(tmp_path: Path) -> None:
    """sd-scripts ``networks/oft.py``: Q clamped to alpha times the outputs, R^T on blocks of rows."""
    blocks, alpha = 0.3 * draw(4, 8, 4, 4), np.float32(0.01)
    file = tmp_path / "oft.safetensors"
    save_file({"oft_unet_blocks_0_to_q.oft_blocks": blocks, "oft_unet_blocks_0_to_q.alpha": np.asarray(alpha)}, file)
    before = load_file(BASE)["blocks.0.to_q.weight"].astype(np.float64)
    Q = (blocks - blocks.transpose(0, 2, 1)).astype(np.float64)
    norm = np.linalg.norm(Q)
    Q *= (min(norm, float(alpha) * 32) + 1e-8) / (norm + 1e-8)
    R = (np.eye(4) + Q) @ np.linalg.inv(np.eye(4) - Q)
    wanted = np.einsum("knm,knp->kmp", R, before.reshape(8, 4, 16)).reshape(32, 16)
    got = merged(BASE, file, tmp_path / "m")["blocks.0.to_q.weight"]
    assert abs(got - wanted).max() <= 1e-6 * abs(wanted - before).max()
