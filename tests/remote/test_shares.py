# SPDX-License-Identifier: Apache-2.0
"""Shares of an output in a bucket, of every command that has shares, and of inputs on the hub."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import surgery
from surgery.algebra.convert_request import ConvertRequest
from surgery.engine.merge.merge_request import MergeRequest
from surgery.engine.shares import folders
from surgery.engine.shares.folders import Shares, assignments, write_share
from surgery.engine.shares.work import WorkRequest
from surgery.extraction.request import ExtractRequest
from surgery.onnx.export.request import ExportRequest, WeightsAsked
from surgery.onnx.export.weight_options import WeightOptions
from surgery_formats.files.output.manifest import MANIFEST
from surgery_formats.files.remote import hub as hub_files
from tests.algebra.test_lora_form import trained
from tests.support.hub import reached
from tests.support.kit import ROOT, make_base, make_lora
from tests.support.s3 import Storage

BASE, LORA = str(ROOT / "examples" / "base"), str(ROOT / "examples" / "lora")
Command = Callable[..., Any]


def _merge(folder: Path) -> tuple[WorkRequest, Command]:
    request = MergeRequest(BASE, ((LORA, 1.0),), by_files=False)
    return request, lambda **options: surgery.merge(BASE, LORA, **options)


def _extract(folder: Path) -> tuple[WorkRequest, Command]:
    tuned = folder / "tuned"
    surgery.merge(BASE, LORA, output=tuned)
    return ExtractRequest(BASE, str(tuned), 4), lambda **options: surgery.extract_lora(BASE, tuned, rank=4, **options)


def _convert(folder: Path) -> tuple[WorkRequest, Command]:
    _, base, adapter = trained("oft", folder / "oft")

    def command(**options: Any) -> Any:
        return surgery.convert(adapter, "peft", base=base, as_lora=True, rank=3, **options)

    return ConvertRequest(str(adapter), str(base), 3), command


def _export(folder: Path) -> tuple[WorkRequest, Command]:
    asked = WeightsAsked(options=WeightOptions(weights_type="int4"))
    request = ExportRequest(BASE, ((LORA, 1.0),), asked=asked)
    return request, lambda **options: surgery.export_onnx(BASE, LORA, weights_type="int4", **options)


@pytest.mark.parametrize("make", [_merge, _extract, _convert, _export])
def test_shares_in_a_bucket_are_one_output(
    make: Callable[[Path], tuple[WorkRequest, Command]], storage: Storage, tmp_path: Path
) -> None:
    request, command = make(tmp_path)
    output = storage.url("out")
    for assignment in assignments(request, request.work(), output, 2):
        write_share(assignment)
    command(output=output, engine=Shares(2))
    command(output=storage.url("single"))
    assert storage.objects("out/") == storage.objects("single/")
    assert {key.split("/")[0] for key in storage.objects()} == {"out", "single"}
    assert storage.unfinished() == []


def test_what_is_left_of_a_share_that_was_being_removed_is_written_anew(
    storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request, command = _merge(tmp_path)
    output = storage.url("out")
    shares = assignments(request, request.work(), output, 1)
    whole = write_share(shares[0])
    names = [key for key in storage.objects() if key.startswith(f"{whole.name}/")]
    assert f"{whole.name}/{MANIFEST}" in names
    storage.clear(f"{whole.name}/{MANIFEST}")
    monkeypatch.setattr(folders, "_PATIENCE", 0.0)
    write_share(shares[0])
    command(output=output, engine=Shares(1))
    assert {key.split("/")[0] for key in storage.objects()} == {"out"}


def test_who_reads_the_hub_and_who_reads_its_cache_have_one_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with reached(monkeypatch, tmp_path) as hub:
        base, lora = make_base(tmp_path / "base"), make_lora(tmp_path / "lora")
        hub.add("org/llama", base)
        hub.add("org/lora", lora)
        request = MergeRequest("hf://org/llama", (("hf://org/lora", 1.0),))
        for assignment in assignments(request, request.work(), tmp_path / "out", 2):
            monkeypatch.setattr(hub_files, "_opened", {})  # as in a process of its own: the first fills the cache
            write_share(assignment)
        monkeypatch.setattr(hub_files, "_opened", {})
        assert request.work().inputs[0].remote is None
        surgery.merge("hf://org/llama", "hf://org/lora", output=tmp_path / "out", engine=Shares(2))
        surgery.merge(base, lora, output=tmp_path / "single")
        weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "single")]
        assert weights[0] == weights[1]
