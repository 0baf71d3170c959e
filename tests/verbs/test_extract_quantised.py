# SPDX-License-Identifier: Apache-2.0
"""Adapters from pairs of which either side is quantised, and the rank at which the quantiser's rounding begins."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy
import pytest
import torch
from safetensors.torch import load_file, save_file

import surgery
from surgery.extraction.code_noise import code_noise
from surgery.extraction.pairing import Delta, Strip
from surgery_formats.arrays import as_torch
from surgery_formats.errors import NothingChangedError
from surgery_formats.models.checkpoint import open_checkpoint
from surgery_formats.storage.aligned import aligned
from surgery_formats.storage.base import read_block, read_rows
from surgery_formats.storage.code_rounding import rounding_variance
from surgery_formats.storage.quantised import is_quantised
from tests.support.kit import ROOT
from tests.support.quantised_folders import FORMATS, quantise_folder

BASE, TUNED, LORA = (ROOT / "examples" / name for name in ("base", "tuned", "lora"))


def values(folder: Path) -> dict[str, torch.Tensor]:
    """Every weight as a reader of the folder gets it."""
    return {name: as_torch(read_rows(one.storage)) for name, one in open_checkpoint(folder).main.parameters.items()}


def saved(folder: Path, tensors: dict[str, torch.Tensor], dtype: torch.dtype = torch.bfloat16) -> Path:
    """A plain copy of the example with other weights."""
    shutil.copytree(BASE, folder)
    save_file({name: tensor.to(dtype).contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folder


def with_lora(tensors: dict[str, torch.Tensor], scale: float = 1.0) -> dict[str, torch.Tensor]:
    """The weights with the example's LoRA merged."""
    config = json.loads((LORA / "adapter_config.json").read_text())
    factors, merged = load_file(LORA / "adapter_model.safetensors"), dict(tensors)
    for key in factors:
        if key.endswith(".lora_A.weight"):
            stem = key.removesuffix(".lora_A.weight")
            name = f"{stem.removeprefix('base_model.model.')}.weight"
            delta = factors[f"{stem}.lora_B.weight"].float() @ factors[key].float()
            merged[name] = merged[name].float() + scale * config["lora_alpha"] / config["r"] * delta
    return merged


@pytest.mark.parametrize("format_name", FORMATS)
@pytest.mark.parametrize("sides", ["base", "tuned", "both"])
def test_the_adapter_makes_tuned_of_base(format_name: str, sides: str, tmp_path: Path) -> None:
    base = quantise_folder(BASE, tmp_path / "base", format_name) if sides != "tuned" else BASE
    tuned = quantise_folder(TUNED, tmp_path / "tuned", format_name) if sides != "base" else TUNED
    result = surgery.extract_lora(base, tuned, output=tmp_path / "lora", rank=128, kind="lora", dtype="fp32")
    assert result.residual < 1e-5
    assert sum(row.kind == "low-rank" for row in result.rows) == 43
    surgery.merge(base, tmp_path / "lora", output=tmp_path / "out", dtype="fp32")
    wanted = values(tuned)
    for name, merged in values(tmp_path / "out").items():
        assert torch.allclose(merged, wanted[name].float(), atol=2e-5), name


@pytest.mark.parametrize("format_name", FORMATS)
def test_equal_codes_are_no_change(format_name: str, tmp_path: Path) -> None:
    one, other = (quantise_folder(BASE, tmp_path / name, format_name) for name in ("one", "other"))
    with pytest.raises(NothingChangedError):
        surgery.extract_lora(one, other, output=tmp_path / "lora")


def test_a_quantised_embedding_and_head_of_tuned(tmp_path: Path) -> None:
    """What factors cannot hold is copied by value: no adapter holds codes."""
    parts = ("_proj", "embed_tokens", "lm_head")
    base, tuned = (quantise_folder(folder, tmp_path / folder.name, "nf4", parts) for folder in (BASE, TUNED))
    result = surgery.extract_lora(
        base, tuned, output=tmp_path / "lora", rank=128, kind="lora", embeddings="full", dtype="fp32"
    )
    assert result.residual < 1e-5
    surgery.merge(base, tmp_path / "lora", output=tmp_path / "out", dtype="fp32")
    embedding = "model.embed_tokens.weight"
    assert values(tmp_path / "out")[embedding].equal(values(tuned)[embedding])


