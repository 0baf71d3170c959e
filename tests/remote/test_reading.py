# SPDX-License-Identifier: Apache-2.0
"""Inputs in a bucket: they are read where they lie, and are what they are on a disk."""

from __future__ import annotations

import gc
import json
import pickle
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import surgery
from surgery_formats.errors import (
    FitError,
    InputError,
    MalformedError,
    MissingPackageError,
    NotFoundError,
    ProofError,
    SurgeryError,
)
from surgery_formats.files.output.manifest import MANIFEST
from surgery_formats.files.raw import open_file
from surgery_formats.files.remote import bucket, ranges
from surgery_formats.files.remote.path import RemotePath, to_path
from tests.support.s3 import Storage, refusing

EXAMPLES = Path(__file__).parents[2] / "examples"


def _files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != MANIFEST}


def test_a_path_of_a_bucket_keeps_its_slashes_and_is_known_by_them(tmp_path: Path) -> None:
    path = to_path("s3://bucket/models/base")
    assert isinstance(path, RemotePath)
    assert str(path / "config.json") == "s3://bucket/models/base/config.json"
    assert (path.parent.key, path.name) == ("models", "base")
    assert [type(one) for one in (path / "x", path.parent, path.with_name("y"))] == [RemotePath] * 3
    assert pickle.loads(pickle.dumps(path)) == path
    assert path in (path / "a/b").parents
    assert path.is_plain
    assert not (path / "../other").is_plain
    assert not (path / "/etc/passwd").is_plain
    assert to_path(Path("s3://bucket/x")) == to_path("s3://bucket/x")
    assert not isinstance(to_path(tmp_path), RemotePath)


def test_merging_from_a_bucket_writes_what_merging_from_a_disk_writes(storage: Storage, tmp_path: Path) -> None:
    base, lora = storage.upload(EXAMPLES / "base", "m/base"), storage.upload(EXAMPLES / "lora", "m/lora")
    surgery.merge(base, lora, output=tmp_path / "there")
    surgery.merge(EXAMPLES / "base", EXAMPLES / "lora", output=tmp_path / "here")
    assert _files(tmp_path / "there") == _files(tmp_path / "here")
    told, here = (json.loads((tmp_path / name / MANIFEST).read_bytes()) for name in ("there", "here"))
    seen = {entry["name"]: entry["etag"] for entry in told.pop("objects")}
    assert (
        seen["model.safetensors"]
        == storage.client.head_object(Bucket=storage.name, Key="m/base/model.safetensors")["ETag"]
    )
    assert told == here


def test_models_in_a_bucket_are_inspected_and_compared(storage: Storage) -> None:
    base = storage.upload(EXAMPLES / "base", "base")
    here, there = surgery.inspect(EXAMPLES / "base"), surgery.inspect(base)
    assert (there.parameters, there.nbytes) == (here.parameters, here.nbytes)
    assert surgery.diff(base, EXAMPLES / "base").equal


def test_adapters_are_converted_and_extracted_from_a_bucket(storage: Storage, tmp_path: Path) -> None:
    base, tuned, lora = (storage.upload(EXAMPLES / name, name) for name in ("base", "tuned", "lora"))
    for name, adapter, models in (
        ("there", lora, (base, tuned)),
        ("here", EXAMPLES / "lora", (EXAMPLES / "base", EXAMPLES / "tuned")),
    ):
        surgery.convert(adapter, "mlx", output=tmp_path / f"{name}-mlx", base=models[0])
        surgery.extract_lora(*models, output=tmp_path / name, rank=4)
    assert _files(tmp_path / "there-mlx") == _files(tmp_path / "here-mlx")
    assert _files(tmp_path / "there") == _files(tmp_path / "here")


def test_positions_are_read_from_blocks_that_overlap_them(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranges, "HEAD", 100)
    monkeypatch.setattr(ranges, "BLOCK", 1000)
    monkeypatch.setattr(ranges, "_RUN", 300)
    data = np.random.default_rng(0).bytes(12_345)
    storage.put("data", data)
    file = open_file(storage.url("data"))
    for offset, nbytes in [(0, 50), (50, 400), (450, 3000), (3450, 10), (12_000, 345), (999, 2), (0, 12_345)]:
        assert file.read(offset, nbytes) == data[offset : offset + nbytes]
    assert file.remote is not None
    file.remote.warm([(200, 7), (9000, 3345)])
    assert file.read(200, 7) + file.read(9000, 3345) == data[200:207] + data[9000:]
    with pytest.raises(MalformedError, match="ends at byte 12345, 5 bytes early"):
        file.read(12_300, 50)
    assert open_file(storage.url("data")).identity == file.identity


