# SPDX-License-Identifier: Apache-2.0
"""Files whose scale is known to be wrong are told apart from those whose scale is right, and the warning says by how much."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from safetensors.numpy import save_file

from surgery import combine, convert, inspect, merge
from surgery_formats.adapters.registry import read_adapter
from surgery_formats.errors import MalformedError
from tests.support.adapter_files import GOLDEN, draw, peft_deltas, write_peft
from tests.support.combinations import OneLayer

Q = "base_model.model.model.layers.0.self_attn.q_proj"
M = "lora_unet_down_blocks_0_attentions_0_proj_in"


def combined_by_peft(folder: Path, *, rslora: bool = False, kind: str = "svd", alpha: int = 16) -> Path:
    """What PEFT's own ``add_weighted_adapter`` makes of two adapters."""

    torch.manual_seed(0)
    config = peft.LoraConfig(r=8, lora_alpha=alpha, use_rslora=rslora, target_modules=["q_proj"])
    model = peft.get_peft_model(OneLayer(), config, adapter_name="a")
    model.add_adapter("b", config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_()
    model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "sum", combination_type=kind, svd_rank=16)
    model.save_pretrained(folder)
    return folder


def said_by(path: Path) -> str:
    found = inspect(path)
    return "\n".join(found.traps)  # type: ignore[union-attr]


def set_version(folder: Path, version: str | None) -> Path:
    config = json.loads((folder / "adapter_config.json").read_text())
    config.pop("peft_version", None)
    (folder / "adapter_config.json").write_text(json.dumps(config | ({"peft_version": version} if version else {})))
    return folder


@pytest.mark.parametrize(("version", "told"), [("0.20.0", True), ("0.18.1", True), (None, True), ("0.21.0", False)])
def test_combinations_by_svd_of_old_versions_of_peft(tmp_path: Path, version: str | None, told: bool) -> None:
    folder = set_version(combined_by_peft(tmp_path) / "sum", version)
    assert ("orthonormal" in said_by(folder)) is told
    assert any("orthonormal" in one for one in combine([(folder, 0.5)], dry_run=True).warnings) is told
    assert any("orthonormal" in one for one in convert(folder, "mlx", dry_run=True).warnings) is told


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_factors_that_were_trained_are_not_taken_for_an_svd(tmp_path: Path, dtype: type) -> None:
    a = draw(1, 4, 48)
    a /= np.linalg.norm(a, axis=1, keepdims=True)  # rows of length one, but at an angle
    trained = write_peft(
        tmp_path / "t", {f"{Q}.lora_A.weight": a.astype(dtype), f"{Q}.lora_B.weight": draw(2, 40, 4)}, r=4, lora_alpha=4
    )
    assert read_adapter(trained).examine() == ()
    straight = np.linalg.qr(a.T)[0].T.astype(dtype)
    made = {f"{Q}.lora_A.weight": np.ascontiguousarray(straight), f"{Q}.lora_B.weight": draw(2, 40, 4)}
    assert read_adapter(write_peft(tmp_path / "s", made, r=4, lora_alpha=4)).examine()
    assert read_adapter(write_peft(tmp_path / "u", made, r=4, lora_alpha=8)).examine() == ()


def test_rslora_that_peft_combined_is_too_strong_and_the_warning_says_by_how_much(tmp_path: Path) -> None:
    folder = combined_by_peft(tmp_path, rslora=True, kind="cat") / "sum"
    wanted = sum(peft_deltas(tmp_path / side)["q_proj"] for side in "ab")
    got = peft_deltas(folder)["q_proj"]
    times = float((got * wanted).sum() / (wanted * wanted).sum())
    assert times == pytest.approx(4.0, rel=1e-5)  # of rank 16: PEFT's fault, shown here
    assert "4 times too strongly" in said_by(folder)
    assert "weight 0.25" in said_by(folder)
    combine([(folder, 0.25)], output=tmp_path / "right")
    assert np.abs(peft_deltas(tmp_path / "right")["q_proj"] - wanted).max() < 1e-5 * np.abs(wanted).max()
    assert "too strongly" not in said_by(tmp_path / "a")


def kohya(path: Path, rank: int, alpha: float | None, **metadata: str) -> Path:
    tensors = {f"{M}.lora_down.weight": draw(1, rank, 6), f"{M}.lora_up.weight": draw(2, 8, rank)}
    if alpha is not None:
        tensors[f"{M}.alpha"] = np.array(alpha, np.float32)
    save_file(tensors, path, metadata or None)
    return path


def test_a_file_of_merge_lora_concat(tmp_path: Path) -> None:
    joined = kohya(tmp_path / "c.safetensors", 8, 2.0, ss_network_dim="4", ss_network_alpha="2.0")
    assert "--concat" in said_by(joined)
    assert "0.5 of its strength" in said_by(joined)


