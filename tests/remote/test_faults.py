# SPDX-License-Identifier: Apache-2.0
"""Connections that are dropped, and processes that are killed, at the requests of a merge from bucket to bucket."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import surgery
from surgery_formats.errors import SurgeryError
from surgery_formats.files.output.manifest import MANIFEST, UNFINISHED
from surgery_formats.files.remote import bucket, stage
from tests.support.kit import environment
from tests.support.s3 import Faults, Storage

EXAMPLES = Path(__file__).parents[2] / "examples"
KEEPING = "import surgery; from surgery_formats.files.remote import stage; stage._WORTH_KEEPING = 0"
HOW = ("refused", "request", "answer")


@pytest.fixture
def faults(storage: Storage, server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Faults]:
    way = Faults(server)
    monkeypatch.setenv("AWS_ENDPOINT_URL", way.url)
    bucket.connect.cache_clear()
    yield way
    way.close()


@pytest.fixture
def models(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> tuple[str, str]:
    monkeypatch.setattr(stage, "_WORTH_KEEPING", 0)
    return storage.upload(EXAMPLES / "base", "base"), storage.upload(EXAMPLES / "lora", "lora")


def _merge(models: tuple[str, str], out: str) -> None:
    bucket.connect.cache_clear()  # as a process that has just begun
    surgery.merge(*models, output=out, shard_size=2_000_000)


def _whole(storage: Storage, models: tuple[str, str], faults: Faults) -> tuple[dict[str, bytes], int]:
    """The output of a merge that nothing happens to, and the number of its requests."""
    faults.begin()
    _merge(models, storage.url("whole"))
    return storage.objects("whole"), faults.count


def _points(count: int, step: int, offset: int = 0) -> range:
    return range(1 + offset, count + 1, step)


def _check_one_dropped(storage: Storage, models: tuple[str, str], faults: Faults, how: str, step: int) -> None:
    whole, count = _whole(storage, models, faults)
    assert count > 30
    for number in _points(count, step, HOW.index(how)):
        faults.begin(how, lambda request, number=number: request == number)
        _merge(models, storage.url(f"out-{number}"))
        assert storage.objects(f"out-{number}/") == whole, number
    assert storage.unfinished() == []


@pytest.mark.parametrize("how", HOW)
def test_a_dropped_connection_loses_nothing(
    storage: Storage, models: tuple[str, str], faults: Faults, how: str
) -> None:
    _check_one_dropped(storage, models, faults, how, 29)


@pytest.mark.slow
@pytest.mark.parametrize("how", HOW)
def test_no_request_may_not_be_dropped(storage: Storage, models: tuple[str, str], faults: Faults, how: str) -> None:
    _check_one_dropped(storage, models, faults, how, 1)


def _again(storage: Storage, models: tuple[str, str], *, complete: bool) -> None:
    """The same merge once more, which removes the marker of a complete output."""
    with pytest.raises(SurgeryError, match="already exists") if complete else contextlib.nullcontext():
        _merge(models, storage.url("out"))


def _check_gone(storage: Storage, models: tuple[str, str], faults: Faults, step: int) -> None:
    whole, count = _whole(storage, models, faults)
    for number in _points(count, step, step // 2):
        faults.begin("refused", lambda request, number=number: request >= number)
        error: SurgeryError | None = None
        try:
            _merge(models, storage.url("out"))
        except SurgeryError as caught:
            error = caught
        if error is not None:
            assert "the connection failed" in error.message
            assert "\n" not in str(error)
            assert error.exit_code in (3, 7), number
        left = storage.objects("out/")
        if error is None:  # all that failed is what tidies up
            assert left.keys() - {UNFINISHED} == whole.keys()
        else:
            assert not left or UNFINISHED in left, number
        faults.begin()
        _again(storage, models, complete=MANIFEST in left)
        assert storage.objects("out/") == whole, number
        assert storage.objects(".") == {}, number
        assert storage.unfinished() == [], number
        storage.clear("out/")


def test_a_store_that_is_gone_leaves_no_output(
    storage: Storage, models: tuple[str, str], faults: Faults, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bucket, "RETRIES", 1)
    _check_gone(storage, models, faults, 29)


@pytest.mark.slow
def test_a_store_that_is_gone_at_any_request_leaves_no_output(
    storage: Storage, models: tuple[str, str], faults: Faults, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bucket, "RETRIES", 1)
    _check_gone(storage, models, faults, 1)


def _check_killed(storage: Storage, models: tuple[str, str], faults: Faults, step: int) -> None:
    whole, count = _whole(storage, models, faults)
    for number in _points(count, step, step - 1):
        faults.begin()
        program = f"{KEEPING}; surgery.merge(*{models!r}, output={storage.url('out')!r}, shard_size=2_000_000)"
        with subprocess.Popen([sys.executable, "-c", program]) as process:

            def kill(request: int, number: int = number, pid: int = process.pid) -> None:
                if request == number:
                    os.kill(pid, signal.SIGKILL)

            faults.also = kill
            process.wait(300)
        left = storage.objects("out/")
        complete = MANIFEST in left
        assert complete or not left or UNFINISHED in left, number
        faults.begin()
        _again(storage, models, complete=complete)
        assert storage.objects("out/") == whole, number
        assert storage.objects(".") == {}, number
        assert storage.unfinished() == [], number
        assert storage.waiting("out") == [], number
        storage.clear("out/")


def test_a_killed_process_leaves_no_output(storage: Storage, models: tuple[str, str], faults: Faults) -> None:
    _check_killed(storage, models, faults, 29)


@pytest.mark.slow
def test_a_process_killed_at_any_request_leaves_no_output(
    storage: Storage, models: tuple[str, str], faults: Faults
) -> None:
    _check_killed(storage, models, faults, 1)


def _check_interrupted(storage: Storage, models: tuple[str, str], faults: Faults, step: int) -> None:
    whole, count = _whole(storage, models, faults)
    words = ["-q", "merge", *models, "-o", storage.url("out"), "--shard-size", "2MB"]
    for number in _points(count, step, step - 1):
        sent = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)[number % 3]
        faults.begin()
        command = [sys.executable, "-c", f"{KEEPING}; from surgery_cli.__main__ import main; main()", *words]
        with subprocess.Popen(
            command, env=environment(), stderr=subprocess.PIPE, text=True, start_new_session=True, preexec_fn=_hears
        ) as process:

            def interrupt(
                request: int, number: int = number, process: subprocess.Popen[str] = process, sent: int = sent
            ) -> None:
                if request == number:
                    process.send_signal(sent)

            faults.also = interrupt
            _, told = process.communicate(timeout=300)
        left = storage.objects("out/")
        assert (process.returncode, told) in ((128 + sent, "error: interrupted\n"), (0, "")), number
        assert left in ({}, whole), number
        assert storage.unfinished() == [], number
        assert storage.waiting("out") == [], number
        storage.clear("out/")


def _hears() -> None:
    """As from a terminal, whatever the tests were started by."""
    for number, action in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
        signal.signal(number, action)


def test_an_interrupted_command_gives_its_uploads_up(storage: Storage, models: tuple[str, str], faults: Faults) -> None:
    _check_interrupted(storage, models, faults, 29)


@pytest.mark.slow
def test_a_command_interrupted_at_any_request_gives_its_uploads_up(
    storage: Storage, models: tuple[str, str], faults: Faults
) -> None:
    _check_interrupted(storage, models, faults, 1)
