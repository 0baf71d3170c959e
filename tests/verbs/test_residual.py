# SPDX-License-Identifier: Apache-2.0
"""A merge that keeps the codes and writes a LoRA of what they cannot hold: together they are base and adapters."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import surgery
from surgery.engine.quantised import residual_factors
from surgery_formats.arrays import Array
from surgery_formats.errors import FitError, NothingChangedError, ProofError, UsageError
from surgery_formats.models.checkpoint import open_checkpoint
from surgery_formats.text import nbytes
from tests.engine.test_requantise import quantise as toy_model
from tests.engine.test_requantise import storage as toy_storage  # noqa: F401  # a fixture
from tests.support.kit import ROOT, make_lora
from tests.verbs.test_bitsandbytes_base import LORA, QUERY, quantised, values_of

DORA = ROOT / "examples" / "dora"


def apart(base: Path, adapters: Any, out: Path, folder: Path) -> float:
    """How far model and LoRA together are from base and adapters, relative to the update, merged exactly on both sides."""
    surgery.merge(base, adapters, output=folder / "wanted", dtype="fp32")
    if (out / "adapter" / "adapter_config.json").exists():
        surgery.merge(out, out / "adapter", output=folder / "found", dtype="fp32")
        found = values_of(folder / "found")
    else:
        found = values_of(out)
    wanted, before = values_of(folder / "wanted"), values_of(base)
    off = sum(float(((found[name] - wanted[name]) ** 2).sum()) for name in wanted)
    size = sum(float(((before[name] - wanted[name]) ** 2).sum()) for name in wanted)
    return (off / size) ** 0.5


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize(
    ("adapters", "options", "most"),
    [
        ([LORA], {}, 1e-5),
        ([(LORA, 0.5), (LORA, -0.2)], {}, 1e-5),
        ([LORA], {"rank": 4}, 0.4),
        ([LORA], {"max_error": 0.2}, 0.2),
        ([DORA], {"rank": 32}, 0.2),
    ],
    ids=["one", "two", "of a lower rank", "to an error", "DoRA"],
)
def test_model_and_lora_are_base_and_adapters(
    kind: str, adapters: list[Any], options: dict[str, Any], most: float, tmp_path: Path
) -> None:
    base = quantised(tmp_path / "base", kind)
    result = surgery.merge(base, adapters, output=tmp_path / "out", quantized="residual", **options)
    off = apart(base, adapters, tmp_path / "out", tmp_path)
    assert off <= most
    assert result.residual is not None
    assert result.residual.error == pytest.approx(off, abs=1e-5)
    for before, after in [(open_checkpoint(base).main, open_checkpoint(tmp_path / "out").main)]:
        assert before.config == after.config
        assert {n: p.storage.kind for n, p in before.parameters.items()} == {
            n: p.storage.kind for n, p in after.parameters.items()
        }
    written = json.loads((tmp_path / "out" / "adapter" / "residual.json").read_text())
    assert written["weights"].keys() == {n for n, p in before.parameters.items() if p.storage.elements is None}
    assert result.as_json()["residual"] == written
    assert surgery.verify(tmp_path / "out", against=base).kind == "folder"


def test_without_a_rank_the_codes_and_the_factors_of_a_lora_stay_as_they_are(tmp_path: Path) -> None:
    base = quantised(tmp_path / "base", "nf4")
    result = surgery.merge(base, LORA, output=tmp_path / "out", quantized="residual")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (base / "model.safetensors").read_bytes()
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (LORA, tmp_path / "out" / "adapter"))
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[key], after[key]) for key in before)
    assert "codes moved in 0 of 42 weights" in str(result)


def test_codes_move_where_that_needs_the_smaller_lora(tmp_path: Path) -> None:
    base = quantised(tmp_path / "base", "int8")
    result = surgery.merge(base, LORA, output=tmp_path / "out", quantized="residual", max_error=0.3)
    assert result.residual is not None
    assert {(weight.moved, weight.rank) for weight in result.residual.weights} == {(True, 0)}
    assert not (tmp_path / "out" / "adapter" / "adapter_model.safetensors").exists()
    assert apart(base, [LORA], tmp_path / "out", tmp_path) < 0.1


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("options", [{}, {"rank": 2}])
@pytest.mark.usefixtures("toy_storage")
def test_weights_that_are_stored_transposed(turned: bool, options: dict[str, Any], tmp_path: Path) -> None:
    base, one = toy_model(tmp_path / "base", turned=turned), make_lora(tmp_path / "one", strength=0.1)
    adapters = [(one, 0.7), (make_lora(tmp_path / "two"), 0.1)]
    surgery.merge(base, adapters, output=tmp_path / "out", quantized="residual", **options)
    assert apart(base, adapters, tmp_path / "out", tmp_path) < (0.9 if options else 1e-5)


@pytest.mark.usefixtures("toy_storage")
def test_a_trained_copy_of_a_quantised_weight_is_in_the_lora_folder(tmp_path: Path) -> None:
    base, saved = toy_model(tmp_path / "base", turned=False), make_lora(tmp_path / "saved", modules_to_save=["o_proj"])
    name = "model.layers.0.self_attn.o_proj.weight"
    factors = load_file(saved / "adapter_model.safetensors")
    trained = np.random.default_rng(0).standard_normal((32, 32), np.float32)
    save_file({**factors, f"base_model.model.{name}": trained}, saved / "adapter_model.safetensors")
    surgery.merge(base, saved, output=tmp_path / "out", quantized="residual")
    assert apart(base, [saved], tmp_path / "out", tmp_path) < 1e-5
    written = load_file(tmp_path / "out" / "adapter" / "adapter_model.safetensors")
    assert np.array_equal(written[f"base_model.model.{name}"], trained)


def test_peft_loads_the_lora_beside_the_model(tmp_path: Path) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = quantised(tmp_path / "base", "nf4")
    surgery.merge(base, DORA, output=tmp_path / "out", quantized="residual", rank=48)
    surgery.merge(base, DORA, output=tmp_path / "wanted", dtype="fp32")
    surgery.merge(tmp_path / "out", make_zero(tmp_path / "zero"), output=tmp_path / "plain", dtype="fp32")
    attached = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32), tmp_path / "out" / "adapter"
    )
    wanted = AutoModelForCausalLM.from_pretrained(tmp_path / "wanted", dtype=torch.float32)
    weight = attached.base_model.model.model.layers[0].self_attn.q_proj
    found = weight.weight + weight.get_delta_weight("default")
    exact = wanted.model.layers[0].self_attn.q_proj.weight
    assert float(((found - exact).norm() / exact.norm()).detach()) < 0.02


def make_zero(folder: Path) -> Path:
    """A LoRA of one weight that is next to nothing."""
    shutil.copytree(LORA, folder)
    factors = load_file(LORA / "adapter_model.safetensors")
    save_file({key: factor * 1e-9 for key, factor in factors.items()}, folder / "adapter_model.safetensors")
    return folder


def test_what_cannot_be_is_refused_by_name(tmp_path: Path) -> None:
    base = quantised(tmp_path / "base", "nf4")
    with pytest.raises(FitError, match="a LoRA of rank 2 leaves") as refused:
        surgery.merge(base, LORA, output=tmp_path / "out", quantized="residual", rank=2, max_error=0.05)
    assert refused.value.tensor is not None
    with pytest.raises(UsageError, match="keeps its codes"):
        surgery.merge(base, LORA, output=tmp_path / "out", quantized="residual", reversible=True)
    for options in ({"rank": 4}, {"max_error": 0.1}):
        with pytest.raises(UsageError, match="only a residual"):
            surgery.merge(base, LORA, output=tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_a_lora_that_is_not_what_was_computed_is_no_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = quantised(tmp_path / "base", "nf4")
    make = residual_factors._lora

    def twice(name: str, B: Array, A: Array) -> Any:
        return make(name, B * (2 if name == QUERY else 1), A)

    monkeypatch.setattr(residual_factors, "_lora", twice)
    with pytest.raises(ProofError) as failed:
        surgery.merge(base, LORA, output=tmp_path / "out", quantized="residual", rank=4)
    assert failed.value.tensor == QUERY
    assert not (tmp_path / "out").exists()


def test_an_adapter_of_plain_weights_alone_leaves_nothing_for_a_lora(tmp_path: Path) -> None:
    base, lora = quantised(tmp_path / "base", "nf4"), tmp_path / "lora"
    shutil.copytree(LORA, lora)
    name = "base_model.model.lm_head.lora_{}.weight"
    factors = {
        name.format("A"): np.full((8, 128), 0.1, np.float32),
        name.format("B"): np.full((1536, 8), 0.1, np.float32),
    }
    save_file(factors, lora / "adapter_model.safetensors")
    result = surgery.merge(base, lora, output=tmp_path / "out", quantized="residual")
    assert "none: the adapters change no quantised weight" in str(result.summary())
    assert not (tmp_path / "out" / "adapter").exists()
    surgery.merge(base, lora, output=tmp_path / "wanted", quantized="requantize")
    written = [(tmp_path / folder / "model.safetensors").read_bytes() for folder in ("out", "wanted")]
    assert written[0] == written[1]


def test_the_account_counts_what_is_in_the_model_and_what_is_in_the_lora(tmp_path: Path) -> None:
    base, lora = quantised(tmp_path / "base", "nf4"), tmp_path / "lora"
    shutil.copytree(LORA, lora)
    file, head = lora / "adapter_model.safetensors", "base_model.model.lm_head.lora_{}.weight"
    in_lora = load_file(file)
    in_model = {
        head.format("A"): np.full((8, 128), 0.1, np.float32),
        head.format("B"): np.full((1536, 8), 0.1, np.float32),
    }
    save_file({**in_lora, **in_model}, file)
    result = surgery.merge(base, lora, output=tmp_path / "out", quantized="residual")
    assert result.ledger.adapter_tensors == len(in_lora) + len(in_model)
    assert f"{len(in_lora)} of them in the LoRA beside the model" in str(result.summary())


@pytest.mark.parametrize("way", ["requantize", "residual"])
def test_codes_are_kept_only_where_there_are_some_and_no_other_type_is_asked_for(way: str, tmp_path: Path) -> None:
    with pytest.raises(FitError, match="nothing of it is quantised"):
        surgery.merge(ROOT / "examples" / "base", LORA, output=tmp_path / "out", quantized=way)
    with pytest.raises(UsageError, match="for the release"):
        surgery.merge(ROOT / "examples" / "base", LORA, output=tmp_path / "out", quantized=way, as_trained="nf4")
    base = quantised(tmp_path / "base", "nf4")
    with pytest.raises(UsageError, match="keeps the codes, and `dtype=` asks for elements"):
        surgery.merge(base, LORA, output=tmp_path / "out", quantized=way, dtype="bf16")


@pytest.mark.parametrize(
    ("adapter", "options", "exact"),
    [(LORA, {}, True), (LORA, {"rank": 4}, False), (LORA, {"max_error": 0.3}, False), (DORA, {}, False)],
    ids=["its own", "of a lower rank", "to an error", "DoRA"],
)
def test_a_dry_run_says_what_the_lora_takes(
    adapter: Path, options: dict[str, Any], exact: bool, tmp_path: Path
) -> None:
    base = quantised(tmp_path / "base", "nf4")
    ahead = surgery.merge(base, adapter, quantized="residual", dry_run=True, **options)
    written = surgery.merge(base, adapter, output=tmp_path / "out", quantized="residual", **options)
    assert ahead.preview is not None
    assert written.residual is not None
    most = ahead.preview.beside_nbytes
    assert most == written.residual.nbytes if exact else written.residual.nbytes <= most < 2e6
    assert f"at most {nbytes(most)}" in str(ahead)


def test_a_dry_run_counts_the_lora_in_what_has_to_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = quantised(tmp_path / "base", "nf4")
    plain = surgery.merge(base, LORA, quantized="residual", dry_run=True).nbytes
    monkeypatch.setattr("surgery.engine.preview._free", lambda output: plain + 1000)
    for quantized, fits in [("requantize", True), ("residual", False)]:
        ahead = surgery.merge(base, LORA, output=tmp_path / "out", quantized=quantized, dry_run=True)
        assert any("will not fit" in warning for warning in ahead.warnings) is not fits


def test_a_lora_that_holds_too_little_gets_a_warning(tmp_path: Path) -> None:
    base = quantised(tmp_path / "base", "nf4")
    poor = surgery.merge(base, LORA, output=tmp_path / "poor", quantized="residual", rank=2)
    assert poor.residual is not None
    assert poor.residual.error > 0.1
    assert any(f"off by {poor.residual.error:.0%} of the update" in warning for warning in poor.warnings)
    for number, options in enumerate([{}, {"max_error": 0.3}]):  # it holds all, or what was asked for
        result = surgery.merge(base, LORA, output=tmp_path / f"{number}", quantized="residual", **options)
        assert not any("off by" in warning for warning in result.warnings)


def test_adapters_that_cancel_each_other_are_no_merge(tmp_path: Path) -> None:
    base = quantised(tmp_path / "base", "nf4")
    with pytest.raises(NothingChangedError, match="no weight of the base would change") as refused:
        surgery.merge(base, [(LORA, -1.0), LORA], output=tmp_path / "out", quantized="residual")
    assert "cancel" in str(refused.value.hint)
    assert not (tmp_path / "out").exists()


def test_an_adapter_that_adds_nothing_is_no_merge(tmp_path: Path) -> None:
    with pytest.raises(NothingChangedError, match="no weight of the base would change"):
        surgery.merge(quantised(tmp_path / "base", "nf4"), (LORA, 0.0), output=tmp_path / "out", quantized="residual")
    assert not (tmp_path / "out").exists()
