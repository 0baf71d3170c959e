# SPDX-License-Identifier: Apache-2.0
"""Outputs in a bucket: complete when their manifest is there, equal to those on a disk, and nothing otherwise."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import surgery
from surgery.engine import streaming
from surgery_formats.errors import FitError, OutputExistsError, ProofError, ResourceError
from surgery_formats.files.output.folder import output_folder
from surgery_formats.files.output.manifest import MANIFEST, UNFINISHED, verify_folder
from surgery_formats.files.remote import stage, upload
from surgery_formats.files.remote.bucket import Bucket
from tests.support.folder_jobs import PLAN
from tests.support.quantised_folders import quantise_folder
from tests.support.s3 import Storage

EXAMPLES = Path(__file__).parents[2] / "examples"


def _models(storage: Storage) -> tuple[str, str]:
    return storage.upload(EXAMPLES / "base", "base"), storage.upload(EXAMPLES / "lora", "lora")


def test_a_merge_from_bucket_to_bucket_writes_what_it_writes_on_a_disk(storage: Storage, tmp_path: Path) -> None:
    base, lora = _models(storage)
    surgery.merge(base, lora, output=storage.url("out/merged"))
    surgery.merge(base, lora, output=tmp_path / "merged")
    assert storage.objects("out/merged") == {path.name: path.read_bytes() for path in (tmp_path / "merged").iterdir()}
    assert storage.unfinished() == []
    assert storage.waiting("out/merged") == []
    assert surgery.verify(storage.url("out/merged")).checks
    assert surgery.diff(storage.url("out/merged"), tmp_path / "merged").equal


def test_shards_of_a_model_go_through_a_window_smaller_than_a_tensor(
    storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Threads are ahead of the upload by little, whatever the order of copies, weights and files."""
    monkeypatch.setattr(streaming, "_AHEAD", 1000)
    monkeypatch.setattr(streaming, "_FETCHED", 3000)
    base, lora = _models(storage)
    for workers in (1, 3):
        out = storage.url(f"out-{workers}")
        surgery.merge(base, lora, output=out, shard_size=500_000, workers=workers, verify_copies=True)
    surgery.merge(base, lora, output=tmp_path / "merged", shard_size=500_000, verify_copies=True)
    here = {path.name: path.read_bytes() for path in (tmp_path / "merged").iterdir()}
    assert len(here) > 10
    assert storage.objects("out-1/") == storage.objects("out-3/") == here


@pytest.mark.parametrize("codes", ["nf4", "gptq"])
def test_codes_and_scales_of_a_weight_go_to_their_places(storage: Storage, tmp_path: Path, codes: str) -> None:
    """One piece of work makes several tensors, which lie apart in a file, or in two."""
    lora = storage.upload(EXAMPLES / "lora", "lora")
    base = storage.upload(quantise_folder(EXAMPLES / "base", tmp_path / "base", codes), "base")
    surgery.merge(base, lora, output=storage.url("out"), shard_size=200_000)
    surgery.merge(base, lora, output=tmp_path / "out", shard_size=200_000)
    assert storage.objects("out/") == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}