@pytest.mark.parametrize("format_name", FORMATS)
def test_a_lora_merged_into_the_dequantised_base_is_found_below_the_step(format_name: str, tmp_path: Path) -> None:
    """Both sides have the same rounded values, so that the quantiser's error is in neither difference."""
    base = quantise_folder(BASE, tmp_path / "base", format_name)
    tuned = saved(tmp_path / "tuned", with_lora(values(base)), torch.float32)
    result = surgery.extract_lora(base, tuned, output=tmp_path / "lora", rank=surgery.Rank.auto, kind="lora")
    rank = json.loads((LORA / "adapter_config.json").read_text())["r"]
    assert {row.rank for row in result.rows if row.kind == "low-rank"} == {rank}
    assert [text for text in result.quantised if "is not in" in text] == list(result.quantised)


@pytest.mark.parametrize("beyond_rounding", [False, True])
def test_a_lora_that_was_requantised_stands_out_of_one_rounding(beyond_rounding: bool, tmp_path: Path) -> None:
    """BASE's own rounding is on both sides, and TUNED's is not."""
    base = quantise_folder(BASE, tmp_path / "base", "nf4")
    surgery.merge(base, LORA, output=tmp_path / "tuned", quantized="requantize")
    result = surgery.extract_lora(
        base,
        tmp_path / "tuned",
        output=tmp_path / "lora",
        rank=surgery.Rank.auto,
        kind="lora",
        beyond_rounding=beyond_rounding,
    )
    rank = json.loads((LORA / "adapter_config.json").read_text())["r"]
    assert 1 <= max(row.rank for row in result.rows if row.kind == "low-rank") <= rank
    (finding,) = result.quantised
    assert finding.startswith("rounding to codes (NF4 in BASE and NF4 in TUNED) is in 42 of 42 differences")
    assert result.reproduced is None  # codes have no cells of a width


def test_a_lora_merged_into_the_release_stands_out_of_the_rounding_of_its_nf4(tmp_path: Path) -> None:
    """The difference has the LoRA and the error of the quantiser; what is below its edge is left out."""
    base = quantise_folder(BASE, tmp_path / "base", "nf4")
    tuned = saved(tmp_path / "tuned", with_lora(values(BASE), scale=4.0))
    result = surgery.extract_lora(base, tuned, output=tmp_path / "lora", rank=surgery.Rank.auto, kind="lora")
    rank = json.loads((LORA / "adapter_config.json").read_text())["r"]
    ranks = [row.rank for row in result.rows if row.kind == "low-rank"]
    assert min(ranks) >= 1
    assert max(ranks) <= rank
    (finding,) = result.quantised
    assert finding.startswith("rounding to codes (NF4 in BASE) is in 42 of 42 differences")
    assert json.loads((tmp_path / "lora" / "surgery_manifest.json").read_text())["quantised"] == [finding]


@pytest.mark.parametrize("format_name", ["nf4", "int8"])
def test_a_lora_merged_into_codes_stands_out_of_their_new_rounding(format_name: str, tmp_path: Path) -> None:
    """BASE's rounded values are what was rounded again; int8 keeps its scales, and some values leave their range."""
    base = quantise_folder(BASE, tmp_path / "base", format_name)
    surgery.merge(base, LORA, output=tmp_path / "tuned", quantized="requantize")
    result = surgery.unmerge(base, tmp_path / "tuned", output=tmp_path / "lora")
    assert isinstance(result, surgery.ExtractResult)
    rank = json.loads((LORA / "adapter_config.json").read_text())["r"]
    ranks = [row.rank for row in result.rows if row.kind == "low-rank"]
    assert len(ranks) == 42
    assert 5 <= min(ranks) <= max(ranks) <= rank + 1  # up to 128 without
    assert ranks.count(rank) > 30
    (finding,) = result.quantised
    assert "is in 42 of 42 differences" in finding
    assert "were rounded again from BASE's rounded values" in finding
    assert result.reproduced is None  # codes are no cells of elements
    assert "reproduced" not in str(result.summary())
    assert not result.warnings


