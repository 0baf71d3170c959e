# SPDX-License-Identifier: Apache-2.0
"""Commands on GGUF files: of several formats, of other names and orders than the model they were made of."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

import surgery
from surgery_formats.models.checkpoint import open_checkpoint
from tests.verbs.test_merge_gguf import CONFIGS, GOLDEN, adapter, apart, layer_weights, main

WIDE = GOLDEN / "wide.gguf"
KINDS = {"Q4_K": 5, "Q5_0": 1, "Q6_K": 2, "Q8_0": 1}


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    """The values of the GGUF, as transformers would store them."""
    folder = tmp_path / "plain"
    folder.mkdir()
    save_file(apart(main(WIDE)), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIGS["wide"]))
    return folder


def tuned(plain: Path, folder: Path) -> Path:
    """Another model, in full precision."""
    shutil.copytree(plain, folder)
    draw = np.random.default_rng(1)
    weights = {
        name: held + 0.02 * draw.standard_normal(held.shape).astype(np.float32) if held.ndim == 2 else held
        for name, held in apart(main(WIDE)).items()
    }
    save_file(weights, folder / "model.safetensors")
    return folder


def test_inspect_tells_every_format_of_a_file_that_mixes_them() -> None:
    (part,) = surgery.inspect(WIDE).components
    assert {group.kind: group.weights for group in part.quantised} == KINDS
    assert {group.kind: round(group.bits, 4) for group in part.quantised} == {
        "Q4_K": 4.5, "Q5_0": 5.5, "Q6_K": 6.5625, "Q8_0": 8.5,
    }  # fmt: skip


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "granite"])
def test_plain_numbers_in_another_order_are_not_said_to_be_quantised(name: str) -> None:
    (part,) = surgery.inspect(GOLDEN / f"{name}.gguf").components
    assert part.quantised == ()
    assert not open_checkpoint(GOLDEN / f"{name}.gguf").is_quantised


def test_diff_and_report_against_the_same_values(plain: Path, tmp_path: Path) -> None:
    found = surgery.diff(WIDE, plain)
    assert (found.difference, found.moved, found.not_compared) == (0.0, 0.0, 0)
    assert {loss.kind: loss.weights for loss in found.quantisation} == KINDS
    lora = adapter(tmp_path / "lora", layer_weights(main(WIDE)))
    (choice,) = surgery.report(lora, base=plain, other_base=WIDE).choices
    assert (choice.weights, choice.apart, choice.beside) == (7, 0.0, 0.0)


def test_extraction_from_either_side(plain: Path, tmp_path: Path) -> None:
    other = tuned(plain, tmp_path / "tuned")
    for number, (base, fine_tune) in enumerate(((WIDE, other), (other, WIDE))):
        result = surgery.extract_lora(
            base, fine_tune, output=tmp_path / str(number), rank=512, kind="lora", dtype="fp32"
        )
        assert result.residual < 1e-6
        assert len(result.quantised) == len(KINDS)


def test_a_graph_and_values_as_trained(plain: Path, tmp_path: Path) -> None:
    surgery.export_onnx(WIDE, output=tmp_path / "graph", dtype="fp32")
    assert surgery.verify(tmp_path / "graph", against=WIDE).kind == "graph"
    lora = adapter(tmp_path / "lora", layer_weights(main(WIDE)))
    other = tuned(plain, tmp_path / "tuned")
    surgery.merge(other, lora, output=tmp_path / "trained", as_trained=WIDE)
    surgery.merge(plain, lora, output=tmp_path / "wanted")
    merged, wanted = (open_checkpoint(tmp_path / name).main.parameters for name in ("trained", "wanted"))
    for name, parameter in wanted.items():
        assert np.array_equal(merged[name].get(), parameter.get()), name
