# SPDX-License-Identifier: Apache-2.0
"""Where shares and inputs lie, what a removal that was cut short leaves, and what is said before a share is asked for."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import surgery
from surgery.engine.merge.merge_request import MergeRequest
from surgery.engine.shares import folders
from surgery.engine.shares.folders import Shares, assignments, write_share
from surgery_formats.errors import OutputExistsError
from surgery_formats.files.output.manifest import MANIFEST
from tests.algebra.test_lora_form import trained
from tests.support.kit import HIDDEN, ROOT, make_base, make_lora

BASE, LORA = str(ROOT / "examples" / "base"), str(ROOT / "examples" / "lora")


@pytest.fixture
def request_(tmp_path: Path) -> MergeRequest:
    return MergeRequest(str(make_base(tmp_path / "base")), ((str(make_lora(tmp_path / "a")), 1.0),))


def test_what_is_left_of_a_share_that_was_being_removed_is_written_anew(
    request_: MergeRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    shares = assignments(request_, request_.work(), output, 2)
    for assignment in shares:
        write_share(assignment)

    def killed(path: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            surgery.merge(request_.base, request_.adapters, output=output, engine=Shares(2))
    assert output.exists()
    assert shares[0].folder.is_dir()
    assert not (shares[0].folder / MANIFEST).exists()
    before = (output / "model.safetensors").read_bytes()
    monkeypatch.setattr(folders, "_PATIENCE", 0.0)
    for assignment in shares:
        write_share(assignment)
    surgery.merge(request_.base, request_.adapters, output=output, engine=Shares(2), overwrite=True)
    assert (output / "model.safetensors").read_bytes() == before
    assert not any(assignment.folder.exists() for assignment in shares)


def test_shares_that_cannot_be_removed_do_not_fail_a_complete_output(
    request_: MergeRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for assignment in assignments(request_, request_.work(), tmp_path / "out", 1):
        write_share(assignment)

    def fail(path: Path) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(shutil, "rmtree", fail)
    surgery.merge(request_.base, request_.adapters, output=tmp_path / "out", engine=Shares(1))
    assert "could not be removed" in caplog.text


def test_a_way_back_out_of_a_link_leads_workers_where_it_leads_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "far" / "deep").mkdir(parents=True)
    (tmp_path / "here").mkdir()
    make_base(tmp_path / "far" / "base")
    make_base(tmp_path / "here" / "base", **{"lm_head.weight": torch.ones(64, HIDDEN)})
    make_lora(tmp_path / "a")
    os.symlink(tmp_path / "far" / "deep", tmp_path / "here" / "link")
    monkeypatch.chdir(tmp_path / "here")
    request = MergeRequest("link/../base", "../a").portable()
    assert os.path.samefile(request.base, tmp_path / "far" / "base")
    output = "link/../out"
    for assignment in assignments(request, request.work(), output, 2):
        assert write_share(assignment).resolve().parent == tmp_path / "far"
    surgery.merge("link/../base", "../a", output=output, engine=Shares(2))
    surgery.merge(tmp_path / "far" / "base", tmp_path / "a", output=tmp_path / "single")
    assert (tmp_path / "far" / "out" / "model.safetensors").read_bytes() == (
        tmp_path / "single" / "model.safetensors"
    ).read_bytes()


def _merge(out: Path, inputs: Path) -> None:
    surgery.merge(BASE, LORA, output=out, engine=Shares(2))


def _extract(out: Path, inputs: Path) -> None:
    surgery.extract_lora(BASE, surgery.merge(BASE, LORA, output=inputs / "tuned").output, output=out, engine=Shares(2))


def _convert(out: Path, inputs: Path) -> None:
    _, base, adapter = trained("oft", inputs / "oft")
    surgery.convert(adapter, "peft", output=out, base=base, as_lora=True, rank=3, engine=Shares(2))


def _export(out: Path, inputs: Path) -> None:
    surgery.export_onnx(BASE, LORA, output=out, weights_type="int4", engine=Shares(2))


@pytest.mark.parametrize("command", [_merge, _extract, _convert, _export])
def test_an_output_that_is_there_is_told_before_any_share_is_asked_for(
    command: Callable[[Path, Path], None], tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    with pytest.raises(OutputExistsError):  # and not that shares are missing
        command(tmp_path / "out", tmp_path)
    assert os.listdir(tmp_path / "out") == ["mine"]
