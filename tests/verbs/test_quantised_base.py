# SPDX-License-Identifier: Apache-2.0
"""A base whose weights lie in several stored tensors: a plugin's storage of one file is all that merges, diffs and reports need."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import surgery
from surgery.engine.merge.merge_plan import plan_merge
from surgery.engine.plan import PlannedFile, check_conservation
from surgery.engine.quantised.output import quantised_output
from surgery.reference import forward, open_reference
from surgery_formats.adapters.registry import read_adapter
from surgery_formats.arrays import as_torch
from surgery_formats.binding.bind import bind
from surgery_formats.errors import FitError, MalformedError, NothingChangedError
from surgery_formats.models.checkpoint import open_checkpoint
from surgery_formats.storage.base import read_rows
from surgery_formats.testing.plugins import installed_project
from tests.support.kit import ROOT, environment, make_base, make_lora

TOY = Path(__file__).parents[1] / "plugins" / "toy_storage"
sys.path.insert(0, str(TOY))
from toy_storage import CODES, SCALES, ToyWeight, quantised  # noqa: E402  # a package of its own

QUERY = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(autouse=True)
def toy() -> Iterator[None]:
    with installed_project(TOY):
        yield


def coded(values: torch.Tensor, bands: int) -> list[torch.Tensor]:
    """Codes, scales and what they stand for."""
    return [as_torch(part) for part in quantised(values.numpy(), bands, 2)]


def quantise(folder: Path, *, band: int = 1, shards: int = 1) -> Path:
    """`make_base` with the projections of its layers stored in 4 bits."""
    make_base(folder)
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if "_proj" in name]:
        values = tensors.pop(name).float()
        codes, scales, _ = coded(values, len(values) // band)
        tensors |= {name + CODES: codes, name + SCALES: scales}
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "toy4"}}))
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return folder
    (folder / "model.safetensors").unlink()
    weight_map: dict[str, str] = {}
    for number in range(shards):  # codes and scales of one weight in different files
        shard = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        mine = {name: tensor for i, (name, tensor) in enumerate(sorted(tensors.items())) if i % shards == number}
        save_file(mine, folder / shard, {"format": "pt"})
        weight_map |= dict.fromkeys(mine, shard)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Every logical weight, as a reader of the folder gets it."""
    return {name: as_torch(read_rows(one.storage)) for name, one in open_checkpoint(folder).main.parameters.items()}


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def expected(base: Path, lora: Path, weight: float = 1.0) -> dict[str, torch.Tensor]:
    """The exact values of every weight that the LoRA changes."""
    factors, found = load_file(lora / "adapter_model.safetensors"), weights(base)
    scale = json.loads((lora / "adapter_config.json").read_text())
    changed = {}
    for key in factors:
        if key.endswith(".lora_A.weight"):
            stem = key.removesuffix(".lora_A.weight")
            name = f"{stem.removeprefix('base_model.model.')}.weight"
            delta = factors[f"{stem}.lora_B.weight"].double() @ factors[key].double()
            changed[name] = found[name].double() + weight * scale["lora_alpha"] / scale["r"] * delta
    assert changed
    return changed


@pytest.mark.parametrize("shards", [1, 2, 3])
@pytest.mark.parametrize("band", [1, 8])
def test_a_merge_keeps_the_storage_and_is_the_requantised_sum(band: int, shards: int, tmp_path: Path) -> None:
    base, lora = quantise(tmp_path / "base", band=band, shards=shards), make_lora(tmp_path / "lora")
    surgery.merge(base, lora, output=tmp_path / "out", quantized="requantize")
    before, after, changed = stored(base), stored(tmp_path / "out"), expected(base, lora)
    assert after.keys() == before.keys()
    for name in before:
        weight = name.removesuffix(CODES).removesuffix(SCALES)
        if weight not in changed:
            assert after[name].equal(before[name]), name
    for name, exact in changed.items():
        codes, scales, _ = coded(exact.float(), len(exact) // band)
        assert after[name + CODES].equal(codes), name
        assert after[name + SCALES].equal(scales), name
        assert not after[name + CODES].equal(before[name + CODES])
    assert json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]


