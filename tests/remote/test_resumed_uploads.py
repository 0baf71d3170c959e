# SPDX-License-Identifier: Apache-2.0
"""A merge into a bucket that was killed goes on: whole files are not sent again, and none is trusted that may be another one."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import surgery
from surgery_formats.errors import ProofError, ResourceError
from surgery_formats.files.output.manifest import UNFINISHED
from surgery_formats.files.remote import finished, stage
from surgery_formats.files.remote.bucket import Bucket
from surgery_formats.files.remote.path import to_path
from surgery_formats.files.remote.upload import Upload
from tests.support.kit import environment
from tests.support.s3 import Storage

EXAMPLES = Path(__file__).parents[2] / "examples"
SHARD = 500_000
FILES = 7
KILLED = f"""
import os, signal, sys
import surgery
from surgery_formats.files.remote import stage
from surgery_formats.files.remote.finished import FinishedFiles
base, lora, output, after = sys.argv[1:]
stage._WORTH_KEEPING = 0
noted, calls = FinishedFiles.noted, []
def killed(*args):
    result = noted(*args)
    calls.append(args)
    if len(calls) == int(after):
        os.kill(os.getpid(), signal.SIGKILL)
    return result
FinishedFiles.noted = killed
surgery.merge(base, lora, output=output, shard_size={SHARD})
"""


@pytest.fixture
def models(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> tuple[str, str]:
    monkeypatch.setattr(stage, "_WORTH_KEEPING", 0)
    return storage.upload(EXAMPLES / "base", "base"), storage.upload(EXAMPLES / "lora", "lora")


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The keys that are uploaded to."""
    keys: list[str] = []
    begin = Upload.__init__

    def begun(self: Upload, bucket: Bucket, key: str, *rest: object) -> None:
        keys.append(key)
        begin(self, bucket, key, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(Upload, "__init__", begun)
    return keys


def _merge(storage: Storage, models: tuple[str, str], **options: object) -> dict[str, bytes]:
    surgery.merge(*models, output=storage.url("out"), shard_size=SHARD, **options)  # type: ignore[arg-type]
    return storage.objects("out/")


def _killed(storage: Storage, models: tuple[str, str], after: int) -> list[str]:
    """Kill a merge once so many files are finished; their names."""
    words = [*models, storage.url("out"), str(after)]
    done = subprocess.run([sys.executable, "-c", KILLED, *words], env=environment(), capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert storage.objects("out/") == {}
    return [name.rpartition("/")[2] for name in storage.objects(".out.") if finished._RECORDS in name]


def _whole(storage: Storage, models: tuple[str, str], folder: Path, **options: object) -> dict[str, bytes]:
    surgery.merge(*models, output=folder / "out", shard_size=SHARD, **options)  # type: ignore[arg-type]
    assert not storage.objects(".")
    return {path.name: path.read_bytes() for path in (folder / "out").iterdir()}


def test_files_that_a_killed_run_has_finished_are_not_sent_again(
    storage: Storage, models: tuple[str, str], sent: list[str], tmp_path: Path
) -> None:
    whole = _whole(storage, models, tmp_path)
    kept = _killed(storage, models, 4)
    assert len(kept) in (4, 5)  # one more may be on its way
    assert _merge(storage, models) == whole
    names = {name for name in whole if name.endswith(".safetensors")}
    assert len(names) == FILES
    assert {key.rpartition("/")[2] for key in sent} == names - {*kept}
    assert storage.objects(".") == {}
    assert storage.unfinished() == []


def test_a_run_that_nothing_happens_to_leaves_nothing_beside_its_output(
    storage: Storage, models: tuple[str, str], sent: list[str], tmp_path: Path
) -> None:
    assert _merge(storage, models) == _whole(storage, models, tmp_path)
    assert sum(key.startswith(".out.") for key in sent) == FILES - 1
    assert storage.objects(".") == {}


def test_a_finished_file_that_was_written_to_since_is_made_again(
    storage: Storage, models: tuple[str, str], sent: list[str], tmp_path: Path
) -> None:
    whole = _whole(storage, models, tmp_path)
    kept = _killed(storage, models, 3)
    left = storage.objects(".out.")
    first, second, third = (
        next(key for key in left if key.endswith(f"/{name}") and "finished" not in key) for name in kept[:3]
    )
    storage.put(f".out.{first}", bytes(len(left[first])))  # other bytes, as many
    storage.client.delete_object(Bucket=storage.name, Key=f".out.{second}")
    record = next(key for key in left if key.endswith(kept[2]) and "finished" in key)
    storage.put(f".out.{record}", left[record].replace(b'"plan": "', b'"plan": "0'))
    assert third
    assert _merge(storage, models) == whole
    assert {*kept[:3]} <= {key.rpartition("/")[2] for key in sent}


def test_another_command_does_not_take_them_and_removes_them_when_it_is_done(
    storage: Storage, models: tuple[str, str], tmp_path: Path
) -> None:
    whole = _whole(storage, models, tmp_path, dtype="fp32")
    _killed(storage, models, 3)
    storage.client.create_multipart_upload(Bucket=storage.name, Key=next(iter(storage.objects(".out."))))
    assert _merge(storage, models, dtype="fp32") == whole
    assert storage.objects(".") == {}


def test_what_was_left_by_a_run_that_was_killed_behind_its_manifest_goes(
    storage: Storage, models: tuple[str, str]
) -> None:
    _killed(storage, models, 3)
    left = storage.objects(".out.")
    whole = _merge(storage, models)
    for name, data in left.items():
        storage.put(f".out.{name}", data)
    storage.put(f"out/{UNFINISHED}", b"{}")
    with pytest.raises(FileExistsError):
        _merge(storage, models)
    assert storage.objects(".") == {}
    assert storage.objects("out/") == whole


def test_finished_files_are_read_again_if_everything_is_to_be_verified(
    storage: Storage, models: tuple[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    _killed(storage, models, 3)
    read: list[str] = []
    digest = stage.RemoteStage._digest

    def reading(self: stage.RemoteStage, name: str, *facts: object) -> str:
        read.append(name)
        return digest(self, name, *facts)  # type: ignore[arg-type]

    monkeypatch.setattr(stage.RemoteStage, "_digest", reading)
    assert _merge(storage, models, verify_copies=True) == _whole(storage, models, tmp_path, verify_copies=True)
    assert len(read) == FILES


def test_a_finished_file_that_changes_before_the_commit_is_an_error(
    storage: Storage, models: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    claim = stage.RemoteStage._claim

    def meanwhile(self: stage.RemoteStage, names: list[str]) -> set[str]:
        key = next(key for key in storage.objects(".out.") if "finished" not in key)
        storage.put(f".out.{key}", b"of another")
        return claim(self, names)

    monkeypatch.setattr(stage.RemoteStage, "_claim", meanwhile)
    with pytest.raises(ProofError, match="a finished file was changed or removed"):
        _merge(storage, models)
    assert storage.objects("out/") == {}
    assert [*storage.objects(".").values()].count(b"of another") == 1  # it is not ours


def test_what_the_store_says_it_has_copied_must_be_there(
    storage: Storage, models: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """S3 may answer that all is well, and say in the answer that it is not."""
    _merge(storage, models)
    monkeypatch.setattr(Bucket, "copy", lambda *args: None)
    with pytest.raises(ProofError, match="is not there after"):
        _merge(storage, models, overwrite=True)
    assert storage.objects().keys() == {key for key in storage.objects() if key.startswith(("base/", "lora/"))}


@pytest.mark.parametrize("lost", [True, False])
def test_finished_files_stay_when_the_store_is_lost_and_go_with_any_other_error(
    storage: Storage, models: tuple[str, str], monkeypatch: pytest.MonkeyPatch, sent: list[str], lost: bool
) -> None:
    whole = _merge(storage, models)
    storage.clear("out/")
    with monkeypatch.context() as patch:
        patch.setattr(Bucket, "put", _refusing(Bucket.put, lost=lost))
        with pytest.raises(ResourceError):
            _merge(storage, models)
    assert bool(storage.objects(".out.")) is lost
    sent.clear()
    assert _merge(storage, models) == whole
    assert len(sent) == (1 if lost else FILES)
    assert storage.objects(".") == {}


def _refusing(put: object, *, lost: bool) -> object:
    def refuse(bucket: Bucket, key: str, data: bytes, *, new: bool = False) -> None:
        if key.endswith("config.json"):
            bucket.lost += lost
            raise ResourceError("the connection failed", file=bucket.url(key))
        put(bucket, key, data, new=new)  # type: ignore[operator]

    return refuse


def test_what_a_store_does_not_copy_is_sent_to_its_place(
    storage: Storage, models: tuple[str, str], monkeypatch: pytest.MonkeyPatch, sent: list[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(finished, "MOST_COPIED", 1000)
    assert _merge(storage, models) == _whole(storage, models, tmp_path)
    assert all(key.startswith("out/") for key in sent)


def test_an_upload_may_be_completed_while_its_blocks_wait(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    """A slow store has not taken the last blocks yet when it is told that there will be no more."""
    stream = Upload._stream

    def late(self: Upload) -> Iterator[object]:
        self._decided.wait(300)
        yield from stream(self)

    monkeypatch.setattr(Upload, "_stream", late)
    bucket = to_path(storage.url("out")).bucket  # type: ignore[attr-defined]
    upload = Upload(bucket, "out", 6)
    upload.write(b"whole ")
    upload.end()
    upload.complete()
    assert storage.objects("out") == {"": b"whole "}
