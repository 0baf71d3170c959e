# SPDX-License-Identifier: Apache-2.0
"""The output folder: what it writes, what names it takes, what it proves."""

from __future__ import annotations

import gc
import json
import os
import stat
import threading
import tracemalloc
from collections.abc import Iterator
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
)
from surgery_formats.files.output import kernel_copy
from surgery_formats.files.output.folder import output_folder
from surgery_formats.files.output.manifest import MANIFEST, manifest_bytes, safe_name, verify_folder
from surgery_formats.files.raw import open_file
from tests.support.folder_jobs import PLAN, write_output


def test_a_committed_folder_holds_its_files_and_its_manifest(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with output_folder(out, PLAN) as folder:
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
    assert manifest["plan"] == PLAN
    assert manifest["tool"] == "test"
    assert manifest["files"]["unet/model.safetensors"] == {
        "ranges": [[0, 5]],
        "size": 5,
        "xxh3": xxhash.xxh3_128_hexdigest(b"hello"),
    }
    verify_folder(out)


def test_a_file_made_in_pieces_is_one_like_any_other(tmp_path: Path) -> None:
    with output_folder(tmp_path / "out", PLAN) as folder:
        folder.write_made("adapters/x", 5, (memoryview(piece) for piece in (b"he", b"", b"llo")))
        folder.write_small("y", b"hello")
        folder.commit({})
    entries = json.loads((tmp_path / "out" / MANIFEST).read_bytes())["files"]
    assert entries["adapters/x"] == entries["y"]
    assert (tmp_path / "out" / "adapters" / "x").read_bytes() == b"hello"

    def failing() -> Iterator[bytes]:
        yield b"he"
        raise FitError("not finite")

    with pytest.raises(FitError, match="not finite"), output_folder(tmp_path / "no", PLAN) as folder:
        folder.write_made("x", 5, failing())
    assert sorted(os.listdir(tmp_path)) == ["out"]


def test_a_manifest_of_a_hundred_thousand_weights_is_read(tmp_path: Path) -> None:
    with output_folder(tmp_path / "out", PLAN) as folder:
        folder.write_small("x", b"x")
        folder.commit({"ledger": "x" * (70 << 20)})
    assert len(verify_folder(tmp_path / "out")["ledger"]) == 70 << 20


def test_a_large_manifest_takes_little_more_than_its_bytes() -> None:
    """The pieces of its text, all at once, were seven times as much."""
    ledger = [
        {"name": f"layers.{n}.weight", "outcome": "updated", "survival": 0.5, "shape": [n, 4]} for n in range(9000)
    ]
    tracemalloc.start()
    try:
        data = manifest_bytes({"ledger": ledger}, PLAN, {})
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert json.loads(data)["ledger"] == ledger
    assert peak < 3 * len(data)


def test_modes_follow_the_umask_and_nothing_is_a_link(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        out = write_output(tmp_path / "out")
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
        with output_folder(tmp_path / "out", PLAN) as folder:
            folder.create("a.safetensors", 10).pwrite(b"abc", 0)
            raise fault

    with pytest.raises(fault):
        run()
    assert os.listdir(tmp_path) == []


def test_leaving_without_commit_leaves_nothing(tmp_path: Path) -> None:
    with output_folder(tmp_path / "out", PLAN) as folder:
        folder.write_small("config.json", b"{}")
    assert os.listdir(tmp_path) == []


def test_descriptors_are_closed(tmp_path: Path) -> None:
    gc.collect()  # files that other tests left to be collected are not this one's
    before = len(os.listdir("/proc/self/fd"))
    write_output(tmp_path / "one")

    def run() -> None:
        with output_folder(tmp_path / "two", PLAN) as folder:
            folder.create("a", 10)
            folder.commit({})

    with pytest.raises(ProofError):
        run()
    with pytest.raises(OutputExistsError):
        write_output(tmp_path / "one")
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_finished_file_is_durable_before_its_journal_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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

    with output_folder(tmp_path / "out", PLAN) as folder:
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
        f"sync .out.surgery-{PLAN[:16]}",
        "write .surgery-journal",
        "sync .surgery-journal",
    ]


class TestProof:
    def test_a_file_that_a_successor_has_begun_is_not_named_as_ones_own(self, tmp_path: Path) -> None:
        """Where locks hold on one machine alone, a worker that was given up writes beside the one that has its work now."""
        with output_folder(tmp_path / "out", PLAN) as folder:
            lost = folder.create("model.safetensors", 5)
            lost.pwrite(b"hello", 0)
            lost.path.unlink()  # as who comes next does, and begins anew
            lost.path.write_bytes(b"he\0\0\0")
            with pytest.raises(ProofError, match="another process writes it, too"):
                lost.finish({})
            assert not (folder.staged / "model.safetensors").exists()
        assert os.listdir(tmp_path) == []

    @pytest.mark.parametrize(
        ("writes", "gap"),
        [
            ([(7, b"890"), (0, b"123")], "bytes 3 to 7"),
            ([(0, b"123")], "bytes 3 to 10"),
            ([(1, b"234567890")], "bytes 0 to 1"),
            ([(0, b"12345"), (2, b"345"), (6, b"7890")], "bytes 5 to 6"),
        ],
    )
    def test_unwritten_bytes_are_found(self, writes: list[tuple[int, bytes]], gap: str, tmp_path: Path) -> None:
        with output_folder(tmp_path / "out", PLAN) as folder:
            made = folder.create("a", 10)
            for offset, data in writes:
                made.pwrite(data, offset)
            with pytest.raises(ProofError, match=f"{gap} were never written"):
                made.finish({})

    @pytest.mark.parametrize(("offset", "size"), [(8, 3), (-1, 2), (11, 0)])
    def test_a_write_outside_the_plan_is_refused(self, offset: int, size: int, tmp_path: Path) -> None:
        with output_folder(tmp_path / "out", PLAN) as folder:
            made = folder.create("a", 10)
            for act in (lambda: made.pwrite(b"x" * size, offset), lambda: made.readback(offset, size)):
                with pytest.raises(ProofError):
                    act()

    def test_an_unfinished_file_stops_the_commit(self, tmp_path: Path) -> None:
        with output_folder(tmp_path / "out", PLAN) as folder:
            folder.create("a", 0)
            with pytest.raises(ProofError, match="never finished: a"):
                folder.commit({})
        assert os.listdir(tmp_path) == []

    def test_nan_is_not_written_into_a_manifest(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="JSON"), output_folder(tmp_path / "out", PLAN) as folder:
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
    with output_folder(tmp_path / "out", PLAN) as folder:
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
    with output_folder(tmp_path / "out", PLAN) as folder:
        folder.write_small("a", b"1")
        with pytest.raises(FitError, match="two output files"):
            folder.create("a", 1)


class TestCopy:
    @pytest.mark.parametrize("fault", [None, "EXDEV", "ENOSYS", "EINVAL", "EOPNOTSUPP", "zero", "missing"])
    def test_every_copy_method_gives_the_same_bytes(
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
        with output_folder(tmp_path / "out", PLAN) as folder:
            made = folder.create("a", 250_010)
            made.pwrite(b"0123456789", 0)
            made.copy_from(open_file(tmp_path / "source"), 40_000, 10, 250_000)
            made.finish({})
            folder.commit({})
        assert (tmp_path / "out/a").read_bytes() == b"0123456789" + data[40_000:290_000]

    def test_a_source_that_is_too_short_is_named(self, tmp_path: Path) -> None:
        (tmp_path / "source").write_bytes(b"short")
        with pytest.raises(MalformedError, match="source"), output_folder(tmp_path / "out", PLAN) as folder:
            folder.create("a", 100).copy_from(open_file(tmp_path / "source"), 0, 0, 100)
        assert os.listdir(tmp_path) == ["source"]


def test_many_threads_write_and_finish_at_once(tmp_path: Path) -> None:
    block = 4096
    names = [f"model-{index}.safetensors" for index in range(6)]
    start = threading.Barrier(6)
    with output_folder(tmp_path / "out", PLAN) as folder, ThreadPoolExecutor(6) as pool:

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


class TestVerifyFolder:
    def test_every_difference_is_found(self, tmp_path: Path) -> None:
        def spoiled(what: str) -> Path:
            out = tmp_path / what
            with output_folder(out, PLAN) as folder:
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
            ("size", "has 4 bytes, but had 3 when written"),
            ("bytes", "its bytes have changed"),
        ]:
            with pytest.raises(ProofError, match=says):
                verify_folder(tmp_path / what)

    @pytest.mark.parametrize(
        "manifest", ["[]", "{}", '{"format": "surgery-manifest/1"}', '{"format": "other", "files": {}}', "{"]
    )
    def test_an_invalid_manifest_is_refused(self, manifest: str, tmp_path: Path) -> None:
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