def test_the_same_bytes_whatever_the_number_of_workers(tmp_path: Path) -> None:
    base, lora = quantise(tmp_path / "base", shards=2), make_lora(tmp_path / "lora")
    for workers in (1, 4):
        surgery.merge(base, lora, output=tmp_path / str(workers), workers=workers, quantized="requantize")
    for file in sorted((tmp_path / "1").iterdir()):
        assert file.read_bytes() == (tmp_path / "4" / file.name).read_bytes(), file.name


@pytest.mark.parametrize("dtype", ["keep", "fp32", "bf16"])
def test_a_merge_to_plain_floats_dequantises_every_weight(dtype: str, tmp_path: Path) -> None:
    base, lora = quantise(tmp_path / "base"), make_lora(tmp_path / "lora")
    result = surgery.merge(base, lora, output=tmp_path / "out", dtype=dtype)
    after, changed = stored(tmp_path / "out"), expected(base, lora)
    wanted = {name: changed.get(name, values.double()) for name, values in weights(base).items()}
    assert after.keys() == wanted.keys()
    rounding = 2.0**-22 if dtype == "fp32" else 2.0**-8
    for name, values in wanted.items():
        assert float((after[name].double() - values).abs().max()) <= rounding * float(values.abs().max()), name
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    sources = json.loads((tmp_path / "out" / "surgery_manifest.json").read_text())["ledger"]["without_output"]
    assert sources[QUERY + CODES] == {"class": "source", "why": f"its values are in {QUERY}"}
    assert sources[QUERY + SCALES] == {"class": "source", "why": f"its values are in {QUERY}"}
    assert sum(result.ledger.classes.values()) == len(weights(base))


def test_the_ledger_counts_weights_and_accounts_for_every_stored_tensor(tmp_path: Path) -> None:
    base, lora = quantise(tmp_path / "base"), make_lora(tmp_path / "lora")
    result = surgery.merge(base, lora, output=tmp_path / "out", quantized="requantize")
    assert result.ledger.classes == {"copied": len(weights(base)) - 4, "updated": 4}
    rows = json.loads((tmp_path / "out" / "surgery_manifest.json").read_text())["ledger"]["tensors"]
    assert rows.keys() == stored(base).keys()
    for part in (CODES, SCALES):
        row = rows[QUERY + part]
        assert (row["class"], row["weight"], len(row["xxh3"])) == ("updated", QUERY, 32)
    assert "survival" in rows[QUERY + CODES]
    assert "survival" not in rows[QUERY + SCALES]  # of the weight, once


def test_a_weight_of_which_a_tensor_would_not_be_written_is_refused(tmp_path: Path) -> None:
    base, lora = quantise(tmp_path / "base"), make_lora(tmp_path / "lora")
    binding = bind([(read_adapter(lora), 1.0)], open_checkpoint(base))
    plan = plan_merge(binding, quantised=quantised_output("requantize"))
    (file,) = plan.files
    fewer = tuple(tensor for tensor in file.tensors if tensor.name != QUERY + SCALES)
    object.__setattr__(plan, "files", (PlannedFile(file.name, file.header, file.nbytes, fewer),))
    with pytest.raises(FitError, match="without its"):
        check_conservation(binding, plan)


def test_an_update_below_the_step_of_the_storage_changes_nothing(tmp_path: Path) -> None:
    base, lora = quantise(tmp_path / "base"), make_lora(tmp_path / "lora", strength=1e-9)
    with pytest.raises(NothingChangedError):
        surgery.merge(base, lora, output=tmp_path / "out", quantized="requantize")


def test_a_dora_meets_the_values_of_the_weight(tmp_path: Path) -> None:
    base, dora = quantise(tmp_path / "base"), make_lora(tmp_path / "dora", use_dora=True)
    factors = load_file(dora / "adapter_model.safetensors")
    for name, values in weights(base).items():
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{stem}.lora_A.weight" in factors:
            factors[f"{stem}.lora_magnitude_vector"] = 2 * values.norm(dim=1)
    save_file(factors, dora / "adapter_model.safetensors")
    surgery.merge(base, dora, output=tmp_path / "out", dtype="fp32")
    for name, summed in expected(base, dora).items():
        wanted = summed * (2 * weights(base)[name].double().norm(dim=1) / summed.norm(dim=1))[:, None]
        assert torch.allclose(stored(tmp_path / "out")[name].double(), wanted, rtol=1e-5, atol=1e-5), name


