# SPDX-License-Identifier: Apache-2.0
"""A reversible merge taken back is the base bit for bit, for every kind that merges."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import surgery
from surgery.engine.undo.sidecar import open_sidecar
from surgery_formats.adapters.registry import read_adapter
from surgery_formats.errors import FitError, ProofError
from surgery_formats.files.output.manifest import verify_folder
from surgery_formats.models.checkpoint import open_checkpoint
from surgery_formats.models.identity import content_id
from surgery_formats.models.side_files import BASE_ROUNDING
from surgery_formats.testing.plugins import installed_project
from surgery_formats.updates import Update
from tests.oracles.cases import CASES, Case, build
from tests.support.kit import ROOT, make_base, make_lora, spawn
from tests.support.quantised_folders import FORMATS, quantise_folder
from tests.support.toy_kinds import adapter_of, gained_lora, halves, outer_sine
from tests.support.toy_kinds_of_a_weight import lengthened, overwritten, row_gain

TOY_STORAGE = Path(__file__).parents[1] / "plugins" / "toy_storage"
sys.path.insert(0, str(TOY_STORAGE))


def same_files(base: Path, back: Path) -> None:
    """Every file of a base is back as it was; nothing but a manifest is new."""
    names = {str(path.relative_to(base)) for path in base.rglob("*") if path.is_file()}
    assert {str(path.relative_to(back)) for path in back.rglob("*") if path.is_file()} == names | {
        "surgery_manifest.json"
    }
    for name in names:
        assert (base / name).read_bytes() == (back / name).read_bytes(), name


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    return make_base(tmp_path / "base"), make_lora(tmp_path / "lora")


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_every_merge_is_taken_back_bit_for_bit(case: Case, tmp_path: Path) -> None:
    built = build(case, tmp_path)
    result = surgery.merge(built.base, built.adapters, output=tmp_path / "out", reversible=True)
    verify_folder(tmp_path / "out")
    assert result.rounding_nbytes == (tmp_path / "out" / BASE_ROUNDING).stat().st_size
    back = surgery.unmerge(tmp_path / "out", built.adapters, output=tmp_path / "back")
    verify_folder(tmp_path / "back")
    before, after = open_checkpoint(built.base), open_checkpoint(tmp_path / "back")
    assert content_id(after) == back.base_id
    if all(shard.container == "safetensors" for part in before.components.values() for shard in part.shards):
        assert content_id(before) == back.base_id
        assert not before.path.is_dir() or {p.name for p in (tmp_path / "back").iterdir()} >= {
            p.name for p in before.path.iterdir() if p.is_file()
        }
    for name, component in before.components.items():
        for tensor in component.tensors.values():
            twin = after.components[name].tensors[tensor.name]
            assert (tensor.dtype, tensor.shape) == (twin.dtype, twin.shape)
            assert tensor.read().tobytes() == twin.read().tobytes(), tensor.name


@pytest.mark.parametrize("stored", ["keep", "fp32", "bf16", "fp16"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_every_type_is_taken_back_from_every_type(dtype: torch.dtype, stored: str, tmp_path: Path) -> None:
    base, lora = make_base(tmp_path / "base", dtype), make_lora(tmp_path / "lora", strength=0.05)
    (base / "README.md").write_text("of the base")
    surgery.merge(base, lora, output=tmp_path / "out", dtype=stored, shard_size=9000, reversible=True)
    surgery.unmerge(tmp_path / "out", lora, output=tmp_path / "back")
    same_files(base, tmp_path / "back")


@pytest.mark.parametrize("kind", [gained_lora, outer_sine, row_gain, halves, overwritten, lengthened])
@pytest.mark.parametrize("weight", [1.0, 0.5])
def test_kinds_that_the_product_does_not_know_are_taken_back(
    kind: Callable[[Path], Update], weight: float, tmp_path: Path
) -> None:
    base = make_base(tmp_path / "base")
    adapter = adapter_of(kind(tmp_path / "adapter.safetensors"))
    surgery.merge(base, adapter * weight, output=tmp_path / "out", reversible=True)
    surgery.unmerge(tmp_path / "out", adapter * weight, output=tmp_path / "back")
    same_files(base, tmp_path / "back")


@pytest.mark.parametrize("quantized", ["requantize", "dequantize"])
@pytest.mark.parametrize("shards", [1, 3])
def test_a_quantised_base_is_taken_back_with_its_codes_and_scales(quantized: str, shards: int, tmp_path: Path) -> None:
    from tests.verbs.test_quantised_base import quantise

    with installed_project(TOY_STORAGE):
        base, lora = quantise(tmp_path / "base", band=2, shards=shards), make_lora(tmp_path / "lora", 1.0)
        surgery.merge(base, lora, output=tmp_path / "out", quantized=quantized, reversible=True)
        surgery.unmerge(tmp_path / "out", lora, output=tmp_path / "back")
        same_files(base, tmp_path / "back")


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("quantized", ["requantize", "dequantize"])
def test_codes_are_taken_back(name: str, quantized: str, tmp_path: Path) -> None:
    """By what differs from the codes nearest to the estimate, if the format was kept; else whole."""
    base, lora = quantise_folder(ROOT / "examples" / "base", tmp_path / "base", name), ROOT / "examples" / "lora"
    surgery.merge(base, lora, output=tmp_path / "out", quantized=quantized, reversible=True)
    surgery.unmerge(tmp_path / "out", lora, output=tmp_path / "back")
    same_files(base, tmp_path / "back")
    kept = tmp_path / "out" / BASE_ROUNDING
    modes = {record["mode"] for record in open_sidecar(kept).facts["weights"].values()}
    assert modes == ({"codes"} if quantized == "requantize" else set())
    if quantized == "requantize":
        limit = (
            0.32 if name == "int8" else 0.15
        )  # int8's scales are chosen anew, so that its codes are less foreseeable
        assert kept.stat().st_size < limit * (base / "model.safetensors").stat().st_size


def test_what_was_kept_for_codes_is_of_no_use_to_elements_and_a_plan_promises_the_base(tmp_path: Path) -> None:
    base, lora = quantise_folder(ROOT / "examples" / "base", tmp_path / "base", "nf4"), ROOT / "examples" / "lora"
    surgery.merge(base, lora, output=tmp_path / "out", quantized="requantize", reversible=True)
    surgery.merge(base, lora, output=tmp_path / "other")
    planned = surgery.unmerge(tmp_path / "out", lora, dry_run=True)
    assert not planned.estimated_codes
    assert planned.exact_share == 1
    kept = tmp_path / "out" / BASE_ROUNDING
    with pytest.raises(FitError, match="is not the model that this file was kept for"):
        surgery.unmerge(tmp_path / "other", lora, output=tmp_path / "back", base_rounding=kept)


def test_a_base_of_pickles_comes_back_as_safetensors_with_its_content_id(tmp_path: Path) -> None:
    base, lora = make_base(tmp_path / "base"), make_lora(tmp_path / "lora")
    tensors = load_file(base / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]  # one storage, two names
    (base / "model.safetensors").unlink()
    torch.save(tensors, base / "pytorch_model.bin")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    surgery.merge(base, lora, output=tmp_path / "out", reversible=True)
    result = surgery.unmerge(tmp_path / "out", lora, output=tmp_path / "back")
    assert result.base_id == content_id(open_checkpoint(base)) == content_id(open_checkpoint(tmp_path / "back"))
    assert (tmp_path / "back" / "config.json").read_bytes() == (base / "config.json").read_bytes()


def test_a_file_without_a_folder_is_taken_back(tmp_path: Path) -> None:
    base, lora = make_base(tmp_path / "base"), make_lora(tmp_path / "lora")
    surgery.merge(base / "model.safetensors", lora, output=tmp_path / "out", reversible=True)
    surgery.unmerge(tmp_path / "out", lora, output=tmp_path / "back")
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (base / "model.safetensors").read_bytes()


def test_cycles_do_not_drift(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, lora = pair
    for number in range(4):
        surgery.merge(base, (lora, 0.7), output=tmp_path / f"out{number}", reversible=True)
        surgery.unmerge(tmp_path / f"out{number}", (lora, 0.7), output=tmp_path / f"back{number}")
        base = tmp_path / f"back{number}"
    same_files(pair[0], base)


def test_two_merges_are_taken_back_one_after_the_other(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, lora = pair
    other = make_lora(tmp_path / "other", strength=0.3, targets=("self_attn.k_proj", "self_attn.q_proj"))
    surgery.merge(base, lora, output=tmp_path / "one", reversible=True)
    surgery.merge(tmp_path / "one", other, output=tmp_path / "two", reversible=True)
    surgery.unmerge(tmp_path / "two", other, output=tmp_path / "one-again")
    shutil.copy(tmp_path / "one" / BASE_ROUNDING, tmp_path / "kept")
    surgery.unmerge(tmp_path / "one-again", lora, output=tmp_path / "back", base_rounding=tmp_path / "kept")
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (base / "model.safetensors").read_bytes()


def test_what_was_kept_is_the_same_from_any_number_of_workers_and_from_shares(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    from surgery.engine.merge.merge_request import MergeRequest
    from surgery.engine.shares.folders import Shares, assignments, write_share

    for workers in (1, 8):
        surgery.merge(*pair, output=tmp_path / f"w{workers}", reversible=True, workers=workers)
    request = MergeRequest(str(pair[0]), ((str(pair[1]), 1.0),), reversible=True)
    for assignment in assignments(request, request.work(), tmp_path / "shared", 2):
        write_share(assignment)
    surgery.merge(*pair, output=tmp_path / "shared", engine=Shares(2), reversible=True)
    for name in os.listdir(tmp_path / "w1"):
        data = (tmp_path / "w1" / name).read_bytes()
        assert data == (tmp_path / "w8" / name).read_bytes() == (tmp_path / "shared" / name).read_bytes(), name


def test_a_merge_without_it_writes_what_it_always_wrote(pair: tuple[Path, Path], tmp_path: Path) -> None:
    surgery.merge(*pair, output=tmp_path / "plain")
    surgery.merge(*pair, output=tmp_path / "kept", reversible=True)
    assert set(os.listdir(tmp_path / "kept")) - set(os.listdir(tmp_path / "plain")) == {BASE_ROUNDING}
    for name in set(os.listdir(tmp_path / "plain")) - {"surgery_manifest.json"}:
        assert (tmp_path / "plain" / name).read_bytes() == (tmp_path / "kept" / name).read_bytes()
    surgery.merge(tmp_path / "kept", pair[1], output=tmp_path / "again")
    assert BASE_ROUNDING not in os.listdir(tmp_path / "again")  # it is not of that merge


def test_a_fault_while_the_base_is_kept_leaves_nothing(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from surgery.engine.undo import record

    monkeypatch.setattr(record, "decode", lambda *rest: np.zeros(1, np.uint16))
    with pytest.raises(ProofError, match="does not give it back"):
        surgery.merge(*pair, output=tmp_path / "out", reversible=True)
    assert set(os.listdir(tmp_path)) == {"base", "lora"}


def test_the_command(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, lora = pair
    done = spawn("merge", base, f"{lora}=0.7", "-o", tmp_path / "out", "--reversible")
    assert done.returncode == 0, done.stderr
    assert "kept beside it" in done.stdout + done.stderr
    ahead = spawn("unmerge", tmp_path / "out", f"{lora}=0.7", "--dry-run")
    assert ahead.returncode == 0, ahead.stderr
    done = spawn("unmerge", tmp_path / "out", f"{lora}=0.7", "-o", tmp_path / "back", "--json")
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)["result"]
    assert answer["base_id"] == content_id(open_checkpoint(base))
    assert answer["exact_share"] == 1
    same_files(base, tmp_path / "back")
    refused = spawn("unmerge", tmp_path / "out", lora, "-o", tmp_path / "again")
    assert refused.returncode == 4
    assert "lora=0.7" in refused.stderr


def test_an_adapter_is_read_and_given_as_well(pair: tuple[Path, Path], tmp_path: Path) -> None:
    lora = read_adapter(pair[1])
    surgery.merge(pair[0], lora * 0.25, output=tmp_path / "out", reversible=True)
    result = surgery.unmerge(surgery.open(tmp_path / "out"), lora * 0.25, output=tmp_path / "back")
    assert result.output == tmp_path / "back"
    assert result.exact_share == 1
    assert "bit for bit" in str(result)


class TestWeightsOfWhatIsNoAddition:
    """Below 0 nothing is taken back, so it is refused; above 1 it goes on along the line from the weight to the updated one."""

    @pytest.mark.parametrize("name", ["llama-dora", "llama-ia3", "llama-oft", "llama_cls-ia3"])
    def test_a_negative_one_is_refused(self, name: str, tmp_path: Path) -> None:
        built = build(CASES[name], tmp_path)
        ((adapter, _),) = built.adapters
        with pytest.raises(FitError, match=r"a weight of -1 for a .*: only additions can be subtracted") as caught:
            surgery.merge(built.base, (adapter, -1.0), output=tmp_path / "out")
        assert "surgery unmerge" in str(caught.value.hint)
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize("name", ["llama-dora", "llama-ia3", "llama-oft"])
    @pytest.mark.parametrize("weight", [0.25, 1.5])
    def test_another_goes_that_share_of_the_way_and_is_taken_back(
        self, name: str, weight: float, tmp_path: Path
    ) -> None:
        built = build(CASES[name], tmp_path)
        ((adapter, _),) = built.adapters
        surgery.merge(built.base, adapter, output=tmp_path / "whole")
        surgery.merge(built.base, (adapter, weight), output=tmp_path / "out", reversible=True)
        before, whole, part = (
            {key: tensor.read().astype(np.float64) for key, tensor in open_checkpoint(folder).main.tensors.items()}
            for folder in (built.base, tmp_path / "whole", tmp_path / "out")
        )
        for key, values in before.items():
            np.testing.assert_allclose(part[key], values + weight * (whole[key] - values), rtol=0, atol=1e-5)
        surgery.unmerge(tmp_path / "out", (adapter, weight), output=tmp_path / "back")
        same_files(built.base, tmp_path / "back")
        kept = open_sidecar(tmp_path / "out" / BASE_ROUNDING)
        sizes = [kept.parts[f"weight/{label}"].nbytes for label in kept.facts["weights"]]
        changed = [before[label].size * 4 for label in kept.facts["weights"]]
        assert sum(sizes) < 0.6 * sum(changed)  # the inverse is a good estimate

    def test_an_addition_may_be_subtracted(self, pair: tuple[Path, Path], tmp_path: Path) -> None:
        surgery.merge(pair[0], (pair[1], -1.0), output=tmp_path / "out")
