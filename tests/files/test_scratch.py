# SPDX-License-Identifier: Apache-2.0
"""What killed runs left is removed by later ones, what others use stays; a command with several outputs can go on."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from surgery_formats.errors import OutputExistsError, ResourceError, UsageError
from surgery_formats.files.output.output_file import output_faults
from surgery_formats.files.output.scratch import scratch_folder
from surgery_formats.files.output.several import several_outputs
from surgery_formats.files.output.single import write_single
from tests.support.folder_jobs import OTHER, PLAN, leave_stage, write_output


def _dead(folder: Path, digit: str = "0") -> Path:
    dead = folder / f".surgery-scratch-{digit * 16}"
    dead.mkdir()
    (dead / "left").write_bytes(b"by a killed run")
    return dead


class TestScratchFolder:
    def test_is_gone_afterwards_and_so_is_what_killed_runs_left(self, tmp_path: Path) -> None:
        _dead(tmp_path)
        other = tmp_path / ".surgery-scratch-of-somebody"
        other.mkdir()
        with scratch_folder(tmp_path) as folder:
            assert folder.parent == tmp_path
            assert sorted(os.listdir(tmp_path)) == sorted([folder.name, other.name])
            (folder / "a").mkdir()
        assert os.listdir(tmp_path) == [other.name]

    def test_one_in_use_stays(self, tmp_path: Path) -> None:
        with scratch_folder(tmp_path) as first, scratch_folder(tmp_path) as second:
            assert first.is_dir()
            assert second.is_dir()
            assert first != second
        assert os.listdir(tmp_path) == []

    def test_without_a_place_it_lies_among_temporary_files(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
        for beside in (None, tmp_path / "missing"):
            with scratch_folder(beside) as folder:
                assert folder.parent == tmp_path

    @pytest.mark.parametrize("inside", ["step/model.safetensors", ""])
    def test_a_failure_within_is_told_of_a_place_that_people_know(self, inside: str, tmp_path: Path) -> None:
        def fill() -> None:
            with scratch_folder(tmp_path) as folder, output_faults(folder / inside):
                raise OSError(28, "No space left on device")

        with pytest.raises(ResourceError) as caught:
            fill()
        assert caught.value.file == str(tmp_path)

    def test_a_link_is_not_followed(self, tmp_path: Path) -> None:
        kept = tmp_path / "kept"
        kept.mkdir()
        (kept / "file").write_bytes(b"")
        place = tmp_path / "place"
        place.mkdir()
        (place / f".surgery-scratch-{'1' * 16}").symlink_to(kept)
        with scratch_folder(place):
            pass
        assert os.listdir(kept) == ["file"]


class TestWhatOthersBegan:
    def test_goes_when_the_output_is_complete(self, tmp_path: Path) -> None:
        out = tmp_path / "out"
        leave_stage(out, {"a.safetensors": "aaa"}, OTHER)
        leave_stage(tmp_path / "another", {"a.safetensors": "aaa"}, OTHER)
        write_output(out)
        assert sorted(os.listdir(tmp_path)) == [f".another.surgery-{OTHER[:16]}", "out"]

    def test_goes_with_a_single_file_too(self, tmp_path: Path) -> None:
        (tmp_path / f".out.surgery-{OTHER[:16]}.bin").write_bytes(b"half")
        write_single(tmp_path / "out.bin", PLAN, 1, lambda file: file.pwrite(b"x", 0))
        assert os.listdir(tmp_path) == ["out.bin"]


class TestSingleFile:
    @pytest.mark.parametrize("overwrite", [False, True])
    def test_a_name_that_cannot_be_made_durable_is_taken_back(
        self, overwrite: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        out = tmp_path / "out.bin"
        if overwrite:
            out.write_bytes(b"old")

        def fails(folder: Path) -> None:
            raise OSError(5, "Input/output error")

        monkeypatch.setattr("surgery_formats.files.output.single.sync_folder", fails)
        with pytest.raises(ResourceError, match="Input/output error"):
            write_single(out, PLAN, 3, lambda file: file.pwrite(b"new", 0), overwrite=overwrite)
        assert os.listdir(tmp_path) == (["out.bin"] if overwrite else [])
        assert not overwrite or out.read_bytes() == b"old"

    def test_what_is_replaced_is_gone(self, tmp_path: Path) -> None:
        out = tmp_path / "out.bin"
        out.write_bytes(b"old")
        write_single(out, PLAN, 3, lambda file: file.pwrite(b"new", 0), overwrite=True)
        assert out.read_bytes() == b"new"
        assert os.listdir(tmp_path) == ["out.bin"]

    def test_what_is_replaced_is_gone_even_if_its_removal_is_interrupted(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        out, unlink, asked = tmp_path / "out.bin", Path.unlink, []
        out.write_bytes(b"old")

        def interrupted(path: Path, missing_ok: bool = False) -> None:
            asked.append(path)
            if len(asked) == 1:
                raise KeyboardInterrupt
            unlink(path, missing_ok)

        monkeypatch.setattr(Path, "unlink", interrupted)
        with pytest.raises(KeyboardInterrupt):
            write_single(out, PLAN, 3, lambda file: file.pwrite(b"new", 0), overwrite=True)
        assert out.read_bytes() == b"new"
        assert os.listdir(tmp_path) == ["out.bin"]

    def test_a_name_that_is_too_long_is_refused_at_once(self, tmp_path: Path) -> None:
        for write in (
            lambda out: write_single(out, PLAN, 1, lambda file: pytest.fail("written")),
            lambda out: write_output(out),
        ):
            with pytest.raises(UsageError, match="256 bytes"):
                write(tmp_path / ("n" * 256))


class TestSeveralOutputs:
    def test_one_that_is_complete_is_left_as_it_is(self, tmp_path: Path) -> None:
        out = write_output(tmp_path / "out")
        inode = (out / "model.safetensors").stat().st_ino
        with several_outputs():
            write_output(out)
        assert (out / "model.safetensors").stat().st_ino == inode
        assert os.listdir(tmp_path) == ["out"]
        with pytest.raises(OutputExistsError):
            write_output(out)

    @pytest.mark.parametrize("changed", ["plan", "bytes", "more"])
    def test_another_one_is_refused(self, changed: str, tmp_path: Path) -> None:
        out = write_output(tmp_path / "out", plan=OTHER if changed == "plan" else PLAN)
        if changed == "bytes":
            (out / "model.safetensors").write_bytes(b"Weights")
        if changed == "more":
            (out / "notes").write_bytes(b"mine")
        with several_outputs(), pytest.raises(OutputExistsError):
            write_output(out)
        assert os.listdir(tmp_path) == ["out"]

    def test_the_same_holds_for_single_files(self, tmp_path: Path) -> None:
        out = tmp_path / "out.bin"

        def write(data: bytes) -> Path:
            with several_outputs():
                return write_single(out, PLAN, len(data), lambda file: file.pwrite(data, 0))

        write(b"one")
        inode = out.stat().st_ino
        write(b"one")
        assert out.stat().st_ino == inode
        with pytest.raises(OutputExistsError):
            write(b"two")
        assert os.listdir(tmp_path) == ["out.bin"]