def test_inspect_shows_weights_and_not_their_codes(tmp_path: Path) -> None:
    found = json.dumps(surgery.inspect(quantise(tmp_path / "base")).as_json())
    assert "TOY4" in found
    assert "toy_codes" not in found
    plain = surgery.inspect(make_base(tmp_path / "plain"))
    quantised_ = surgery.inspect(tmp_path / "base")
    assert quantised_.components[0].parameters == plain.components[0].parameters


def test_diff_compares_values_under_the_names_of_the_weights(tmp_path: Path) -> None:
    base, lora = quantise(tmp_path / "base"), make_lora(tmp_path / "lora")
    surgery.merge(base, lora, output=tmp_path / "out", quantized="requantize")
    result = surgery.diff(base, tmp_path / "out")
    assert {tensor.name for tensor in result.tensors} == set(weights(base))
    moved = {tensor.name for tensor in result.tensors if tensor.status != "equal"}
    assert moved == set(expected(base, lora))


@pytest.mark.parametrize("dtype", ["keep", "fp32"])
def test_verify_knows_what_was_written(dtype: str, tmp_path: Path) -> None:
    base, lora = quantise(tmp_path / "base", shards=2), make_lora(tmp_path / "lora")
    surgery.merge(base, lora, output=tmp_path / "out", dtype=dtype)
    assert surgery.verify(tmp_path / "out", against=base).kind == "folder"


def test_a_dry_run_plans_every_stored_tensor(tmp_path: Path) -> None:
    base, lora = quantise(tmp_path / "base"), make_lora(tmp_path / "lora")
    result = surgery.merge(base, lora, dry_run=True, quantized="requantize")
    assert {tensor.name for tensor in result.ledger.plan.tensors} == set(stored(base))
    assert sum(tensor.outcome == "updated" for tensor in result.ledger.plan.tensors) == 8
    assert len(result.ledger.plan.computed()) == 4


def test_two_adapters_are_added_before_the_sum_is_rounded(tmp_path: Path) -> None:
    base = quantise(tmp_path / "base")
    one, other = make_lora(tmp_path / "one"), make_lora(tmp_path / "other", strength=0.5)
    surgery.merge(base, [(one, 0.7), (other, -0.3)], output=tmp_path / "out", quantized="requantize")
    first, second, before = expected(base, one, 0.7), expected(base, other, -0.3), weights(base)
    for name in first:
        codes, _, _ = coded((first[name] + second[name] - before[name]).float(), len(before[name]))
        apart = stored(tmp_path / "out")[name + CODES] != codes
        assert apart.float().mean() < 0.01, name  # where the sum lies halfway between two codes


