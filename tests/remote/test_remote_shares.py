# SPDX-License-Identifier: Apache-2.0
"""Shares in a bucket that were being removed, and shares of inputs on the hub."""

from __future__ import annotations

from pathlib import Path

import pytest

import surgery
from surgery.engine.merge.merge_request import MergeRequest
from surgery.engine.shares import folders
from surgery.engine.shares.folders import Shares, assignments, write_share
from surgery_formats.files.output.manifest import MANIFEST
from surgery_formats.files.remote import hub as hub_files
from tests.support.hub import reached
from tests.support.kit import ROOT, make_base, make_lora
from tests.support.s3 import Storage

BASE, LORA = str(ROOT / "examples" / "base"), str(ROOT / "examples" / "lora")


def test_what_is_left_of_a_share_that_was_being_removed_is_written_anew(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = MergeRequest(BASE, LORA).portable()
    output = storage.url("out")
    shares = assignments(request, request.work(), output, 1)
    whole = write_share(shares[0])
    names = [key for key in storage.objects() if key.startswith(f"{whole.name}/")]
    assert f"{whole.name}/{MANIFEST}" in names
    storage.clear(f"{whole.name}/{MANIFEST}")
    monkeypatch.setattr(folders, "_PATIENCE", 0.0)
    write_share(shares[0])
    surgery.merge(BASE, LORA, output=output, engine=Shares(1))
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
