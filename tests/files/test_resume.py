# SPDX-License-Identifier: Apache-2.0
"""An identical run goes on where a killed one stopped, and believes only what it can check."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import xxhash

from surgery_formats.files.output.folder import FileRecord, output_folder
from surgery_formats.files.output.manifest import MANIFEST, verify_folder
from tests.support.folder_jobs import OTHER, PLAN, leave_stage


class TestResume:
    def test_finished_files_are_reused_and_the_rest_is_deleted(self, tmp_path: Path) -> None:
        out = tmp_path / "out"
        stage = leave_stage(out, {"a.safetensors": "aaa", "unet/b.safetensors": "bbb"})
        inode = (stage / "unet/b.safetensors").stat().st_ino
        with output_folder(out, PLAN) as folder:
            assert dict(folder.finished).keys() == {"a.safetensors", "unet/b.safetensors"}
            assert folder.finished["a.safetensors"].size == 3
            assert sorted(os.listdir(stage)) == [".surgery-journal", "a.safetensors", "unet"]
            assert os.listdir(stage / "unet") == ["b.safetensors"]
            folder.commit({})
        assert (out / "unet/b.safetensors").stat().st_ino == inode
        verify_folder(out)

    def test_a_second_interruption_keeps_what_both_finished(self, tmp_path: Path) -> None:
        out = tmp_path / "out"
        leave_stage(out, {"a.safetensors": "aaa"})
        leave_stage(out, {"b.safetensors": "bbb"})
        with output_folder(out, PLAN) as folder:
            assert set(folder.finished) == {"a.safetensors", "b.safetensors"}

    def test_a_file_whose_bytes_changed_is_written_again(self, tmp_path: Path) -> None:
        out = tmp_path / "out"
        stage = leave_stage(out, {"a.safetensors": "aaa"})
        (stage / "a.safetensors").write_bytes(b"aXa")
        with output_folder(out, PLAN) as folder:
            assert "a.safetensors" not in folder.finished
            made = folder.create("a.safetensors", 3)
            made.pwrite(b"aaa", 0)
            made.finish({"xxh3": xxhash.xxh3_128_hexdigest(b"aaa")})
            folder.commit({})
        verify_folder(out)

    @pytest.mark.parametrize("spoil", ["size", "link", "gone"])
    def test_a_file_that_differs_from_its_record_is_not_reused(self, spoil: str, tmp_path: Path) -> None:
        stage = leave_stage(tmp_path / "out", {"a.safetensors": "aaa"})
        victim = stage / "a.safetensors"
        victim.unlink()
        if spoil == "size":
            victim.write_bytes(b"aaaa")
        elif spoil == "link":
            (tmp_path / "elsewhere").write_bytes(b"aaa")
            victim.symlink_to(tmp_path / "elsewhere")
        with output_folder(tmp_path / "out", PLAN) as folder:
            assert not folder.finished
            assert os.listdir(stage) == [".surgery-journal"]

    def test_files_never_looked_up_are_not_in_the_output(self, tmp_path: Path) -> None:
        out = tmp_path / "out"
        leave_stage(out, {"a.safetensors": "aaa", "unet/b.safetensors": "bbb"})
        with output_folder(out, PLAN) as folder:
            assert "a.safetensors" in folder.finished
            folder.commit({})
        assert sorted(os.listdir(out)) == ["a.safetensors", MANIFEST]

    def test_a_custom_check_decides_about_reuse(self, tmp_path: Path) -> None:
        stage = leave_stage(tmp_path / "out", {"a.safetensors": "aaa"})
        asked: list[tuple[Path, FileRecord]] = []

        def verify(path: Path, found: FileRecord) -> bool:
            asked.append((path, found))
            return False

        with output_folder(tmp_path / "out", PLAN, verify=verify) as folder:
            assert not asked  # not before somebody looks
            assert "a.safetensors" not in folder.finished
        assert asked == [
            (
                stage / "a.safetensors",
                FileRecord("a.safetensors", 3, {"xxh3": xxhash.xxh3_128_hexdigest(b"aaa")}),
            )
        ]

    def test_without_a_hash_or_check_nothing_is_reused(self, tmp_path: Path) -> None:
        stage = leave_stage(tmp_path / "out", {"a.safetensors": "aaa"})
        entry = {"plan": PLAN, "name": "a.safetensors", "size": 3, "record": {}}
        (stage / ".surgery-journal").write_text(json.dumps(entry) + "\n")
        with output_folder(tmp_path / "out", PLAN) as folder:
            assert not folder.finished

    def test_another_plan_does_not_see_the_stage(self, tmp_path: Path) -> None:
        stage = leave_stage(tmp_path / "out", {"a.safetensors": "aaa"})
        with output_folder(tmp_path / "out", OTHER) as folder:
            assert not folder.finished
        assert (stage / "a.safetensors").exists()

    @pytest.mark.parametrize(
        "line",
        [
            b"null",
            b"[]",
            b"{}",
            b"[" * 100_000,
            b"\xff\xfe",
            json.dumps({"plan": PLAN, "name": "../../victim", "size": 3, "record": {}}).encode(),
            json.dumps({"plan": PLAN, "name": 3, "size": 3, "record": {}}).encode(),
            json.dumps({"plan": PLAN, "name": "a", "size": None, "record": {}}).encode(),
            json.dumps({"plan": PLAN, "name": "a", "size": 3, "record": 3}).encode(),
        ],
    )
    def test_a_corrupt_journal_is_ignored(self, line: bytes, tmp_path: Path) -> None:
        stage = tmp_path / f".out.surgery-{PLAN[:16]}"
        stage.mkdir()
        (stage / ".surgery-journal").write_bytes(line)
        (tmp_path / "victim").write_bytes(b"abc")
        with output_folder(tmp_path / "out", PLAN) as folder:
            assert not folder.finished
        assert (tmp_path / "victim").read_bytes() == b"abc"