def test_an_object_that_is_written_to_meanwhile_is_never_read_on(storage: Storage) -> None:
    storage.put("data", b"a" * 400_000)
    file = open_file(storage.url("data"))
    storage.put("data", b"b" * 400_000)
    with pytest.raises(ProofError, match="changed while it was read"):
        file.read(300_000, 10)
    with pytest.raises(ProofError, match="changed while it was read"):
        file.check_unchanged()
    storage.client.delete_object(Bucket=storage.name, Key="data")
    with pytest.raises(ProofError, match="disappeared while it was read"):
        file.check_unchanged()


@pytest.mark.parametrize(
    "name", ["../other/model.safetensors", "/other/model.safetensors", "s3://other/model.safetensors"]
)
def test_an_index_names_nothing_outside_of_its_prefix(storage: Storage, name: str) -> None:
    storage.upload(EXAMPLES / "base", "other")
    storage.put("base/model.safetensors.index.json", b'{"weight_map": {"a": "%s"}}' % name.encode())
    with pytest.raises(MalformedError, match="the shard"):
        surgery.inspect(storage.url("base"))


def test_what_is_not_there_is_said_to_be_so(storage: Storage) -> None:
    for reference in (storage.url("nothing"), storage.url("nothing/model.safetensors")):
        with pytest.raises(NotFoundError, match="no such file or folder"):
            surgery.inspect(reference)
    with pytest.raises(NotFoundError, match="no such bucket"):
        surgery.inspect("s3://bucket-of-nobody/base")
    with pytest.raises(InputError, match="not the name of an object"):
        surgery.inspect("s3://")


def test_a_dropped_connection_is_an_error_of_one_line(monkeypatch: pytest.MonkeyPatch, storage: Storage) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    bucket.connect.cache_clear()
    with pytest.raises(InputError, match="the connection failed, and 2 repetitions did not help") as caught:
        surgery.inspect(storage.url("base"))
    assert caught.value.exit_code == 3
    assert "\n" not in str(caught.value)


def test_without_its_library_the_command_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    bucket.connect.cache_clear()
    monkeypatch.setitem(sys.modules, "obstore", None)
    with pytest.raises(MissingPackageError, match="object storage need the package obstore") as caught:
        surgery.inspect("s3://bucket/base")
    assert caught.value.hint == "pip install 'model-surgery[cloud]'"


def test_copies_of_a_folder_are_one_input(storage: Storage, tmp_path: Path) -> None:
    """The name of the folder counts for nothing, here or there."""
    shutil.copytree(EXAMPLES / "lora", tmp_path / "copy")
    from surgery.engine.recorded import input_digest

    assert input_digest(to_path(storage.upload(EXAMPLES / "lora", "lora"))) == input_digest(tmp_path / "copy")


def test_a_version_is_recorded_where_the_bucket_keeps_them(storage: Storage, tmp_path: Path) -> None:
    storage.client.put_bucket_versioning(Bucket=storage.name, VersioningConfiguration={"Status": "Enabled"})
    base, lora = storage.upload(EXAMPLES / "base", "base"), storage.upload(EXAMPLES / "lora", "lora")
    surgery.merge(base, lora, output=tmp_path / "merged")
    objects = json.loads((tmp_path / "merged" / MANIFEST).read_bytes())["objects"]
    versions = storage.client.list_object_versions(Bucket=storage.name)["Versions"]
    assert {entry["version"] for entry in objects} <= {version["VersionId"] for version in versions}
    assert all(entry["etag"] for entry in objects)


REFUSALS = [
    (403, b"<Error><Code>AccessDenied</Code></Error>", "access is denied"),
    (401, b"", "the credentials are not accepted"),
    (301, b"<Error><Code>PermanentRedirect</Code></Error>", "the bucket is in another region"),
    (400, b"<Error><Code>AuthorizationHeaderMalformed</Code></Error>", "the bucket is in another region"),
    (500, b"", "the store answers 500 Internal Server Error"),
]


