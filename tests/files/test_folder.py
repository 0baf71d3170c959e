# SPDX-License-Identifier: Apache-2.0
"""The output folder: what it refuses, what it keeps, what it says, and that it is all or nothing."""

from __future__ import annotations

import fcntl
import json
import os
import resource
import stat
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from surgery_formats.errors import (
    FitError,
    MalformedError,
    NotFoundError,
    OutputExistsError,
    ProofError,
    ResourceError,
    SurgeryError,
)
from surgery_formats.files import kernel_copy
from surgery_formats.files.folder import FileRecord, check_disk, output_folder, verify_folder
from surgery_formats.files.manifest import MANIFEST, safe_name
from surgery_formats.files.raw import open_file

_ROOT = Path(__file__).parents[2]
_PLAN = "0123456789abcdef" * 4
_OTHER = "f" * 64


def _env() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(_ROOT / "formats")}


def _write(out: Path, data: bytes = b"weights", plan: str = _PLAN, **options: object) -> Path:
    with output_folder(out, plan, **options) as folder:  # type: ignore[arg-type]
        made = folder.create("model.safetensors", len(data))
        made.pwrite(data, 0)
        made.finish({"xxh3": xxhash.xxh3_128_hexdigest(data)})
        return folder.commit({"tool": "test"})


_KILLED = """
import json, os, sys, xxhash
from surgery_formats.files.folder import output_folder
with output_folder(sys.argv[1], sys.argv[2]) as folder:
    for name, text in json.loads(sys.argv[3]).items():
        data = text.encode()
        made = folder.create(name, len(data))
        made.pwrite(data, 0)
        made.finish({"xxh3": xxhash.xxh3_128_hexdigest(data)})
    for name in ("half.safetensors", "unet/half.safetensors", "vae/half.safetensors"):
        folder.create(name, 1000).pwrite(b"x" * 10, 0)
    os._exit(9)
"""


def _leave_stage(out: Path, files: dict[str, str], plan: str = _PLAN) -> Path:
    """What a killed run leaves: finished files, a half-written one, a journal with a torn last line."""
    ran = subprocess.run([sys.executable, "-c", _KILLED, str(out), plan, json.dumps(files)], env=_env(), check=False)
    assert ran.returncode == 9
    stage = out.parent / f".{out.name}.surgery-{plan[:16]}"
    with (stage / ".surgery-journal").open("ab") as journal:
        journal.write(b'\n{"plan": "' + plan[:20].encode())
    return stage


