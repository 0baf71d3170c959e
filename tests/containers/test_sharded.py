# SPDX-License-Identifier: Apache-2.0
"""Folders of weights: which file is chosen, and that index and shards agree in full."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from surgery_formats.containers.sharded import open_folder_tensors, open_shards
from surgery_formats.errors import MalformedError, NotFoundError

ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"


def put(path: Path, *names: str, value: float = 1.0) -> None:
    tensors = {name: torch.full((2,), value) for name in names}
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        path.write_bytes(safetensors.torch.save(tensors, {"format": "pt"}))
    else:
        torch.save(tensors, path)


def index(path: Path, weight_map: Any, **more: Any) -> None:
    path.write_text(json.dumps({**more, "weight_map": weight_map}))


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    put(tmp_path / ONE, "b", "a")
    put(tmp_path / TWO, "c")
    index(tmp_path / INDEX, {"c": TWO, "a": ONE, "b": ONE}, metadata={"total_size": 1})
    return tmp_path


# ------------------------------------------------------------------------------------------------- choosing


def test_shards_are_opened_through_their_index(sharded: Path) -> None:
    found = open_folder_tensors(sharded)
    assert [shard.path.name for shard in found.shards] == [ONE, TWO]
    assert list(found.tensors) == ["a", "b", "c"]
    assert found.index_path == sharded / INDEX
    assert found.index == json.loads((sharded / INDEX).read_text())
    assert [shard.container for shard in found.shards] == ["safetensors"] * 2
    assert found.shards[0].metadata == {"format": "pt"}
    assert found.tensors["c"].read().tolist() == [1, 1]


def test_an_index_without_metadata_is_read(sharded: Path) -> None:
    index(sharded / INDEX, {"c": TWO, "a": ONE, "b": ONE})
    assert len(open_folder_tensors(sharded).tensors) == 3


CHOICES: dict[str, tuple[list[str], str]] = {
    "single": (["model.safetensors"], "model.safetensors"),
    "safetensors before bin": (["pytorch_model.bin", "model.safetensors"], "model.safetensors"),
    "bin": (["pytorch_model.bin"], "pytorch_model.bin"),
    "bin beside arguments": (["pytorch_model.bin", "training_args.bin", "optimizer.pt"], "pytorch_model.bin"),
    "lone torch file beside arguments": (
        ["mine.pth", "training_args.bin", "rng_state_0.pth", "scheduler.pt"],
        "mine.pth",
    ),
    "diffusers": (["diffusion_pytorch_model.safetensors"], "diffusion_pytorch_model.safetensors"),
    "diffusers and a variant": (
        ["diffusion_pytorch_model.fp16.safetensors", "diffusion_pytorch_model.safetensors"],
        "diffusion_pytorch_model.safetensors",
    ),
    "only a variant": (
        ["diffusion_pytorch_model.fp16.safetensors"],
        "diffusion_pytorch_model.fp16.safetensors",
    ),
    "adapter": (["adapter_model.safetensors"], "adapter_model.safetensors"),
    "adapter bin": (["adapter_model.bin"], "adapter_model.bin"),
    "lone file": (["anything at all.safetensors"], "anything at all.safetensors"),
    "model before another": (["consolidated.safetensors", "model.safetensors"], "model.safetensors"),
    "hidden copies": (["._x.safetensors", "x.safetensors"], "x.safetensors"),
}


@pytest.mark.parametrize("case", CHOICES)
def test_the_right_file_of_a_folder_is_chosen(case: str, tmp_path: Path) -> None:
    names, chosen = CHOICES[case]
    for name in names:
        put(tmp_path / name, name)
    found = open_folder_tensors(tmp_path)
    assert [shard.path.name for shard in found.shards] == [chosen]
    assert list(found.tensors) == [chosen]
    assert found.index is None


def test_stems_choose_the_adapter(tmp_path: Path) -> None:
    put(tmp_path / "model.safetensors", "m")
    put(tmp_path / "adapter_model.safetensors", "a")
    assert list(open_folder_tensors(tmp_path, ["adapter_model"]).tensors) == ["a"]
    assert list(open_folder_tensors(tmp_path).tensors) == ["m"]


def test_pickles_are_opened_through_their_index(tmp_path: Path) -> None:
    put(tmp_path / "pytorch_model-00001-of-00002.bin", "a")
    torch.save({"b": torch.ones(1).t(), "step": 3}, tmp_path / "pytorch_model-00002-of-00002.bin")
    names = {"a": "pytorch_model-00001-of-00002.bin", "b": "pytorch_model-00002-of-00002.bin"}
    index(tmp_path / "pytorch_model.bin.index.json", names)
    found = open_folder_tensors(tmp_path)
    assert [(shard.container, shard.metadata) for shard in found.shards] == [("torch", {})] * 2
    assert list(found.tensors) == ["a", "b"]


@pytest.mark.parametrize("name", ["unet.safetensors.index.json", "model.safetensors.index.fp16.json"])
def test_an_index_under_another_name_is_used(name: str, sharded: Path) -> None:
    (sharded / INDEX).rename(sharded / name)
    found = open_folder_tensors(sharded)
    assert (len(found.tensors), found.index_path) == (3, sharded / name)


def test_open_shards_takes_files_too(sharded: Path) -> None:
    assert list(open_shards(sharded / TWO).tensors) == ["c"]
    assert len(open_shards(sharded / INDEX).tensors) == 3
    assert len(open_shards(sharded).tensors) == 3
    (sharded / "notes.txt").write_text("x")
    with pytest.raises(MalformedError, match="by its name"):
        open_shards(sharded / "notes.txt")


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    (tmp_path / "training_args.bin").write_bytes(b"x")
    (tmp_path / "folder.safetensors").mkdir()
    with pytest.raises(NotFoundError, match="no weights"):
        open_folder_tensors(tmp_path)
    with pytest.raises(NotFoundError):
        open_folder_tensors(tmp_path / "nowhere")


def test_several_files_without_an_index_are_refused(sharded: Path) -> None:
    (sharded / INDEX).unlink()
    with pytest.raises(MalformedError, match=r"2 files of weights.*name one"):
        open_folder_tensors(sharded)


# -------------------------------------------------------------------------------------------- disagreement


def assert_refused(folder: Path, what: str, tensor: str | None = None) -> None:
    with pytest.raises(MalformedError, match=what) as caught:
        open_folder_tensors(folder)
    if tensor is not None:
        assert caught.value.tensor == tensor
    assert "\x1b" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_tensor_in_no_shard_is_refused(sharded: Path) -> None:
    index(sharded / INDEX, {"c": TWO, "a": ONE, "b": ONE, "d": TWO})
    assert_refused(sharded, "1 of its 4 tensors", "d")


def test_a_tensor_missing_from_the_index_is_refused(sharded: Path) -> None:
    index(sharded / INDEX, {"c": TWO, "a": ONE})
    assert_refused(sharded, "not in the index", "b")


def test_a_tensor_in_another_shard_than_the_index_names_is_refused(sharded: Path) -> None:
    index(sharded / INDEX, {"c": TWO, "a": ONE, "b": TWO})
    assert_refused(sharded, "but the index says", "b")


def test_a_tensor_in_two_shards_is_refused(sharded: Path) -> None:
    put(sharded / TWO, "c", "a", value=2.0)
    assert_refused(sharded, "is in .* and in", "a")


def test_a_stale_index_beside_a_single_file_is_refused(sharded: Path) -> None:
    put(sharded / "model.safetensors", "a")
    (sharded / TWO).unlink()
    assert_refused(sharded, "is missing.*left over")


def test_two_models_in_a_folder_are_refused(sharded: Path) -> None:
    put(sharded / "model.safetensors", "a")
    assert_refused(sharded, "two models")


def test_an_index_of_a_single_file_is_read(tmp_path: Path) -> None:
    put(tmp_path / "model.safetensors", "a")
    index(tmp_path / INDEX, {"a": "model.safetensors"})
    found = open_folder_tensors(tmp_path)
    assert (list(found.tensors), found.index_path) == (["a"], tmp_path / INDEX)


def test_a_damaged_shard_is_named(sharded: Path) -> None:
    (sharded / TWO).write_bytes((sharded / TWO).read_bytes()[:-1])
    with pytest.raises(MalformedError, match="1 bytes early") as caught:
        open_folder_tensors(sharded)
    assert caught.value.file == str(sharded / TWO)


def test_a_pickle_without_tensors_is_named(tmp_path: Path) -> None:
    torch.save([1], tmp_path / "pytorch_model.bin")
    with pytest.raises(MalformedError, match="a list where a dict") as caught:
        open_folder_tensors(tmp_path)
    assert caught.value.file == str(tmp_path / "pytorch_model.bin")


# ------------------------------------------------------------------------------------------------- hostile

NAMES = {
    "parent": "../x.safetensors",
    "hidden parent": "a/../../x.safetensors",
    "absolute": "/etc/x.safetensors",
    "sub-folder": "sub/x.safetensors",
    "dot": ".",
    "two dots": "..",
    "empty": "",
    "backslash": "..\\x.safetensors",
    "drive": "C:x.safetensors",
    "stream": "x.safetensors:y.safetensors",
    "wildcard": "*.safetensors",
    "NUL": "x\0.safetensors",
    "line break": "x\n.safetensors",
    "escape": "\x1b[2Jx.safetensors",
    "right to left": "x\u202e.safetensors",
    "surrogate": "\ud800.safetensors",
    "space at the end": "x.safetensors ",
    "device": "NUL.safetensors",
    "long": "x" * 300 + ".safetensors",
    "pickle": "x.bin",
    "no suffix": "x",
    "number": 3,
    "list": ["x.safetensors"],
    "null": None,
}


@pytest.mark.parametrize("case", NAMES)
def test_unsafe_names_in_an_index_are_refused(case: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    put(tmp_path / "x.safetensors", "a")
    put(folder / "sub" / "x.safetensors", "a")
    put(folder / "x.bin", "a")
    index(folder / INDEX, {"a": NAMES[case]})
    assert_refused(folder, "file name|does not end in|is not a string")


def test_names_that_differ_only_in_case_are_refused(tmp_path: Path) -> None:
    put(tmp_path / "A.safetensors", "a")
    put(tmp_path / "a.safetensors", "b")
    index(tmp_path / INDEX, {"a": "A.safetensors", "b": "a.safetensors"})
    assert_refused(tmp_path, "one file on some systems")


@pytest.mark.parametrize("weight_map", [None, [], {}, "x"])
def test_an_index_without_a_weight_map_is_refused(weight_map: Any, tmp_path: Path) -> None:
    index(tmp_path / INDEX, weight_map)
    assert_refused(tmp_path, "no weight_map")


@pytest.mark.parametrize("raw", [b"", b"[]", b"{", b'{"weight_map":{"a":"x","a":"y"}}', b'{"weight_map":NaN}', b"\xff"])
def test_an_index_that_is_not_json_is_refused(raw: bytes, tmp_path: Path) -> None:
    (tmp_path / INDEX).write_bytes(raw)
    assert_refused(tmp_path, "JSON|twice")


def test_a_giant_index_is_refused(tmp_path: Path) -> None:
    with open(tmp_path / INDEX, "wb") as file:
        file.truncate((64 << 20) + 1)
    assert_refused(tmp_path, "bytes of JSON")


def test_a_missing_shard_is_named(sharded: Path) -> None:
    (sharded / TWO).unlink()
    assert_refused(sharded, f"'{TWO}' is missing")


def link(sharded: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    (sharded / TWO).rename(target)
    (sharded / TWO).symlink_to(os.path.relpath(target, sharded))


def test_a_link_out_of_the_folder_is_refused(sharded: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    link(sharded, tmp_path_factory.mktemp("else") / "secret.safetensors")
    assert_refused(sharded, "leads out of the folder")


def test_a_link_inside_the_folder_is_followed(sharded: Path) -> None:
    link(sharded, sharded / "real.safetensors")
    assert len(open_folder_tensors(sharded).tensors) == 3


def test_a_cycle_of_links_is_refused(sharded: Path) -> None:
    (sharded / TWO).unlink()
    (sharded / TWO).symlink_to(TWO)
    assert_refused(sharded, "leads out of the folder")


def test_a_broken_link_is_not_found(sharded: Path) -> None:
    (sharded / TWO).unlink()
    (sharded / TWO).symlink_to("nothing.safetensors")
    with pytest.raises(NotFoundError):
        open_folder_tensors(sharded)


def test_a_pipe_as_shard_does_not_hang(sharded: Path) -> None:
    (sharded / TWO).unlink()
    os.mkfifo(sharded / TWO)
    assert_refused(sharded, "regular file")


def hub_cache(root: Path, inner: str, outside: Mapping[str, str] = {}) -> Path:
    """``models--o--n/snapshots/<commit>/<inner>`` whose files are links into ``models--o--n/blobs``."""
    repo = root / "models--o--n"
    folder = repo / "snapshots" / "0123abcd" / inner
    folder.mkdir(parents=True)
    (repo / "blobs").mkdir()
    for blob, (name, tensor) in {"e1": (ONE, "a"), "e2": (TWO, "b")}.items():
        put(root / "made.safetensors", tensor)
        real = root / outside[name] if name in outside else repo / "blobs" / blob
        (root / "made.safetensors").rename(real)
        (folder / name).symlink_to(os.path.relpath(real, folder))
    (repo / "blobs" / "e3").write_text(json.dumps({"weight_map": {"a": ONE, "b": TWO}}))
    (folder / INDEX).symlink_to(os.path.relpath(repo / "blobs" / "e3", folder))
    return folder


@pytest.mark.parametrize("inner", ["", "unet"])
def test_links_within_a_hub_cache_are_followed(inner: str, tmp_path: Path) -> None:
    assert list(open_folder_tensors(hub_cache(tmp_path, inner)).tensors) == ["a", "b"]


def test_links_out_of_a_hub_cache_are_refused(tmp_path: Path) -> None:
    assert_refused(hub_cache(tmp_path, "", {TWO: "secret.safetensors"}), "leads out of the folder")
