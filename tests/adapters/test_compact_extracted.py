# SPDX-License-Identifier: Apache-2.0
"""Extraction into compact folders: the reported error has the codes in it, and how parameters are held is recorded."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import surgery
from surgery_formats.adapters.registry import format_named, read_adapter
from surgery_formats.errors import FitError
from tests.oracles import models
from tests.support.adapter_files import Arrays
from tests.support.extractions import everything, only, tune

EXAMPLES = Path(__file__).parents[2] / "examples"


def _replacements(folder: Path) -> dict[str, dict[str, Any]]:
    """The records of parameters stored whole."""
    parameters = json.loads((folder / "compact.json").read_text())["parameters"]
    return {p["path"]: r for p in parameters for r in p["updates"] if r["kind"] == "replacement"}


def test_the_bias_of_a_head_is_trained_in_place_unless_its_module_is_a_copy(tmp_path: Path) -> None:
    base = models.build_base("bert", tmp_path / "base")
    tuned = tune(base, tmp_path / "tuned", everything)
    surgery.extract_lora(base, tuned, output=tmp_path / "c", rank=2, factors="int8", allow_loss=True)
    assert _replacements(tmp_path / "c")["classifier.bias"] == {"kind": "replacement"}
    held = {
        site.path: u.held for site, (u, *_) in read_adapter(tmp_path / "c").updates.items() if u.kind == "replacement"
    }
    assert held["classifier.bias"] == "in place"
    assert {how for path, how in held.items() if "LayerNorm" in path} == {"copy"}


def test_how_a_parameter_is_held_is_recorded_where_the_configuration_does_not_imply_it(tmp_path: Path) -> None:
    base = models.build_base("llama", tmp_path / "base")
    tuned = tune(base, tmp_path / "tuned", only("norm"))
    surgery.extract_lora(base, tuned, output=tmp_path / "p")
    source = read_adapter(tmp_path / "p")
    for held, recorded in (("copy", None), ("resized", "resized"), ("in place", "in place")):
        updates = {site: (replace(chain[0], held=held),) for site, chain in source.updates.items()}
        rendering = format_named("compact").render(replace(source, updates=updates), None)
        parameters = json.loads(rendering.small_files["compact.json"])["parameters"]
        assert {record.get("held") for parameter in parameters for record in parameter["updates"]} == {recorded}


def test_extraction_reports_the_error_of_the_codes_it_wrote(tmp_path: Path) -> None:
    base, tuned = EXAMPLES / "base", EXAMPLES / "tuned"
    plain = surgery.extract_lora(base, tuned, output=tmp_path / "16", rank=16)
    eight = surgery.extract_lora(base, tuned, output=tmp_path / "32", rank=32, factors="int8")
    four = surgery.extract_lora(base, tuned, output=tmp_path / "64", rank=64, factors="int4")
    assert (four.format, four.dtype) == ("compact", "int4")
    assert max(eight.adapter_nbytes, four.adapter_nbytes) < 1.2 * plain.adapter_nbytes
    assert four.residual < 0.7 * eight.residual < 0.7 * plain.residual
    best = surgery.extract_lora(base, tuned, rank=64, factors="int4", dry_run=True)
    assert best.residual < four.residual < 1.03 * best.residual  # the codes' error is in it

    surgery.merge(base, tmp_path / "64", output=tmp_path / "m")
    old, new, made = (load_float(path / "model.safetensors") for path in (base, tuned, tmp_path / "m"))
    left = sum(float(np.square(new[n] - made[n]).sum()) for n in new)
    whole = sum(float(np.square(new[n] - old[n]).sum()) for n in new)
    assert (left / whole) ** 0.5 == pytest.approx(four.residual, rel=0.02)  # the merge rounds to bfloat16 once more
    assert f'"residual": {four.as_json()["residual"]}' in (tmp_path / "64/surgery_manifest.json").read_text()


def load_float(file: Path) -> Arrays:
    from safetensors.torch import load_file as load

    return {name: value.double().numpy() for name, value in load(file).items()}


def test_a_budget_of_bytes_holds_for_codes(tmp_path: Path) -> None:
    base, tuned = EXAMPLES / "base", EXAMPLES / "tuned"
    surgery.extract_lora(base, tuned, output=tmp_path / "c", rank=surgery.Rank.budget("300kB"), factors="int4")
    size = sum((tmp_path / "c" / name).stat().st_size for name in ("adapter.safetensors", "compact.json"))
    assert 0.8 * 300_000 < size <= 300_000
    with pytest.raises(FitError, match="`factors=` chooses"):
        surgery.extract_lora(base, tuned, output=tmp_path / "d", factors="int4", dtype="bf16")
