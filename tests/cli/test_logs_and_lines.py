# SPDX-License-Identifier: Apache-2.0
"""What a command says while it works where nobody watches, what the library logs, and what it says on another system."""

from __future__ import annotations

import logging
import os
import re
import sys
from pathlib import Path

import pytest

import surgery
from surgery.progress import Progress
from surgery_cli import progress
from surgery_cli.options import Settings
from surgery_formats.errors import ResourceError
from surgery_formats.system import check_system, missing_features
from tests.support.kit import ROOT, Run, environment, spawn

BASE, LORA = ROOT / "examples" / "base", ROOT / "examples" / "lora"


def test_a_log_gets_a_line_every_five_seconds(capsys: pytest.CaptureFixture[str]) -> None:
    seconds = iter([0.0, 1.0, 4.9, 5.0, 9.9, 10.5, 12.0])
    lines = progress._LinesOfProgress("merge", lambda: next(seconds))
    for done, phase in (
        (1, "writing"),
        (10**9, "writing"),
        (2 * 10**9, "writing"),
        (3 * 10**9, "writing"),
        (4 * 10**9, "syncing"),
    ):
        lines(Progress(done, 4 * 10**9, phase))
    lines.done()
    assert capsys.readouterr().err.splitlines() == [
        "merge: 2 GB of 4 GB (50%), 400 MB/s",
        "merge, syncing: 4 GB of 4 GB (100%), 381 MB/s",
        "merge: done in 12 s",
    ]


def test_what_is_done_before_a_line_is_due_is_not_said(capsys: pytest.CaptureFixture[str]) -> None:
    lines = progress._LinesOfProgress("merge", lambda: 0.0)
    lines(Progress(1, 2, "writing"))
    lines.done()
    assert capsys.readouterr().err == ""


def test_work_that_failed_is_not_said_to_be_done(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "_SECONDS", -1.0)

    def fail() -> None:
        with progress.bar(Settings(), "merge") as callback:
            callback(Progress(1, 2, "writing"))
            raise ResourceError("full")

    with pytest.raises(ResourceError):
        fail()
    assert "done" not in capsys.readouterr().err


def test_a_quiet_dry_run_says_what_it_found_and_nothing_else(tmp_path: Path, run: Run) -> None:
    found = run("merge", BASE, LORA, "-o", tmp_path / "out", "--dry-run", "-q")
    assert "would write" in found.stdout
    assert found.stderr == ""
    assert run("merge", BASE, LORA, "-o", tmp_path / "out", "-q").output == ""


@pytest.mark.parametrize(("given", "unit"), [("--text", "bytes"), ("--ids", "tokens")])
def test_progress_of_an_evaluation_counts_what_was_given(
    given: str, unit: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Run
) -> None:
    from surgery_cli.commands import eval as of_eval

    units: list[str] = []

    def bar(settings: Settings, what: str, *, unit: str) -> object:
        units.append(unit)
        raise ResourceError("enough")

    monkeypatch.setattr(of_eval, "bar", bar)
    file = tmp_path / "text"
    file.write_bytes(b"text")
    run("eval", BASE, given, file)
    assert units == [unit]


def test_a_phase_with_the_name_of_the_work_is_not_said_twice(capsys: pytest.CaptureFixture[str]) -> None:
    seconds = iter([0.0, 10.0])
    progress._LinesOfProgress("evaluating", lambda: next(seconds))(Progress(1000, 2000, "evaluating"))
    assert capsys.readouterr().err == "evaluating: 1 kB of 2 kB (50%), 100 B/s\n"
    for what, line in (("evaluating", "evaluating 3 models: "), ("extracting", "extracting, evaluating 3 models: ")):
        clock = iter((0.0, 10.0))
        progress._LinesOfProgress(what, lambda clock=clock: next(clock))(Progress(1000, 2000, "evaluating 3 models"))
        assert capsys.readouterr().err.startswith(line)


@pytest.mark.parametrize("settings", [Settings(quiet=True), Settings(json=True)])
def test_quiet_and_json_have_no_lines(settings: Settings) -> None:
    with progress.bar(settings, "merge") as callback:
        assert not isinstance(callback, progress._LinesOfProgress)
    with progress.bar(Settings(), "merge") as callback:
        assert isinstance(callback, progress._LinesOfProgress)


def test_the_library_logs_and_is_silent_by_default(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    surgery.merge(BASE, LORA, output=tmp_path / "silent")
    assert capfd.readouterr() == ("", "")
    logger = logging.getLogger("surgery")
    logger.propagate = True
    with caplog.at_level(logging.DEBUG, "surgery"):
        surgery.merge(BASE, LORA, output=tmp_path / "told")
    said = [f"{record.name}: {record.getMessage()}" for record in caplog.records]
    assert any(re.fullmatch(r"surgery.verbs: merge took [\d.]+ s", line) for line in said)
    assert any(line.startswith("surgery.files: ") for line in said)


@pytest.mark.parametrize(
    ("flags", "names"), [([], []), (["-v"], []), (["-v", "-v"], ["verbs"]), (["--debug"], ["files", "verbs"])]
)
def test_the_command_shows_logs_where_it_is_asked_to(flags: list[str], names: list[str], tmp_path: Path) -> None:
    done = spawn("merge", BASE, LORA, "-o", tmp_path / "out", *flags)
    assert done.returncode == 0
    assert sorted(set(re.findall(r"^ *[\d.]+ surgery\.(\w+): ", done.stderr, re.M))) == names


WITHOUT = """
import os, sys
for name in ("pread", "preadv", "pwrite", "geteuid", "O_CLOEXEC", "O_NOFOLLOW", "O_DIRECTORY"):
    delattr(os, name)

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name == "fcntl":
            raise ModuleNotFoundError(f"No module named '{name}'", name=name)

sys.modules.pop("fcntl", None)
sys.meta_path.insert(0, Hidden())
"""


def test_a_system_without_what_is_needed_is_refused_at_once(tmp_path: Path) -> None:
    """As on Windows, whose Python has neither of these."""
    (tmp_path / "sitecustomize.py").write_text(WITHOUT)
    there = {"PYTHONPATH": os.pathsep.join([str(tmp_path), environment()["PYTHONPATH"]])}
    done = spawn("merge", BASE, LORA, "-o", tmp_path / "out", **there)
    assert done.returncode == 7, done.stderr
    message, hint = done.stderr.splitlines()
    assert message.startswith("error: this system has no os.pread, os.preadv, os.pwrite, ")
    assert message.endswith("fcntl: surgery runs on Linux and macOS")
    assert "Windows Subsystem for Linux" in hint
    assert spawn("--help", **there).returncode == 0


def test_the_library_refuses_it_too(monkeypatch: pytest.MonkeyPatch) -> None:
    assert missing_features() == ()
    check_system()
    monkeypatch.setitem(sys.modules, "fcntl", None)
    monkeypatch.delattr(os, "pread")
    assert missing_features() == ("os.pread", "fcntl")
    with pytest.raises(ResourceError, match=r"no os\.pread, fcntl"):
        check_system()
    for name in ("open", "inspect", "merge", "Checkpoint"):
        with pytest.raises(ResourceError, match=r"no os\.pread, fcntl"):
            getattr(surgery, name)
    assert issubclass(ResourceError, surgery.SurgeryError)  # which a program can still catch
