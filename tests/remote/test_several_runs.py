# SPDX-License-Identifier: Apache-2.0
"""Two runs that write one output of a bucket, and commits that fail at their last requests."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path

import obstore
import pytest
from obstore.store import LocalStore

import surgery
from surgery_formats.errors import OutputExistsError, ProofError, ResourceError
from surgery_formats.files.output.folder import OutputFolder, output_folder
from surgery_formats.files.output.manifest import MANIFEST, UNFINISHED
from surgery_formats.files.output.memory import memory_folder
from surgery_formats.files.output.single import write_single
from surgery_formats.files.remote import upload
from surgery_formats.files.remote.bucket import Bucket, connect
from surgery_formats.files.remote.stage import RemoteStage
from surgery_formats.files.remote.upload import Upload
from surgery_formats.whole import is_within_whole
from tests.support.folder_jobs import OTHER, PLAN
from tests.support.s3 import Storage

EXAMPLES = Path(__file__).parents[2] / "examples"


def _marker(job: str, *files: str) -> bytes:
    return json.dumps({"job": job, "files": files}).encode()


def _begun(storage: Storage, plan: str = PLAN) -> OutputFolder:
    folder = output_folder(storage.url("out"), plan)
    folder.__enter__()
    folder.write_small("config.json", plan.encode())
    return folder


def test_a_commit_that_another_run_is_in_the_middle_of_is_left_alone(storage: Storage) -> None:
    folder = _begun(storage)
    storage.put(f"out/{UNFINISHED}", _marker(OTHER, "config.json"))
    storage.put("out/config.json", b"of the other")
    before = storage.objects("out")
    with pytest.raises(OutputExistsError, match="another process is writing it"):
        folder.commit({})
    folder.__exit__(None, None, None)
    assert storage.objects("out") == before


def test_a_marker_that_appears_after_the_look_is_not_written_over(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between a listing and the first request to write lies time enough for another run to claim the output."""
    put, other = Bucket.put, _marker(OTHER, "config.json")

    def late(bucket: Bucket, key: str, data: bytes, *, new: bool = False) -> None:
        if key.endswith(UNFINISHED):
            storage.put(key, other)
        put(bucket, key, data, new=new)

    folder = _begun(storage)
    monkeypatch.setattr(Bucket, "put", late)
    with pytest.raises(OutputExistsError, match="another process is writing it"):
        folder.commit({})
    folder.__exit__(None, None, None)
    assert storage.objects("out") == {UNFINISHED: other}


def test_the_same_run_twice_writes_the_same(storage: Storage) -> None:
    folder = _begun(storage)
    storage.put(f"out/{UNFINISHED}", _marker(PLAN, "config.json"))
    folder.commit({})
    folder.__exit__(None, None, None)
    assert storage.objects("out").keys() == {"config.json", MANIFEST}


def test_a_run_that_comes_second_does_not_remove_what_is_complete(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    put = Bucket.put

    def late(bucket: Bucket, key: str, data: bytes, *, new: bool = False) -> None:
        if key.endswith(MANIFEST):
            storage.put(key, b"of the other")
        put(bucket, key, data, new=new)

    folder = _begun(storage)
    monkeypatch.setattr(Bucket, "put", late)
    with pytest.raises(OutputExistsError):
        folder.commit({})
    folder.__exit__(None, None, None)
    assert {"config.json", MANIFEST} <= storage.objects("out").keys()


def test_a_manifest_whose_answer_fails_does_not_stay_alone(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    put = Bucket.put

    def lose(bucket: Bucket, key: str, data: bytes, *, new: bool = False) -> None:
        put(bucket, key, data, new=new)
        if key.endswith(MANIFEST):
            raise ResourceError("the connection failed", file=bucket.url(key))

    folder = _begun(storage)
    monkeypatch.setattr(Bucket, "put", lose)
    with pytest.raises(ResourceError):
        folder.commit({})
    folder.__exit__(None, None, None)
    assert storage.objects("out") == {}


def test_a_commit_into_a_bucket_is_interrupted_at_once_and_undone(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its requests may take minutes, and with ``--verify full`` it reads everything again."""
    harm: list[bool] = []

    def interrupt(*_: object) -> None:
        harm.append(is_within_whole(sys._getframe()))
        raise KeyboardInterrupt

    folder = _begun(storage)
    monkeypatch.setattr(RemoteStage, "_prove", interrupt)
    with pytest.raises(KeyboardInterrupt):
        folder.commit({})
    folder.__exit__(None, None, None)
    assert harm == [False]
    assert storage.objects("out") == {}


def test_a_store_that_knows_of_what_is_missing_deletes_the_rest(tmp_path: Path) -> None:
    """Google's and Azure's say so; S3 does not."""
    store = LocalStore(tmp_path)
    (tmp_path / "b").write_bytes(b"")
    Bucket("gs", "bucket", obstore, store).delete(["a", "b"])
    assert not list(tmp_path.iterdir())


def test_a_large_file_that_has_appeared_meanwhile_stays(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upload, "SMALL", 10)
    with pytest.raises(OutputExistsError, match="already exists"):
        write_single(storage.url("one.bin"), PLAN, 20, lambda file: storage.put("one.bin", b"of the other"))
    assert storage.objects() == {"one.bin": b"of the other"}
    assert storage.unfinished() == []


@pytest.mark.parametrize("lost", ["upload", "answer"])
def test_a_failed_upload_beside_an_old_object_of_its_size(
    storage: Storage, monkeypatch: pytest.MonkeyPatch, lost: str
) -> None:
    """The size alone does not tell what was sent from what was there; that the object has changed does."""
    old, sent = b"of the old output", b"of the new output"
    storage.put("one.bin", old)
    send = Upload._send

    def fail(self: Upload, part: int) -> None:
        if lost == "upload":
            for _ in self._stream():
                pass
        else:
            send(self, part)
        raise ResourceError("the connection failed", file=storage.url("one.bin"))

    monkeypatch.setattr(Upload, "_send", fail)
    begun = Upload(connect("s3", storage.name), "one.bin", len(sent))
    begun.write(sent)
    begun.end()
    with pytest.raises(ResourceError) if lost == "upload" else contextlib.nullcontext():
        begun.complete()
    assert storage.objects() == {"one.bin": old if lost == "upload" else sent}


def test_what_killed_runs_left_in_memory_goes(storage: Storage) -> None:
    left = [memory_folder() / f".{'0' * 16}.surgery-{'1' * 16}", memory_folder() / f".surgery-scratch-{'2' * 16}"]
    for folder in left:
        folder.mkdir()
    _begun(storage).__exit__(None, None, None)
    write_single(storage.url("one.bin"), PLAN, 0, lambda file: None)
    assert not any(folder.exists() for folder in left)


def test_a_damaged_output_is_told_by_its_file(storage: Storage) -> None:
    base, lora = storage.upload(EXAMPLES / "base", "base"), storage.upload(EXAMPLES / "lora", "lora")
    surgery.merge(base, lora, output=storage.url("out"))
    data = bytearray(storage.objects("out/")["model.safetensors"])
    data[-1] ^= 1
    storage.put("out/model.safetensors", bytes(data))
    with pytest.raises(ProofError, match=r"changed since it was written|is not what was written") as caught:
        surgery.verify(storage.url("out"))
    assert str(caught.value.file).endswith("model.safetensors")