def test_adapters_are_extracted_converted_and_combined_into_a_bucket(storage: Storage, tmp_path: Path) -> None:
    base, lora = _models(storage)
    tuned = storage.upload(EXAMPLES / "tuned", "tuned")
    for out, at in (
        (storage.url("out"), lambda name: storage.url(f"out/{name}")),
        (None, lambda name: tmp_path / name),
    ):
        surgery.extract_lora(base, tuned, output=at("extracted"), rank=4)
        surgery.convert(lora, "mlx", output=at("mlx"), base=base)
        surgery.convert(lora, "gguf", output=at("lora.gguf"), base=base)
        surgery.combine([lora, at("extracted")], output=at("both"))
        assert out is None or [storage.waiting(f"out/{name}") for name in ("extracted", "mlx", "both")] == [[], [], []]
    found = storage.objects("out/")
    here = {path.relative_to(tmp_path).as_posix(): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert {name: found[name] for name in found if not name.endswith(MANIFEST)} == {
        name: here[name] for name in here if not name.endswith(MANIFEST)
    }
    assert found.keys() == here.keys()


def test_an_output_is_replaced_only_when_it_is_asked_for(storage: Storage) -> None:
    base, lora = _models(storage)
    out = storage.url("out")
    surgery.merge(base, lora, output=out, shard_size=500_000)
    before = storage.objects("out")
    with pytest.raises(OutputExistsError, match="already exists"):
        surgery.merge(base, lora, output=out)
    assert storage.objects("out") == before
    surgery.merge(base, lora, output=out, overwrite=True)
    after = storage.objects("out")
    assert "model.safetensors" in after
    assert not any("-of-" in name for name in after)
    verify_folder(out)
    storage.put("foreign/notes.txt", b"mine")
    with pytest.raises(OutputExistsError, match="were not written by surgery"):
        surgery.merge(base, lora, output=storage.url("foreign"), overwrite=True)
    with pytest.raises(OutputExistsError, match="is not a folder"):
        surgery.merge(base, lora, output=storage.url("foreign/notes.txt"), overwrite=True)


@pytest.mark.parametrize(
    ("out", "what"), [("base", "is one of the inputs"), ("base/inner", "lies in the input"), ("", "needs a name")]
)
def test_an_output_never_overlaps_an_input(storage: Storage, out: str, what: str) -> None:
    base, lora = _models(storage)
    with pytest.raises(FitError, match=what):
        surgery.merge(base, lora, output=storage.url(out), overwrite=True)


def test_an_output_that_holds_an_input_is_refused(storage: Storage) -> None:
    base, lora = storage.upload(EXAMPLES / "base", "m/base"), storage.upload(EXAMPLES / "lora", "lora")
    with pytest.raises(FitError, match="holds the input"):
        surgery.merge(base, lora, output=storage.url("m"), overwrite=True)


def test_a_base_that_changes_midway_is_an_error_and_no_output(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, lora = _models(storage)
    compute = streaming.stream_weights

    def meanwhile(*args: object, **kwargs: object) -> object:
        done = compute(*args, **kwargs)  # type: ignore[arg-type]
        storage.put("base/model.safetensors", storage.objects("base")["model.safetensors"] + b" ")
        return done

    monkeypatch.setattr(streaming, "stream_weights", meanwhile)
    with pytest.raises(ProofError, match="the input changed while it was read") as caught:
        surgery.merge(base, lora, output=storage.url("out"))
    assert caught.value.exit_code == 5
    assert storage.objects("out") == {}
    assert storage.unfinished() == []


def test_what_fails_midway_leaves_nothing(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    base, lora = _models(storage)
    put = Bucket.put

    def refuse(bucket: Bucket, key: str, data: bytes, *, new: bool = False) -> object:
        if key.endswith("config.json"):
            raise ResourceError("access is denied", file=bucket.url(key))
        return put(bucket, key, data, new=new)

    monkeypatch.setattr(Bucket, "put", refuse)
    with pytest.raises(ResourceError, match="access is denied"):
        surgery.merge(base, lora, output=storage.url("out"))
    assert storage.objects("out") == {}
    assert storage.unfinished() == []
    assert storage.waiting("out") == []


def test_an_interrupt_right_behind_the_marker_takes_it_back(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    base, lora = _models(storage)
    put = Bucket.put

    def interrupted(bucket: Bucket, key: str, data: bytes, *, new: bool = False) -> None:
        put(bucket, key, data, new=new)
        raise KeyboardInterrupt

    monkeypatch.setattr(Bucket, "put", interrupted)
    with pytest.raises(KeyboardInterrupt):
        surgery.merge(base, lora, output=storage.url("out"))
    assert storage.objects("out") == {}
    assert storage.unfinished() == []


def test_many_cores_share_the_blocks_of_a_weight_and_write_the_same(
    storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, lora = _models(storage)
    surgery.merge(base, lora, output=tmp_path / "out")
    monkeypatch.setattr("surgery.engine.execute.cores", lambda: 8)
    monkeypatch.setattr("surgery.engine.blocks.BLOCK_ELEMENTS", 100)
    surgery.merge(base, lora, output=storage.url("out"))
    there = storage.objects("out")["model.safetensors"]
    assert there == (tmp_path / "out/model.safetensors").read_bytes()


def test_bytes_that_a_store_does_not_give_back_are_no_output(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    base, lora = _models(storage)
    monkeypatch.setattr(upload.Upload, "digests", property(lambda self: {"xxh3": "0" * 32}))
    with pytest.raises(ProofError, match="gives back other bytes"):
        surgery.merge(base, lora, output=storage.url("out"), verify_copies=True)
    assert storage.objects("out") == {}


def test_nobody_sees_an_upload_before_the_commit(storage: Storage) -> None:
    data = bytes(range(256)) * 60_000
    with output_folder(storage.url("out"), PLAN) as folder:
        sent = folder.upload("model.safetensors", len(data))
        sent.write(data[:7_000_000])
        sent.write(data[7_000_000:])
        sent.end()
        folder.noted("model.safetensors", sent, {})
        folder.write_small("config.json", b"{}")
        assert storage.objects("out") == {}
        assert storage.unfinished() == ["out/model.safetensors"]
        folder.commit({})
    found = storage.objects("out")
    assert found["model.safetensors"] == data
    record = json.loads(found[MANIFEST])["files"]["model.safetensors"]
    assert record["size"] == len(data)


def test_a_killed_run_leaves_nothing_that_the_next_does_not_clean(storage: Storage) -> None:
    """Killed while it uploads, it leaves an upload; while objects appear, it leaves these and a list of them."""
    from surgery_formats.files.remote.path import to_path

    bucket = to_path(storage.url("out")).bucket  # type: ignore[attr-defined]
    begun = storage.client.create_multipart_upload(Bucket=storage.name, Key="out/model.safetensors")
    storage.client.create_multipart_upload(Bucket=storage.name, Key="outside/model.safetensors")
    assert begun["UploadId"]
    storage.put(f"out/{UNFINISHED}", json.dumps({"job": "1", "files": ["a.safetensors", "b.safetensors"]}).encode())
    storage.put("out/a.safetensors", b"half")
    with output_folder(storage.url("out"), PLAN) as folder:
        assert storage.unfinished() == ["outside/model.safetensors"]
        folder.write_small("b.safetensors", b"new")
        folder.commit({})
    assert storage.objects("out").keys() == {"b.safetensors", MANIFEST}
    assert bucket.all_below("out").keys() == {"b.safetensors", MANIFEST}
    storage.put(f"foreign/{UNFINISHED}", b"not JSON")
    storage.put("foreign/mine", b"")
    with pytest.raises(OutputExistsError, match="'mine', which no run of surgery has begun"):
        output_folder(storage.url("foreign"), PLAN).__enter__()


def test_what_is_too_large_to_wait_in_memory_is_refused(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "_MOST_WAITING", 1000)
    _, lora = _models(storage)
    with pytest.raises(FitError, match="would have to wait in memory"):
        surgery.convert(lora, "peft", output=storage.url("out"))
    assert storage.objects("out") == {}


def test_what_reads_its_output_back_is_refused_by_name(storage: Storage) -> None:
    base, lora = _models(storage)
    with pytest.raises(FitError, match="reads the output back while it is made"):
        surgery.merge(base, lora, output=storage.url("out"), reversible=True)


@pytest.mark.parametrize("nbytes", [0, 1, 5 << 20, (5 << 20) + 1, 100_000_001, 20_000_000_000, 400_000_000_000])
def test_parts_are_few_large_and_leave_almost_nothing(nbytes: int) -> None:
    part = upload.part_size(nbytes)
    assert part >= upload.SMALL
    assert nbytes // part <= 10_000
    assert nbytes < 16 << 20 or nbytes % part <= nbytes // part
