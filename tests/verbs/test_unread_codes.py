# SPDX-License-Identifier: Apache-2.0
"""Weights in a quantised format that nothing reads: one message, and never a number that was made of codes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import surgery
from surgery_formats.errors import FitError, SurgeryError
from surgery_formats.models.checkpoint import open_checkpoint
from surgery_formats.storage.unread import unread_weights
from tests.support.kit import make_base, make_lora

CODED = "model.layers.0.self_attn.q_proj"


def coded(folder: Path, method: str = "aqlm") -> Path:
    """`make_base` with its projections as indices into a codebook, a form of which no storage is known."""
    make_base(folder)
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if "_proj" in name]:
        stem, values = name.removesuffix(".weight"), tensors.pop(name)
        tensors[f"{stem}.codes"] = torch.randint(-90, 90, (len(values), values.shape[1] // 8, 1), dtype=torch.int8)
        tensors[f"{stem}.codebooks"] = torch.randn(1, 256, 1, 8).half()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    named = {"quant_method": method, "nbits_per_codebook": 8}
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": named}))
    return folder


def test_every_command_that_needs_values_says_the_same(tmp_path: Path) -> None:
    base, plain, lora = coded(tmp_path / "base"), make_base(tmp_path / "plain"), make_lora(tmp_path / "lora")
    said = []
    for command in (
        lambda: surgery.merge(base, lora, output=tmp_path / "out"),
        lambda: surgery.report(lora, base=base),
        lambda: surgery.extract_lora(base, plain, output=tmp_path / "out"),
        lambda: surgery.extract_lora(plain, base, output=tmp_path / "out"),
        lambda: surgery.convert(lora, to="mlx", base=base, output=tmp_path / "out"),
    ):
        with pytest.raises(FitError) as refused:
            command()
        assert "did you mean" not in str(refused.value)
        said.append(refused.value.message)
    assert len(set(said)) == 1
    assert said[0].startswith("is quantised (aqlm) in a form that is not read: 10 weights are stored as codes")
    assert not (tmp_path / "out").exists()


def test_inspect_shows_the_tensors_and_says_that_their_numbers_are_codes(tmp_path: Path) -> None:
    found = surgery.inspect(coded(tmp_path / "base"))
    assert "codebooks" in str(found.summary(verbose=True))
    (note,) = found.warnings
    assert "aqlm" in note
    assert "the count of parameters" in note


def test_report_counts_what_is_there_and_warns(tmp_path: Path) -> None:
    lora = make_lora(tmp_path / "lora", targets=("self_attn.q_proj",))
    base = coded(tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    save_file(tensors | {f"{CODED}.weight": torch.randn(32, 32)}, base / "model.safetensors")
    assert "counted as codes" in surgery.report(lora, base=base).warnings[0]


def test_diff_compares_the_rest_and_gives_no_total(tmp_path: Path) -> None:
    base, plain = coded(tmp_path / "base"), make_base(tmp_path / "plain")
    found = surgery.diff(base, plain)
    statuses = {one.name: one.status for one in found.tensors}
    assert {name for name, status in statuses.items() if status == "not compared"} == {
        name for name in statuses if "_proj" in name
    }
    assert statuses["lm_head.weight"] == "equal"
    assert (found.not_compared, found.difference, found.moved, found.equal) == (10, None, None, False)
    assert "10 weights, so that there is no total" in str(found)
    assert "aqlm" in found.warnings[0]


def test_diff_of_codes_with_the_same_codes_is_equal_and_with_others_is_not_compared(tmp_path: Path) -> None:
    base, other = coded(tmp_path / "base"), coded(tmp_path / "other")
    same = (base / "model.safetensors").read_bytes()
    tensors = load_file(other / "model.safetensors")
    tensors[f"{CODED}.codes"] += 1
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    found = surgery.diff(base, other)
    assert found.not_compared == 1  # the codes of the others have the same bytes
    assert (found.difference, found.moved) == (None, None)
    (other / "model.safetensors").write_bytes(same)
    assert surgery.diff(base, other).equal


def test_an_adapter_on_modules_that_are_not_quantised_merges_and_copies_the_codes(tmp_path: Path) -> None:
    base = coded(tmp_path / "base")
    lora = make_lora(tmp_path / "lora", targets=("plain",))
    tensors = load_file(base / "model.safetensors")
    for layer in range(2):
        tensors[f"model.layers.{layer}.plain.weight"] = torch.randn(32, 32).bfloat16()
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    surgery.merge(base, lora, output=tmp_path / "out")
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert after[f"{CODED}.codes"].equal(tensors[f"{CODED}.codes"])
    assert not after["model.layers.0.plain.weight"].equal(tensors["model.layers.0.plain.weight"])
    assert "quantization_config" in json.loads((tmp_path / "out" / "config.json").read_text())
    with pytest.raises(FitError, match="aqlm"):  # or scales of another type would stand beside their codes
        surgery.merge(base, lora, output=tmp_path / "other", dtype="fp32")


U8, I32, F16, F8 = torch.uint8, torch.int32, torch.float16, torch.float8_e4m3fn


@pytest.mark.parametrize(
    ("parts", "weight", "lacking"),
    [
        ({"a.qweight": (I32, (4, 32)), "a.qzeros": (I32, (1, 4))}, "a.weight", "a.scales"),
        ({"a.weight_packed": (I32, (32, 4))}, "a.weight", "a.weight_scale"),
        ({"a.weight": (U8, (512, 1)), "a.weight.absmax": (U8, (16,))}, "a.weight", "a.weight.quant_map"),
        ({"a.weight": (torch.int8, (32, 32))}, "a.weight", ""),
        ({"a.weight": (F8, (32, 32)), "a.weight_scale_inv": (torch.float32, (1, 1))}, "a.weight", ""),
        ({"a.weight.absmax": (torch.float32, (16,))}, "a.weight", "a.weight"),
        ({"a.weight.nested_absmax": (torch.float32, (1,))}, "a.weight", "a.weight"),
        ({"a.weight": (F16, (32, 32)), "a.weight.absmax": (torch.float32, (16,))}, "a.weight", "a.weight.quant_map"),
        ({"a.weight_scale_inv": (torch.float32, (1, 1))}, "a.weight", "a.weight"),
        ({"a.weight_scale": (F16, (32, 1))}, "a.weight", "a.weight_packed"),
        ({"experts.x_blocks": (U8, (2, 4, 2, 16))}, "experts.x", "experts.x_scales"),
    ],
)
def test_what_is_missing_is_named(
    parts: dict[str, tuple[torch.dtype, tuple[int, ...]]], weight: str, lacking: str, tmp_path: Path
) -> None:
    save_file(
        {name: torch.zeros(shape).to(dtype) for name, (dtype, shape) in parts.items()}, tmp_path / "m.safetensors"
    )
    tensors = open_checkpoint(tmp_path / "m.safetensors").main.tensors
    found = unread_weights(tensors, {})
    assert found is not None
    assert list(found.weights) == [weight]
    assert found.tensors == parts.keys()
    assert list(found.lacking)[:1] == ([lacking] if lacking else [])
    assert (f"without {lacking}" in found.message) == bool(lacking)


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        (
            {"weight": (U8, (32, 16)), "weight_scale": (F8, (32, 2)), "weight_scale_2": (torch.float32, ())}
            | {"pre_quant_scale": (F16, (32,))},
            "(ModelOpt with AWQ) in a form that is not read (layers multiply their inputs by pre_quant_scale first)",
        ),
        (
            {"weight": (U8, (32, 16)), "weight_scale": (F8, (128, 4)), "weight_scale_2": (torch.float32, ())}
            | {"comfy_quant": (U8, (20,))},
            "(ComfyUI) in a form that is not read (scales lie in tiles, for the tensor cores of a GPU)",
        ),
        (
            {"weight": (F8, (32, 32)), "weight_scale": (U8, (128, 4)), "comfy_quant": (U8, (20,))},
            "(ComfyUI) in a form that is not read (scales lie in tiles, for the tensor cores of a GPU)",
        ),
    ],
)
def test_the_cause_is_named_where_it_is_known(
    parts: dict[str, tuple[torch.dtype, tuple[int, ...]]], words: str, tmp_path: Path
) -> None:
    tensors = {f"a.{name}": torch.ones(shape).to(dtype) for name, (dtype, shape) in parts.items()}
    save_file(tensors, tmp_path / "m.safetensors")
    (warning,) = surgery.inspect(tmp_path / "m.safetensors").warnings
    assert words in warning
    with pytest.raises(FitError) as refused:
        open_checkpoint(tmp_path / "m.safetensors").main.check_read()
    assert words in refused.value.message


def test_scales_that_lost_their_codes_do_not_pass_in_silence(tmp_path: Path) -> None:
    base, lora = make_base(tmp_path / "base"), make_lora(tmp_path / "lora")
    tensors = load_file(base / "model.safetensors")
    del tensors[f"{CODED}.weight"]
    save_file(tensors | {f"{CODED}.weight.absmax": torch.ones(16)}, base / "model.safetensors", {"format": "pt"})
    assert f"without {CODED}.weight" in surgery.inspect(base).warnings[0]
    with pytest.raises(SurgeryError):
        surgery.merge(base, lora, output=tmp_path / "out")


def test_numbers_buffers_and_indices_are_no_codes(tmp_path: Path) -> None:
    tensors = {
        "layer.weight": torch.zeros(4, 4),
        "attention.scales": torch.zeros(4),
        "embeddings.position_ids": torch.arange(8)[None],
        "attn.bias": torch.ones(1, 1, 8, 8, dtype=torch.bool),
        "bn.num_batches_tracked": torch.tensor(3),
        "cast.weight": torch.zeros(4, 4).to(F8),  # float8 without a scale is what it says
    }
    save_file(tensors, tmp_path / "m.safetensors")
    assert unread_weights(open_checkpoint(tmp_path / "m.safetensors").main.tensors, {"quantization_config": {}}) is None


def test_names_from_files_cannot_forge_a_message(tmp_path: Path) -> None:
    base = coded(tmp_path / "base", method="\x1b[2Jgptq\nerror: all is well")
    with pytest.raises(SurgeryError) as refused:
        surgery.merge(base, make_lora(tmp_path / "lora"), output=tmp_path / "out")
    assert "\x1b" not in str(refused.value)
    assert "\n" not in str(refused.value)