def test_an_adapter_that_is_larger_than_the_copy_is_warned_of(tmp_path: Path) -> None:
    tensors = {name: value.float() for name, value in values(BASE).items()}
    generator = torch.Generator().manual_seed(0)
    moved = {
        name: value + 1e-3 * torch.randn(value.shape, generator=generator) if "_proj" in name else value
        for name, value in tensors.items()
    }
    base = saved(tmp_path / "base", tensors, torch.float32)
    tuned = saved(tmp_path / "tuned", moved, torch.float32)
    result = surgery.extract_lora(base, tuned, rank=surgery.Rank.auto, kind="lora", dry_run=True)
    assert result.saved < 1
    assert "the adapter is larger than TUNED" in result.warnings[-1]
    coded = surgery.extract_lora(
        base, tuned, rank=surgery.Rank.auto, kind="lora", factors="int8", allow_loss=True, dry_run=True
    )
    assert "as int8 codes it would have 1.71 MB (factors int8)" in result.warnings[-1]
    assert coded.adapter_nbytes == pytest.approx(1.71e6, rel=0.01)
    assert coded.saved > 1
    assert not any("larger than TUNED" in warning for warning in coded.warnings)
    assert not surgery.extract_lora(base, tuned, rank=128, kind="lora", dry_run=True).warnings


@pytest.mark.parametrize("format_name", FORMATS)
@pytest.mark.parametrize("sides", ["base", "tuned", "both"])
def test_the_edge_is_above_the_noise_and_near_it(format_name: str, sides: str, tmp_path: Path) -> None:
    """Against the singular values of what quantising really added to the differences."""
    base = quantise_folder(BASE, tmp_path / "base", format_name) if sides != "tuned" else BASE
    tuned = quantise_folder(TUNED, tmp_path / "tuned", format_name) if sides != "base" else TUNED
    sizes = [open_checkpoint(folder).main.parameters for folder in (base, tuned, BASE, TUNED)]
    for name in [name for name in sizes[0] if "_proj" in name]:
        old, new = aligned(sizes[0][name].storage, sizes[1][name].storage)
        strip = Strip(old, new, 0, old.shape[0])
        noise = code_noise(Delta((strip,)))
        assert noise is not None
        added = (sizes[1][name].get() - sizes[0][name].get()) - (sizes[3][name].get() - sizes[2][name].get())
        assert 1.0 < noise.edge / numpy.linalg.norm(added, 2) < 1.9, name
        assert 0.9 < noise.energy / numpy.linalg.norm(added) ** 2 < 1.6, name


@pytest.mark.parametrize("format_name", FORMATS)
def test_the_expected_error_is_the_one_that_values_have(format_name: str, tmp_path: Path) -> None:
    folder = quantise_folder(BASE, tmp_path / "base", format_name)
    for name, parameter in open_checkpoint(folder).main.parameters.items():
        storage = parameter.storage
        if not is_quantised(storage):
            continue
        rows = storage.shape[0]
        expected = rounding_variance(storage, 0, rows)
        assert numpy.array_equal(rounding_variance(storage, 3, 7), expected[3:7])
        released = open_checkpoint(BASE).main.parameters[name].get()
        error = read_block(storage, 0, rows) - (released.T if storage.transposed else released)
        assert 0.9 < float(expected.sum()) / float((error**2).sum()) < 1.4, name


def test_the_extraction_does_not_depend_on_the_number_of_threads(tmp_path: Path) -> None:
    base, tuned = (quantise_folder(folder, tmp_path / folder.name, "nf4") for folder in (BASE, TUNED))
    for workers in (1, 3):
        surgery.extract_lora(base, tuned, output=tmp_path / str(workers), rank=surgery.Rank.auto, workers=workers)
    for file in sorted((tmp_path / "1").iterdir()):
        assert file.read_bytes() == (tmp_path / "3" / file.name).read_bytes(), file.name