def test_projections_that_were_trained_in_parts(tmp_path: Path) -> None:
    """sd-scripts 48d368f, ``lora_sd3.py`` and ``lora_flux.py``: run there, such a file gives 1/3 of what was trained, 1/4 of linear1."""
    module = "lora_unet_joint_blocks_0_x_block_attn"
    tensors = {
        f"{module}_qkv.lora_down.weight": draw(1, 12, 6),
        f"{module}_qkv.lora_up.weight": draw(2, 18, 12),
        f"{module}_proj.lora_down.weight": draw(3, 4, 6),
        f"{module}_proj.lora_up.weight": draw(4, 6, 4),
        **{f"{module}_{end}.alpha": np.array(2, np.float32) for end in ("qkv", "proj")},
    }
    for on in ("True", "False"):
        said = {"ss_network_dim": "4", "ss_network_alpha": "2.0", "ss_network_args": f'{{"split_qkv": "{on}"}}'}
        save_file(tensors, tmp_path / "x.safetensors", said)
        assert ("1 fused projections act at 1/3 of their strength" in said_by(tmp_path / "x.safetensors")) is (
            on == "True"
        )
    alone = {key: value for key, value in tensors.items() if "_qkv" in key}
    save_file(alone, tmp_path / "x.safetensors", said | {"ss_network_args": '{"split_qkv": "True"}'})
    assert "--concat" not in said_by(tmp_path / "x.safetensors")


def test_a_file_of_a_merge_script(tmp_path: Path) -> None:
    facts = {"ss_network_dim": "4", "ss_network_alpha": "2.0", "modelspec.merged_from": "a, b"}
    assert "merge_lora.py squares the ratios" in said_by(kohya(tmp_path / "m.safetensors", 4, 2.0, **facts))


def test_a_lost_alpha_is_taken_from_the_metadata_and_said_so(tmp_path: Path) -> None:
    lost = kohya(tmp_path / "l.safetensors", 4, None, ss_network_dim="4", ss_network_alpha="1")
    assert "their scale is 0.25 by ss_network_alpha" in said_by(lost)
    ((update,),) = read_adapter(lost).updates.values()
    assert update.scale == 0.25
    assert said_by(kohya(tmp_path / "n.safetensors", 4, None)) == "1 modules without alpha: their scale is 1"


@pytest.mark.parametrize("dim", ["4", "Dynamic", "None", "nan", "-4", "8", ""])
def test_files_that_are_as_they_should_be(tmp_path: Path, dim: str) -> None:
    assert said_by(kohya(tmp_path / "k.safetensors", 4, 2.0, ss_network_dim=dim, ss_network_alpha="2")) == ""


def test_alphas_of_diffusers_conversion_are_told_by_their_type(tmp_path: Path) -> None:
    """diffusers 0.42.0, ``convert_state_dict_to_kohya``: ``torch.tensor(len(weight))``, whatever alpha the LoRA had."""
    factors = {f"{M}.lora_down.weight": draw(1, 4, 6), f"{M}.lora_up.weight": draw(2, 8, 4)}
    for alpha, told in ((np.array(4), True), (np.array(8), False), (np.array(4, np.float32), False)):
        save_file({**factors, f"{M}.alpha": alpha}, tmp_path / "x.safetensors")
        assert ("convert_state_dict_to_kohya" in said_by(tmp_path / "x.safetensors")) is told
    save_file({**factors, f"{M}.alpha": np.array(4)}, tmp_path / "x.safetensors")
    assert any("alpha = rank" in one for one in convert(tmp_path / "x.safetensors", "kohya", dry_run=True).warnings)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [('{"algo": "glora", "rs_lora": "True"}', True), ('{"rs_lora": "False"}', False), ("{", False), ("[]", False)],
)
def test_glora_whose_alpha_leaves_out_the_root_of_its_rank(arguments: str, told: bool, tmp_path: Path) -> None:
    tensors = {
        f"{M}.a1.weight": draw(1, 6, 2),
        f"{M}.a2.weight": draw(2, 2, 6),
        f"{M}.b1.weight": draw(3, 8, 2),
        f"{M}.b2.weight": draw(4, 2, 6),
        f"{M}.alpha": np.array(1, np.float32),
    }
    save_file(tensors, tmp_path / "x.safetensors", {"ss_network_args": arguments})
    assert ("root of the rank" in said_by(tmp_path / "x.safetensors")) is told


def test_a_dora_that_torchtune_exported_is_named(tmp_path: Path) -> None:
    folder = GOLDEN / "torchtune/llama-dora/epoch"
    with pytest.raises(MalformedError, match="use_dora is false") as caught:
        read_adapter(folder)
    assert "adapter_model.pt" in (caught.value.hint or "")
    assert read_adapter(folder / "adapter_model.pt").updates
    factors = {f"{Q}.lora_A.weight": draw(1, 4, 6), f"{Q}.lora_B.weight": draw(2, 8, 4)}
    other = write_peft(tmp_path / "x", {**factors, f"{Q}.lora_magnitude_vector": draw(3, 8)})
    with pytest.raises(MalformedError, match="use_dora is false") as caught:
        read_adapter(other)
    assert caught.value.hint is None


def test_a_merge_says_what_torchtune_s_export_of_qwen2_is(tmp_path: Path) -> None:
    folder = GOLDEN / "torchtune/qwen2"
    said = merge(folder / "base", folder / "epoch", output=tmp_path / "out").warnings
    assert any("rows of q_proj and k_proj are in a wrong order" in one for one in said)
    assert "rows of q_proj and k_proj are in a wrong order" in said_by(folder / "epoch")