def test_values_in_place_of_a_quantised_weight_are_quantised(tmp_path: Path) -> None:
    base, saved = quantise(tmp_path / "base"), make_lora(tmp_path / "saved", modules_to_save=["o_proj"])
    factors = load_file(saved / "adapter_model.safetensors")
    name = "model.layers.0.self_attn.o_proj.weight"
    trained = torch.randn(weights(base)[name].shape)
    save_file({**factors, f"base_model.model.{name}": trained}, saved / "adapter_model.safetensors")
    surgery.merge(base, saved, output=tmp_path / "out", quantized="requantize")
    codes, scales, _ = coded(trained, len(trained))
    assert stored(tmp_path / "out")[name + CODES].equal(codes)
    assert stored(tmp_path / "out")[name + SCALES].equal(scales)


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """A model of which one projection is quantised, and which can be computed."""
    folder = shutil.copytree(ROOT / "examples" / "base", tmp_path / "llama")
    tensors = load_file(folder / "model.safetensors")
    values = tensors.pop(QUERY).float()
    codes, scales, _ = coded(values, len(values))
    save_file({**tensors, QUERY + CODES: codes, QUERY + SCALES: scales}, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_a_graph_has_the_weight_in_elements(llama: Path, tmp_path: Path) -> None:
    surgery.export_onnx(llama, output=tmp_path / "graph", dtype="fp32")
    assert surgery.verify(tmp_path / "graph", against=llama).kind == "graph"
    assert load_file(tmp_path / "graph" / "delta.safetensors").keys() >= {QUERY}


def test_the_reference_computes_a_merge_as_it_will_be_stored(llama: Path, tmp_path: Path) -> None:
    lora = ROOT / "examples" / "lora"
    surgery.merge(llama, lora, output=tmp_path / "out", quantized="requantize")
    base = open_checkpoint(llama)
    plan = plan_merge(bind([(read_adapter(lora), 1.0)], base), quantised=quantised_output("requantize"))
    planned, written = open_reference(base.main, plan), open_reference(open_checkpoint(tmp_path / "out").main)
    assert QUERY in planned.weights.names
    assert planned.weights.load(QUERY).equal(written.weights.load(QUERY))
    ids = torch.tensor([[1, 5, 9]])
    assert forward(planned, ids).logits.equal(forward(written, ids).logits)


@pytest.mark.parametrize("band", [1, 8])
def test_an_adapter_extracted_from_a_quantised_base_makes_the_fine_tune_of_it(band: int, tmp_path: Path) -> None:
    base, tuned = quantise(tmp_path / "base", band=band), make_base(tmp_path / "tuned")
    generator = torch.Generator().manual_seed(0)
    values = {n: v.float() + 0.1 * torch.randn(v.shape, generator=generator) for n, v in weights(base).items()}
    save_file(values, tuned / "model.safetensors", {"format": "pt"})
    result = surgery.extract_lora(base, tuned, output=tmp_path / "lora", rank=64, kind="lora")
    assert result.residual < 1e-6
    assert {row.kind for row in result.rows if row.name == QUERY} == {"low-rank"}
    surgery.merge(base, tmp_path / "lora", output=tmp_path / "out", dtype="fp32")
    for name, merged in stored(tmp_path / "out").items():
        assert torch.allclose(merged, values[name], atol=1e-5), name


def test_the_rounding_of_a_storage_that_does_not_tell_its_grid_is_said_to_be_unknown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(ToyWeight, "fit")  # what is not there makes it no codec
    base, tuned = quantise(tmp_path / "base"), quantise(tmp_path / "tuned")
    tensors = load_file(tuned / "model.safetensors")
    tensors[QUERY + SCALES] *= 2
    save_file(tensors, tuned / "model.safetensors", {"format": "pt"})
    result = surgery.extract_lora(base, tuned, output=tmp_path / "lora", rank=2, kind="lora")
    assert result.quantised == (
        "what rounding to codes (TOY4 in BASE and TOY4 in TUNED) adds to 1 differences is not known",
    )


def test_a_base_with_codes_and_no_scales_is_malformed(tmp_path: Path) -> None:
    base = quantise(tmp_path / "base")
    save_file({n: t for n, t in stored(base).items() if n != QUERY + SCALES}, base / "model.safetensors")
    with pytest.raises(MalformedError, match=r"no '.*q_proj\.weight\.toy_scales'"):
        open_checkpoint(base).main.parameters  # noqa: B018


_KILLED_AT_THE_SECOND_FILE = """
import os, sys, threading, surgery
from pathlib import Path
from surgery_formats.files.output.output_file import OutputFile
from surgery_formats.testing.plugins import installed_project

finish, finished, one_at_a_time = OutputFile.finish, [], threading.Lock()

def finish_one(self, record):
    with one_at_a_time:
        if finished:
            os._exit(9)
        finish(self, record)
        finished.append(self)

OutputFile.finish = finish_one
toy, base, lora, out = sys.argv[1:]
with installed_project(Path(toy)):
    surgery.merge(base, lora, output=out, quantized="requantize")
"""


def test_a_killed_merge_goes_on_where_one_file_of_its_weights_is_finished(tmp_path: Path) -> None:
    base, lora = quantise(tmp_path / "base", shards=2), make_lora(tmp_path / "lora")
    surgery.merge(base, lora, output=tmp_path / "whole", quantized="requantize")
    words = [sys.executable, "-c", _KILLED_AT_THE_SECOND_FILE, TOY, base, lora, tmp_path / "out"]
    assert subprocess.run(words, env=environment(), check=False).returncode == 9
    (stage,) = tmp_path.glob(".out.surgery-*")
    assert len(list(stage.glob("*.safetensors"))) == 1
    surgery.merge(base, lora, output=tmp_path / "out", quantized="requantize")
    for file in sorted((tmp_path / "whole").iterdir()):
        assert file.read_bytes() == (tmp_path / "out" / file.name).read_bytes(), file.name