@pytest.mark.parametrize(("status", "body", "what"), REFUSALS, ids=[str(status) for status, _, _ in REFUSALS])
def test_a_store_that_refuses_is_an_error_of_one_line(
    storage: Storage, monkeypatch: pytest.MonkeyPatch, status: int, body: bytes, what: str
) -> None:
    with refusing(status, body) as url:
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        bucket.connect.cache_clear()
        for verb in (
            lambda: surgery.inspect(storage.url("base")),
            lambda: surgery.merge(EXAMPLES / "base", EXAMPLES / "lora", output=storage.url("out")),
        ):
            with pytest.raises(SurgeryError, match=what) as caught:
                verb()
            assert caught.value.exit_code in (3, 7)
            assert caught.value.hint
            assert "\n" not in str(caught.value)


def test_other_stores_say_what_they_lack(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("AZURE_STORAGE_ACCOUNT_NAME", "GOOGLE_APPLICATION_CREDENTIALS"):
        monkeypatch.delenv(variable, raising=False)
    with pytest.raises(InputError, match="Account must be specified") as caught:
        surgery.inspect("az://container/base")
    assert "AZURE_STORAGE_ACCOUNT_NAME" in (caught.value.hint or "")


@pytest.mark.parametrize(
    "verb",
    [lambda url: surgery.bench(url), lambda url: surgery.verify(url)],
)
def test_what_needs_a_disk_says_so(storage: Storage, verb: Callable[[str], object]) -> None:
    surgery.export_onnx(EXAMPLES / "base", output=storage.url("model"))
    with pytest.raises(FitError, match="which a bucket does not have"):
        verb(storage.url("model"))


def test_an_object_is_closed_without_a_lock(storage: Storage) -> None:
    """The collector may close it while its thread holds the lock of the blocks, or one that another waits for there."""
    storage.put("data", bytes(1000))
    blocks = ranges._BLOCKS
    with blocks._lock:
        file = open_file(storage.url("data"))
        del file
        gc.collect()
    assert blocks._closed


def test_who_may_list_a_prefix_alone_reads_what_is_below(
    storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, lora = storage.upload(EXAMPLES / "base", "mine/base"), storage.upload(EXAMPLES / "lora", "mine/lora")
    listing = bucket.Bucket.listing

    def restricted(self: bucket.Bucket, prefix: str) -> bucket.Listing:
        if not prefix.startswith("mine/"):
            raise InputError("access is denied", file=self.url(prefix))
        return listing(self, prefix)

    monkeypatch.setattr(bucket.Bucket, "listing", restricted)
    surgery.merge(base, lora, output=storage.url("mine/out"))
    assert surgery.inspect(storage.url("mine/out")).parameters
    assert surgery.inspect(storage.url("mine/out/model.safetensors")).parameters


def test_listings_that_are_too_old_are_forgotten(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    storage.put("a/x", b"1")
    store = to_path(storage.url("a")).bucket  # type: ignore[attr-defined]
    monkeypatch.setattr(bucket, "_REMEMBERED", 0.0)
    for number in range(5):
        store.listing(f"a{number}")
    assert len(store._seen) == 1


@pytest.mark.parametrize(
    ("reference", "variables"),
    [
        (
            "az://models/x",
            {
                "AZURE_STORAGE_ENDPOINT": "http://127.0.0.1:9/a",
                "AZURE_STORAGE_ACCOUNT_NAME": "a",
                "AZURE_STORAGE_ACCOUNT_KEY": "aaaa",
            },
        ),
        ("gs://models/x", {"GOOGLE_BASE_URL": "http://127.0.0.1:9", "GOOGLE_SKIP_SIGNATURE": "true"}),
    ],
)
def test_a_plain_endpoint_that_is_named_is_used(
    reference: str, variables: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(bucket, "RETRIES", 0)
    bucket.connect.cache_clear()
    with pytest.raises(InputError, match="the connection failed"):
        surgery.inspect(reference)
    bucket.connect.cache_clear()


@pytest.mark.parametrize("then", [b"cde", bytes(100), b""])
def test_a_tiny_object_that_was_replaced_since_it_was_listed_is_the_new_one(storage: Storage, then: bytes) -> None:
    storage.put("models/a", b"ab")
    path = RemotePath(storage.url("models/a"))
    assert path.is_file()  # its size is remembered for some seconds
    storage.put("models/a", then)
    file = open_file(path)
    file.check_unchanged()
    assert file.read(0, file.size) == then
