# SPDX-License-Identifier: Apache-2.0
"""What may become an output, who may write it, and what a full disk leaves."""

from __future__ import annotations

import fcntl
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from surgery_formats.errors import (
    FitError,
    NotFoundError,
    OutputExistsError,
    ResourceError,
    SurgeryError,
)
from surgery_formats.files.output import kernel_copy
from surgery_formats.files.output.folder import output_folder
from surgery_formats.files.output.manifest import MANIFEST, verify_folder
from tests.support.folder_jobs import OTHER, PLAN, env, write_output


class TestExistingOutput:
    def test_is_refused_with_the_remedy(self, tmp_path: Path) -> None:
        out = write_output(tmp_path / "out")
        with pytest.raises(OutputExistsError, match="`overwrite=True`"):
            write_output(out, b"new")
        assert (out / "model.safetensors").read_bytes() == b"weights"
        assert os.listdir(tmp_path) == ["out"]

    def test_an_empty_folder_is_fine(self, tmp_path: Path) -> None:
        (tmp_path / "out").mkdir()
        out = write_output(tmp_path / "out")
        assert verify_folder(out)["files"].keys() == {"model.safetensors"}
        assert (out / "model.safetensors").read_bytes() == b"weights"

    def test_appearing_meanwhile_is_not_replaced(self, tmp_path: Path) -> None:
        out = tmp_path / "out"

        def run() -> None:
            with output_folder(out, PLAN) as folder:
                write_output(out, b"of another plan", OTHER)
                folder.commit({})

        with pytest.raises(OutputExistsError):
            run()
        assert (out / "model.safetensors").read_bytes() == b"of another plan"
        assert os.listdir(tmp_path) == ["out"]

    @pytest.mark.parametrize("can_exchange", [True, False])
    def test_overwrite_replaces_it_whole(
        self, can_exchange: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        if not can_exchange:
            monkeypatch.setattr("surgery_formats.files.output.stage.exchange", lambda one, other: False)
        out = write_output(tmp_path / "out")
        (out / "stale.json").write_text("{}")
        write_output(out, b"new", OTHER, overwrite=True)
        assert sorted(os.listdir(out)) == ["model.safetensors", MANIFEST]
        assert (out / "model.safetensors").read_bytes() == b"new"
        assert os.listdir(tmp_path) == ["out"]

    @pytest.mark.parametrize("overwrite", [True, False])
    def test_a_file_or_a_link_is_never_replaced(self, overwrite: bool, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("precious")
        (tmp_path / "real").mkdir()
        (tmp_path / "link").symlink_to("real")
        (tmp_path / "dangling").symlink_to("nowhere")
        before = sorted(os.listdir(tmp_path))
        for name in ("file", "link", "dangling"):
            with pytest.raises(OutputExistsError):
                write_output(tmp_path / name, overwrite=overwrite)
        assert sorted(os.listdir(tmp_path)) == before
        assert (tmp_path / "file").read_text() == "precious"

    def test_the_working_folder_is_never_replaced(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "out/below").mkdir(parents=True)
        monkeypatch.chdir(tmp_path / "out/below")
        for out in (Path(".."), tmp_path / "out"):
            with pytest.raises(FitError):
                write_output(out, overwrite=True)

    def test_what_became_the_working_folder_meanwhile_is_not_replaced(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        out = tmp_path / "out"
        with output_folder(out, PLAN, overwrite=True) as folder:
            out.mkdir()
            (out / "mine").write_text("m")
            monkeypatch.chdir(out)
            with pytest.raises(FitError):
                folder.commit({})
        assert (out / "mine").read_text() == "m"


class TestInputs:
    @pytest.mark.parametrize("overwrite", [True, False])
    @pytest.mark.parametrize("out", ["base", "base/merged", ".", "link", "base/../base"])
    def test_are_never_touched(
        self, out: str, overwrite: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        root = tmp_path / "root"
        (root / "base").mkdir(parents=True)
        (root / "base/model.safetensors").write_text("base")
        (root / "link").symlink_to("base")
        monkeypatch.chdir(tmp_path)
        for source in (root / "base", Path("root/link")):
            with pytest.raises(FitError):
                write_output(root / out, overwrite=overwrite, inputs=[source])
        assert (root / "base/model.safetensors").read_text() == "base"
        assert sorted(os.listdir(root)) == ["base", "link"]
        assert os.listdir(root / "base") == ["model.safetensors"]

    def test_a_folder_that_holds_an_input_file_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out/adapter.safetensors").write_text("a")
        with pytest.raises(FitError, match="holds the input"):
            write_output(tmp_path / "out", overwrite=True, inputs=[tmp_path / "out/adapter.safetensors"])

    def test_beside_the_output_are_fine(self, tmp_path: Path) -> None:
        (tmp_path / "base").mkdir()
        (tmp_path / "base/model.safetensors").write_bytes(b"base")
        out = write_output(tmp_path / "out", inputs=[tmp_path / "base", tmp_path / "gone"])
        assert verify_folder(out)["files"].keys() == {"model.safetensors"}
        assert (out / "model.safetensors").read_bytes() == b"weights"
        assert (tmp_path / "base/model.safetensors").read_bytes() == b"base"


def test_a_missing_parent_is_named(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="mkdir -p"):
        write_output(tmp_path / "no/such/out")


_RACE = """
import sys, time
from surgery_formats.errors import SurgeryError
from surgery_formats.files.output.folder import output_folder
try:
    with output_folder(sys.argv[1], "ab" * 32) as folder:
        folder.write_small("a", b"1")
        time.sleep(1.5)
        folder.commit({})
except SurgeryError as error:
    sys.stderr.write(str(error) + "\\n")
    sys.exit(error.exit_code)
"""


def test_exactly_one_of_four_processes_writes(tmp_path: Path) -> None:
    out = tmp_path / "out"
    running = [
        subprocess.Popen([sys.executable, "-c", _RACE, str(out)], stderr=subprocess.PIPE, text=True, env=env())
        for _ in range(4)
    ]
    said = [process.communicate(timeout=300)[1] for process in running]
    assert sorted(process.returncode for process in running) == [0, 2, 2, 2]
    for process, text in zip(running, said, strict=True):
        assert text == "" if process.returncode == 0 else len(text.splitlines()) == 1
        assert process.returncode == 0 or "another process is writing it" in text or "already exists" in text
    verify_folder(out)
    assert os.listdir(tmp_path) == ["out"]


class TestRace:
    """Another process ends its run between our opening its stage and our locking it."""

    def _when_locking(self, then: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> None:
        real = fcntl.flock

        def flock(fd: int, how: int) -> None:
            monkeypatch.setattr(fcntl, "flock", real)
            then()
            real(fd, how)

        monkeypatch.setattr(fcntl, "flock", flock)

    def test_a_stage_removed_meanwhile_is_created_again(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._when_locking((tmp_path / f".out.surgery-{PLAN[:16]}").rmdir, monkeypatch)
        verify_folder(write_output(tmp_path / "out"))
        assert os.listdir(tmp_path) == ["out"]

    def test_an_output_finished_meanwhile_is_noticed_before_the_work(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def finish() -> None:
            stage = tmp_path / f".out.surgery-{PLAN[:16]}"
            (stage / "model.safetensors").write_bytes(b"theirs")
            stage.rename(tmp_path / "out")

        self._when_locking(finish, monkeypatch)
        with pytest.raises(OutputExistsError), output_folder(tmp_path / "out", PLAN):
            pytest.fail("the work was begun")
        assert os.listdir(tmp_path) == ["out"]
        assert (tmp_path / "out/model.safetensors").read_bytes() == b"theirs"


class TestFullDisk:
    def test_a_file_size_limit_is_an_error_with_a_place(self, tmp_path: Path) -> None:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        # Python ignores SIGXFSZ: the write fails with EFBIG
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
        try:
            with output_folder(tmp_path / "out", PLAN) as folder:
                with pytest.raises(ResourceError):
                    folder.create("a", 200_000)
                # What was reserved is free again when the message says how much is free.
                assert [path.name for path in tmp_path.rglob("*.part")] == []
            with pytest.raises(ResourceError, match=r"out/model.safetensors: larger than .*`shard_size=`"):
                write_output(tmp_path / "out", b"x" * 200_000)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert os.listdir(tmp_path) == []
        verify_folder(write_output(tmp_path / "out", b"x" * 200_000))

    def test_a_full_disk_is_found_before_the_work(self, tmp_path: Path) -> None:
        mount = tmp_path / "small"
        mount.mkdir()
        if subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", mount], capture_output=True, check=False
        ).returncode:
            pytest.skip("a tmpfs cannot be mounted here (the same error is injected by the fault matrix)")
        try:
            with pytest.raises(ResourceError, match=r"no space left on the disk: 4 MB needed, 1.0\d MB free") as caught:
                write_output(mount / "out", b"x" * 4_000_000)
            assert caught.value.exit_code == 7
            assert os.listdir(mount) == []
            verify_folder(write_output(mount / "out", b"x" * 500_000))
        finally:
            subprocess.run(["umount", mount], check=True)


def test_a_stage_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "victim").mkdir()
    (tmp_path / "victim/precious").write_text("p")
    (tmp_path / f".out.surgery-{PLAN[:16]}").symlink_to("victim")
    with pytest.raises(SurgeryError):
        write_output(tmp_path / "out")
    assert (tmp_path / "victim/precious").read_text() == "p"


def test_a_failing_final_sync_removes_the_output_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = write_output(tmp_path / "out", b"old")
    real = kernel_copy.sync_folder

    def failing(fd: int) -> None:
        if os.path.samestat(os.fstat(fd), tmp_path.stat()):
            raise OSError(5, "Input/output error")
        real(fd)

    monkeypatch.setattr("surgery_formats.files.output.stage.sync_folder", failing)
    for target, options in ((tmp_path / "fresh", {}), (out, {"overwrite": True})):
        with pytest.raises(ResourceError, match="Input/output error"):
            write_output(target, b"new", OTHER, **options)
    assert os.listdir(tmp_path) == ["out"]
    assert (out / "model.safetensors").read_bytes() == b"old"
