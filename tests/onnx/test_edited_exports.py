# SPDX-License-Identifier: Apache-2.0
"""An export of this toolkit is edited as any graph is, and what comes out still runs and verifies."""

from __future__ import annotations

import shutil
from pathlib import Path

import onnx
import pytest

import surgery
from surgery.onnx.edit.strip import STACK_TRACE
from surgery.onnx.graph.contract import from_metadata
from surgery_formats.errors import ProofError

BASE, LORA = "examples/base", "examples/lora"
TEXTS = ["The following methods", "import"]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exported") / "out"
    surgery.export_onnx(BASE, output=out)
    return out


def words(folder: Path) -> list[str | None]:
    return [one.text for one in surgery.run(folder, TEXTS, max_new=6).texts]


def prefill_of(folder: Path) -> str:
    props = onnx.load(folder / "model.onnx", load_external_data=False).metadata_props
    contract = from_metadata({prop.key: prop.value for prop in props})
    assert contract is not None
    return contract.prefill


def test_a_merge_into_it_has_the_second_graph_too_and_is_the_export_of_the_merge(
    exported: Path, tmp_path: Path
) -> None:
    surgery.merge(exported / "model.onnx", LORA, graph_of=BASE, output=tmp_path / "merged")
    assert prefill_of(tmp_path / "merged") == "prefill.onnx"
    assert "computed tensors" in {check.name for check in surgery.verify(tmp_path / "merged").checks}
    surgery.export_onnx(BASE, LORA, output=tmp_path / "other")
    assert words(tmp_path / "merged") == words(tmp_path / "other") != words(exported)


def test_a_flipped_byte_of_a_merged_tensor_is_found(exported: Path, tmp_path: Path) -> None:
    surgery.merge(exported / "model.onnx", LORA, graph_of=BASE, output=tmp_path / "merged")
    weights = tmp_path / "merged" / "model.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-1] ^= 1
    raw[len(raw) // 2] ^= 1
    weights.write_bytes(raw)
    with pytest.raises(ProofError):
        surgery.verify(tmp_path / "merged")


def test_slots_in_it_leave_the_second_graph_behind_and_say_so(exported: Path, tmp_path: Path) -> None:
    surgery.insert(exported / "model.onnx", LORA, base=BASE, output=tmp_path / "slots")
    assert prefill_of(tmp_path / "slots") == ""
    assert (tmp_path / "slots" / "config.json").read_bytes() == (exported / "config.json").read_bytes()
    surgery.verify(tmp_path / "slots", against=BASE)
    assert words(tmp_path / "slots") == words(exported)


def test_the_size_that_stripping_states_is_that_of_the_file(exported: Path, tmp_path: Path) -> None:
    traced = shutil.copytree(exported, tmp_path / "traced") / "model.onnx"
    model = onnx.load(traced, load_external_data=False)
    model.graph.node[0].metadata_props.add(key=STACK_TRACE, value='File "model.py", line 3')
    onnx.save(model, traced)
    result = surgery.strip(traced, output=tmp_path / "stripped")
    assert prefill_of(tmp_path / "stripped") == ""
    assert result.after == (tmp_path / "stripped" / "model.onnx").stat().st_size
    assert surgery.strip(traced, dry_run=True).after == result.after