def test_a_committed_folder_holds_its_files_and_its_manifest(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with output_folder(out, _PLAN) as folder:
        made = folder.create("unet/model.safetensors", 5)
        made.pwrite(b"llo", 2)
        made.pwrite(b"he", 0)
        assert made.readback(1, 3) == b"ell"
        made.finish({"xxh3": xxhash.xxh3_128_hexdigest(b"hello"), "ranges": [[0, 5]]})
        folder.write_small("config.json", b"{}")
        assert not out.exists()
        assert folder.commit({"tool": "test"}) == out
    assert sorted(os.listdir(tmp_path)) == ["out"]
    assert (out / "unet/model.safetensors").read_bytes() == b"hello"
    raw = (out / MANIFEST).read_bytes()
    manifest = json.loads(raw)
    assert raw == json.dumps(manifest, sort_keys=True, indent=1).encode() + b"\n"
    assert manifest["format"] == "surgery-manifest/1"
    assert manifest["plan"] == _PLAN
    assert manifest["tool"] == "test"
    assert manifest["files"]["unet/model.safetensors"] == {
        "ranges": [[0, 5]],
        "size": 5,
        "xxh3": xxhash.xxh3_128_hexdigest(b"hello"),
    }
    verify_folder(out)


def test_modes_follow_the_umask_and_nothing_is_a_link(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        out = _write(tmp_path / "out")
    finally:
        os.umask(before)
    assert stat.S_IMODE(out.stat().st_mode) == 0o750
    for path in out.iterdir():
        found = path.lstat()
        assert stat.S_ISREG(found.st_mode)
        assert stat.S_IMODE(found.st_mode) == 0o640
        assert found.st_nlink == 1


@pytest.mark.parametrize("fault", [ValueError, KeyboardInterrupt, SystemExit])
def test_a_failed_run_leaves_nothing(fault: type[BaseException], tmp_path: Path) -> None:
    def run() -> None:
        with output_folder(tmp_path / "out", _PLAN) as folder:
            folder.create("a.safetensors", 10).pwrite(b"abc", 0)
            raise fault

    with pytest.raises(fault):
        run()
    assert os.listdir(tmp_path) == []


def test_leaving_without_commit_leaves_nothing(tmp_path: Path) -> None:
    with output_folder(tmp_path / "out", _PLAN) as folder:
        folder.write_small("config.json", b"{}")
    assert os.listdir(tmp_path) == []


def test_descriptors_are_given_back(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    _write(tmp_path / "one")

    def run() -> None:
        with output_folder(tmp_path / "two", _PLAN) as folder:
            folder.create("a", 10)
            folder.commit({})

    with pytest.raises(ProofError):
        run()
    with pytest.raises(OutputExistsError):
        _write(tmp_path / "one")
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_finished_file_is_durable_before_the_journal_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    sync, rename, write = os.fsync, os.rename, os.pwrite

    def name(fd: int) -> str:
        return os.path.basename(os.readlink(f"/proc/self/fd/{fd}"))

    def noted_sync(fd: int) -> None:
        done.append(f"sync {name(fd)}")
        sync(fd)

    def noted_rename(old: Path, new: Path) -> None:
        done.append(f"rename {old.name} {new.name}")
        rename(old, new)

    def noted_write(fd: int, data: memoryview, offset: int) -> int:
        done.append(f"write {name(fd)}")
        return write(fd, data, offset)

    with output_folder(tmp_path / "out", _PLAN) as folder:
        made = folder.create("unet/a", 3)
        made.pwrite(b"abc", 0)
        monkeypatch.setattr(os, "fsync", noted_sync)
        monkeypatch.setattr(os, "rename", noted_rename)
        monkeypatch.setattr(os, "pwrite", noted_write)
        made.finish({})
        monkeypatch.undo()
    assert done == [
        "sync a.part",
        "rename a.part a",
        "sync unet",
        f"sync .out.surgery-{_PLAN[:16]}",
        "write .surgery-journal",
        "sync .surgery-journal",
    ]


class TestExistingOutput:
    def test_is_refused_with_the_remedy(self, tmp_path: Path) -> None:
        out = _write(tmp_path / "out")
        with pytest.raises(OutputExistsError, match="--overwrite"):
            _write(out, b"new")
        assert (out / "model.safetensors").read_bytes() == b"weights"
        assert os.listdir(tmp_path) == ["out"]

    def test_an_empty_folder_is_fine(self, tmp_path: Path) -> None:
        (tmp_path / "out").mkdir()
        verify_folder(_write(tmp_path / "out"))

    def test_appearing_meanwhile_is_not_replaced(self, tmp_path: Path) -> None:
        out = tmp_path / "out"

        def run() -> None:
            with output_folder(out, _PLAN) as folder:
                _write(out, b"of another plan", _OTHER)
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
            monkeypatch.setattr("surgery_formats.files.stage.exchange", lambda one, other: False)
        out = _write(tmp_path / "out")
        (out / "stale.json").write_text("{}")
        _write(out, b"new", _OTHER, overwrite=True)
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
                _write(tmp_path / name, overwrite=overwrite)
        assert sorted(os.listdir(tmp_path)) == before
        assert (tmp_path / "file").read_text() == "precious"

    def test_the_working_folder_is_never_replaced(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "out/below").mkdir(parents=True)
        monkeypatch.chdir(tmp_path / "out/below")
        for out in (Path(".."), tmp_path / "out"):
            with pytest.raises(FitError):
                _write(out, overwrite=True)

    def test_what_became_the_working_folder_meanwhile_is_not_replaced(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        out = tmp_path / "out"
        with output_folder(out, _PLAN, overwrite=True) as folder:
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
                _write(root / out, overwrite=overwrite, inputs=[source])
        assert (root / "base/model.safetensors").read_text() == "base"
        assert sorted(os.listdir(root)) == ["base", "link"]
        assert os.listdir(root / "base") == ["model.safetensors"]

    def test_a_folder_that_holds_an_input_file_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out/adapter.safetensors").write_text("a")
        with pytest.raises(FitError, match="holds the input"):
            _write(tmp_path / "out", overwrite=True, inputs=[tmp_path / "out/adapter.safetensors"])

    def test_beside_the_output_are_fine(self, tmp_path: Path) -> None:
        (tmp_path / "base").mkdir()
        verify_folder(_write(tmp_path / "out", inputs=[tmp_path / "base", tmp_path / "gone"]))


def test_a_missing_parent_is_named(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="mkdir -p"):
        _write(tmp_path / "no/such/out")


class TestResume:
    def test_finished_files_are_used_again_and_the_rest_is_gone(self, tmp_path: Path) -> None:
        out = tmp_path / "out"
        stage = _leave_stage(out, {"a.safetensors": "aaa", "unet/b.safetensors": "bbb"})
        inode = (stage / "unet/b.safetensors").stat().st_ino
        with output_folder(out, _PLAN) as folder:
            assert dict(folder.finished).keys() == {"a.safetensors", "unet/b.safetensors"}
            assert folder.finished["a.safetensors"].size == 3
            assert sorted(os.listdir(stage)) == [".surgery-journal", "a.safetensors", "unet"]
            assert os.listdir(stage / "unet") == ["b.safetensors"]
            folder.commit({})
        assert (out / "unet/b.safetensors").stat().st_ino == inode
        verify_folder(out)

    def test_a_second_interruption_keeps_what_both_finished(self, tmp_path: Path) -> None:
        out = tmp_path / "out"
        _leave_stage(out, {"a.safetensors": "aaa"})
        _leave_stage(out, {"b.safetensors": "bbb"})
        with output_folder(out, _PLAN) as folder:
            assert set(folder.finished) == {"a.safetensors", "b.safetensors"}

    def test_a_file_whose_bytes_changed_is_written_again(self, tmp_path: Path) -> None:
        out = tmp_path / "out"
        stage = _leave_stage(out, {"a.safetensors": "aaa"})
        (stage / "a.safetensors").write_bytes(b"aXa")
        with output_folder(out, _PLAN) as folder:
            assert "a.safetensors" not in folder.finished
            made = folder.create("a.safetensors", 3)
            made.pwrite(b"aaa", 0)
            made.finish({"xxh3": xxhash.xxh3_128_hexdigest(b"aaa")})
            folder.commit({})
        verify_folder(out)

    @pytest.mark.parametrize("spoil", ["size", "link", "gone"])
    def test_a_file_that_is_not_there_as_noted_is_not_offered(self, spoil: str, tmp_path: Path) -> None:
        stage = _leave_stage(tmp_path / "out", {"a.safetensors": "aaa"})
        victim = stage / "a.safetensors"
        victim.unlink()
        if spoil == "size":
            victim.write_bytes(b"aaaa")
        elif spoil == "link":
            (tmp_path / "elsewhere").write_bytes(b"aaa")
            victim.symlink_to(tmp_path / "elsewhere")
        with output_folder(tmp_path / "out", _PLAN) as folder:
            assert not folder.finished
            assert os.listdir(stage) == [".surgery-journal"]

    def test_what_the_run_does_not_ask_for_is_not_in_the_output(self, tmp_path: Path) -> None:
        out = tmp_path / "out"
        _leave_stage(out, {"a.safetensors": "aaa", "unet/b.safetensors": "bbb"})
        with output_folder(out, _PLAN) as folder:
            assert "a.safetensors" in folder.finished
            folder.commit({})
        assert sorted(os.listdir(out)) == ["a.safetensors", MANIFEST]

    def test_the_caller_may_judge_for_itself(self, tmp_path: Path) -> None:
        stage = _leave_stage(tmp_path / "out", {"a.safetensors": "aaa"})
        asked: list[tuple[Path, FileRecord]] = []

        def verify(path: Path, found: FileRecord) -> bool:
            asked.append((path, found))
            return False

        with output_folder(tmp_path / "out", _PLAN, verify=verify) as folder:
            assert not asked  # not before somebody looks
            assert "a.safetensors" not in folder.finished
        assert asked == [
            (
                stage / "a.safetensors",
                FileRecord("a.safetensors", 3, {"xxh3": xxhash.xxh3_128_hexdigest(b"aaa")}),
            )
        ]

    def test_without_a_hash_or_a_judge_nothing_is_trusted(self, tmp_path: Path) -> None:
        stage = _leave_stage(tmp_path / "out", {"a.safetensors": "aaa"})
        entry = {"plan": _PLAN, "name": "a.safetensors", "size": 3, "record": {}}
        (stage / ".surgery-journal").write_text(json.dumps(entry) + "\n")
        with output_folder(tmp_path / "out", _PLAN) as folder:
            assert not folder.finished

    def test_another_plan_does_not_see_it(self, tmp_path: Path) -> None:
        stage = _leave_stage(tmp_path / "out", {"a.safetensors": "aaa"})
        with output_folder(tmp_path / "out", _OTHER) as folder:
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
            json.dumps({"plan": _PLAN, "name": "../../victim", "size": 3, "record": {}}).encode(),
            json.dumps({"plan": _PLAN, "name": 3, "size": 3, "record": {}}).encode(),
            json.dumps({"plan": _PLAN, "name": "a", "size": None, "record": {}}).encode(),
            json.dumps({"plan": _PLAN, "name": "a", "size": 3, "record": 3}).encode(),
        ],
    )
    def test_a_journal_full_of_rubbish_is_ignored(self, line: bytes, tmp_path: Path) -> None:
        stage = tmp_path / f".out.surgery-{_PLAN[:16]}"
        stage.mkdir()
        (stage / ".surgery-journal").write_bytes(line)
        (tmp_path / "victim").write_bytes(b"abc")
        with output_folder(tmp_path / "out", _PLAN) as folder:
            assert not folder.finished
        assert (tmp_path / "victim").read_bytes() == b"abc"


class TestProof:
    def test_bytes_nobody_wrote_are_found(self, tmp_path: Path) -> None:
        with (
            pytest.raises(ProofError, match="bytes 3 to 7 were never written"),
            output_folder(tmp_path / "out", _PLAN) as folder,
        ):
            made = folder.create("a", 10)
            made.pwrite(b"890", 7)
            made.pwrite(b"123", 0)
            made.finish({})
        with (
            pytest.raises(ProofError, match="bytes 3 to 10"),
            output_folder(tmp_path / "out", _PLAN) as folder,
        ):
            made = folder.create("a", 10)
            made.pwrite(b"123", 0)
            made.finish({})

    @pytest.mark.parametrize(("offset", "size"), [(8, 3), (-1, 2), (11, 0)])
    def test_a_write_outside_the_plan_is_refused(self, offset: int, size: int, tmp_path: Path) -> None:
        with output_folder(tmp_path / "out", _PLAN) as folder:
            made = folder.create("a", 10)
            for act in (lambda: made.pwrite(b"x" * size, offset), lambda: made.readback(offset, size)):
                with pytest.raises(ProofError):
                    act()

    def test_an_unfinished_file_stops_the_commit(self, tmp_path: Path) -> None:
        with (
            pytest.raises(ProofError, match="never finished: a"),
            output_folder(tmp_path / "out", _PLAN) as folder,
        ):
            folder.create("a", 0)
            folder.commit({})
        assert os.listdir(tmp_path) == []

    def test_nan_is_not_written_into_a_manifest(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="JSON"), output_folder(tmp_path / "out", _PLAN) as folder:
            folder.commit({"error": float("nan")})
        assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "name",
    [
        *("", ".", "..", "/a", "../a", "a/..", "a/b/c", "a//b", "a/", "a\\b", "C:a"),
        *("a\0b", "a\nb", "a\x1b[2J", "\ud800", "\u202ea", "x" * 241),
        *("NUL", "com1.txt", "a.", "a "),
        *("a.part", "a.part/b", ".surgery-journal", MANIFEST, f"{MANIFEST}/a"),
    ],
)
def test_a_dangerous_name_is_refused(name: str, tmp_path: Path) -> None:
    with output_folder(tmp_path / "out", _PLAN) as folder:
        with pytest.raises(FitError):
            folder.create(name, 0)
        with pytest.raises(FitError):
            folder.write_small(name, b"")


@given(st.text(min_size=1, max_size=30))
def test_every_accepted_name_stays_in_the_folder(name: str) -> None:
    try:
        parts = safe_name(name)
    except FitError:
        return
    assert "/".join(parts) == name
    assert 1 <= len(parts) <= 2
    assert os.path.normpath(os.path.join("/stage", name)) == f"/stage/{name}"
    os.fsencode(name)


@given(st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_-]{0,20}(/[a-z0-9_-]{1,20})?\.safetensors", fullmatch=True))
def test_ordinary_names_are_accepted(name: str) -> None:
    stem = name.split(".", maxsplit=1)[0]
    if not any(
        part.lower() in {"con", "prn", "aux", "nul"} or part.lower()[:3] in {"com", "lpt"} for part in stem.split("/")
    ):
        assert "/".join(safe_name(name)) == name


def test_a_name_is_used_once(tmp_path: Path) -> None:
    with output_folder(tmp_path / "out", _PLAN) as folder:
        folder.write_small("a", b"1")
        with pytest.raises(FitError, match="two output files"):
            folder.create("a", 1)


class TestCopy:
    @pytest.mark.parametrize("fault", [None, "EXDEV", "ENOSYS", "EINVAL", "EOPNOTSUPP", "zero", "missing"])
    def test_every_way_gives_the_same_bytes(
        self, fault: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        data = os.urandom(300_000)
        (tmp_path / "source").write_bytes(data)
        real = os.copy_file_range
        calls = 0

        def broken(source: int, target: int, count: int, source_at: int, target_at: int) -> int:
            nonlocal calls
            calls += 1
            if calls == 1:  # some bytes first, so that the other way must go on where this one stopped
                return real(source, target, 1000, source_at, target_at)
            if fault == "zero":
                return 0
            raise OSError(getattr(__import__("errno"), str(fault)), "no")

        if fault == "missing":
            monkeypatch.delattr(os, "copy_file_range")
        elif fault is not None:
            monkeypatch.setattr(os, "copy_file_range", broken)
        monkeypatch.setattr(kernel_copy, "_BUFFER", 70_000)
        with output_folder(tmp_path / "out", _PLAN) as folder:
            made = folder.create("a", 250_010)
            made.pwrite(b"0123456789", 0)
            made.copy_from(open_file(tmp_path / "source"), 40_000, 10, 250_000)
            made.finish({})
            folder.commit({})
        assert (tmp_path / "out/a").read_bytes() == b"0123456789" + data[40_000:290_000]

    def test_a_source_that_is_too_short_is_named(self, tmp_path: Path) -> None:
        (tmp_path / "source").write_bytes(b"short")
        with pytest.raises(MalformedError, match="source"), output_folder(tmp_path / "out", _PLAN) as folder:
            folder.create("a", 100).copy_from(open_file(tmp_path / "source"), 0, 0, 100)
        assert os.listdir(tmp_path) == ["source"]


def test_many_threads_write_and_finish_at_once(tmp_path: Path) -> None:
    block = 4096
    names = [f"model-{index}.safetensors" for index in range(6)]
    start = threading.Barrier(6)
    with output_folder(tmp_path / "out", _PLAN) as folder, ThreadPoolExecutor(6) as pool:

        def whole(name: str) -> None:
            start.wait()
            made = folder.create(name, 16 * block)
            for at in reversed(range(16)):
                made.pwrite(bytes([at]) * block, at * block)
            made.finish({})

        list(pool.map(whole, names))
        shared = folder.create("shared", 64 * block)
        list(pool.map(lambda at: shared.pwrite(bytes([at]) * block, at * block), range(64)))
        shared.finish({})
        folder.commit({})
    verify_folder(tmp_path / "out")
    for name in names:
        assert (tmp_path / "out" / name).read_bytes() == b"".join(bytes([at]) * block for at in range(16))
    assert (tmp_path / "out/shared").read_bytes() == b"".join(bytes([at]) * block for at in range(64))


_RACE = """
import sys, time
from surgery_formats.errors import SurgeryError
from surgery_formats.files.folder import output_folder
try:
    with output_folder(sys.argv[1], "ab" * 32) as folder:
        folder.write_small("a", b"1")
        time.sleep(1.5)
        folder.commit({})
except SurgeryError as error:
    sys.stderr.write(str(error) + "\\n")
    sys.exit(error.exit_code)
"""


def test_of_four_processes_one_writes(tmp_path: Path) -> None:
    out = tmp_path / "out"
    running = [
        subprocess.Popen([sys.executable, "-c", _RACE, str(out)], stderr=subprocess.PIPE, text=True, env=_env())
        for _ in range(4)
    ]
    said = [process.communicate(timeout=60)[1] for process in running]
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

    def test_a_stage_that_was_removed_meanwhile_is_made_anew(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self._when_locking((tmp_path / f".out.surgery-{_PLAN[:16]}").rmdir, monkeypatch)
        verify_folder(_write(tmp_path / "out"))
        assert os.listdir(tmp_path) == ["out"]

    def test_an_output_that_was_finished_meanwhile_is_seen_before_the_work(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def finish() -> None:
            stage = tmp_path / f".out.surgery-{_PLAN[:16]}"
            (stage / "model.safetensors").write_bytes(b"theirs")
            stage.rename(tmp_path / "out")

        self._when_locking(finish, monkeypatch)
        with pytest.raises(OutputExistsError), output_folder(tmp_path / "out", _PLAN):
            pytest.fail("the work was begun")
        assert os.listdir(tmp_path) == ["out"]
        assert (tmp_path / "out/model.safetensors").read_bytes() == b"theirs"


class TestFullDisk:
    def test_a_file_size_limit_is_an_error_with_a_place(self, tmp_path: Path) -> None:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        # Python ignores SIGXFSZ: the write fails with EFBIG
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
        try:
            with output_folder(tmp_path / "out", _PLAN) as folder:
                with pytest.raises(ResourceError):
                    folder.create("a", 200_000)
                # What was reserved is free again when the message says how much is free.
                assert [path.name for path in tmp_path.rglob("*.part")] == []
            with pytest.raises(ResourceError, match=r"out/model.safetensors: larger than .*--shard-size"):
                _write(tmp_path / "out", b"x" * 200_000)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert os.listdir(tmp_path) == []
        verify_folder(_write(tmp_path / "out", b"x" * 200_000))

    def test_a_full_disk_is_found_before_the_work(self, tmp_path: Path) -> None:
        mount = tmp_path / "small"
        mount.mkdir()
        if subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", mount], capture_output=True, check=False
        ).returncode:
            pytest.skip("a tmpfs cannot be mounted here (the same error is injected by the fault matrix)")
        try:
            with pytest.raises(ResourceError, match=r"no space left on the disk: 4 MB needed, 1.0\d MB free") as caught:
                _write(mount / "out", b"x" * 4_000_000)
            assert caught.value.exit_code == 7
            assert os.listdir(mount) == []
            verify_folder(_write(mount / "out", b"x" * 500_000))
        finally:
            subprocess.run(["umount", mount], check=True)

    def test_the_preflight_says_how_much(self, tmp_path: Path) -> None:
        check_disk(tmp_path, 1)
        check_disk(tmp_path / "not/there/yet", 1)
        with pytest.raises(ResourceError, match=r"not enough disk: 1e\+06 TB needed, .* free"):
            check_disk(tmp_path, 10**18)


class TestVerifyFolder:
    def test_finds_every_difference(self, tmp_path: Path) -> None:
        def spoiled(what: str) -> Path:
            out = tmp_path / what
            with output_folder(out, _PLAN) as folder:
                folder.write_small("unet/config.json", b"{}")
                folder.write_small("a", b"abc")
                folder.commit({})
            verify_folder(out)
            return out

        (spoiled("missing") / "unet/config.json").unlink()
        (spoiled("extra") / "unet/more").write_text("")
        (spoiled("link") / "loop").symlink_to("unet")
        (spoiled("size") / "a").write_bytes(b"abcd")
        (spoiled("bytes") / "a").write_bytes(b"abd")
        for what, says in [
            ("missing", "missing: unet/config.json"),
            ("extra", "not in the manifest: unet/more"),
            ("link", "not in the manifest: loop"),
            ("size", "4 bytes, 3 when written"),
            ("bytes", "its bytes changed"),
        ]:
            with pytest.raises(ProofError, match=says):
                verify_folder(tmp_path / what)

    @pytest.mark.parametrize(
        "manifest", ["[]", "{}", '{"format": "surgery-manifest/1"}', '{"format": "other", "files": {}}', "{"]
    )
    def test_refuses_what_is_no_manifest(self, manifest: str, tmp_path: Path) -> None:
        (tmp_path / MANIFEST).write_text(manifest)
        with pytest.raises(MalformedError):
            verify_folder(tmp_path)

    def test_names_of_a_hostile_manifest_are_never_opened(self, tmp_path: Path) -> None:
        (tmp_path / "out").mkdir()
        (tmp_path / "secret").write_text("s")
        entry = {"format": "surgery-manifest/1", "files": {"../secret": {"size": 1}}}
        (tmp_path / "out" / MANIFEST).write_text(json.dumps(entry))
        with pytest.raises(ProofError, match="missing"):
            verify_folder(tmp_path / "out")
        with pytest.raises(NotFoundError):
            verify_folder(tmp_path)


def test_a_stage_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "victim").mkdir()
    (tmp_path / "victim/precious").write_text("p")
    (tmp_path / f".out.surgery-{_PLAN[:16]}").symlink_to("victim")
    with pytest.raises(SurgeryError):
        _write(tmp_path / "out")
    assert (tmp_path / "victim/precious").read_text() == "p"


def test_a_sync_that_fails_at_the_end_takes_the_output_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = _write(tmp_path / "out", b"old")
    real = kernel_copy.sync_folder

    def failing(fd: int) -> None:
        if os.path.samestat(os.fstat(fd), tmp_path.stat()):
            raise OSError(5, "Input/output error")
        real(fd)

    monkeypatch.setattr("surgery_formats.files.stage.sync_folder", failing)
    for target, options in ((tmp_path / "fresh", {}), (out, {"overwrite": True})):
        with pytest.raises(ResourceError, match="Input/output error"):
            _write(target, b"new", _OTHER, **options)
    assert os.listdir(tmp_path) == ["out"]
    assert (out / "model.safetensors").read_bytes() == b"old"
