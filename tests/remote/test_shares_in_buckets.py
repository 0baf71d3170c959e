# SPDX-License-Identifier: Apache-2.0
"""Work in shares from bucket to bucket: the bytes of one process, written by workers, and nothing left."""

from __future__ import annotations

import contextlib
import pickle
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

import surgery
from surgery.engine.execute import Run
from surgery.engine.shares.folders import Assignment, assignments, finished_shares, write_share
from surgery.engine.shares.work import Work, WorkRequest
from surgery_formats.errors import ProofError
from surgery_formats.files.output.manifest import MANIFEST
from surgery_formats.files.remote import finished
from surgery_formats.files.remote.bucket import Bucket
from surgery_formats.files.remote.upload import Upload
from tests.algebra.test_lora_form import trained
from tests.support.s3 import Storage

EXAMPLES = Path(__file__).parents[2] / "examples"
SHARD = 900_000
Write = Callable[[str, str, dict[str, object]], None]


@dataclass(frozen=True)
class InTurn:
    """A cluster of this process: workers get what can be sent, one after the other.

    Attributes:
        meanwhile: Called with every share that is finished.
    """

    meanwhile: Callable[[Assignment], None] = lambda assignment: None

    @contextlib.contextmanager
    def shares(self, request: WorkRequest, work: Work, output: Path, run: Run) -> Iterator[Sequence[Path]]:
        for assignment in assignments(request, work, output, 3, verify=run.verify_copies):
            write_share(pickle.loads(pickle.dumps(assignment)), Run(workers=1))
            self.meanwhile(assignment)
        with finished_shares(work, output, 3, verify=run.verify_copies) as folders:
            yield folders


def merge(storage: Storage, output: str, **options: object) -> None:
    surgery.merge(storage.url("base"), storage.url("lora"), output=output, shard_size=SHARD, **options)  # type: ignore[arg-type]


def extract(storage: Storage, output: str, **options: object) -> None:
    surgery.extract_lora(storage.url("base"), storage.url("tuned"), output=output, rank=3, **options)  # type: ignore[arg-type]


def export(storage: Storage, output: str, **options: object) -> None:
    adapters = [storage.url("lora")]
    surgery.export_onnx(storage.url("base"), merge=adapters, weights_type="int4", output=output, **options)  # type: ignore[arg-type]


def verified(storage: Storage, output: str, **options: object) -> None:
    merge(storage, output, dtype="fp16", verify_copies=True, **options)


@pytest.fixture
def models(storage: Storage) -> Storage:
    for name in ("base", "lora", "tuned"):
        storage.upload(EXAMPLES / name, name)
    return storage


@pytest.mark.parametrize("command", [merge, verified, extract, export])
def test_shares_in_a_bucket_are_one_output(models: Storage, command: Callable[..., None], tmp_path: Path) -> None:
    command(models, models.url("here"))
    command(models, models.url("there"), engine=InTurn())
    command(models, str(tmp_path / "disk"))
    here, disk = models.objects("here/"), tmp_path / "disk"
    assert models.objects("there/") == here
    assert here == {path.relative_to(disk).as_posix(): path.read_bytes() for path in disk.rglob("*") if path.is_file()}
    assert models.objects(".") == {}
    assert models.unfinished() == []


def test_svds_of_a_conversion_are_shared_out_in_a_bucket(storage: Storage, tmp_path: Path) -> None:
    _, base, adapter = trained("oft", tmp_path / "oft")
    given = {"base": storage.upload(base, "base"), "as_lora": True, "rank": 3}
    source = storage.upload(adapter, "oft")
    for name, options in (("here", {}), ("there", {"engine": InTurn()})):
        surgery.convert(source, "peft", output=storage.url(name), **given, **options)
    surgery.convert(source, "peft", output=tmp_path / "disk", **given)
    assert storage.objects("there/") == storage.objects("here/")
    assert storage.objects("here/") == {path.name: path.read_bytes() for path in (tmp_path / "disk").iterdir()}
    assert storage.objects(".") == {}


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """Keys that were uploaded to in parts, and that were copied."""
    seen: dict[str, list[str]] = {"sent": [], "copied": []}
    begin, copy = Upload.__init__, Bucket.copy

    def sending(self: Upload, bucket: Bucket, key: str, *rest: object) -> None:
        seen["sent"].append(key)
        begin(self, bucket, key, *rest)  # type: ignore[arg-type]

    def copying(self: Bucket, key: str, to: str) -> None:
        seen["copied"].append(to)
        copy(self, key, to)

    monkeypatch.setattr(Upload, "__init__", sending)
    monkeypatch.setattr(Bucket, "copy", copying)
    return seen


def test_workers_write_the_files_and_the_driver_none(models: Storage, requests: dict[str, list[str]]) -> None:
    merge(models, models.url("out"), engine=InTurn())
    weights = [f"out/{name}" for name in models.objects("out/") if name.endswith(".safetensors")]
    assert len(weights) > 3
    assert sorted(requests["copied"]) == weights
    assert all(".share-" in key for key in requests["sent"])
    assert len(requests["sent"]) == len(weights)


def test_files_that_a_store_does_not_copy_pass_through_the_driver(
    models: Storage, requests: dict[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    merge(models, models.url("here"))
    monkeypatch.setattr(finished, "MOST_COPIED", 1000)
    merge(models, models.url("there"), engine=InTurn())
    assert models.objects("here/") == models.objects("there/")
    assert requests["copied"] == []
    assert models.objects(".") == {}


def _change(storage: Storage, data: Callable[[bytes], bytes]) -> Callable[[Assignment], None]:
    def change(assignment: Assignment) -> None:
        prefix = assignment.folder.key + "/"  # type: ignore[attr-defined]
        name, old = next((name, old) for name, old in storage.objects(prefix).items() if name != MANIFEST)
        storage.put(prefix + name, data(old))

    return change


def test_a_file_of_a_share_that_was_written_again_counts_if_it_has_the_hash(models: Storage) -> None:
    merge(models, models.url("here"))
    merge(models, models.url("there"), engine=InTurn(_change(models, lambda data: data)))
    assert models.objects("here/") == models.objects("there/")


@pytest.mark.parametrize("data", [lambda data: bytes([data[0] ^ 1]) + data[1:], lambda data: data[1:]])
def test_a_file_of_a_share_that_is_another_one_is_noticed(models: Storage, data: Callable[[bytes], bytes]) -> None:
    with pytest.raises(ProofError, match=r"is not what the worker wrote|is not the file of"):
        merge(models, models.url("out"), engine=InTurn(_change(models, data)))
    assert models.objects("out/") == {}
    assert models.unfinished() == []


def test_a_share_that_was_killed_is_done_again(models: Storage) -> None:
    """Nobody can have put anything into a share's prefix but a worker that was lost."""
    from surgery.engine.merge.merge_request import MergeRequest

    request = MergeRequest(models.url("base"), models.url("lora"), shard_size=SHARD).portable()
    assignment = assignments(request, request.work(), models.url("out"), 3)[0]
    write_share(assignment)
    prefix = assignment.folder.key + "/"  # type: ignore[attr-defined]
    whole = models.objects(prefix)
    models.client.delete_object(Bucket=models.name, Key=prefix + MANIFEST)
    models.put(prefix + "model-00000-of-00000.safetensors", b"half")
    write_share(assignment)
    again = models.objects(prefix)
    assert again.keys() == whole.keys()
    assert {name: again[name] for name in whole if name != MANIFEST} == {
        name: data for name, data in whole.items() if name != MANIFEST
    }
